"""Attention over the latent cache in plain XLA: blocks of keys, an online softmax, no score matrix in memory.

Decoding is *absorbed*: queries already in latent space attend to the cache entries themselves, one shared
key/value head. Prefill is *expanded*: each block of latents goes through kv_b_proj to per-head keys and
values, which costs fewer operations once there are more than L (P+V) / (2L-P-V) queries to share it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_fp4_jax.cache import Cache, PagedLatentCache, numbers
from mla_fp4_jax.einsum import einsum_f32

KEY_BLOCK = 512
# Scores in flight at once, B * T * H * K elements of 4 bytes: 64 MiB.
SCORE_ELEMENTS = 1 << 24

KeysValues = Callable[[Float[Array, "B K LR"]], tuple[Float[Array, "..."], Float[Array, "..."]]]


def absorbed_attention(
    q: Float[Array, "B T H LR"],
    cache: Cache,
    visible: Int[Array, "B T"],
    scale: float,
) -> tuple[Float[Array, "B T H L"], Float[Array, "B T H"]]:
    """softmax(q . entry * scale) over the slots a query sees, applied to the entries' latents.

    Args:
        q: latent queries then rotated rope queries, in the compute dtype.
        cache: keys (all L+R columns) and values (the first L).
        visible: query (b, t) sees the slots 0 .. visible[b, t] - 1 that the cache holds.
        scale: the softmax scale, (P + R)^-1/2 times YaRN's.

    Returns:
        The attended latent in q's dtype, and the natural-log LSE in float32. A query that sees nothing gets
        exactly 0 and -inf.
    """
    rank = cache.kv_lora_rank

    def keys_values(entries):
        entries = numbers(entries, cache, q.dtype)
        return entries, entries[..., :rank]

    return _blockwise(q, cache, visible, scale, keys_values, rank)


def expanded_attention(
    q: Float[Array, "B T H PR"],
    cache: Cache,
    visible: Int[Array, "B T"],
    scale: float,
    kv_b_proj: Callable[[Float[Array, "B K L"]], Float[Array, "B K H PV"]],
    qk_nope_head_dim: int,
    v_head_dim: int,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """As absorbed_attention, with per-head keys and values expanded from the latents block by block.

    Args:
        q: nope then rotated rope queries.
        cache: the latents and rope keys.
        visible: see absorbed_attention.
        scale: likewise.
        kv_b_proj: the up-projection of one block of latents.
        qk_nope_head_dim: P, the columns of kv_b_proj's output that are keys.
        v_head_dim: V, the rest.

    Returns:
        The attended values in q's dtype, and the natural-log LSE in float32.
    """
    rank = cache.kv_lora_rank

    def keys_values(entries):
        entries = numbers(entries, cache, q.dtype)
        expanded = kv_b_proj(entries[..., :rank])
        k_rope = jnp.broadcast_to(entries[:, :, None, rank:], (*expanded.shape[:3], entries.shape[-1] - rank))
        return jnp.concatenate([expanded[..., :qk_nope_head_dim], k_rope], -1), expanded[..., qk_nope_head_dim:]

    return _blockwise(q, cache, visible, scale, keys_values, v_head_dim)


def _blockwise(
    q: Float[Array, "B T H D"],
    cache: Cache,
    visible: Int[Array, "B T"],
    scale: float,
    keys_values: KeysValues,
    width: int,
) -> tuple[Float[Array, "B T H W"], Float[Array, "B T H"]]:
    """Queries in blocks that bound the memory of their scores; each block runs on its own."""
    batch, tokens, heads, _ = q.shape
    size = max(1, min(tokens, SCORE_ELEMENTS // (batch * heads * _key_block(cache))))
    if size == tokens:
        return _attend(q, cache, visible, scale, keys_values, width)
    blocks = -(-tokens // size)
    padding = blocks * size - tokens
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    visible = jnp.pad(visible, ((0, 0), (0, padding)))

    def one(i):
        part = jax.lax.dynamic_slice_in_dim(q, i * size, size, 1)
        seen = jax.lax.dynamic_slice_in_dim(visible, i * size, size, 1)
        return _attend(part, cache, seen, scale, keys_values, width)

    out, lse = jax.lax.map(one, jnp.arange(blocks))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, blocks * size, heads, width)
    lse = jnp.moveaxis(lse, 0, 1).reshape(batch, blocks * size, heads)
    return out[:, :tokens], lse[:, :tokens]


def _attend(
    q: Float[Array, "B T H D"],
    cache: Cache,
    visible: Int[Array, "B T"],
    scale: float,
    keys_values: KeysValues,
    width: int,
) -> tuple[Float[Array, "B T H W"], Float[Array, "B T H"]]:
    batch, tokens, heads, _ = q.shape
    size = _key_block(cache)

    def step(index, state):
        highest, total, acc = state
        entries, slots = cache.block(index, size)
        keys, values = keys_values(entries)
        head = "h" if keys.ndim == 4 else ""
        scores = einsum_f32(f"bthd,bk{head}d->bthk", q, keys)
        seen = (slots[:, None] >= 0) & (slots[:, None] < visible[:, :, None])
        scores = jnp.where(seen[:, :, None], scores * scale, -jnp.inf)
        new_highest = jnp.maximum(highest, scores.max(-1))
        # A row that has seen nothing yet has no maximum; any finite one keeps exp(-inf - .) at 0.
        offset = jnp.where(jnp.isneginf(new_highest), 0.0, new_highest)
        probs = jnp.exp(scores - offset[..., None])
        kept = jnp.exp(highest - offset)
        product = einsum_f32(f"bthk,bk{head}w->bthw", probs.astype(values.dtype), values)
        return new_highest, total * kept + probs.sum(-1), acc * kept[..., None] + product

    start = (
        jnp.full((batch, tokens, heads), -jnp.inf, jnp.float32),
        jnp.zeros((batch, tokens, heads), jnp.float32),
        jnp.zeros((batch, tokens, heads, width), jnp.float32),
    )
    # The trip count follows the longest sequence, not the capacity, and is data: it never retraces.
    longest = jnp.minimum(jnp.max(visible), jnp.max(cache.length))
    blocks = (longest + size - 1) // size
    highest, total, acc = jax.lax.fori_loop(0, blocks, step, start)
    alive = total != 0  # NaN counts: a poisoned weight must show
    out = jnp.where(alive[..., None], acc / jnp.where(alive, total, 1.0)[..., None], 0.0)
    lse = jnp.where(alive, highest + jnp.log(jnp.where(alive, total, 1.0)), -jnp.inf)
    return out.astype(q.dtype), lse


def _key_block(cache: Cache) -> int:
    """Slots per block: KEY_BLOCK, or the whole cache where that is smaller; whole pages either way."""
    return (
        min(KEY_BLOCK, cache.capacity)
        if not isinstance(cache, PagedLatentCache)
        else min(max(KEY_BLOCK // cache.page_size, 1) * cache.page_size, cache.capacity)
    )
