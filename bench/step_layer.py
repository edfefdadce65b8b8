"""The layers that bench.step measures: random FP4 weights, the same dequantised, and a plain XLA layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mla_fp4_jax import FP4Array, MLAConfig, MLAWeights
from mla_fp4_jax.einsum import einsum_f32
from mla_fp4_jax.functional import rms_norm
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
    sizes = dict(hidden_size=7168, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64)
    if small:
        sizes = dict(hidden_size=128, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16)
    return MLAConfig(num_attention_heads=heads, v_head_dim=32 if small else 128, **sizes)


def fp4_layer(config: MLAConfig, seed: int) -> MLAWeights:
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


def dense_layer(weights: MLAWeights, *, kv_b: bool) -> MLAWeights:
    """The same numbers in bfloat16; kv_b_proj too, or left as it is."""

    def dense(name, value):
        if not isinstance(value, FP4Array) or (name == "kv_b_proj" and not kv_b):
            return value
        return value.dequantize(jnp.bfloat16)

    names = [field.name for field in dataclasses.fields(MLAWeights)]
    return MLAWeights(**{name: dense(name, getattr(weights, name)) for name in names})


def plain_step(weights: MLAWeights, x: jax.Array, entries: jax.Array, length: int, config: MLAConfig):
    """A decode step as plain XLA does it: dense weights, absorbed einsums, scores in memory, one contiguous cache.

    Args:
        weights: dense.
        x: [B, 1, E], also its compute dtype.
        entries: [B, S, L + R].
        length: tokens cached before, of every sequence.
        config: the layer.

    Returns:
        The layer's output, and entries with the new one at `length`.
    """
    c, kind = config, x.dtype

    def product(spec, a, b):
        return einsum_f32(spec, a, b.astype(kind))

    positions = jnp.full((x.shape[0], 1), length, jnp.int32)
    cos, sin = cos_sin(c.rope, c.qk_rope_head_dim, positions)
    low = rms_norm(product("bte,qe->btq", x, weights.q_a_proj).astype(kind), weights.q_a_layernorm, c.layernorm_eps)
    q = product("btq,nq->btn", low, weights.q_b_proj).astype(kind)
    q = q.reshape(x.shape[0], c.num_attention_heads, c.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
    q_rope = rotate(q_rope, cos, sin, interleaved=c.rope_interleave)
    kv = product("bte,ne->btn", x, weights.kv_a_proj_with_mqa).astype(kind)
    latent = rms_norm(kv[..., : c.kv_lora_rank], weights.kv_a_layernorm, c.layernorm_eps)
    k_rope = rotate(kv[..., c.kv_lora_rank :], cos, sin, interleaved=c.rope_interleave)
    new = jnp.concatenate([latent, k_rope], axis=-1).astype(entries.dtype)
    entries = jax.lax.dynamic_update_slice_in_dim(entries, new, length, axis=1)
    key_rows, value_rows = jnp.split(weights.kv_b_proj, [c.qk_nope_head_dim], axis=1)
    q_latent = product("bhp,hpl->bhl", q_nope, key_rows).astype(kind)
    scores = product("bhd,bsd->bhs", jnp.concatenate([q_latent, q_rope], -1), entries) * c.softmax_scale
    scores = jnp.where(jnp.arange(entries.shape[1])[None, None] <= length, scores, -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(kind)
    attended = product("bhs,bsl->bhl", probabilities, entries[..., : c.kv_lora_rank]).astype(kind)
    heads = product("bhl,hvl->bhv", attended, value_rows).astype(kind)
    y = product("bn,en->be", heads.reshape(x.shape[0], -1), weights.o_proj).astype(kind)
    return y[:, None], entries
