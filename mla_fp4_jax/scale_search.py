"""The MXFP4 scale of least squared error among three: the spec's, half of it, twice it."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from mla_fp4_jax import formats

_LARGEST_BYTE = 252  # 6 * 2^(252 - 127) is finite in float32


def least_error_bytes(
    groups: Float[Array, "*rows groups G"], floor: Int32[Array, "*rows groups"]
) -> Int32[Array, "*rows groups"]:
    """Scale bytes, 0 .. 254, that leave the least sum of squared errors in each group; ties go to `floor`, then up.

    Args:
        groups: bfloat16, float16 or float32, finite.
        floor: the byte of 2^(e-2) for a group whose largest magnitude is in [2^e, 2^(e+1)); may be negative.
    """
    floor = jnp.clip(floor, 0, 254)
    # Errors are counted in units of the floor scale, where nothing overflows. The power of two is applied in halves:
    # each is a normal float32.
    power = 127 - floor
    half = power // 2
    unit = formats.decode_e8m0((half + 127).astype(jnp.uint8))[..., None]
    rest = formats.decode_e8m0((power - half + 127).astype(jnp.uint8))[..., None]
    scaled = groups.astype(jnp.float32) * unit * rest
    best, least = floor, _squared_error(groups, scaled, floor, 0)
    for step in (1, -1):
        byte = jnp.clip(floor + step, 0, jnp.maximum(floor, _LARGEST_BYTE))
        error = _squared_error(groups, scaled, byte, byte - floor)
        best = jnp.where(error < least, byte, best)
        least = jnp.minimum(error, least)
    return best


def _squared_error(groups: Array, scaled: Array, byte: Array, step: Array | int) -> Array:
    exponent = jnp.broadcast_to(byte[..., None] - 127, groups.shape)
    codes = formats.encode_e2m1(groups, exponent)
    steps = jnp.broadcast_to(jnp.asarray(step, jnp.int32)[..., None], groups.shape)
    error = scaled - formats.decode_e2m1(codes, jnp.float32, steps)
    return jnp.sum(error * error, axis=-1)
