"""fp4_linear: a plain linear map with a packed FP4 weight."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops.bmm import fp4_bmm


def fp4_linear(
    x: Float[Array, "*batch C"],
    w: FP4Array,
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """x @ w.T for a packed weight w [N, C] ([out, in], as checkpoints store linears).

    Args:
        x: bfloat16, float16 or float32, any leading axes.
        w: scale groups lie along C.
        preferred_element_type: of the result; None for x's.
        implementation: see fp4_bmm, whose numerics and errors these are.
    """
    if not isinstance(w, FP4Array) or w.ndim != 2:
        got = f"shape {w.shape}" if isinstance(w, FP4Array) else type(w).__name__
        raise ValueError(f"fp4_linear: w must be an FP4Array [N, C]; got {got}. Reshape it first.")
    if x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"fp4_linear: x must be [..., C = {w.shape[1]}]; got {jnp.shape(x)}. w is [out, in].")
    flat = x.reshape(math.prod(x.shape[:-1]), 1, x.shape[-1])
    y = fp4_bmm(
        flat,
        w.reshape(1, *w.shape),
        "columns",
        preferred_element_type=preferred_element_type,
        implementation=implementation,
    )
    return y.reshape(*x.shape[:-1], w.shape[0])
