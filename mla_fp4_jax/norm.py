"""Root-mean-square norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*batch D"], gain: Float[Array, "D"], eps: float) -> Float[Array, "*batch D"]:
    """g * x / sqrt(mean(x^2) + eps), computed in float32 and rounded once to x's dtype."""
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (scaled * gain.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + gain.shape)).astype(x.dtype)
