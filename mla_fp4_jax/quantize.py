"""Quantising to MXFP4 and NVFP4. Only ever on request: nothing in this library calls it on a loaded weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int32

from mla_fp4_jax import formats
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.scale_search import least_error_bytes

MXFP4_GROUP = 32
NVFP4_GROUP = 16
LEAST_ERROR = "mse"
SCALE_RULES = ("even", "floor", "ceil", "rceil")
# Mantissa bits of a group's largest magnitude, m in [1, 2), from which its scale takes the next power of two:
# even at 1.75, where rounding to e2m1 would pass 6; ceil above 1; rceil above 1.5, the largest m of 6 = 1.5 * 4.
_STEP_UP_FROM = {"even": 0x600000, "floor": 1 << 23, "ceil": 1, "rceil": 0x400001}
_E2M1_EXPONENT_MAX = 2  # 6 = 1.5 * 2^2
_F32_INF = 0x7F800000
_NVFP4_TINY = 64 << 23  # the bits of 2^-63


def quantize_mxfp4(w: Float[Array, "*rows C"], *, scale_rule: str = "even") -> FP4Array:
    """MXFP4 in groups of 32 along the last axis: a power-of-two scale each, elements to nearest even.

    With a group's largest magnitude m * 2^e, m in [1, 2), the scale is 2^(e-2) or 2^(e-1):

        floor   2^(e-2) always (OCP MX v1.0, section 6.3); magnitudes above 6 * 2^(e-2) saturate
        even    2^(e-1) from m = 1.75: AMD Quark, llm-compressor; the least error of the four
        ceil    2^(e-1) above m = 1: nothing saturates
        rceil   2^(e-1) above m = 1.5: ModelOpt, MLX; nothing saturates
        mse     whichever of 2^(e-3), 2^(e-2), 2^(e-1) leaves the least squared error in the group

    Args:
        w: bfloat16, float16 or float32.
        scale_rule: one of the above.

    Returns:
        The array; a group of zeros decodes to zeros. Bits are the same on every device (with "mse" but for exponents
        whose errors are equal up to float32 rounding).

    Raises:
        ValueError: NaN or infinite values. Under jit, where they cannot be refused, their group's scale becomes
            255, so that it decodes to NaN.
    """
    if scale_rule not in (*SCALE_RULES, LEAST_ERROR):
        raise ValueError(
            f"quantize_mxfp4: scale_rule must be one of {(*SCALE_RULES, LEAST_ERROR)}; got {scale_rule!r}. "
            "'even' has the least error of the fixed ones."
        )
    groups = _groups("quantize_mxfp4", w, MXFP4_GROUP)
    largest = _largest_bits(groups)
    if scale_rule == LEAST_ERROR:
        byte = least_error_bytes(groups, (largest >> 23) - _E2M1_EXPONENT_MAX)
    else:
        step = jnp.where((largest & 0x7FFFFF) >= _STEP_UP_FROM[scale_rule], 1, 0)
        byte = jnp.clip((largest >> 23) + step - _E2M1_EXPONENT_MAX, 0, 254)
    codes = formats.encode_e2m1(groups, jnp.broadcast_to(byte[..., None] - 127, groups.shape))
    byte = jnp.where(largest >= _F32_INF, formats.E8M0_NAN, byte)
    return FP4Array.from_codes(codes.reshape(w.shape), byte.astype(jnp.uint8))


def quantize_nvfp4(w: Float[Array, "*rows C"]) -> FP4Array:
    """NVFP4 in groups of 16 along the last axis: an e4m3 scale each, one float32 scale for the array.

        global_scale = max|w| / (448 * 6), at least 2^-126
        scale = e4m3(max|group| / 6 / global_scale), at least 2^-9

    Args:
        w: bfloat16, float16 or float32.

    Returns:
        The array; elements are w / (scale * global_scale) to nearest even. All zeros: global_scale is 1.

    Raises:
        ValueError: NaN or infinite values. Under jit the whole array becomes NaN.
    """
    groups = _groups("quantize_nvfp4", w, NVFP4_GROUP)
    bits, largest = formats.f32_bits(groups), _largest_bits(groups)
    most = jnp.max(largest, initial=0)
    # An array of tiny values is worked on 2^64 times as large, lest 1 / scale overflow or subnormals be flushed.
    tiny = most < _NVFP4_TINY
    values, peaks = _f32(bits, tiny), _f32(largest, tiny)
    unit = jnp.where(tiny, jnp.float32(2.0**-64), 1.0)
    scale = _divide(_f32(most, tiny), formats.E4M3_MAX * formats.E2M1_MAX)
    scale = jnp.maximum(scale, jnp.where(tiny, jnp.float32(2.0**-62), 0.0))
    scale = jnp.where(most == 0, 1.0 / unit, jnp.where(most >= _F32_INF, jnp.nan, scale))
    smallest = 2.0**-9  # e4m3's least; a zero scale would lose the group
    byte = formats.encode_e4m3(jnp.maximum(_divide(_divide(peaks, formats.E2M1_MAX), scale), smallest))
    inverse = jax.lax.optimization_barrier(1.0 / scale)  # XLA would join the two divisions, one bit off
    codes = formats.encode_e2m1(values * (inverse / formats.decode_e4m3(byte))[..., None])
    return FP4Array.from_codes(codes.reshape(w.shape), byte, global_scale=scale * unit, format="nvfp4")


def _groups(where: str, w: Float[Array, "*rows C"], group: int) -> Float[Array, "*rows groups G"]:
    w = jnp.asarray(w)
    if w.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"{where}: w must be bfloat16, float16 or float32; got {w.dtype}. Cast it first.")
    if w.ndim < 1 or w.shape[-1] % group:
        raise ValueError(
            f"{where}: w must have a last axis of whole groups of {group}; got {w.shape}. "
            f"Pad it to {-(-(w.shape[-1] if w.ndim else 1) // group) * group} columns."
        )
    if not isinstance(w, Tracer):
        with jax.ensure_compile_time_eval():  # a constant within jit is as well known
            bad = int(jnp.size(w) - jnp.sum(jnp.isfinite(w)))
        if bad:
            raise ValueError(
                f"{where}: w must be finite; got {bad} NaN or infinite values. Repair the weights first."
            )
    return w.reshape(*w.shape[:-1], w.shape[-1] // group, group)


def _divide(a: Float[Array, "*shape"], scalar: Float[Array, ""] | float) -> Float[Array, "*shape"]:
    """a / scalar of a >= 0, correctly rounded.

    XLA multiplies by the reciprocal of a divisor that it sees to be one scalar; so it is shown an array, one that
    depends on a in order that vmap makes an array of it as well.
    """
    a = jax.lax.optimization_barrier(a)
    return a / jax.lax.optimization_barrier(jnp.where(a < 0, a, scalar))


def _f32(bits: Int32[Array, "*shape"], enlarge: Bool[Array, ""]) -> Float[Array, "*shape"]:
    """Float32 of bits; where told, 2^64 times as large, subnormals included (of values below 2^64)."""
    magnitude = bits & 0x7FFFFFFF
    normal = jax.lax.bitcast_convert_type(magnitude + (64 << 23), jnp.float32)
    larger = jnp.where(magnitude < 1 << 23, magnitude.astype(jnp.float32) * 2.0 ** (64 - 149), normal)
    larger = jnp.where(bits < 0, -larger, larger)
    return jnp.where(enlarge, larger, jax.lax.bitcast_convert_type(bits, jnp.float32))


def _largest_bits(groups: Float[Array, "*rows groups G"]) -> Int32[Array, "*rows groups"]:
    """Float32 bits of each group's largest magnitude: non-negative floats are ordered as their bits are."""
    return jnp.max(formats.f32_bits(groups) & 0x7FFFFFFF, axis=-1)
