"""The demo's yardstick: a layer in NumPy float64, keys and values expanded; shares no code with the library.

Weights are turned to float64 a few rows at a time and attention goes head by head, so that a full-size layer
needs little memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
from jaxtyping import Float64, Int

from mla_fp4_jax.config import MLAConfig, RopeConfig
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.weights import MLAWeights

# OCP Microscaling Formats v1.0, section 5.3.3; bit 3 is the sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)])
_ELEMENTS_AT_ONCE = 1 << 23  # 64 MiB of float64

Quantise = Callable[[np.ndarray], np.ndarray]


def decode_mxfp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float64 values of packed codes [..., C/2] under scale bytes [..., C/32]."""
    return decode(packed, np.exp2(scales.astype(np.float64) - 127))


def decode(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float64 values of packed codes [..., C/2] under scales [..., C/G] that are numbers already."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return _E2M1[codes] * np.repeat(scales, codes.shape[-1] // scales.shape[-1], axis=-1)


def _nvfp4_scales(weight: FP4Array, scales: np.ndarray) -> np.ndarray:
    values = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    if weight.global_divisor is not None:
        return values / float(weight.global_divisor)
    return values if weight.global_scale is None else values * float(weight.global_scale)


class Float64Layer:
    """A layer's weights as float64, made on demand, and the steps of MLA on them for one sequence."""

    def __init__(self, config: MLAConfig, weights: MLAWeights):
        """Copy the weights to the host as they are stored."""
        self.config = config
        self._weights = {}
        for field, value in vars(weights).items():
            if isinstance(value, FP4Array):
                packed, scales = (np.asarray(part) for part in value.to_packed()[:2])
                self._weights[field] = (packed, scales if value.format == "mxfp4" else _nvfp4_scales(value, scales))
            elif value is not None:
                self._weights[field] = np.asarray(value)

    def has(self, field: str) -> bool:
        """Whether the layer has this weight."""
        return field in self._weights

    def length(self, field: str) -> int:
        """Of a weight's first axis."""
        value = self._weights[field]
        return len(value[0] if isinstance(value, tuple) else value)

    def rows(self, field: str, part: slice | int) -> np.ndarray:
        """Some of a weight's first axis, in float64."""
        value = self._weights[field]
        if isinstance(value, tuple):
            packed, scales = value[0][part], value[1][part]
            return decode_mxfp4(packed, scales) if scales.dtype == np.uint8 else decode(packed, scales)
        return value[part].astype(np.float64)

    def linear(self, x: Float64[np.ndarray, "T C"], field: str) -> Float64[np.ndarray, "T N"]:
        """x @ W.T."""
        step = max(1, _ELEMENTS_AT_ONCE // x.shape[1])
        starts = range(0, self.length(field), step)
        parts = [x @ self.rows(field, slice(start, start + step)).T for start in starts]
        return np.concatenate(parts, axis=1)

    def bias(self, field: str) -> np.ndarray | float:
        """A bias, or 0 where there is none."""
        return self.rows(field, slice(None)) if self.has(field) else 0.0

    def norm(self, x: Float64[np.ndarray, "T D"], field: str) -> Float64[np.ndarray, "T D"]:
        """RMS norm."""
        scale = np.sqrt(np.mean(x * x, axis=1, keepdims=True) + self.config.layernorm_eps)
        return x / scale * self.rows(field, slice(None))

    def queries(
        self, x: Float64[np.ndarray, "T E"], positions: Int[np.ndarray, "T"]
    ) -> Float64[np.ndarray, "T H PR"]:
        """Queries with their rope columns rotated."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.linear(x, "q_proj")
        else:
            low = self.norm(self.linear(x, "q_a_proj") + self.bias("q_a_proj_bias"), "q_a_layernorm")
            q = self.linear(low, "q_b_proj")
        q = q.reshape(len(x), c.num_attention_heads, -1)
        angles = _angles(c.rope, c.qk_rope_head_dim, positions)[:, None]
        rotated = self._rotate(q[..., c.qk_nope_head_dim :], angles)
        turns = np.floor(positions / c.rope.original_max_position_embeddings)
        warmth = c.q_scale * (1.0 + (c.rope.llama_4_scaling_beta or 0.0) * np.log(1.0 + turns))
        return np.concatenate([q[..., : c.qk_nope_head_dim], rotated], axis=-1) * warmth[:, None, None]

    def entries(self, x: Float64[np.ndarray, "S E"]) -> tuple[Float64[np.ndarray, "S L"], Float64[np.ndarray, "S R"]]:
        """What a cache would hold of tokens 0 .. S-1: normed latents and rotated rope keys."""
        c = self.config
        kv = self.linear(x, "kv_a_proj_with_mqa") + self.bias("kv_a_proj_bias")
        angles = _angles(c.rope, c.qk_rope_head_dim, np.arange(len(x)))
        latent = self.norm(kv[:, : c.kv_lora_rank], "kv_a_layernorm") * c.latent_scale
        return latent, self._rotate(kv[:, c.kv_lora_rank :], angles)

    def naive(
        self,
        q: Float64[np.ndarray, "T H PR"],
        latent: Float64[np.ndarray, "S L"],
        k_rope: Float64[np.ndarray, "S R"],
        positions: Int[np.ndarray, "T"],
    ) -> Float64[np.ndarray, "T H V"]:
        """Attention over expanded keys and values."""
        c, out = self.config, []
        for h in range(c.num_attention_heads):
            expanded = latent @ self.rows("kv_b_proj", h).T
            keys = np.concatenate([expanded[:, : c.qk_nope_head_dim], k_rope], axis=1)
            probabilities = _causal_softmax(q[:, h] @ keys.T * self._softmax_scale(), positions)
            out.append(probabilities @ expanded[:, c.qk_nope_head_dim :])
        return np.stack(out, axis=1)

    def absorbed(
        self,
        q: Float64[np.ndarray, "T H PR"],
        latent: Float64[np.ndarray, "S L"],
        k_rope: Float64[np.ndarray, "S R"],
        positions: Int[np.ndarray, "T"],
        w_k: Callable[[int], np.ndarray],
        w_v: Callable[[int], np.ndarray],
        quantise: Quantise = lambda x: x,
    ) -> Float64[np.ndarray, "T H V"]:
        """Attention in latent space with other weights, as functions of the head: w_k [P, L], w_v [V, L].

        `quantise` is applied to what the two absorbed products take in: q_nope, and the attended latent.
        """
        c, out = self.config, []
        keys = np.concatenate([latent, k_rope], axis=1)
        for h in range(c.num_attention_heads):
            q_latent = quantise(q[:, h, : c.qk_nope_head_dim]) @ w_k(h)
            scores = np.concatenate([q_latent, q[:, h, c.qk_nope_head_dim :]], axis=1) @ keys.T
            attended = _causal_softmax(scores * self._softmax_scale(), positions) @ latent
            out.append(quantise(attended) @ w_v(h).T)
        return np.stack(out, axis=1)

    def output(self, heads: Float64[np.ndarray, "T H V"]) -> Float64[np.ndarray, "T E"]:
        """The last projection."""
        return self.linear(heads.reshape(len(heads), -1), "o_proj") + self.bias("o_proj_bias")

    def _rotate(self, x: np.ndarray, angles: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        a, b = (x[..., 0::2], x[..., 1::2]) if self.config.rope_interleave else (x[..., :half], x[..., half:])
        turned = (a + 1j * b) * np.exp(1j * angles) * _cos_sin_scale(self.config.rope)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def _softmax_scale(self) -> float:
        c, rope = self.config, self.config.rope
        yarn = rope.rope_type == "yarn" and bool(rope.mscale_all_dim)
        temperature = _yarn_m(rope.factor, rope.mscale_all_dim or 0.0) if yarn else 1.0
        return temperature**2 / math.sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim)


def _causal_softmax(scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
    seen = np.arange(scores.shape[1])[None] <= positions[:, None]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _yarn_m(factor: float, mscale: float) -> float:
    return 1.0 + 0.1 * mscale * math.log(factor) if factor > 1 else 1.0


def _cos_sin_scale(rope: RopeConfig) -> float:
    if rope.rope_type == "default":
        return 1.0
    if rope.attention_factor is not None or rope.rope_type == "longrope":
        return 1.0 if rope.attention_factor is None else rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_m(rope.factor, rope.mscale) / _yarn_m(rope.factor, rope.mscale_all_dim)
    return _yarn_m(rope.factor, 1.0)


def _angles(rope: RopeConfig, dim: int, positions: np.ndarray) -> np.ndarray:
    """Position times frequency; frequencies are rounded to float32, which is part of what the models are."""
    frequencies = []
    for j in range(dim // 2):
        plain = rope.theta ** (-2 * j / dim)
        kept = 1.0
        if rope.rope_type == "yarn":
            low, high = _ramp(rope, dim)
            kept = 1.0 - min(max((j - low) / (high - low), 0.0), 1.0)
        divisor = 1.0 if rope.frequency_divisors is None else rope.frequency_divisors[j]
        frequencies.append((plain * kept + plain / rope.factor * (1.0 - kept)) / divisor)
    return positions[:, None] * np.array(frequencies, np.float32).astype(np.float64)


def _ramp(rope: RopeConfig, dim: int) -> tuple[float, float]:
    context, log_theta = rope.original_max_position_embeddings, math.log(rope.theta)
    ends = [
        dim * math.log(context / (2 * math.pi * turns)) / (2 * log_theta)
        for turns in (rope.beta_fast, rope.beta_slow)
    ]
    if rope.truncate:
        ends = [math.floor(ends[0]), math.ceil(ends[1])]
    low, high = max(ends[0], 0), min(ends[1], dim - 1)
    return low, high + 0.001 if low == high else high
