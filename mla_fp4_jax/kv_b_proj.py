"""kv_b_proj as a checkpoint stores it, to the one pack that this library uses and to what engines make of it."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8

from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.quantize import MXFP4_GROUP, quantize_mxfp4


class EngineWeights(NamedTuple):
    """The absorbed projections in the layouts of vLLM, SGLang and ATOM (aiter): two arrays instead of one.

    Attributes:
        W_K: uint8 [H, L, P/2], key rows transposed and quantised again along P.
        W_K_scale: uint8 [H, L, P/32].
        W_V: uint8 [H, V, L/2], the checkpoint's bytes.
        W_V_scale: uint8 [H, V, L/32], likewise.
        error: float32, |W_K - checkpoint| / |checkpoint| over the key rows, root mean square: what quantising
            again has lost. W_V loses nothing.
    """

    W_K: UInt8[Array, "H L half_P"]
    W_K_scale: UInt8[Array, "H L P_groups"]
    W_V: UInt8[Array, "H V half_L"]
    W_V_scale: UInt8[Array, "H V L_groups"]
    error: Float[Array, ""]


def one_pack(
    packed: ArrayLike, scales: ArrayLike, *, num_heads: int, qk_nope_head_dim: int, v_head_dim: int
) -> FP4Array:
    """The checkpoint's kv_b_proj as FP4 [H, P+V, L]: a reshape; inside jit not one byte is moved.

    Args:
        packed: uint8 [H*(P+V), L/2], the low nibble first.
        scales: uint8 or float8_e8m0fnu [H*(P+V), L/32].
        num_heads: H; rows are ordered by head, a head's P key rows before its V value rows.
        qk_nope_head_dim: P.
        v_head_dim: V.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    flat = _check("one_pack", packed, scales, num_heads, qk_nope_head_dim, v_head_dim)
    return flat.reshape(num_heads, qk_nope_head_dim + v_head_dim, flat.shape[-1])


def unpack_kv_b_proj(
    packed: ArrayLike,
    scales: ArrayLike,
    *,
    num_heads: int,
    qk_nope_head_dim: int,
    v_head_dim: int,
    scale_rule: str = "even",
) -> EngineWeights:
    """kv_b_proj in the engines' layouts, for parity with them; jittable. This library itself uses one_pack.

    Groups lie along L in the checkpoint but along the contracted P in W_K, so W_K has to be dequantised, transposed
    and quantised again; the error is returned.

    Args:
        packed: uint8 [H*(P+V), L/2], the low nibble first.
        scales: uint8 or float8_e8m0fnu [H*(P+V), L/32].
        num_heads: H.
        qk_nope_head_dim: P, a multiple of 32.
        v_head_dim: V.
        scale_rule: of the second quantisation; see quantize_mxfp4.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    flat = _check("unpack_kv_b_proj", packed, scales, num_heads, qk_nope_head_dim, v_head_dim)
    if qk_nope_head_dim % MXFP4_GROUP:
        raise ValueError(
            f"unpack_kv_b_proj: qk_nope_head_dim must be a multiple of {MXFP4_GROUP}, W_K's groups lie along it; got "
            f"{qk_nope_head_dim}. Use one_pack, which has no such limit."
        )
    pack = flat.reshape(num_heads, qk_nope_head_dim + v_head_dim, flat.shape[-1])
    codes, scale_bytes = pack.to_packed()
    keys = pack.dequantize(jnp.float32)[:, :qk_nope_head_dim].swapaxes(1, 2)
    again = quantize_mxfp4(keys, scale_rule=scale_rule)
    w_k, w_k_scale = again.to_packed()
    lost = again.dequantize(jnp.float32) - keys
    # Relative to the largest value, so that squares of tiny weights do not vanish.
    unit = jnp.maximum(jnp.max(jnp.abs(keys), initial=0.0), jnp.finfo(jnp.float32).tiny)
    total = jnp.sum((keys / unit) ** 2)
    error = jnp.sqrt(jnp.sum((lost / unit) ** 2) / jnp.where(total == 0, 1.0, total))
    value_rows = slice(qk_nope_head_dim, None)
    return EngineWeights(w_k, w_k_scale, codes[:, value_rows], scale_bytes[:, value_rows], error)


def _check(where: str, packed, scales, num_heads: int, qk_nope_head_dim: int, v_head_dim: int) -> FP4Array:
    for name, value in (
        ("num_heads", num_heads),
        ("qk_nope_head_dim", qk_nope_head_dim),
        ("v_head_dim", v_head_dim),
    ):
        if value < 1:
            raise ValueError(f"{where}: {name} must be at least 1; got {value}. Take it from the config.")
    shape = jnp.shape(packed)
    rows = num_heads * (qk_nope_head_dim + v_head_dim)
    if len(shape) != 2 or shape[0] != rows:
        raise ValueError(
            f"{where}: packed must be [H*(P+V), L/2] = [{rows}, L/2]; got {shape}. "
            "Check num_heads, qk_nope_head_dim and v_head_dim."
        )
    columns, groups = 2 * shape[1], jnp.shape(scales)
    if columns % MXFP4_GROUP:
        raise ValueError(
            f"{where}: packed must hold whole groups of {MXFP4_GROUP} columns, two to a byte; got {shape}. "
            "Check that it is MXFP4."
        )
    if groups != (rows, columns // MXFP4_GROUP):
        raise ValueError(
            f"{where}: scales must be [H*(P+V), L/{MXFP4_GROUP}] = {(rows, columns // MXFP4_GROUP)} beside packed "
            f"{shape}; got {groups}. MXFP4 has one scale to {MXFP4_GROUP} elements."
        )
    return FP4Array.from_packed(packed, scales, format="mxfp4")
