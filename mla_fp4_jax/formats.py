"""The facts of e2m1, e8m0 and e4m3: encode, decode, nibbles. Integer operations on bits alone.

Floating-point arithmetic is avoided on purpose: XLA's CPU back end flushes subnormals, its GPU back end may drop
a conversion to a narrow type and back, and the casts of float8_e8m0fnu turn 0 into NaN. Bits are equal everywhere.

Sources: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 (e2m1) and 5.4.1 (e8m0); OCP 8-bit Floating Point
Specification (OFP8) v1.0 (e4m3, here without infinities: "e4m3fn").
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, UInt8

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E8M0_NAN = 255  # the only byte that is no power of two

_F32_BIAS = 127
_F32_MANTISSA_BITS = 23
_F32_IMPLICIT_ONE = 1 << _F32_MANTISSA_BITS
_F32_SIGN = 1 << 31
_F32_NAN = 0x7FC00000
_F32_INF = 0x7F800000
_E4M3_BIAS = 7
_E4M3_MANTISSA_BITS = 3
_E4M3_NAN = 0x7F
_E4M3_LARGEST = 0x7E  # 448


def f32_bits(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """The bits of a bfloat16, float16 or float32 array as float32, subnormals kept; TypeError for others."""
    if x.dtype == jnp.bfloat16:  # by bits: a CPU's conversion may flush
        return jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
    if x.dtype in (jnp.float16, jnp.float32):
        return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    raise TypeError(f"f32_bits: x must be bfloat16, float16 or float32; got {x.dtype}. Cast it first.")


def encode_e2m1(x: Float[Array, "*shape"], exponent: Int32[Array, "*shape"] | None = None) -> UInt8[Array, "*shape"]:
    """The e2m1 code, 0 .. 15, of x / 2^exponent: to nearest, ties to even, saturating at 6; the sign is kept.

    Args:
        x: finite bfloat16, float16 or float32.
        exponent: int32 power of two that x is divided by, without an intermediate rounding; None for 0.
    """
    bits = f32_bits(x)
    field, mantissa = (bits >> _F32_MANTISSA_BITS) & 0xFF, bits & (_F32_IMPLICIT_ONE - 1)
    # |x| / 2^exponent = significand * 2^(binade - 23), the significand 24 bits long, subnormals' too, or 0. Below
    # 2 the grid's step is 1/2, from 2 on 1, from 4 on 2: the significand is cut 22 bits from its end in each of
    # those binades, and further below.
    missing = jnp.where(field > 0, 0, jnp.minimum(jax.lax.clz(mantissa) - 8, 24))
    significand = jnp.where(field > 0, mantissa | _F32_IMPLICIT_ONE, mantissa << missing)
    binade = jnp.maximum(field, 1) - missing - _F32_BIAS - (0 if exponent is None else exponent)
    cut = jnp.clip(22 - binade, 22, 26)  # 26 leaves nothing of 24 bits
    odd = (significand >> cut) & 1
    steps = (significand + (1 << (cut - 1)) - 1 + odd) >> cut
    magnitude = jnp.where(binade > 2, 7, jnp.minimum(steps + 2 * jnp.clip(binade, 0, 2), 7))
    magnitude = jnp.where(significand == 0, 0, magnitude)
    return (((bits >> 28) & 8) | magnitude).astype(jnp.uint8)


def decode_e2m1(
    codes: UInt8[Array, "*shape"],
    dtype: DTypeLike = jnp.float32,
    exponent: Int32[Array, "*shape"] | None = None,
) -> Float[Array, "*shape"]:
    """e2m1(code) * 2^exponent, exact wherever `dtype` holds it.

    Args:
        codes: 0 .. 15; higher bits are ignored.
        dtype: bfloat16 or float32 hold every code for exponents -127 .. 125; what is larger becomes infinite.
        exponent: int32 >= -127, such as a scale byte - 127; None for 0.
    """
    code = codes.astype(jnp.int32)
    magnitude, sign = code & 7, (code & 8) << 28
    # Codes 2 .. 7 are (1 + m/2) 2^(e-1) of their two fields e, m; 1 is the subnormal 1/2.
    binade = jnp.where(magnitude == 1, -1, (magnitude >> 1) - 1) + (0 if exponent is None else exponent)
    half = jnp.where(magnitude > 1, magnitude & 1, 0) << (_F32_MANTISSA_BITS - 1)
    field = binade + _F32_BIAS
    normal = jnp.where(field > 254, _F32_INF, (jnp.clip(field, 1, 254) << _F32_MANTISSA_BITS) | half)
    subnormal = (_F32_IMPLICIT_ONE | half) >> jnp.clip(1 - field, 0, 31)
    bits = jnp.where(magnitude == 0, 0, jnp.where(field > 0, normal, subnormal)) | sign
    return f32_from_bits(bits, dtype)


def decode_e8m0(byte: UInt8[Array, "*shape"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
    """2^(byte - 127): byte 0 is 2^-127, a float32 subnormal; 255 is NaN."""
    field = byte.astype(jnp.int32)
    bits = jnp.where(field == 0, _F32_IMPLICIT_ONE >> 1, field << _F32_MANTISSA_BITS)
    return f32_from_bits(jnp.where(field == E8M0_NAN, _F32_NAN, bits), dtype)


def encode_e8m0(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The byte of an exact power of two 2^-127 .. 2^127; 255 (NaN) for anything else: scales are never rounded."""
    bits = f32_bits(x)
    field, mantissa = (bits >> _F32_MANTISSA_BITS) & 0xFF, bits & (_F32_IMPLICIT_ONE - 1)
    smallest = (field == 0) & (mantissa == _F32_IMPLICIT_ONE >> 1)
    exact = (bits >= 0) & (smallest | ((mantissa == 0) & (field > 0)))
    return jnp.where(exact, field, E8M0_NAN).astype(jnp.uint8)


def encode_e4m3(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """The e4m3fn byte nearest to x: ties to even, saturating at 448; NaN stays NaN."""
    bits = f32_bits(x)
    field, sign = (bits >> _F32_MANTISSA_BITS) & 0xFF, (bits >> 24) & 0x80
    significand = (bits & (_F32_IMPLICIT_ONE - 1)) | jnp.where(field > 0, _F32_IMPLICIT_ONE, 0)
    binade = jnp.maximum(field, 1) - _F32_BIAS
    lowest = 1 - _E4M3_BIAS
    cut = jnp.clip(_F32_MANTISSA_BITS - _E4M3_MANTISSA_BITS + jnp.maximum(lowest - binade, 0), 20, 26)
    odd = (significand >> cut) & 1
    steps = (significand + (1 << (cut - 1)) - 1 + odd) >> cut
    byte = steps + 8 * jnp.maximum(binade - lowest, 0)  # a carry into the exponent is already right
    largest = (binade > 8) | (byte > _E4M3_LARGEST)
    byte = jnp.where(largest, _E4M3_LARGEST, byte)
    byte = jnp.where((bits & ~_sign_bit()) > _F32_INF, _E4M3_NAN, byte)
    return (byte | sign).astype(jnp.uint8)


def decode_e4m3(byte: UInt8[Array, "*shape"], dtype: DTypeLike = jnp.float32) -> Float[Array, "*shape"]:
    """The e4m3fn value of a byte; 0x7F and 0xFF are NaN. bfloat16 and float32 hold it exactly."""
    wide = byte.astype(jnp.int32)
    sign, field, mantissa = (wide & 0x80) << 24, (wide >> 3) & 15, wide & 7
    normal = ((field + _F32_BIAS - _E4M3_BIAS) << _F32_MANTISSA_BITS) | (mantissa << 20)
    # Subnormals are m * 2^-9, m = 1 .. 7: find m's leading bit.
    lead = jnp.where(mantissa >= 4, 2, jnp.where(mantissa >= 2, 1, 0))
    tiny = ((lead - 9 + _F32_BIAS) << _F32_MANTISSA_BITS) | ((mantissa << (_F32_MANTISSA_BITS - lead)) & 0x7FFFFF)
    bits = jnp.where(field > 0, normal, jnp.where(mantissa == 0, 0, tiny))
    bits = jnp.where((wide & 0x7F) == _E4M3_NAN, _F32_NAN, bits)
    return f32_from_bits(bits | sign, dtype)


def pack_nibbles(codes: UInt8[Array, "*shape C"]) -> UInt8[Array, "*shape half"]:
    """Two codes to a byte, the one with the even index in the low nibble."""
    return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: UInt8[Array, "*shape half"]) -> UInt8[Array, "*shape C"]:
    """Codes 0 .. 15 of packed bytes, the low nibble first."""
    codes = jnp.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def f32_from_bits(bits: Int32[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """float32 bits as `dtype`; to bfloat16 by bits, since the values made here have at most 6 significant bits."""
    if jnp.dtype(dtype) == jnp.bfloat16:
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)


def _sign_bit() -> int:
    return -_F32_SIGN  # as an int32
