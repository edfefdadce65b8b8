"""Merging splits on a Hopper GPU against NumPy: any number of them, what was never written, repeats."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.implementations import MOSAIC
from pallas_kernels.mla_decode_combine_mosaic_gpu import combine_splits_mosaic_gpu

pytestmark = pytest.mark.gpu
ROUNDING = 2.0**-8  # of a result to bfloat16, relative


@functools.partial(jax.jit, static_argnames=("rows", "split_size"))
def merge(parts, written, lse, visible, length, *, rows, split_size):
    # The kernel destroys what it merges: it gets an array of its own, NaN where the attention would not have written.
    parts = jnp.where(written[:, :, None, None], parts, jnp.nan)
    return combine_splits_mosaic_gpu(parts, lse, visible, length, rows=rows, split_size=split_size)


@pytest.mark.parametrize(
    ("splits", "heads", "tokens"),
    [(2, 128, 1), (2, 20, 3), (4, 8, 1), (5, 20, 3), (8, 128, 1), (32, 20, 1), (33, 8, 3), (128, 8, 1)],
)
def test_it_equals_the_oracle(splits, heads, tokens, rng):
    reason = implementations.why_not(MOSAIC)
    if reason is not None:
        pytest.skip(reason)
    size, rows, padded = 128, heads * tokens, 64 * -(-heads * tokens // 64)
    most = np.array([0, 1, size, size + 1, splits * size - 1, splits * size])
    length = np.concatenate([most, [splits * size]]).astype(np.int32)
    visible = np.tile(length[:, None], (1, tokens))
    visible[-1] = 5  # fewer than the sequence holds
    visible[:, 1:] //= 2
    batch, number = len(length), -(-np.minimum(visible.max(axis=1), length) // size)
    written = np.arange(splits)[:, None] < number
    parts = rng.standard_normal((splits, batch, padded, 512)).astype(np.float32)
    lse = np.where(written[:, :, None], rng.uniform(-30, 30, (splits, batch, padded)), np.nan).astype(np.float32)
    lse[:, 4, 1] = -np.inf  # a row that sees nothing of what its sequence holds
    operands = [jnp.asarray(a) for a in (parts, written, lse, visible, length)]
    out, out_lse = (np.asarray(a) for a in merge(*operands, rows=rows, split_size=size))
    wide, weight = parts[:, :, :rows].astype(np.float64), np.exp(lse[:, :, :rows].astype(np.float64))
    weight = np.where(written[:, :, None], weight, 0)
    total = weight.sum(axis=0)
    want = (weight[..., None] * wide).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
    # Weights are good to some 2^-19 (an exponential of 60 in float32), relative; sums cancel less than 2^6 here.
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=ROUNDING, atol=2.0**-13)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(out_lse, np.log(total), rtol=1e-6, atol=2e-5)
    assert (out[total == 0] == 0).all() and (out_lse[total == 0] == -np.inf).all() and (total == 0).any()
    again = merge(*operands, rows=rows, split_size=size)
    assert all(
        (np.asarray(a).view(np.uint8) == b.view(np.uint8)).all() for a, b in zip(again, (out, out_lse), strict=True)
    )
