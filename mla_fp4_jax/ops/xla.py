"""The FP4 products in plain XLA: the reference that runs everywhere. It writes the decoded weight to memory."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mla_fp4_jax.einsum import einsum_f32
from mla_fp4_jax.fp4_array import FP4Array


def fp4_bmm_xla(
    x: Float[Array, "B H K"], w: FP4Array, contract: str, *, out_dtype: DTypeLike
) -> Float[Array, "B H out"]:
    """x times the decoded w [H, N, C] over its rows or columns, accumulated in float32.

    bfloat16 x meets w in bfloat16, which holds it exactly; otherwise both are float32.
    """
    operand = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32
    spec = "bhn,hnc->bhc" if contract == "rows" else "bhc,hnc->bhn"
    out = einsum_f32(spec, x.astype(operand), w.without_global_scale(operand))
    return (out if w.global_scale is None else out * w.global_scale).astype(out_dtype)
