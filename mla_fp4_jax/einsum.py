"""The one way this library multiplies dense arrays: operands as they are, accumulated in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def einsum_rounded(spec: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """einsum_f32 rounded once to `dtype`, by the matmul itself where it can.

    XLA often writes a float32 result to memory to convert it in another kernel.
    """
    if a.dtype == jnp.float32 or jnp.dtype(dtype) != a.dtype:
        return einsum_f32(spec, a, b).astype(dtype)
    return jax.lax.platform_dependent(
        a,
        b,
        cuda=lambda a, b: jnp.einsum(spec, a, b),  # accumulates in float32 and rounds once
        default=lambda a, b: einsum_f32(spec, a, b).astype(dtype),
    )


def einsum_f32(spec: str, a: Array, b: Array) -> Array:
    """jnp.einsum of two arrays of one float dtype with a float32 result; float32 operands are never cut to TF32.

    XLA's CPU back end has no bfloat16 product with a float32 result for every shape (jax 0.10 and 0.12: "Unsupported
    element type for DotThunk"), so there both sides are widened first; products of widened operands are exact.
    """
    if a.dtype == jnp.float32:
        return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32)),
        default=lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32),
    )
