"""A layer's weights as a pytree: which arrays a config asks for, their shapes, and random ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.quantize import quantize_mxfp4, quantize_nvfp4

Weight = jax.Array | FP4Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAWeights:
    """The weights of one layer, under Hugging Face's names; any of them dense or FP4.

    Linear weights are [out, in]. With `q_lora_rank` the query goes through q_a_proj, q_a_layernorm and
    q_b_proj, without it through q_proj; the others are None.

    Attributes:
        q_proj: [H*(P+R), E].
        q_a_proj: [Q, E].
        q_a_layernorm: [Q].
        q_b_proj: [H*(P+R), Q].
        kv_a_proj_with_mqa: [L+R, E].
        kv_a_layernorm: [L].
        kv_b_proj: [H, P+V, L], a head's P key rows before its V value rows: the checkpoint's matrix, viewed.
        o_proj: [E, H*V].
        q_a_proj_bias: [Q]; None without attention_bias, as the next two.
        kv_a_proj_bias: [L+R].
        o_proj_bias: [E].
    """

    kv_a_proj_with_mqa: Weight
    kv_a_layernorm: jax.Array
    kv_b_proj: Weight
    o_proj: Weight
    q_proj: Weight | None = None
    q_a_proj: Weight | None = None
    q_a_layernorm: jax.Array | None = None
    q_b_proj: Weight | None = None
    q_a_proj_bias: jax.Array | None = None
    kv_a_proj_bias: jax.Array | None = None
    o_proj_bias: jax.Array | None = None


def weight_shapes(config: MLAConfig) -> dict[str, tuple[int, ...]]:
    """Name -> logical shape of every weight of a layer, in MLAWeights' names and layouts."""
    c, heads = config, config.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {}
    if c.q_lora_rank is None:
        shapes["q_proj"] = (heads * c.qk_head_dim, c.hidden_size)
    else:
        shapes["q_a_proj"] = (c.q_lora_rank, c.hidden_size)
        shapes["q_a_layernorm"] = (c.q_lora_rank,)
        shapes["q_b_proj"] = (heads * c.qk_head_dim, c.q_lora_rank)
    shapes["kv_a_proj_with_mqa"] = (c.cache_dim, c.hidden_size)
    shapes["kv_a_layernorm"] = (c.kv_lora_rank,)
    shapes["kv_b_proj"] = (heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
    shapes["o_proj"] = (c.hidden_size, heads * c.v_head_dim)
    if c.attention_bias:
        if c.q_lora_rank is not None:
            shapes["q_a_proj_bias"] = (c.q_lora_rank,)
        shapes["kv_a_proj_bias"] = (c.cache_dim,)
        shapes["o_proj_bias"] = (c.hidden_size,)
    return shapes


def check_weights(config: MLAConfig, weights: MLAWeights) -> None:
    """Raise ValueError unless `weights` has exactly the arrays that `config` asks for."""
    shapes = weight_shapes(config)
    for field in dataclasses.fields(MLAWeights):
        value, expected = getattr(weights, field.name), shapes.get(field.name)
        if expected is None and value is not None:
            raise ValueError(
                f"MLAAttention: weights.{field.name} must be None for this config; got shape {value.shape}. "
                "Check q_lora_rank and attention_bias."
            )
    for field in dataclasses.fields(MLAWeights):
        value, expected = getattr(weights, field.name), shapes.get(field.name)
        if expected is not None and (value is None or tuple(value.shape) != expected):
            got = None if value is None else tuple(value.shape)
            raise ValueError(
                f"MLAAttention: weights.{field.name} must have shape {expected}; got {got}. "
                "Weights are [out, in], kv_b_proj [H, P+V, L]."
            )


FORMATS = {"dense": lambda dense: dense, "mxfp4": quantize_mxfp4, "nvfp4": quantize_nvfp4}


def random_weights(config: MLAConfig, formats: Mapping[str, str], dtype: DTypeLike, rngs: nnx.Rngs) -> MLAWeights:
    """Weights drawn normal with variance 1 / fan-in, each in its named format ("dense" unless named)."""
    shapes = weight_shapes(config)
    for name, kind in formats.items():
        if name not in shapes or name.endswith(("layernorm", "bias")):
            raise ValueError(
                f"MLAAttention: a format must name one of this layer's projections; got {name!r}. "
                f"They are {[key for key in shapes if key.endswith(('proj', 'mqa'))]}."
            )
        if kind not in FORMATS:
            raise ValueError(f"MLAAttention: the format of {name} must be one of {list(FORMATS)}; got {kind!r}.")
    made = {}
    for name, shape in shapes.items():
        if name.endswith("layernorm"):
            made[name] = jnp.ones(shape, dtype)
        elif name.endswith("bias"):
            made[name] = jnp.zeros(shape, dtype)
        else:
            dense = jax.random.normal(rngs.params(), shape, jnp.float32) * shape[-1] ** -0.5
            made[name] = FORMATS[formats.get(name, "dense")](dense.astype(dtype))
    return MLAWeights(**made)
