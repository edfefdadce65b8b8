"""Decoding a tile of packed FP4 weights inside a kernel, exactly, with operations that every back end has.

Value = e2m1 * scale, the scale shared by a group of consecutive columns. Steps that look roundabout avoid
subnormal operands (XLA's CPU back end, hence the Pallas interpreter, flushes them; ROCm may) and types that
Triton lacks (FP4, e8m0). Only a product that is itself subnormal in float32 depends on the device: NVIDIA GPUs
keep it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

# The three magnitude bits of e2m1 (OCP MX v1.0, 5.3.3) put at the top of float16's exponent and mantissa read as
# e2m1 * 2^-14: the biases, 1 and 15, differ by 14. 0.5, e2m1's subnormal, is a float16 subnormal, exact as well.
_E2M1_SHIFT = 14
# Likewise e4m3fn (OCP FP8 v1.0): bias 7 against 15.
_E4M3_SHIFT = 8
_F32_BIAS = 127
_F32_MANTISSA_BITS = 23
_F32_MAX_EXPONENT = 254
_F32_NAN = 0x7FC00000


def decode_tile(
    codes: UInt8[Array, "R half"], scales: UInt8[Array, "R groups"], *, scale_format: str, dtype: DTypeLike
) -> Float[Array, "R C"]:
    """The weights of a tile: code 2i is the low nibble of byte i, code 2i + 1 the high one.

    Args:
        codes: two e2m1 codes a byte.
        scales: one scale byte per C / groups consecutive columns.
        scale_format: "e8m0" (2^(byte - 127), 255 is NaN) or "e4m3" (e4m3fn).
        dtype: bfloat16 or float32; both hold every product exactly. Past float32's range it is infinite.
    """
    group = 2 * codes.shape[1] // scales.shape[1]
    values = _e2m1_tiny(codes)
    for factor in _scale_factors(scales, scale_format):
        values = values * _per_column(factor, group)
    return values.astype(dtype)


def _e2m1_tiny(codes: UInt8[Array, "R half"]) -> Float[Array, "R C"]:
    """e2m1 * 2^-14 as float32."""
    byte = codes.astype(jnp.uint16)
    low = ((byte & 0x08) << 12) | ((byte & 0x07) << 9)
    high = ((byte & 0x80) << 8) | ((byte & 0x70) << 5)
    bits = jnp.stack([low, high], axis=-1).reshape(codes.shape[0], 2 * codes.shape[1])
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def _scale_factors(scales: UInt8[Array, "R groups"], scale_format: str) -> list[Float[Array, "R groups"]]:
    """Normal float32 factors whose product is scale * 2^14."""
    if scale_format == "e4m3":
        byte = scales.astype(jnp.uint16)
        bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
        tiny = jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
        factor = tiny * float(2 ** (_E4M3_SHIFT + _E2M1_SHIFT))
        return [jnp.where((byte & 0x7F) == 0x7F, jnp.nan, factor)]
    # 2^(byte - 127 + 14) leaves float32 above byte 240, whence two factors; the second is 1 for lesser bytes.
    byte = scales.astype(jnp.int32)
    exponent = jnp.minimum(byte + _E2M1_SHIFT, _F32_MAX_EXPONENT)
    rest = jnp.maximum(byte + _E2M1_SHIFT - _F32_MAX_EXPONENT, 0) + _F32_BIAS
    first = jnp.where(byte == 255, _F32_NAN, exponent << _F32_MANTISSA_BITS)
    return [_f32_from_bits(first), _f32_from_bits(rest << _F32_MANTISSA_BITS)]


def _f32_from_bits(bits: Array) -> Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _per_column(factor: Float[Array, "R groups"], group: int) -> Float[Array, "R C"]:
    rows, groups = factor.shape
    return jnp.broadcast_to(factor[:, :, None], (rows, groups, group)).reshape(rows, groups * group)
