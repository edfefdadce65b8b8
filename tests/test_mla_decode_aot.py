"""The Triton decode kernel compiled for an H100 without one: what is spilled, shared memory, no decoded cache."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
import sm90

from mla_fp4_jax.cache import LatentCache, PagedLatentCache
from mla_fp4_jax.ops import mla_decode

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(sm90.why_not() is not None, reason=f"compiles for an H100: {sm90.why_not()}"),
]
# Bytes a thread, stores and loads: outputs of 32 x 512 in four warps, of 64 x 512 in eight, leave few registers.
MOST_SPILLED = 256
shape = jax.ShapeDtypeStruct


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("heads", "tokens", "page"),
    [
        *itertools.product((16, 128), (1,), (0, 16, 64, 128)),
        (8, 1, 64),
        (20, 1, 64),
        (32, 1, 64),
        (64, 1, 64),
        (16, 8, 64),
    ],
)
def test_the_triton_kernel_compiles_for_sm_90(heads, tokens, page, cache_dtype):
    batch, capacity, length = 4, 4096, shape((4,), jnp.int32)
    if page:
        table = shape((batch, capacity // page), jnp.int32)
        pages = shape((batch * capacity // page, page, 576), jnp.dtype(cache_dtype))
        cache = PagedLatentCache(pages, table, length, 512)
    else:
        cache = LatentCache(shape((batch, capacity, 576), jnp.dtype(cache_dtype)), length, 512)
    q = shape((batch, tokens, heads, 576), jnp.bfloat16)
    call = functools.partial(mla_decode, scale=0.07, implementation="triton", split_size=capacity)
    program = sm90.compile_for_h100(call, q, cache, shape((batch, tokens), jnp.int32))
    (kernel,) = program.kernels
    assert kernel.spill_bytes <= MOST_SPILLED, kernel
    for dynamic in program.dynamic_shared_bytes.values():
        assert kernel.static_shared_bytes + dynamic <= sm90.SHARED_MEMORY_LIMIT
    # Nothing but the LSE: the cache is neither copied nor decoded in memory.
    assert program.temp_bytes <= 4 * batch * tokens * heads + 512
