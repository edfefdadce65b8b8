"""The "mse" scale rule: the least error of the three exponents, by trying all in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checkpoints import DATA

from mla_fp4_jax import quantize_mxfp4

# Relative RMS errors that AutoRound's search of the same three exponents reached (notes on formats, section 4).
AUTO_ROUND = {
    "normal": 0.1111,
    "uniform": 0.0979,
    "student_t2": 0.1373,
    "outlier_channels": 0.1375,
    "kv_b_proj": 0.1450,
}


def least_error(x: np.ndarray) -> np.ndarray:
    """The least sum of squared errors of each group [N, 32] over the three exponents, float64."""
    peak = np.abs(x).max(-1)
    exponent = np.floor(np.log2(np.where(peak == 0, 1, peak))) - 2
    errors = []
    for step in (-1, 0, 1):
        scale = np.exp2(exponent + step)[:, None]
        distance = np.abs(x[..., None] / scale[..., None] - oracle.E2M1)
        errors.append(np.sum((distance.min(-1) * scale) ** 2, -1))
    return np.min(errors, 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [*AUTO_ROUND, "wide_exponent", "elem_ties"])
def test_no_other_exponent_of_the_three_is_better(case, dtype):
    with np.load(DATA / "vectors" / "vectors_in.npz") as arrays:
        x = arrays[f"{case}:{dtype}"]
    x = (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)
    values = np.asarray(
        jax.jit(lambda w: quantize_mxfp4(w, scale_rule="mse").dequantize())(jnp.asarray(x)), np.float64
    )
    groups = x.reshape(-1, 32).astype(np.float64)
    error = np.sum((values.reshape(-1, 32) - groups) ** 2, -1)
    # Squares are summed in float32, 32 of them: two candidates may be told apart no better than that.
    # Below 2^-120 a scale may be out of e8m0's range, and a CPU flushes subnormal weights.
    kept = np.abs(groups).max(-1) >= 2.0**-120
    np.testing.assert_allclose(error[kept], least_error(groups[kept]), rtol=32 * 2.0**-23, atol=1e-300)
    if case in AUTO_ROUND and dtype == "fp32":
        relative = np.sqrt(error.sum() / (groups**2).sum())
        assert relative == pytest.approx(AUTO_ROUND[case], abs=6e-5)


def test_zeros_and_the_ends_of_the_range():
    x = np.zeros((4, 32), np.float32)
    x[1] = 3.0e38  # the next exponent would overflow
    x[2] = 1e-39
    x[3, 5] = 1.0
    w = quantize_mxfp4(jnp.asarray(x), scale_rule="mse")
    values = np.asarray(w.dequantize())
    assert np.isfinite(values).all() and not values[0].any() and values[3].tolist() == x[3].tolist()
    assert np.abs(values[1] / x[1] - 1).max() < 0.2
