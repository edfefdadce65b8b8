"""The layers that bench.step measures: random FP4 weights, the same dequantised, and a plain XLA layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bench.roofline import DEEPSEEK_V3
from mla_fp4_jax import FP4Array, MLAConfig, MLAWeights
from mla_fp4_jax.einsum import einsum_f32, einsum_rounded
from mla_fp4_jax.norm import rms_norm
from mla_fp4_jax.rope import cos_sin, rotate
from mla_fp4_jax.weights import weight_shapes

# Uniform codes have a root mean square of 2.93; with these scale bytes rows have about unit gain.
_SCALES = {
    "q_a_proj": 119,
    "q_b_proj": 120,
    "kv_a_proj_with_mqa": 119,
    "kv_b_proj": 121,
    "o_proj": 118,
}


def v3_config(heads: int, *, small: bool = False) -> MLAConfig:
    """DeepSeek-V3's layer with this many heads on the device; small sizes to prove the bench on a CPU."""
    c = dataclasses.replace(DEEPSEEK_V3, num_attention_heads=heads)
    if not small:
        return c
    sizes: dict[str, Any] = {"hidden_size": 128, "q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 32}
    return dataclasses.replace(c, qk_nope_head_dim=32, qk_rope_head_dim=16, **sizes)


@functools.partial(jax.jit, static_argnums=0)
def fp4_layer(config: MLAConfig, seed: Int[Array, ""]) -> MLAWeights:
    """Every projection in MXFP4, random codes; norms are ones."""
    made = {}
    for i, (name, shape) in enumerate(weight_shapes(config).items()):
        if name.endswith("layernorm"):
            made[name] = jnp.ones(shape, jnp.bfloat16)
            continue
        of_codes, of_scales = jax.random.split(jax.random.key(seed * 100 + i, impl="rbg"))
        codes = jax.random.bits(of_codes, (*shape[:-1], shape[-1] // 2), jnp.uint8)
        scales = jax.random.bits(of_scales, (*shape[:-1], shape[-1] // 32), jnp.uint8) % 2 + _SCALES[name] - 1
        made[name] = FP4Array.from_packed(codes, scales)
    return MLAWeights(**made)


@jax.jit
def dense_layer(weights: MLAWeights) -> MLAWeights:
    """The same numbers in bfloat16."""
    fields = {field.name: getattr(weights, field.name) for field in dataclasses.fields(MLAWeights)}
    return MLAWeights(**{n: v.dequantize(jnp.bfloat16) if isinstance(v, FP4Array) else v for n, v in fields.items()})


def plain_step(
    weights: MLAWeights, x: Float[Array, "B 1 E"], entries: Float[Array, "B S LR"], length: Array, config: MLAConfig
):
    """A decode step as plain XLA does it: dense weights, absorbed einsums, scores in memory, one contiguous cache.

    Args:
        weights: dense.
        x: also its compute dtype.
        entries: the cache.
        length: int32 scalar, tokens cached before, of every sequence.
        config: the layer.

    Returns:
        The layer's output, and entries with the new one at `length`.
    """
    c, kind, batch = config, x.dtype, x.shape[0]
    assert weights.q_a_layernorm is not None and isinstance(weights.kv_b_proj, jax.Array)

    def product(spec, a, b):
        return einsum_rounded(spec, a, b.astype(kind), kind)

    cos, sin = cos_sin(c.rope, c.qk_rope_head_dim, jnp.full((batch, 1), length))
    with jax.named_scope("mla/qkv_a_proj"):
        low = product("bte,qe->btq", x, weights.q_a_proj)
        kv = product("bte,ne->btn", x, weights.kv_a_proj_with_mqa)
    with jax.named_scope("mla/norm_rope_write"):
        low = rms_norm(low, weights.q_a_layernorm, c.layernorm_eps)
        latent = rms_norm(kv[..., : c.kv_lora_rank], weights.kv_a_layernorm, c.layernorm_eps)
        k_rope = rotate(kv[..., c.kv_lora_rank :], cos, sin, interleaved=c.rope_interleave)
        new = jnp.concatenate([latent, k_rope], axis=-1).astype(entries.dtype)
        entries = jax.lax.dynamic_update_slice_in_dim(entries, new, length, axis=1)
    with jax.named_scope("mla/q_proj"):
        q = product("btq,nq->btn", low, weights.q_b_proj).reshape(batch, c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
    key_rows, value_rows = jnp.split(weights.kv_b_proj, [c.qk_nope_head_dim], axis=1)
    with jax.named_scope("mla/k_up_proj"):
        q_latent = product("bhp,hpl->bhl", q_nope, key_rows)
    with jax.named_scope("mla/attention"):
        q = jnp.concatenate([q_latent, rotate(q_rope, cos, sin, interleaved=c.rope_interleave)], -1)
        scores = einsum_f32("bhd,bsd->bhs", q, entries.astype(kind)) * c.softmax_scale
        scores = jnp.where(jnp.arange(entries.shape[1])[None, None] <= length, scores, -jnp.inf)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(kind)
        attended = product("bhs,bsl->bhl", probabilities, entries[..., : c.kv_lora_rank])
    with jax.named_scope("mla/v_up_proj"):
        heads = product("bhl,hvl->bhv", attended, value_rows)
    with jax.named_scope("mla/o_proj"):
        y = product("bn,en->be", heads.reshape(batch, -1), weights.o_proj)
    return y[:, None], entries
