"""e2m1, e8m0, e4m3 and nibbles, exhaustively, against the float64 oracle, ml_dtypes and recorded casts."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from mla_fp4_jax import formats

CASTS = np.load(Path(__file__).parent / "data" / "vectors" / "element_casts.npz")
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
NARROW = [jnp.bfloat16, jnp.float16]


def both(f, *args):
    """f's result as NumPy, after checking that op by op and compiled agree bit for bit."""
    eager, compiled = np.asarray(f(*args)), np.asarray(jax.jit(f)(*args))
    assert eager.dtype == compiled.dtype
    np.testing.assert_array_equal(bits(eager), bits(compiled))
    return eager


def bits(x: np.ndarray) -> np.ndarray:
    return x.view(f"u{x.dtype.itemsize}")


def every(dtype) -> np.ndarray:
    """All 65536 values of a 16-bit float dtype, NaN and infinity included."""
    return np.arange(1 << 16, dtype=np.uint16).view(jnp.dtype(dtype))


def wide(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return x.astype(np.float64)


def finite(x: np.ndarray) -> np.ndarray:
    return x[np.isfinite(wide(x))]


def float32_probes(rng, middles: np.ndarray) -> np.ndarray:
    """Every tie and its neighbours one float32 ulp away, both signs, and random bit patterns, subnormals too."""
    ties = np.asarray(middles, np.float32)
    near = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    random = rng.integers(0, 2**32, 4096, np.uint32)
    subnormal = rng.integers(0, 1 << 23, 256, np.uint32)
    ordinary = (rng.standard_normal(4096) * 4).astype(np.float32)
    edges = np.array([0.0, 3.4e38, 1.2e-38, 1e-45, 448, 464, 465, 480, 512, 2.0**-9, 2.0**-10, 2.0**-11], np.float32)
    x = np.concatenate([near, random.view(np.float32), subnormal.view(np.float32), ordinary, edges])
    return finite(np.concatenate([x, -x]))


E2M1_MIDDLES = (oracle.E2M1[:7] + oracle.E2M1[1:8]) / 2
E4M3_VALUES = oracle.e4m3(np.arange(127))
E4M3_MIDDLES = (E4M3_VALUES[:-1] + E4M3_VALUES[1:]) / 2


def test_the_oracle_itself_agrees_with_ml_dtypes():
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64), oracle.E2M1)
    every_byte = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(
        every_byte.view(ml_dtypes.float8_e4m3fn).astype(np.float64), oracle.e4m3(every_byte)
    )
    np.testing.assert_array_equal(
        every_byte.view(ml_dtypes.float8_e8m0fnu).astype(np.float64), oracle.e8m0(every_byte)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_f32_bits_widens_every_value(rng, dtype):
    x = every(dtype) if dtype in NARROW else rng.integers(0, 2**32, 65536, np.uint32).view(np.float32)
    x = finite(x)
    expected = x.astype(np.float32).view(np.int32)
    np.testing.assert_array_equal(both(formats.f32_bits, jnp.asarray(x)), expected)


@pytest.mark.bad_input
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.float8_e4m3fn])
def test_f32_bits_refuses_other_dtypes(dtype):
    with pytest.raises(TypeError, match="f32_bits: x must be bfloat16, float16 or float32; got"):
        formats.f32_bits(jnp.zeros(3, dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_encode_e2m1_of_every_16_bit_float(dtype):
    x = finite(every(dtype))
    np.testing.assert_array_equal(both(formats.encode_e2m1, jnp.asarray(x)), oracle.encode_e2m1(x.astype(np.float64)))


def test_encode_e2m1_of_ties_and_their_neighbours(rng):
    x = float32_probes(rng, E2M1_MIDDLES)
    got = both(formats.encode_e2m1, jnp.asarray(x))
    np.testing.assert_array_equal(got, oracle.encode_e2m1(x))
    np.testing.assert_array_equal(got, x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))


def test_ties_by_hand():
    # Not computed by anything: OCP MX v1.0's grid 0 .5 1 1.5 2 3 4 6 and IEEE's rule.
    x = jnp.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -5.0, -0.0, 1e9], jnp.float32)
    assert formats.encode_e2m1(x).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 8, 14, 8, 7]


def test_zero_is_zero_under_any_exponent():
    zero = jnp.array([0.0, -0.0])
    for exponent in (-200, -127, 0, 128):
        assert formats.encode_e2m1(zero, jnp.full(2, exponent, jnp.int32)).tolist() == [0, 8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_e2m1_divides_by_any_power_of_two_without_rounding(rng, dtype):
    if dtype in NARROW:
        x = finite(every(dtype))[::7]
    else:
        # The ties of every binade, so that each exponent below meets some.
        spread = np.concatenate([np.ldexp(E2M1_MIDDLES, e) for e in range(-150, 126)])
        x = float32_probes(rng, spread)
    for exponent in (-127, -126, -30, -1, 0, 1, 14, 100, 125, 127):
        got = both(formats.encode_e2m1, jnp.asarray(x), jnp.full(x.shape, exponent, jnp.int32))
        np.testing.assert_array_equal(got, oracle.encode_e2m1(np.ldexp(x.astype(np.float64), -exponent)))


def test_recorded_e2m1_casts():
    x = CASTS["x"]
    keep = np.isfinite(x)
    got = both(formats.encode_e2m1, jnp.asarray(x[keep]))
    np.testing.assert_array_equal(got, CASTS["ml_dtypes.f4.bits"][keep])
    decoded = both(formats.decode_e2m1, jnp.arange(16, dtype=jnp.uint8))
    np.testing.assert_array_equal(decoded, CASTS["f4_decode"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_16_codes_under_all_256_scale_bytes(dtype):
    codes, scales = np.meshgrid(np.arange(16, dtype=np.uint8), np.arange(256), indexing="ij")
    exponent = jnp.asarray(scales - 127, jnp.int32)
    got = both(lambda c, e: formats.decode_e2m1(c, dtype, e), jnp.asarray(codes), exponent)
    with np.errstate(over="ignore"):
        expected = np.ldexp(oracle.E2M1[codes], scales - 127).astype(jnp.dtype(dtype))
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(bits(got), bits(expected))  # signs of zero too


def test_decode_e2m1_ignores_higher_bits():
    byte = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(formats.decode_e2m1(byte), oracle.E2M1[np.arange(256) & 15])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_e8m0_of_every_byte(dtype):
    got = both(lambda b: formats.decode_e8m0(b, dtype), jnp.arange(256, dtype=jnp.uint8))
    with np.errstate(over="ignore"):
        expected = oracle.e8m0(np.arange(256)).astype(jnp.dtype(dtype))
    assert got.dtype == expected.dtype and np.isnan(got[255].astype(np.float32))
    np.testing.assert_array_equal(bits(got)[:255], bits(expected)[:255])
    if dtype == jnp.float32:
        assert got[0] == 2.0**-127 > 0 and got[127] == 1.0 and got[134] == 128.0
        np.testing.assert_array_equal(got, CASTS["torch.e8m0_decode"])
        np.testing.assert_array_equal(got, CASTS["ml_dtypes.e8m0_decode"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_encode_e8m0_takes_powers_of_two_and_nothing_else(rng, dtype):
    others = np.array([0.0, -0.0, -1.0, 1.5, 3.0, 0.75, np.inf, -np.inf, np.nan, 1e-45, 2.0**-128, 2.0**-127 * 1.5])
    with np.errstate(over="ignore"):
        x = np.concatenate([oracle.e8m0(np.arange(255)), others]).astype(jnp.dtype(dtype))
    if dtype in NARROW:
        x = np.concatenate([x, every(dtype)])
    got = both(formats.encode_e8m0, jnp.asarray(x))
    mantissa, exponent = np.frexp(wide(x))
    exact = np.isfinite(wide(x)) & (mantissa == 0.5) & (exponent >= -126)
    np.testing.assert_array_equal(got, np.where(exact, exponent + 126, 255))
    if dtype != jnp.float16:
        np.testing.assert_array_equal(got[:255], np.arange(255))


@pytest.mark.parametrize("dtype", NARROW)
def test_encode_e4m3_of_every_16_bit_float(dtype):
    x = every(dtype)
    got, nan = both(formats.encode_e4m3, jnp.asarray(x)), np.isnan(wide(x))
    np.testing.assert_array_equal(got[~nan], oracle.encode_e4m3(wide(x)[~nan]))
    assert ((got[nan] & 0x7F) == 0x7F).all()


def test_encode_e4m3_of_ties_and_their_neighbours(rng):
    x = float32_probes(rng, E4M3_MIDDLES)
    got = both(formats.encode_e4m3, jnp.asarray(x))
    np.testing.assert_array_equal(got, oracle.encode_e4m3(x))
    saturated = np.clip(x, -448, 448)  # past that ml_dtypes makes NaN
    np.testing.assert_array_equal(got, saturated.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def test_recorded_e4m3_casts():
    x = CASTS["e4m3_in"]
    np.testing.assert_array_equal(both(formats.encode_e4m3, jnp.asarray(x)), CASTS["torch.e4m3"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_e4m3_of_every_byte_and_back(dtype):
    byte = jnp.arange(256, dtype=jnp.uint8)
    got = both(lambda b: formats.decode_e4m3(b, dtype), byte)
    expected = oracle.e4m3(np.arange(256)).astype(jnp.dtype(dtype))
    nan = np.isnan(expected.astype(np.float32))
    assert nan.sum() == 2
    np.testing.assert_array_equal(np.isnan(got.astype(np.float32)), nan)
    np.testing.assert_array_equal(bits(got)[~nan], bits(expected)[~nan])
    np.testing.assert_array_equal(both(formats.encode_e4m3, jnp.asarray(got)), np.arange(256))


def test_the_first_element_is_the_low_nibble():
    half, one = formats.encode_e2m1(jnp.array([0.5, 1.0]))
    assert formats.pack_nibbles(jnp.stack([half, one])).tolist() == [0x21]
    assert formats.unpack_nibbles(jnp.array([0x21, 0xF8], jnp.uint8)).tolist() == [1, 2, 8, 15]


@pytest.mark.parametrize("shape", [(256,), (2, 128), (1, 256, 1), (0, 4), (3, 0)])
def test_nibbles_there_and_back(shape):
    packed = np.resize(np.arange(256, dtype=np.uint8), shape)
    codes = both(formats.unpack_nibbles, jnp.asarray(packed))
    np.testing.assert_array_equal(codes, oracle.unpack(packed))
    np.testing.assert_array_equal(both(formats.pack_nibbles, jnp.asarray(codes)), packed)
