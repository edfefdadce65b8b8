"""What lies between a decode step's first projections and its next, in one Pallas Triton kernel.

    low'             = rms(low) low_gain                                         the query's latent, for q_b_proj
    cache[b, slot]   = [rms(kv[:L]) kv_gain | rotate(kv[L:], cos, sin)]          the new token's entry, in place

A program serves one of the two for one token. The cache is the kernel's own output: nothing of it is moved but the
entries written. A slot at the capacity, and a page that does not exist, are never addressed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.backend import pl, pltriton

DTYPES = ("bfloat16", "float16", "float32")
_WARPS = 4


def norm_rope_write_triton(
    low: Float[Array, "M W"] | None,
    kv: Float[Array, "M X"],
    low_gain: Float[Array, "Q"] | None,
    kv_gain: Float[Array, "L"],
    cos: Float[Array, "M half_R"],
    sin: Float[Array, "M half_R"],
    slots: Int32[Array, "M"],
    page_table: Int32[Array, "B N"] | None,
    entries: Float[Array, "B S LR"] | Float[Array, "P page LR"],
    *,
    low_first: int,
    kv_first: int,
    eps: float,
    interleaved: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "M Q"] | None, Array]:
    """The module's docstring, for M = B T tokens, those of a sequence together.

    Args:
        low: holds the query's latent in columns low_first .. low_first + Q - 1; None for none.
        kv: holds latent and rope key in columns kv_first .. kv_first + L + R - 1; may be the same array.
        low_gain, kv_gain: the norms'.
        cos, sin: float32.
        slots: of each token in its sequence; one at the capacity drops the token.
        page_table: the pages of each sequence; None where the cache is contiguous.
        entries: the cache, contiguous or in pages. Donate it, or it is copied.
        low_first, kv_first: see low and kv.
        eps: of the norms.
        interleaved: how kv's rope pairs lie, see rope.rotate.
        interpret: run in Pallas's interpreter.

    Returns:
        low' [M, Q] in low's dtype, and the cache. Computed in float32, rounded once to kv's dtype, then the cache's.
    """
    tokens, latent = kv.shape[0], kv_gain.shape[0]
    operands = [kv, kv_gain, cos, sin, slots, *(() if page_table is None else (page_table,)), entries]
    aliases = {len(operands) - 1: 0}
    out_shape = [jax.ShapeDtypeStruct(entries.shape, entries.dtype)]
    if low is not None:
        assert low_gain is not None
        operands += [low, low_gain]
        out_shape.append(jax.ShapeDtypeStruct((tokens, low_gain.shape[0]), low.dtype))
    sequences = entries.shape[0] if page_table is None else page_table.shape[0]
    kernel = functools.partial(
        _kernel,
        paged=page_table is not None,
        tokens_each=tokens // sequences,
        columns=(kv_first, latent, low_first),
        eps=eps,
        interleaved=interleaved,
    )
    cache, *normed = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(tokens, len(out_shape)),
        input_output_aliases=aliases,
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="norm_rope_write",
    )(*operands)
    return (normed[0] if normed else None), cache


def _kernel(kv_ref, kv_gain_ref, cos_ref, sin_ref, slots_ref, *refs, paged, tokens_each, columns, eps, interleaved):
    table_ref = None
    if paged:
        table_ref, *refs = refs
    _, *refs = refs  # the cache as it was; it is the output
    token, kv_first, latent, low_first = pl.program_id(0), *columns
    if len(refs) == 1:
        (cache_ref,) = refs
        _write(kv_ref, kv_gain_ref, cos_ref, sin_ref, slots_ref, table_ref, cache_ref, token, tokens_each, kv_first,
               latent, eps, interleaved)  # fmt: skip
        return
    low_ref, low_gain_ref, cache_ref, normed_ref = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        width = low_gain_ref.shape[0]
        normed, column, mask = _norm(low_ref, low_gain_ref, token, low_first, width, eps)
        pltriton.store(normed_ref.at[token, column], normed.astype(normed_ref.dtype), mask=mask)

    @pl.when(pl.program_id(1) == 1)
    def _():
        _write(kv_ref, kv_gain_ref, cos_ref, sin_ref, slots_ref, table_ref, cache_ref, token, tokens_each, kv_first,
               latent, eps, interleaved)  # fmt: skip


def _norm(x_ref, gain_ref, token, first, width, eps):
    """A token's normed columns in float32, their indices and which of them exist."""
    column = jnp.arange(_next_power_of_2(width), dtype=jnp.int32)
    mask = column < width
    x = pltriton.load(x_ref.at[token, np.int32(first) + column], mask=mask, other=0).astype(jnp.float32)
    gain = pltriton.load(gain_ref.at[column], mask=mask, other=0).astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x * x) * np.float32(1 / width) + np.float32(eps))
    return x * scale * gain, column, mask


def _write(kv_ref, kv_gain_ref, cos_ref, sin_ref, slots_ref, table_ref, cache_ref, token, tokens_each, kv_first,
           latent, eps, interleaved):  # fmt: skip
    slot, sequence = slots_ref[token], jax.lax.div(token, np.int32(tokens_each))
    block, capacity = sequence, cache_ref.shape[1]
    exists = slot < np.int32(capacity)
    if table_ref is not None:
        pages = table_ref.shape[1]
        exists = slot < np.int32(capacity * pages)
        number = jnp.minimum(jax.lax.div(slot, np.int32(capacity)), np.int32(pages - 1))
        block, slot = table_ref[sequence, number], jax.lax.rem(slot, np.int32(capacity))
        exists &= (block >= 0) & (block < np.int32(cache_ref.shape[0]))
    exists &= slot >= 0
    normed, column, mask = _norm(kv_ref, kv_gain_ref, token, kv_first, latent, eps)
    entry = normed.astype(kv_ref.dtype).astype(cache_ref.dtype)
    pltriton.store(cache_ref.at[block, slot, column], entry, mask=mask & exists)
    half = cos_ref.shape[1]
    pair = jnp.arange(_next_power_of_2(half), dtype=jnp.int32)
    mask = pair < half
    first = np.int32(kv_first + latent)
    at = (first + 2 * pair, first + 2 * pair + 1) if interleaved else (first + pair, first + half + pair)
    a, b = (pltriton.load(kv_ref.at[token, i], mask=mask, other=0).astype(jnp.float32) for i in at)
    cos, sin = (pltriton.load(ref.at[token, pair], mask=mask, other=0) for ref in (cos_ref, sin_ref))
    for i, rotated in enumerate((a * cos - b * sin, b * cos + a * sin)):
        entry = rotated.astype(kv_ref.dtype).astype(cache_ref.dtype)
        pltriton.store(cache_ref.at[block, slot, np.int32(latent + i * half) + pair], entry, mask=mask & exists)


def unsupported(kv, cos, entries) -> str | None:
    """Why this kernel cannot take these operands (anything with shape and dtype), or None."""
    for name, array in (("kv", kv), ("the cache", entries), ("cos", cos)):
        if jnp.dtype(array.dtype).name not in DTYPES:
            return f"{name} must be one of {', '.join(DTYPES)}; got {jnp.dtype(array.dtype).name}."
        if 0 in array.shape:
            return f"{name} must not be empty; got {array.shape}."
    return None


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
