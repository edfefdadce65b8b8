"""The parts of a decode step of bench.step, each alone: their kernels' times and their floors."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from bench.step_timing import kernels, total
from mla_fp4_jax import MLAConfig, MLAWeights
from mla_fp4_jax.cache import PagedLatentCache
from mla_fp4_jax.functional import rms_norm
from mla_fp4_jax.ops.mla_decode import mla_decode as latent_attention
from mla_fp4_jax.projections import k_up_proj, linear, v_up_proj
from mla_fp4_jax.rope import cos_sin, rotate

PAGE = 64


def make_cache(config: MLAConfig, batch: int, keys: int, seed: int) -> jax.Array:
    """Entries [B, S, L + R] of unit size; as pages, sequence after sequence."""
    key = jax.random.key(seed, impl="rbg")
    return jax.random.normal(key, (batch, keys, config.cache_dim), jnp.bfloat16)


def paged(entries: jax.Array, config: MLAConfig, length: int) -> PagedLatentCache:
    """A cache of pages [N, 64, L + R], or of entries that are cut into such."""
    batch, keys = entries.shape[:2]
    table = jnp.arange(batch * keys // PAGE, dtype=jnp.int32).reshape(batch, -1)
    pages = entries.reshape(-1, PAGE, config.cache_dim)
    return PagedLatentCache(pages, table, jnp.full((batch,), length, jnp.int32), config.kv_lora_rank)


def parts(config: MLAConfig) -> dict[str, Any]:
    """Name -> (weights, inputs) -> result of one part, as mla_decode composes them."""
    c = config

    def q_proj(w, x):
        low = rms_norm(linear(x, w.q_a_proj), w.q_a_layernorm, c.layernorm_eps)
        return linear(low, w.q_b_proj).reshape(*x.shape[:2], c.num_attention_heads, c.qk_head_dim)

    def kv_a_proj(w, x):
        return linear(x, w.kv_a_proj_with_mqa)

    def rope_and_write(w, state):
        kv, entries = state
        length = entries.shape[1] - 1
        cos, sin = cos_sin(c.rope, c.qk_rope_head_dim, jnp.full(kv.shape[:2], length, jnp.int32))
        latent = rms_norm(kv[..., : c.kv_lora_rank], w.kv_a_layernorm, c.layernorm_eps)
        k_rope = rotate(kv[..., c.kv_lora_rank :], cos, sin, interleaved=c.rope_interleave)
        cache = paged(entries, c, length)
        new = jnp.concatenate([latent, k_rope], -1)
        return kv, cache.append(new, jnp.ones(kv.shape[:2], bool)).pages.reshape(entries.shape)

    def k_up(w, q):
        return k_up_proj(q, w.kv_b_proj, c.qk_nope_head_dim)

    def rope_q(w, state):
        del w
        q, q_latent = state
        cos, sin = cos_sin(c.rope, c.qk_rope_head_dim, jnp.full(q.shape[:2], 4095, jnp.int32))
        rope = rotate(q[..., c.qk_nope_head_dim :], cos[:, :, None], sin[:, :, None], interleaved=c.rope_interleave)
        return jnp.concatenate([q_latent, rope], axis=-1)

    def attention(w, state):
        del w
        q, entries = state
        seen = jnp.full(q.shape[:2], entries.shape[1], jnp.int32)
        return latent_attention(q, paged(entries, c, entries.shape[1]), seen, scale=c.softmax_scale)

    def v_up(w, attended):
        return v_up_proj(attended, w.kv_b_proj, c.v_head_dim)

    def o_proj(w, heads):
        return linear(heads.reshape(*heads.shape[:2], -1), w.o_proj)

    return {
        "q_proj": q_proj,
        "kv_a_proj": kv_a_proj,
        "rope_and_write": rope_and_write,
        "k_up": k_up,
        "rope_q": rope_q,
        "attention": attention,
        "v_up": v_up,
        "o_proj": o_proj,
    }


def part_inputs(config: MLAConfig, batch: int, keys: int) -> dict[str, Any]:
    """Random inputs of every part."""
    c, heads = config, config.num_attention_heads

    def random(*shape):
        return jax.random.normal(jax.random.key(1, impl="rbg"), (batch, 1, *shape), jnp.bfloat16)

    x, q = random(c.hidden_size), random(heads, c.qk_head_dim)
    return {
        "q_proj": x,
        "kv_a_proj": x,
        "rope_and_write": (random(c.cache_dim), make_cache(c, batch, keys, 0)),
        "k_up": q,
        "rope_q": (q, random(heads, c.kv_lora_rank)),
        "attention": (random(heads, c.cache_dim), make_cache(c, batch, keys, 0)),
        "v_up": random(heads, c.kv_lora_rank),
        "o_proj": random(heads, c.v_head_dim),
    }


def measure_parts(config: MLAConfig, layer: MLAWeights, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Kernel time of every part, cold weights, microseconds."""
    _, batch, keys = shape
    inputs, times = part_inputs(config, batch, keys), {}
    flush = jnp.zeros((1 << 26,), jnp.uint8)  # 64 MB between calls: past the L2 cache

    for part, call in parts(config).items():
        if part == "rope_and_write":
            seen, state = kernels(jax.jit(lambda s, w, call=call: call(w, s), donate_argnums=0), inputs[part], layer)
            del state
        else:
            jitted = jax.jit(call)

            def run(state, w, part=part, jitted=jitted):
                jitted(w, inputs[part])
                return state + 1

            seen, flush = kernels(run, flush, layer)
            seen = seen[:-1]  # the flush
        times[part] = {"us": round(total(seen), 2), "launches": len(seen)}
    return times


def floors(
    config: MLAConfig, weights: MLAWeights, shape: tuple[int, int, int], ceilings: dict[str, float]
) -> dict[str, dict[str, float]]:
    """What every part must move and multiply: megabytes, operations, and the time of the slower of the two, us."""
    c, (heads, batch, keys) = config, shape
    up = heads * c.kv_lora_rank * batch * 2  # operations of an absorbed product are this times P or V

    def stored(*names: str) -> float:
        arrays = [getattr(weights, name) for name in names]
        return sum(math.prod(a.shape) * (2.0 if isinstance(a, jax.Array) else 4.25 / 8) for a in arrays)

    def linear_part(*names: str) -> tuple[float, float]:
        return stored(*names), sum(2.0 * batch * math.prod(getattr(weights, name).shape) for name in names)

    share = c.qk_nope_head_dim / (c.qk_nope_head_dim + c.v_head_dim)
    entry, latent = c.cache_dim * 2, heads * c.kv_lora_rank * 2
    table = {
        "q_proj": linear_part("q_a_proj", "q_b_proj"),
        "kv_a_proj": linear_part("kv_a_proj_with_mqa"),
        "rope_and_write": (2 * batch * entry, 0.0),
        "k_up": (share * stored("kv_b_proj"), up * c.qk_nope_head_dim),
        "attention": (
            batch * (keys * entry + heads * entry + latent),
            2.0 * batch * heads * keys * (c.cache_dim + c.kv_lora_rank),
        ),
        "v_up": ((1 - share) * stored("kv_b_proj"), up * c.v_head_dim),
        "o_proj": linear_part("o_proj"),
    }
    result = {}
    for part, (moved, operations) in table.items():
        us = max(moved / ceilings["tb_per_s"], operations / ceilings["tflops"]) / 1e6
        result[part] = {"mb": round(moved / 1e6, 3), "gflop": round(operations / 1e9, 3), "us": round(us, 2)}
    return result
