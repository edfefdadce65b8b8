"""The Hopper kernel that merges splits, compiled for an H100 without one: nothing spills, whatever their number."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
import sm90

from pallas_kernels.mla_decode_combine_mosaic_gpu import combine_splits_mosaic_gpu

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(sm90.why_not() is not None, reason=f"compiles for an H100: {sm90.why_not()}"),
]
shape = jax.ShapeDtypeStruct


@pytest.mark.parametrize(
    ("splits", "rows", "tokens"), [(2, 128, 1), (4, 24, 3), (5, 16, 1), (33, 40, 2), (128, 72, 8)]
)
def test_it_compiles_for_sm_90_without_spills(splits, rows, tokens):
    batch, padded = 3, 64 * -(-rows // 64)
    merge = functools.partial(combine_splits_mosaic_gpu, rows=rows, split_size=128)
    numbers = (shape((batch, tokens), jnp.int32), shape((batch,), jnp.int32))
    parts = (shape((splits, batch, padded, 512), jnp.float32), shape((splits, batch, padded), jnp.float32))
    program = sm90.compile_for_h100(merge, *parts, *numbers)
    (kernel,) = (kernel for kernel in program.kernels if "combine" in kernel.name)
    assert kernel.spill_bytes == 0, kernel
