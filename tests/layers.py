"""Small random layers for tests, with their weights once more as the oracle's float64 arrays."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
from flax import nnx

from mla_fp4_jax import FP4Array, MLAAttention, MLAConfig
from mla_fp4_jax.rope import inverse_frequencies


def small_config(**changes) -> MLAConfig:
    """All sizes different, so that no two axes can be confused; groups of 32 fit kv_lora_rank."""
    sizes = {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "q_lora_rank": 40,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
    }
    return MLAConfig(**{**sizes, **changes})


def make_layer(config: MLAConfig, *, seed: int = 0, dtype=jnp.float32, **kwargs) -> MLAAttention:
    """A layer with random norms and biases too."""
    layer = MLAAttention(config, dtype=dtype, rngs=nnx.Rngs(seed), **kwargs)
    rng = np.random.default_rng(seed)
    for name, value in named_weights(layer).items():
        if name.endswith(("layernorm", "bias")):
            noise = rng.standard_normal(value.shape) * 0.3 + (1.0 if name.endswith("layernorm") else 0.0)
            setattr(layer, name, nnx.Param(jnp.asarray(noise, dtype)))
    return layer


def named_weights(layer: MLAAttention) -> dict:
    weights = layer.weights
    pairs = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return {name: value for name, value in pairs.items() if value is not None}


def to_float64(value) -> np.ndarray:
    """A weight as the oracle sees it: packed bytes are decoded by the oracle's own table."""
    if not isinstance(value, FP4Array):
        return np.asarray(value.astype(jnp.float32)).astype(np.float64)
    packed, scales = value.to_packed()[:2]
    if value.format == "mxfp4":
        return oracle.dequantize(oracle.unpack(np.asarray(packed)), oracle.e8m0(np.asarray(scales)))
    scale_bytes = np.asarray(scales).view(np.uint8)
    return oracle.dequantize(
        oracle.unpack(np.asarray(packed)), oracle.e4m3(scale_bytes), float(np.asarray(value.global_scale))
    )


def oracle_layer(layer: MLAAttention, x: np.ndarray, positions: np.ndarray | None = None):
    """The oracle's y, latents and rope keys for one sequence x [T, E]."""
    config = layer.config
    return oracle.layer(
        np.asarray(x, np.float64),
        {name: to_float64(value) for name, value in named_weights(layer).items()},
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        inv_freq=inverse_frequencies(config.rope, config.qk_rope_head_dim).astype(np.float64),
        scale=config.softmax_scale,
        interleaved=config.rope_interleave,
        eps=config.layernorm_eps,
        positions=positions,
        cos_sin_scale=config.rope.cos_sin_scale,
    )
