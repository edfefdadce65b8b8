"""Rotary position embedding: frequencies, angles and the rotation itself."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mla_fp4_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Inverse frequencies of a rotary embedding, in float32 as the models were trained.

    Plain: theta^(-2j/dim). YaRN divides the slow ones by `factor` and blends in between:
    f_j = ramp_j / (factor * theta^(2j/dim)) + (1 - ramp_j) / theta^(2j/dim). LongRoPE divides each by its own factor.

    Args:
        rope: the settings.
        dim: R, the rotary width; even, may be 0.

    Returns:
        float32 [R/2]. Every step is rounded to float32: at position 100000 one unit in the last place of a
        frequency moves the angle by 0.01 rad, so the order of operations is part of the format.
    """
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(max(dim, 1))
    period = np.float32(rope.theta) ** exponent
    plain = np.float32(1.0) / period
    if rope.rope_type == "default":
        return plain
    if rope.rope_type == "longrope":
        return np.float32(1.0) / (np.asarray(rope.frequency_divisors, np.float32) * period)
    stretched = np.float32(1.0) / (np.float32(rope.factor) * period)
    low, high = _yarn_ramp_ends(rope, dim)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = np.float32(1.0) - ramp.astype(np.float32)
    return stretched * (np.float32(1.0) - keep) + plain * keep


def _yarn_ramp_ends(rope: RopeConfig, dim: int) -> tuple[float, float]:
    """The dimensions that turn beta_fast and beta_slow times within the original context."""

    def dimension(turns: float) -> float:
        context = rope.original_max_position_embeddings
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def cos_sin(
    rope: RopeConfig, dim: int, positions: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch half_R"], Float[Array, "*batch half_R"]]:
    """Cosine and sine of positions * inverse_frequencies, times YaRN's cos_sin_scale; float32."""
    angles = positions.astype(jnp.float32)[..., None] * _broadcast(inverse_frequencies(rope, dim), positions.ndim)
    return jnp.cos(angles) * rope.cos_sin_scale, jnp.sin(angles) * rope.cos_sin_scale


def query_scale(rope: RopeConfig, positions: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """What queries are multiplied by under llama_4_scaling_beta: 1 + beta * ln(1 + floor(position / original))."""
    turns = jnp.floor(positions.astype(jnp.float32) / rope.original_max_position_embeddings)
    return 1.0 + (rope.llama_4_scaling_beta or 0.0) * jnp.log1p(turns)


def _broadcast(vector: np.ndarray, leading: int) -> jax.Array:
    return jnp.asarray(vector).reshape((1,) * leading + vector.shape)


def rotate(
    x: Float[Array, "*#batch R"],
    cos: Float[Array, "*#batch half_R"],
    sin: Float[Array, "*#batch half_R"],
    *,
    interleaved: bool,
) -> Float[Array, "*batch R"]:
    """Rotate the pairs (a, b) of x by an angle: (a cos - b sin, b cos + a sin), written as halves [a' | b'].

    The order written does not matter to a score, since queries and keys go through the same rotation; halves
    are what Hugging Face's DeepSeek-V3 caches.

    Args:
        x: [..., R], any float dtype.
        cos: float32 [..., R/2], broadcast against x's leading axes by the caller.
        sin: likewise.
        interleaved: pairs are (x0, x1), (x2, x3), ...; otherwise (x0, x_{R/2}), (x1, x_{R/2+1}), ...

    Returns:
        [..., R] in x's dtype; computed in float32 and rounded once.
    """
    wide = x.astype(jnp.float32)
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
    else:
        a, b = jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
