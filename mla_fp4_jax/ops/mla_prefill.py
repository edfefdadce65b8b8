"""mla_prefill_attention: attention of many new tokens over the latent cache, expanded to heads, with dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mla_fp4_jax import attention
from mla_fp4_jax.cache import Cache, PagedLatentCache, numbers
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.implementations import INTERPRET, MOSAIC, TRITON, XLA
from pallas_kernels import mla_prefill_triton as triton

# Expanded keys and values in memory at once, B * K * H * (P + V) elements of q's dtype: 1 GiB in bfloat16.
EXPANDED_ELEMENTS = 1 << 29
# Fewer keys at a time than this are not worth a merge.
LEAST_KEYS = 2048
# By implementation, the (dtype, P, R, V) of the tests that it passed on a GPU (tests/test_prefill_gpu.py, an H100):
# None takes it only there.
_CONFIRMED = {MOSAIC: {("bfloat16", 128, 64, 128)}, TRITON: {("bfloat16", 128, 64, 128)}}

Expand = Callable[[Float[Array, "B K L"]], Float[Array, "B K H PV"]]


def mla_prefill_attention(
    q: Float[Array, "B T H PR"],
    cache: Cache,
    visible: Int[Array, "B T"],
    expand: Expand,
    *,
    scale: float,
    v_head_dim: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """softmax(scale q . K) V over the slots a query sees, keys and values expanded from the cached latents.

        K[b, s, h] = [expand(c)[b, s, h, :P] | k_rope[b, s]],   V[b, s, h] = expand(c)[b, s, h, P:]

    A whole prompt, and a chunk against the context cached before it, are the same call. Where all that is seen fits
    EXPANDED_ELEMENTS and about as many slots as there are queries, it is expanded at once; else in blocks of slots,
    each block's result merged with the others' by their LSE. Scores are never in memory.

    Args:
        q: nope then rotated rope queries, P + R columns.
        cache: the latents and rope keys, the new tokens' own included.
        visible: query (b, t) sees the slots 0 .. visible[b, t] - 1 that the cache holds; 0 for padding.
        expand: kv_b_proj of a block of latents, in q's dtype.
        scale: the softmax scale, > 0.
        v_head_dim: V, the last columns of what expand returns.
        implementation: "mosaic_gpu" (Pallas, on a Hopper GPU, P = V = 128, R = 64, bfloat16), "triton" (Pallas, on a
            GPU), "xla" (anywhere), "triton_interpret" (the Triton kernel in Pallas's interpreter, for tests), or None
            for the fastest that can run here.

    Returns:
        The attended values in q's dtype, and the natural-log LSE in float32. A query that sees nothing gets
        exactly 0 and -inf.

    Raises:
        ValueError: shapes, ranges or names that do not fit.
        NotImplementedError: the implementation named cannot run here, or not on these operands. None never fails.

    Numerics:
        Scores and sums are float32, probabilities are rounded to q's dtype before they meet the values; parts are
        merged in float32. Slots past a length and pages that do not exist reach no result, NaN included.
    """
    kv_shape = _check(q, cache, visible, expand, scale, v_head_dim, implementation)
    name, why = _choose(q, cache, kv_shape, v_head_dim, implementation)
    implementations.log_choice("mla_prefill", name, why)
    run = functools.partial(_run, expand=expand, scale=float(scale), kv_shape=kv_shape, v_head_dim=v_head_dim)
    if implementation is None and name != XLA:
        # Decided for the device that is traced for; a program lowered for another one falls back.
        chosen = functools.partial(run, name=name)
        platforms = {"cuda": chosen} if name == MOSAIC else {"cuda": chosen, "rocm": chosen}
        return jax.lax.platform_dependent(q, cache, visible, **platforms, default=functools.partial(run, name=XLA))
    return run(q, cache, visible, name=name)


def keys_at_once(cache: Cache, batch: int, tokens: int, elements_per_slot: int) -> int:
    """Slots that are expanded at once: all, or about as many as there are queries, within EXPANDED_ELEMENTS.

    So many that a first chunk is one block, and not so many that it expands a long cache's empty slots.
    """
    unit = 512 if not isinstance(cache, PagedLatentCache) else max(512, cache.page_size)
    allowed = EXPANDED_ELEMENTS // (batch * elements_per_slot)
    wanted = max(LEAST_KEYS, -(-tokens // unit) * unit)
    return min(cache.capacity, max(unit, min(wanted, allowed // unit * unit)))


def _run(
    q: Array,
    cache: Cache,
    visible: Array,
    *,
    name: str,
    expand: Expand,
    scale: float,
    kv_shape: tuple[int, ...],
    v_head_dim: int,
) -> tuple[Array, Array]:
    def plain() -> tuple[Array, Array]:
        nope = kv_shape[3] - v_head_dim
        return attention.expanded_attention(q, cache, visible, scale, expand, nope, v_head_dim)

    if name == XLA:
        return plain()
    visible = jnp.minimum(visible, cache.length[:, None]).astype(jnp.int32)
    size = kv_shape[1]
    longest = jnp.max(visible)
    call: Any = functools.partial(_kernel, q, name=name, scale=scale, v_head_dim=v_head_dim)

    def part(index: int | Array, out_dtype: DTypeLike) -> tuple[Array, Array]:
        entries = numbers(_block(cache, index, size), cache, q.dtype)
        kv = expand(entries[..., : cache.kv_lora_rank])
        k_rope = entries[..., cache.kv_lora_rank :]
        return call(kv, k_rope, jnp.clip(visible - index * size, 0, size), out_dtype=out_dtype)

    def parts() -> tuple[Array, Array]:
        def more(index, state):
            out, lse = state
            return merge(out, lse, *part(index, jnp.float32))

        blocks = (longest + size - 1) // size
        out, lse = jax.lax.fori_loop(1, blocks, more, part(0, jnp.float32))
        return out.astype(q.dtype), lse

    def whole() -> tuple[Array, Array]:
        return part(0, q.dtype)

    def kernel() -> tuple[Array, Array]:
        return whole() if size == cache.capacity else jax.lax.cond(longest <= size, whole, parts)

    # The kernels take a row's keys without a gap; a page that is lacking is one.
    gaps = _gaps(cache)
    return kernel() if gaps is None else jax.lax.cond(gaps, plain, kernel)


def merge(out: Array, lse: Array, other: Array, other_lse: Array) -> tuple[Array, Array]:
    """Two results over different keys as one, weighted by exp(lse); rows that saw nothing in both stay 0 and -inf."""
    highest = jnp.maximum(lse, other_lse)
    offset = jnp.where(jnp.isneginf(highest), 0.0, highest)
    ours, theirs = jnp.exp(lse - offset), jnp.exp(other_lse - offset)
    total = ours + theirs
    safe = jnp.where(total == 0, 1.0, total)
    merged = out * (ours / safe)[..., None] + other * (theirs / safe)[..., None]
    return merged, jnp.where(total == 0, -jnp.inf, offset + jnp.log(safe))


def _block(cache: Cache, index: int | Array, size: int) -> Array:
    """The entries of slots index * size .., in order; zeros where the cache holds none."""
    index = jnp.asarray(index, jnp.int32)
    entries, _ = cache.block(index, size)
    if cache.capacity % size == 0:
        return entries
    # The last block begins early, with zeros for what was seen before: they go to its end.
    return jnp.roll(entries, -jnp.maximum(index * size - (cache.capacity - size), 0), axis=1)


def _gaps(cache: Cache) -> Array | None:
    """Whether any page that should hold a sequence's tokens does not exist."""
    if not isinstance(cache, PagedLatentCache):
        return None
    exists = (cache.page_table >= 0) & (cache.page_table < cache.pages.shape[0])
    used = jnp.arange(cache.page_table.shape[1])[None] * cache.page_size < cache.length[:, None]
    return jnp.any(used & ~exists)


def _kernel(q, kv, k_rope, visible, *, name, scale, v_head_dim, out_dtype) -> tuple[Array, Array]:
    if name == MOSAIC:
        from pallas_kernels import mla_prefill_mosaic_gpu as mosaic  # needs names that old versions of JAX lack

        return mosaic.mla_prefill_mosaic_gpu(q, kv, k_rope, visible, scale=scale, out_dtype=out_dtype)
    return triton.mla_prefill_triton(
        q,
        kv,
        k_rope,
        visible,
        v_head_dim=v_head_dim,
        scale=scale,
        out_dtype=out_dtype,
        interpret=name == INTERPRET,
    )


def _choose(q, cache, kv_shape, v_head_dim, implementation) -> tuple[str, str]:
    """The implementation for these operands, and why it is not one that is preferred to it."""
    if implementation is not None:
        reason = _why_not(implementation, q, cache, kv_shape, v_head_dim)
        if reason is not None:
            raise NotImplementedError(
                f"mla_prefill: implementation {implementation!r} cannot run: {reason} Use None for one that can."
            )
        return implementation, "asked for"
    reasons = []
    for name in implementations.PREFERENCE:
        reason = _why_not(name, q, cache, kv_shape, v_head_dim)
        if reason is None and name != XLA and not _confirmed(name, q, kv_shape, v_head_dim):
            reason = "on such operands it has not run on a GPU; name it to use it."
        if reason is None:
            return name, " ".join(reasons)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("xla runs everywhere")


def _confirmed(name: str, q: Array, kv_shape: tuple[int, ...], v_head_dim: int) -> bool:
    """Whether a GPU of this kind has confirmed an implementation on such operands; ROCm has confirmed none."""
    nope = kv_shape[3] - v_head_dim
    operands = (jnp.dtype(q.dtype).name, nope, q.shape[3] - nope, v_head_dim)
    gpu = implementations.target_gpu()
    return operands in _CONFIRMED.get(name, set()) and gpu is not None and gpu.platform == "cuda"


def _why_not(name: str, q: Array, cache: Cache, kv_shape: tuple[int, ...], v_head_dim: int) -> str | None:
    """Why an implementation cannot run here on these operands, or None."""
    reason = implementations.why_not(name)
    if reason is not None or name == XLA:
        return reason
    if 0 in q.shape or cache.capacity == 0:
        return f"q and the cache must not be empty; got {q.shape}."
    operands = {"kv_shape": kv_shape, "rope": q.shape[3] - kv_shape[3] + v_head_dim, "v_head_dim": v_head_dim}
    if name == MOSAIC:
        from pallas_kernels import mla_prefill_mosaic_gpu as mosaic  # needs names that old versions of JAX lack

        return mosaic.unsupported(q, **operands)
    return triton.unsupported(q, **operands)


def _check(q, cache, visible, expand, scale, v_head_dim, implementation) -> tuple[int, ...]:
    """The shape of one block of expanded keys and values."""
    implementations.check_name("mla_prefill", implementation)
    if q.ndim != 4 or q.shape[0] != cache.length.shape[0]:
        raise ValueError(
            f"mla_prefill: q must be [B, T, H, P + R], B = {cache.length.shape[0]} as the cache has; got {q.shape}. "
            "Concatenate nope and rope queries."
        )
    if jnp.shape(visible) != q.shape[:2] or not jnp.issubdtype(visible.dtype, jnp.integer):
        raise ValueError(
            f"mla_prefill: visible must be integers [B, T] = {q.shape[:2]}; got {visible.dtype}{jnp.shape(visible)}. "
            "Broadcast it."
        )
    if not scale > 0:
        raise ValueError(f"mla_prefill: scale must be positive; got {scale}. Use config.softmax_scale.")
    batch, tokens, heads, width = q.shape
    latent = jax.ShapeDtypeStruct((batch, 1, cache.kv_lora_rank), q.dtype)
    expanded = jax.eval_shape(expand, latent)
    rope = jax.tree.leaves(cache)[0].shape[-1] - cache.kv_lora_rank
    if expanded.shape[2] != heads or expanded.shape[3] - v_head_dim + rope != width:
        raise ValueError(
            f"mla_prefill: expand must return [B, K, H = {heads}, P + V], P + V = {width - rope + v_head_dim}; got "
            f"{expanded.shape}. Check q, which is [.., P + R], and v_head_dim."
        )
    size = keys_at_once(cache, batch, tokens, heads * expanded.shape[3])
    return batch, size, heads, expanded.shape[3]
