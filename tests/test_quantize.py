"""Quantisers, bit for bit: torchao's recorded results, the rules written out in NumPy, and properties."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_fp4_jax import FP4Array, quantize_mxfp4, quantize_nvfp4

VECTORS = Path(__file__).parent / "data" / "vectors"
INPUTS = np.load(VECTORS / "vectors_in.npz")
TORCHAO_MX = np.load(VECTORS / "torchao_mxfp4.npz")
TORCHAO_NV = np.load(VECTORS / "torchao_nvfp4.npz")
# Compiled, for speed; test_every_magnitude_in_every_dtype_compiled_or_not says that this changes no bit.
MXFP4 = jax.jit(quantize_mxfp4, static_argnames="scale_rule")
NVFP4 = jax.jit(quantize_nvfp4)
RULES = ["floor", "even", "ceil", "rceil"]
# m of a group's largest magnitude m * 2^e, from which the exponent goes up, and whether at m itself already.
STEP_UP = {"floor": (2.0, True), "even": (1.75, True), "ceil": (1.0, False), "rceil": (1.5, False)}
CASES = sorted({name.split(":")[0] for name in INPUTS.files})


def mxfp4_by_rule(x: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scale bytes of float64 groups [N, 32], written from the rules' definitions."""
    half, exponent = np.frexp(np.abs(x).max(-1))
    at, inclusive = STEP_UP[rule]
    up = 2 * half >= at if inclusive else 2 * half > at
    byte = np.clip(exponent - 1 + up - 2 + 127, 0, 254)
    return oracle.encode_e2m1(np.ldexp(x, 127 - byte[:, None])), byte


def nvfp4_by_rule(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes, scale bytes and global scale of float32 [N, 16], as if float32 had exponents without end."""
    unit = 127 - max(int(np.frexp(np.abs(x).max())[1]), -126)  # so that nothing below comes near the ends
    x = np.ldexp(x.astype(np.float64), unit - 127).astype(np.float32)
    peaks = np.abs(x).max(-1)
    glob = max(peaks.max() / np.float32(448 * 6), np.float32(np.ldexp(1.0, -126 + unit - 127)))
    byte = oracle.encode_e4m3(np.maximum(peaks / np.float32(6) / glob, np.float32(2.0**-9)))
    inverse = np.float32(1) / glob / oracle.e4m3(byte).astype(np.float32)
    return oracle.encode_e2m1(x * inverse[:, None]), byte, np.ldexp(glob, 127 - unit)


def no_sign_of_zero(codes: np.ndarray) -> np.ndarray:
    return np.where(codes == 8, 0, codes)


def parts(w: FP4Array, group: int) -> tuple[np.ndarray, ...]:
    """Codes [N, G] by the oracle's nibble order, scale bytes [N], and the global scale."""
    packed, scales, *glob = (np.asarray(part) for part in w.to_packed())
    return oracle.unpack(packed).reshape(-1, group), scales.reshape(-1), *glob


def inputs(case: str, dtype: str) -> np.ndarray:
    x = INPUTS[f"{case}:{dtype}"]
    return x.view(jnp.bfloat16) if dtype == "bf16" else x


def recorded_mxfp4(dtype: str, rule: str):
    """Every finite group of every case: input [N, 32], torchao's codes, scale bytes and values."""
    columns = [[], [], [], []]
    for case in CASES:
        x, prefix = inputs(case, dtype).reshape(-1, 32), f"{case}:{dtype}:{rule}"
        keep = np.isfinite(x.astype(np.float32)).all(-1)
        codes = oracle.unpack(TORCHAO_MX[f"{prefix}:packed"]).reshape(-1, 32)
        scales, values = TORCHAO_MX[f"{prefix}:scale"].reshape(-1), TORCHAO_MX[f"{prefix}:deq"].reshape(-1, 32)
        for column, array in zip(columns, (x, codes, scales, values), strict=True):
            column.append(array[keep])
    return [np.concatenate(column) for column in columns]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_mxfp4_is_torchaos_bit_for_bit(dtype, rule):
    x, their_codes, their_scales, their_values = recorded_mxfp4(dtype, rule)
    assert len(x) > 5600
    w = MXFP4(jnp.asarray(x), scale_rule=rule)
    codes, scales = parts(w, 32)
    values = np.asarray(w.dequantize(jnp.float32))
    largest = np.abs(x.astype(np.float64)).max(-1)
    # What is ours alone, and why (formats.md section 4):
    # - scale byte 0, 2^-127: torchao divides by at least 2^-126 (rceil: by 1) but decodes with 2^-127.
    tiny = (scales == 0) & (largest > 0)
    assert (largest[tiny] < 2.0**-123).all()
    # - rceil at m = 1.5 + 1 ulp: torchao takes a float32 log2, which may round 1.5's neighbour down to it.
    log2 = (rule == "rceil") & (2 * np.frexp(largest)[0] == 1.5 + 2.0**-23) & (their_scales + 1 == scales)
    same = ~tiny & ~log2
    np.testing.assert_array_equal(scales[same], their_scales[same])
    np.testing.assert_array_equal(no_sign_of_zero(codes[same]), no_sign_of_zero(their_codes[same]))
    np.testing.assert_array_equal(values[same], their_values[same])
    assert tiny.sum() <= 70 and log2.sum() <= 10
    # All of it, the exceptions too, is what the rule says.
    expected_codes, expected_scales = mxfp4_by_rule(x.astype(np.float64), rule)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales[largest > 0], expected_scales[largest > 0])
    assert (values[largest == 0] == 0).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_nvfp4_is_torchaos_bit_for_bit(case, dtype):
    x = inputs(case, dtype)
    if not np.isfinite(x.astype(np.float32)).all():
        assert case in ("nan_inf", "huge", "amax_sweep")
        return  # one infinite value, from rounding to bf16, makes the whole array's scale infinite
    prefix = f"{case}:{dtype}:two_level"
    their_codes = oracle.unpack(TORCHAO_NV[f"{prefix}:packed"]).reshape(-1, 16)
    their_scales = TORCHAO_NV[f"{prefix}:scale"].reshape(-1)
    theirs = TORCHAO_NV[f"{prefix}:deq"].reshape(-1, 16)
    # Zeros up to one shape, which is compiled once, change nothing else.
    padded = np.zeros((8192, 16), x.dtype)
    padded[: len(their_codes)] = x.reshape(-1, 16)
    w = NVFP4(jnp.asarray(padded))
    codes, scales, glob = (part[: len(their_codes)] if part.ndim else part for part in parts(w, 16))
    assert glob == TORCHAO_NV[f"{prefix}:global"]
    # torchao's least scale is 2^-6 (byte 8), e4m3's least normal; ours its least subnormal, 2^-9 (section 5).
    clamped = (scales < 8) & (their_scales == 8)
    np.testing.assert_array_equal(scales[~clamped], their_scales[~clamped])
    np.testing.assert_array_equal(no_sign_of_zero(codes[~clamped]), no_sign_of_zero(their_codes[~clamped]))
    # A product of three float32 numbers has two roundings; which two is a library's own matter.
    mine = np.asarray(w.dequantize(jnp.float32))[: len(codes)]
    normal = ~clamped[:, None] & (np.abs(theirs) >= 2.0**-126)  # XLA's CPU back end flushes subnormal products
    np.testing.assert_allclose(mine[normal], theirs[normal], rtol=2.0**-22)
    expected_codes, expected_scales, expected_glob = nvfp4_by_rule(x.astype(np.float32).reshape(-1, 16))
    assert glob == expected_glob
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales, expected_scales)


def probes(rng, dtype) -> jnp.ndarray:
    """Groups [N, 32] of every magnitude that the dtype has, 1e-38 beside 1e38 in a row, and ties."""
    x = rng.standard_normal((512, 32)) * np.exp2(rng.integers(-150, 126, (512, 1)).astype(np.float64))
    mixed = rng.standard_normal((64, 32)) * np.exp2(rng.integers(-140, 120, (64, 32)).astype(np.float64))
    grid = rng.choice(oracle.E2M1, (64, 32)) * np.exp2(rng.integers(-120, 120, (64, 1)).astype(np.float64))
    with np.errstate(over="ignore"):
        x = np.concatenate([x, mixed, grid, grid * 1.25]).astype(jnp.dtype(dtype))
    return jnp.asarray(np.where(np.isfinite(x.astype(np.float64)), x, np.ones((), x.dtype)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rule", [*RULES, "nvfp4"])
def test_every_magnitude_in_every_dtype_compiled_or_not(rng, dtype, rule):
    x = probes(rng, dtype)
    # float16 has no 2^20: rows whose magnitudes it lost to 0 or infinity are still legal input.
    f = quantize_nvfp4 if rule == "nvfp4" else lambda x: quantize_mxfp4(x, scale_rule=rule)
    eager, compiled = f(x), jax.jit(f)(x)
    for a, b in zip(eager.to_packed(), compiled.to_packed(), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    wide = np.asarray(x).astype(np.float64)
    if rule == "nvfp4":
        expected_codes, expected_scales, glob = nvfp4_by_rule(wide.astype(np.float32).reshape(-1, 16))
        codes, scales, mine = parts(eager, 16)
        assert mine == glob
    else:
        expected_codes, expected_scales = mxfp4_by_rule(wide, rule)
        codes, scales = parts(eager, 32)
        keep = (wide != 0).any(-1)
        scales, expected_scales = scales[keep], expected_scales[keep]
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales, expected_scales)


@pytest.mark.parametrize("shift", [-110, -64, -63, -62, -20, 30, 100])
def test_nvfp4_of_tiny_and_huge_arrays(rng, shift):
    """Power-of-two equivariance, past where 1 / scale leaves float32."""
    x = (rng.standard_normal((8, 64)) * np.exp2(rng.integers(-12, 1, (8, 64)))).astype(np.float32)
    codes, scales, glob = parts(NVFP4(jnp.asarray(x)), 16)
    moved = parts(NVFP4(jnp.asarray(np.ldexp(x, shift))), 16)
    np.testing.assert_array_equal(moved[0], codes)
    np.testing.assert_array_equal(moved[1], scales)
    assert moved[2] == np.ldexp(glob, shift)


def test_nvfp4_scales_are_correctly_rounded(rng):
    """A global scale and block scales near e4m3's ties, for 512 arrays at once: a division one bit off shows."""
    ties = (oracle.e4m3(np.arange(8, 126)) + oracle.e4m3(np.arange(9, 127))) / 2
    x = np.zeros((512, 8, 16), np.float32)
    x[:, 0, 0] = rng.uniform(0.5, 4, 512)
    near = x[:, :1, 0] * rng.choice(ties, (512, 7)).astype(np.float32) / np.float32(448)
    x[:, 1:, 0] = np.nextafter(near, rng.choice([-np.inf, 0, np.inf], near.shape).astype(np.float32))
    w = jax.jit(jax.vmap(quantize_nvfp4))(jnp.asarray(x))
    for i in range(512):
        codes, scales, glob = nvfp4_by_rule(x[i])
        assert np.asarray(w.global_scale)[i] == glob
        np.testing.assert_array_equal(np.asarray(w.scales)[i, :, 0], scales)
        np.testing.assert_array_equal(oracle.unpack(np.asarray(w.packed)[i]), codes)


# Hypothesis draws the structure that matters (exponents, signs, ties) and leaves filling in to a seed.
GROUPS = st.tuples(st.integers(0, 2**32 - 1), st.integers(-100, 100), st.integers(0, 40))
RULE = st.sampled_from(RULES)


def groups(drawn) -> np.ndarray:
    """Float32 [4, 64]; within a row magnitudes spread over `spread` powers of two."""
    seed, exponent, spread = drawn
    rng = np.random.default_rng(seed)
    mantissa = rng.choice([1.0, 1.25, 1.5, 1.75, 1.875, 2 - 2**-23, 1.75 - 2**-23, 1.0 + rng.random()], (4, 64))
    powers = np.exp2((exponent - rng.integers(0, spread + 1, (4, 64))).astype(np.float64))
    x = rng.choice([-1.0, 1.0], (4, 64)) * mantissa * powers
    return np.where(rng.random((4, 64)) < 0.1, 0.0, x).astype(np.float32)


@settings(max_examples=40)
@given(GROUPS, RULE)
def test_quantising_what_was_quantised_changes_nothing(drawn, rule):
    once = MXFP4(jnp.asarray(groups(drawn)), scale_rule=rule).dequantize(jnp.float32)
    np.testing.assert_array_equal(MXFP4(once, scale_rule=rule).dequantize(jnp.float32), once)


@settings(max_examples=40)
@given(GROUPS, RULE)
def test_the_sign_goes_through(drawn, rule):
    x = groups(drawn)
    for f in (lambda x: MXFP4(x, scale_rule=rule), NVFP4):
        plus, minus = f(jnp.asarray(x)).to_packed(), f(jnp.asarray(-x)).to_packed()
        np.testing.assert_array_equal(np.asarray(plus[0]) ^ 0x88, minus[0])
        for a, b in zip(plus[1:], minus[1:], strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=40)
@given(GROUPS, RULE, st.integers(-15, 15))
def test_a_power_of_two_goes_into_the_scale(drawn, rule, shift):
    x = groups(drawn)
    packed, scales = MXFP4(jnp.asarray(x), scale_rule=rule).to_packed()
    moved, moved_scales = MXFP4(jnp.asarray(np.ldexp(x, shift)), scale_rule=rule).to_packed()
    nonzero = (x.reshape(4, 2, 32) != 0).any(-1)
    np.testing.assert_array_equal(moved, packed)
    np.testing.assert_array_equal(
        np.asarray(moved_scales, np.int32)[nonzero], np.asarray(scales, np.int32)[nonzero] + shift
    )


@settings(max_examples=40)
@given(GROUPS, RULE)
def test_order_is_kept_within_a_group(drawn, rule):
    x = groups(drawn).reshape(8, 32)
    values = np.asarray(MXFP4(jnp.asarray(x), scale_rule=rule).dequantize(jnp.float32))
    order = np.argsort(x, axis=-1, kind="stable")
    assert (np.diff(np.take_along_axis(values, order, -1), axis=-1) >= 0).all()


def test_the_rules_differ_where_they_should():
    # One group each: largest magnitude 4, 5, 6.5, 7, 7.5 (m = 1, 1.25, 1.625, 1.75, 1.875; e = 2).
    x = np.zeros((5, 32), np.float32)
    x[:, 0] = [4.0, 5.0, 6.5, 7.0, 7.5]
    x[:, 1] = 0.5
    expected = {
        "floor": ([127, 127, 127, 127, 127], [4, 4, 6, 6, 6]),
        "even": ([127, 127, 127, 128, 128], [4, 4, 6, 8, 8]),
        "ceil": ([127, 128, 128, 128, 128], [4, 4, 6, 8, 8]),
        "rceil": ([127, 127, 128, 128, 128], [4, 4, 6, 8, 8]),
    }
    payloads = set()
    for rule, (scales, values) in expected.items():
        w = MXFP4(jnp.asarray(x), scale_rule=rule)
        assert np.asarray(w.scales)[:, 0].tolist() == scales
        assert np.asarray(w.dequantize())[:, 0].tolist() == values
        payloads.add(np.asarray(w.packed).tobytes())
    assert len(payloads) == 4
    default = quantize_mxfp4(jnp.asarray(x))
    assert np.asarray(default.scales)[:, 0].tolist() == expected["even"][0]


def test_even_has_the_least_error_on_ordinary_weights(rng):
    x = rng.standard_normal((256, 256)).astype(np.float32)
    error = {}
    for rule in RULES:
        values = np.asarray(MXFP4(jnp.asarray(x), scale_rule=rule).dequantize(), np.float64)
        error[rule] = np.sqrt(((values - x) ** 2).mean() / (x.astype(np.float64) ** 2).mean())
    values = np.asarray(NVFP4(jnp.asarray(x)).dequantize(), np.float64)
    error["nvfp4"] = np.sqrt(((values - x) ** 2).mean() / (x.astype(np.float64) ** 2).mean())
    # formats.md section 4, "normal": measured with the tools themselves on 8192 elements; +-0.003 of sampling.
    expected = {"even": 0.1112, "floor": 0.1147, "rceil": 0.1151, "ceil": 0.1443, "nvfp4": 0.0945}
    for rule, value in expected.items():
        assert error[rule] == pytest.approx(value, abs=0.003)
    assert min(RULES, key=error.get) == "even"


@pytest.mark.parametrize("quantize", [quantize_mxfp4, quantize_nvfp4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zero_groups_decode_to_zero(quantize, dtype):
    smallest = jnp.finfo(dtype).smallest_subnormal
    x = np.zeros((5, 64), jnp.dtype(dtype))
    x[1] = -0.0
    x[2, 40] = 1.0
    x[3] = smallest
    for w in (quantize(jnp.asarray(x)), quantize(jnp.asarray(np.zeros_like(x))), quantize(-jnp.zeros_like(x))):
        values = np.asarray(w.dequantize(jnp.float32))
        assert np.isfinite(values).all() and (values[:2] == 0).all()
        assert (np.asarray(w.scales) < (255 if w.format == "mxfp4" else 127)).all()
    values = np.asarray(quantize(jnp.asarray(x)).dequantize(jnp.float32))
    assert values[2, 40] == 1.0 and (np.delete(values[2], 40) == 0).all()


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 4, 64), (3, 0), (1, 0, 96)])
def test_any_leading_axes(rng, shape):
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    mx, nv = MXFP4(x), NVFP4(x)
    assert mx.shape == nv.shape == shape
    assert mx.scales.shape == (*shape[:-1], shape[-1] // 32) and nv.scales.shape == (*shape[:-1], shape[-1] // 16)
    assert (mx.format, mx.scale_format, nv.format, nv.scale_format) == ("mxfp4", "e8m0", "nvfp4", "e4m3")
    if x.size:
        flat = MXFP4(x.reshape(-1, 32))
        np.testing.assert_array_equal(flat.scales.reshape(-1), mx.scales.reshape(-1))
        assert mx.group_size == 32 and nv.group_size == 16 and float(nv.global_scale) > 0
    else:
        assert float(nv.global_scale) == 1.0


BAD = [np.nan, np.inf, -np.inf]


@pytest.mark.bad_input
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("quantize", [quantize_mxfp4, quantize_nvfp4])
def test_values_that_are_not_finite_are_refused(quantize, dtype, bad):
    x = jnp.ones((2, 64), dtype).at[1, 3].set(bad)
    with pytest.raises(ValueError, match=r"w must be finite; got 1 NaN or infinite values. Repair the weights first"):
        quantize(x)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rule", RULES)
def test_traced_values_that_are_not_finite_poison_their_group_alone(dtype, bad, rule):
    x = jnp.ones((2, 64), dtype).at[1, 3].set(bad)
    w = jax.jit(lambda x: quantize_mxfp4(x, scale_rule=rule))(x)
    values = np.asarray(w.dequantize(jnp.float32))
    assert np.isnan(values[1, :32]).all() and int(w.scales[1, 0]) == 255
    assert (values[0] == 1).all() and (values[1, 32:] == 1).all()


@pytest.mark.parametrize("bad", BAD)
def test_traced_values_that_are_not_finite_poison_all_of_nvfp4(bad):
    w = jax.jit(quantize_nvfp4)(jnp.ones((2, 64)).at[1, 3].set(bad))
    assert np.isnan(np.asarray(w.dequantize(jnp.float32))).all()


@pytest.mark.bad_input
@pytest.mark.parametrize("quantize", [quantize_mxfp4, quantize_nvfp4])
def test_what_cannot_be_quantised(quantize):
    name = quantize.__name__
    with pytest.raises(
        ValueError, match=rf"{name}: w must have a last axis of whole groups.*\(3, 40\).*to (64|48) co"
    ):
        quantize(jnp.zeros((3, 40)))
    with pytest.raises(ValueError, match="whole groups"):
        quantize(jnp.float32(1.0))
    for dtype in (jnp.int32, jnp.uint8, jnp.float8_e4m3fn, bool):
        with pytest.raises(
            TypeError, match=f"{name}: w must be bfloat16, float16 or float32; got {jnp.dtype(dtype)}"
        ):
            quantize(jnp.zeros((2, 32), dtype))


@pytest.mark.bad_input
@pytest.mark.parametrize("rule", ["EVEN", "nearest", "", None, 0])
def test_unknown_scale_rules(rule):
    with pytest.raises(ValueError, match=r"scale_rule must be one of .*even.*floor.*ceil.*rceil.*; got"):
        quantize_mxfp4(jnp.zeros((1, 32)), scale_rule=rule)
