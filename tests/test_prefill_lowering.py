"""The prefill kernels lower for every platform, the Mosaic one compiles for sm_90, and a layer keeps no scores."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import pytest
import sm90

from mla_fp4_jax.cache import LatentCache, PagedLatentCache
from mla_fp4_jax.ops import mla_prefill_attention
from pallas_kernels.backend import abstract_gpu

GPUS = {"cuda": "NVIDIA H100 80GB HBM3", "rocm": "gfx942"}
L = 512
needs_mosaic = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU needs jax 0.11")


def operands(batch, tokens, heads, capacity, page=0, sizes=(128, 64, 128), dtype=jnp.bfloat16):
    nope, rope, width = sizes
    shape = jax.ShapeDtypeStruct
    q, visible = shape((batch, tokens, heads, nope + rope), dtype), shape((batch, tokens), jnp.int32)
    length, kv_b = shape((batch,), jnp.int32), shape((heads * (nope + width), L), dtype)
    if page:
        table = shape((batch, capacity // page), jnp.int32)
        cache = PagedLatentCache(shape((batch * capacity // page, page, L + rope), dtype), table, length, L)
    else:
        cache = LatentCache(shape((batch, capacity, L + rope), dtype), length, L)
    return q, cache, visible, kv_b


def attention(q, cache, visible, kv_b, *, width=128, implementation=None):
    heads = q.shape[2]

    def expand(latent):
        product = jnp.einsum("bkl,nl->bkn", latent, kv_b, preferred_element_type=jnp.float32).astype(q.dtype)
        return product.reshape(*latent.shape[:2], heads, -1)

    return mla_prefill_attention(
        q, cache, visible, expand, scale=0.07, v_head_dim=width, implementation=implementation
    )


def lowered(platform, args, **options) -> str:
    with abstract_gpu(GPUS[platform], platform):
        traced = jax.jit(functools.partial(attention, **options)).trace(*args)
        return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", GPUS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sizes", [(128, 64, 128), (192, 64, 256), (64, 0, 64), (48, 32, 16)], ids=str)
def test_the_triton_kernel_lowers(platform, dtype, sizes):
    args = operands(2, 300, 4, 4096, sizes=sizes, dtype=jnp.dtype(dtype))
    text = lowered(platform, args, width=sizes[2], implementation="triton")
    assert text.count("custom_call @__gpu$xla.gpu.triton") >= 2  # at once, and in parts


@needs_mosaic
@pytest.mark.parametrize(
    ("tokens", "capacity", "page", "kinds"),
    [
        (300, 512, 0, 1),
        (300, 4096, 0, 2),
        (300, 4096, 64, 2),
        (1, 1, 0, 1),
        (5, 3, 0, 1),
        (128, 128, 0, 1),
        (2, 64, 64, 1),
    ],
)
def test_the_mosaic_kernel_lowers(tokens, capacity, page, kinds):
    text = lowered("cuda", operands(2, tokens, 4, capacity, page), implementation="mosaic_gpu")
    assert text.count("custom_call @mosaic_gpu") >= kinds


@needs_mosaic
@pytest.mark.parametrize(
    ("changes", "text"),
    [({"sizes": (128, 64, 64)}, "P, R, V"), ({"dtype": jnp.float16}, "bfloat16"), ({"tokens": 0}, "empty")],
)
def test_the_mosaic_kernel_says_what_it_lacks(changes, text):
    args = operands(**({"batch": 2, "tokens": 64, "heads": 4, "capacity": 512} | changes))
    width = args[3].shape[0] // 4 - (args[0].shape[3] - 64)
    with pytest.raises(NotImplementedError, match=text):
        lowered("cuda", args, width=width, implementation="mosaic_gpu")


def test_what_is_chosen_follows_confirmation_and_device(monkeypatch):
    module = sys.modules["mla_fp4_jax.ops.mla_prefill"]
    kernels = {"mosaic_gpu": "@mosaic_gpu", "triton": "__gpu$xla.gpu.triton"}
    v3, other = operands(1, 64, 4, 512), operands(1, 64, 4, 512, sizes=(64, 64, 128))
    names = [name for name in kernels if name == "triton" or jax.__version_info__ >= (0, 11)]
    for confirmed in ((), ("triton",), ("mosaic_gpu",), ("mosaic_gpu", "triton")):
        monkeypatch.setattr(module, "_CONFIRMED", dict.fromkeys(confirmed, {("bfloat16", 128, 64, 128)}))
        expected = [name for name in names if name in confirmed][:1]
        for platform, args, chosen in (("cuda", v3, expected), ("cuda", other, []), ("rocm", v3, [])):
            text = lowered(platform, args)
            assert [name for name, call in kernels.items() if call in text] == chosen


@pytest.mark.aot
@needs_mosaic
@pytest.mark.skipif(sm90.why_not() is not None, reason=str(sm90.why_not()))
@pytest.mark.parametrize("capacity", [4096, 16_384])
def test_the_mosaic_route_compiles_for_sm_90_and_keeps_no_scores(capacity):
    args = operands(1, 4096, 128, capacity)
    program = sm90.compile_for_h100(functools.partial(attention, implementation="mosaic_gpu"), *args)
    assert program.kernels and all(kernel.spill_bytes == 0 for kernel in program.kernels)
    assert program.dynamic_shared_bytes["mosaic"] <= sm90.SHARED_MEMORY_LIMIT
    # Keys and values of 4096 slots, and where parts are merged three float32 results; scores would be 4 GB a part.
    expanded, result = 4096 * 128 * 256 * 2, 4096 * 128 * 129 * 4
    assert program.temp_bytes <= 1.1 * (expanded + (0 if capacity == 4096 else 3 * result)) + (64 << 20)
