"""mla_decode: attention of few new tokens over the latent cache, one shared key/value head, with dispatch."""

from __future__ import annotations

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_fp4_jax import attention
from mla_fp4_jax.cache import Cache, PagedLatentCache
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.implementations import INTERPRET, MOSAIC, TRITON, XLA
from pallas_kernels import mla_decode_triton as triton
from pallas_kernels.mla_decode_combine import combine_splits
from pallas_kernels.mla_decode_combine_mosaic_gpu import combine_splits_mosaic_gpu
from pallas_kernels.split_plan import PROCESSORS, STEP, choose_split_size

_ROW_BLOCK = 64  # rows T * H that a program of the kernels takes at most


@overload
def mla_decode(
    q: Array,
    cache: Cache,
    visible: Array,
    *,
    scale: float,
    return_lse: Literal[False] = False,
    split_size: int | None = None,
    implementation: str | None = None,
) -> Array: ...


@overload
def mla_decode(
    q: Array,
    cache: Cache,
    visible: Array,
    *,
    scale: float,
    return_lse: Literal[True],
    split_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Array, Array]: ...


def mla_decode(
    q: Float[Array, "B T H LR"],
    cache: Cache,
    visible: Int[Array, "B T"],
    *,
    scale: float,
    return_lse: bool = False,
    split_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T H L"] | tuple[Float[Array, "B T H L"], Float[Array, "B T H"]]:
    """softmax(scale q . entry) over the slots a query sees, applied to the entries' latents.

        out[b, t, h] = sum_s p[s] entry[b, s, :L],   p = softmax_s(scale q[b, t, h] . entry[b, s])

    Every entry is read once for all heads. Long sequences are cut into splits that run side by side.

    Args:
        q: latent queries then rotated rope queries, L + R columns; T new tokens, 1 or a few speculated.
        cache: keys (all L + R columns) and values (the first L), the new tokens' own entries included; in units of
            its entries_scale, which goes into the scores' scale and the output's normalisation.
        visible: query (b, t) sees the slots 0 .. visible[b, t] - 1 that the cache holds; 0 for a query that takes
            no part. For causal decoding: length - T + 1 + t.
        scale: the softmax scale, > 0.
        return_lse: also return the log-sum-exp, by which results over parts of the keys are merged.
        split_size: keys a split, a multiple of 128; None chooses by B, T, H and the cache's capacity. One given
            makes a sequence's result independent of B as well.
        implementation: "mosaic_gpu" (Pallas, on a Hopper GPU, L = 512, R = 64, q bfloat16, the cache that or
            float8_e4m3fn), "triton" (Pallas, on a GPU), "xla" (anywhere), "triton_interpret" (the Triton kernel in
            Pallas's interpreter, for tests), or None for the fastest that can run here.

    Returns:
        The attended latent in q's dtype, and on request the natural-log LSE in float32. A query that sees nothing
        gets exactly 0 and -inf.

    Raises:
        ValueError: shapes, ranges or names that do not fit.
        TypeError: visible not of integers.
        NotImplementedError: the implementation named cannot run here, or not on these operands. None never fails.

    Numerics:
        Scores and sums are float32, probabilities are rounded to q's dtype before they meet the values; with
        "mosaic_gpu" and a float8_e4m3fn cache to float16, and so are the queries times 2^-4: those of 2^20 and more
        give NaN, those below 2^-10 lose bits. Nothing past a sequence's length and nothing on a page that does not
        exist can reach a result, NaN included. A
        sequence's result depends on no other sequence of the batch, bit for bit, but with "xla", whose library
        calls promise no such thing.
    """
    _check(q, cache, visible, scale, split_size, implementation)
    name, why = _choose(q, cache, implementation)
    implementations.log_choice("mla_decode", name, why)
    if split_size is None:
        rows = q.shape[1] * q.shape[2]
        at_once = PROCESSORS * (triton.programs_per_processor(rows) if name == TRITON else 1)
        blocks = -(-rows // _ROW_BLOCK)
        split_size = choose_split_size(q.shape[0] * blocks, cache.capacity, processors=at_once)
    run = functools.partial(_run, scale=float(scale), split_size=split_size)
    gpu = implementations.target_gpu()
    capability = None if gpu is None or gpu.platform != "cuda" else gpu.capability or (8, 0)
    if implementation is None and name != XLA:
        # Decided for the device that is traced for; a program lowered for another one falls back.
        platforms = {"cuda": functools.partial(run, name=name, capability=capability or (8, 0))}
        if name != MOSAIC:
            platforms["rocm"] = functools.partial(run, name=name)
        out, lse = jax.lax.platform_dependent(
            q, cache, visible, **platforms, default=functools.partial(run, name=XLA)
        )
    else:
        out, lse = run(q, cache, visible, name=name, capability=None if name == INTERPRET else capability)
    return (out, lse) if return_lse else out


def _choose(q: Array, cache: Cache, implementation: str | None) -> tuple[str, str]:
    """The implementation for these operands, and why it is not one that is preferred to it."""
    if implementation is not None:
        reason = _why_not(implementation, q, cache)
        if reason is not None:
            raise NotImplementedError(
                f"mla_decode: implementation {implementation!r} cannot run: {reason} Use None for one that can."
            )
        return implementation, "asked for"
    reasons = []
    for name in implementations.PREFERENCE:
        reason = _why_not(name, q, cache)
        if reason is None:
            return name, " ".join(reasons)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("xla runs everywhere")


def _why_not(name: str, q: Array, cache: Cache) -> str | None:
    """Why an implementation cannot run here on these operands, or None."""
    reason = implementations.why_not(name)
    if reason is not None or name == XLA:
        return reason
    if 0 in q.shape or cache.capacity == 0:
        return f"q and the cache must not be empty; got {q.shape}."
    entries, table = _entries(cache)
    if name == MOSAIC:
        from pallas_kernels import mla_decode_mosaic_gpu as mosaic  # needs names that old versions of JAX lack

        return mosaic.unsupported(q, entries, table, kv_lora_rank=cache.kv_lora_rank)
    return triton.unsupported(q, entries, table, kv_lora_rank=cache.kv_lora_rank)


def _run(
    q: Array,
    cache: Cache,
    visible: Array,
    *,
    name: str,
    scale: float,
    split_size: int,
    capability: tuple[int, int] | None = None,
) -> tuple[Array, Array]:
    if name == XLA:
        return attention.absorbed_attention(q, cache, visible, scale)
    entries, table = _entries(cache)
    batch, tokens, heads, _ = q.shape
    visible, length = visible.astype(jnp.int32), cache.length.astype(jnp.int32)
    operands = (q, entries, None if table is None else table.astype(jnp.int32), visible, length)
    if name == MOSAIC:
        from pallas_kernels import mla_decode_mosaic_gpu as mosaic

        out, lse = mosaic.mla_decode_mosaic_gpu(
            *operands, scale=scale, entries_scale=cache.entries_scale, split_size=split_size
        )
    else:
        out, lse = triton.mla_decode_triton(
            *operands,
            kv_lora_rank=cache.kv_lora_rank,
            scale=scale,
            entries_scale=cache.entries_scale,
            split_size=split_size,
            capability=capability,
            interpret=name == INTERPRET,
        )
    rows = tokens * heads
    if out.shape[0] == 1:
        out, lse = out[0], lse[0, :, :rows]
    elif name == MOSAIC:
        out, lse = combine_splits_mosaic_gpu(out, lse, visible, length, rows=rows, split_size=split_size)
    else:
        out, lse = combine_splits(
            out,
            lse,
            visible,
            length,
            rows=rows,
            split_size=split_size,
            out_dtype=q.dtype,
            interpret=name == INTERPRET,
        )
    return out.reshape(batch, tokens, heads, -1), lse.reshape(batch, tokens, heads)


def _entries(cache: Cache) -> tuple[Array, Array | None]:
    if isinstance(cache, PagedLatentCache):
        return cache.pages, cache.page_table
    return cache.entries, None


def _check(q, cache, visible, scale, split_size, implementation) -> None:
    implementations.check_name("mla_decode", implementation)
    width = _entries(cache)[0].shape[-1]
    if q.ndim != 4 or q.shape[0] != cache.length.shape[0] or q.shape[3] != width:
        raise ValueError(
            f"mla_decode: q must be [B, T, H, L + R] = [{cache.length.shape[0]}, T, H, {width}] as the cache is; "
            f"got {q.shape}. Concatenate latent and rope queries."
        )
    if jnp.shape(visible) != q.shape[:2]:
        raise ValueError(
            f"mla_decode: visible must be [B, T] = {q.shape[:2]}; got {jnp.shape(visible)}. Broadcast it."
        )
    if not jnp.issubdtype(visible.dtype, jnp.integer):
        raise TypeError(f"mla_decode: visible must be integers; got {visible.dtype}. It counts slots.")
    if not scale > 0:
        raise ValueError(f"mla_decode: scale must be positive; got {scale}. Use config.softmax_scale.")
    if split_size is not None and (split_size < STEP or split_size % STEP):
        raise ValueError(
            f"mla_decode: split_size must be a positive multiple of {STEP}; got {split_size}. Leave it out."
        )
