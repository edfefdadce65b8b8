"""MLA's latent attention for decoding, in Pallas Triton: any GPU of compute capability 8.0 or later, and ROCm.

    out[b, r] = softmax_s(scale q[b, r] . entry[b, s]) entry[b, s, :L]

The rows r = (t, h) of a sequence, T tokens of H heads, share every entry. A program takes block_rows rows and one
split of the keys, in steps of block_keys: scores from the latent and the rope columns, an online softmax, and the
latent again as values, from registers. mla_decode_combine merges the splits, whose size is fixed, so that a
sequence's result does not depend on the rest of the batch.

Every load is masked: keys past what the sequence sees or on pages that do not exist read as 0 and score -inf, so
unused memory may hold NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import e4m3_triton
from pallas_kernels.backend import pl, pltriton

LOG2_E = math.log2(math.e)
# Below every score and finite: a row without keys gives exp2(-inf - LOWEST) = 0, never NaN.
LOWEST = float(np.finfo(np.float32).min)
_INT32_ELEMENTS = 2**31
_ROOMY = (9, 10)  # major capabilities with 227 KiB of shared memory a program
_DTYPES = ("bfloat16", "float16", "float32")
_CACHE_DTYPES = (*_DTYPES, "float8_e4m3fn")


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled.

    Attributes:
        block_rows: query rows a program, a power of 2 of at least 16.
        block_keys: keys a step, likewise.
        num_warps: warps a program.
        num_stages: steps whose loads are in flight at once.
        transposed: whether keys, and then the output's columns, are the rows of the products, of which a tensor core
            takes 64: for few query rows.
        ahead: whether a step's keys are asked for a step before, and wait decoded in registers.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    transposed: bool = False
    ahead: bool = False


def mla_decode_triton(
    q: Float[Array, "B T H LR"],
    entries: Float[Array, "B S LR"] | Float[Array, "N page LR"],
    page_table: Int32[Array, "B M"] | None,
    visible: Int32[Array, "B T"],
    length: Int32[Array, "B"],
    *,
    kv_lora_rank: int,
    scale: float,
    split_size: int,
    entries_scale: float = 1.0,
    config: Config | None = None,
    capability: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "splits B rows L"], Float[Array, "splits B rows"]]:
    """The attention of this module's docstring, split by split.

    Args:
        q: latent then rope queries; bfloat16, float16 or float32.
        entries: a contiguous cache, or pages; of those dtypes or float8_e4m3fn.
        page_table: the page of keys m * page .. of a sequence; None where the cache is contiguous. Ids outside
            0 .. N-1 are no page.
        visible: row (b, t) sees the keys 0 .. visible[b, t] - 1 that the cache holds.
        length: keys a sequence holds.
        kv_lora_rank: L.
        scale: the softmax scale.
        split_size: keys a split, a multiple of 128.
        entries_scale: entries stand for this times what they are.
        config: tiles; None for default_config.
        capability: of the CUDA GPU; None elsewhere, and where no PTX may be used.
        interpret: run in Pallas's interpreter.

    Returns:
        Each split's normalised output, in q's dtype where there is one split, else float32, and its natural-log
        LSE in float32; both unwritten where a split starts past all that its sequence sees. Rows that see nothing
        get 0 and -inf.
    """
    batch, tokens, heads, width = q.shape
    rows = tokens * heads
    page_size = None if page_table is None else entries.shape[1]
    capacity = entries.shape[1] if page_table is None else page_table.shape[1] * entries.shape[1]
    splits = max(1, -(-capacity // split_size))
    config = config or default_config(rows, q.dtype, entries.dtype, page_size, capability)
    flat = entries.reshape(-1, width)  # one axis of keys, whatever holds them
    if flat.dtype == jnp.float8_e4m3fn:  # which Triton does not have on every GPU, nor Pallas's masked loads
        flat = jax.lax.bitcast_convert_type(flat, jnp.uint8)
    kernel = functools.partial(
        _kernel,
        config=config,
        capability=capability,
        rank=kv_lora_rank,
        heads=heads,
        scale=scale * entries_scale,
        out_scale=entries_scale,
        split_size=split_size,
        capacity=capacity,
        page_size=page_size,
    )
    return pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((splits, batch, rows, kv_lora_rank), q.dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((splits, batch, rows), jnp.float32),
        ],
        grid=(-(-rows // config.block_rows), splits, batch),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="mla_decode",
    )(q.reshape(batch, rows, width), flat, *(() if page_table is None else (page_table,)), visible, length)


def _kernel(
    q_ref, keys_ref, *refs, config: Config, capability, rank, heads, scale, out_scale, split_size, capacity, page_size
):
    *table_refs, visible_ref, length_ref, out_ref, lse_ref = refs
    block, split, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows, width = q_ref.shape[1], q_ref.shape[2]
    tokens, splits = visible_ref.shape[1], out_ref.shape[0]
    held = jnp.minimum(length_ref[b], np.int32(capacity))

    token = jnp.arange(_next_power_of_2(tokens), dtype=jnp.int32)
    visible = pltriton.load(visible_ref.at[b, token], mask=token < tokens, other=0)
    most = jnp.minimum(jnp.max(visible), held)
    first = split * np.int32(split_size)
    end = jnp.minimum(first + np.int32(split_size), most)

    @pl.when((first < most) | (splits == 1))
    def _():
        row = block * np.int32(config.block_rows) + jnp.arange(config.block_rows, dtype=jnp.int32)
        in_rows = row < rows
        row_token = jnp.where(in_rows, jax.lax.div(row, np.int32(heads)), 0)
        seen = jnp.minimum(pltriton.load(visible_ref.at[b, row_token], mask=in_rows, other=0), held)
        row_slice = pl.ds(block * np.int32(config.block_rows), config.block_rows)

        def load_q(start, size):
            mask = in_rows[:, None] & (jnp.arange(size) >= 0)[None]
            return pltriton.load(q_ref.at[b, row_slice, pl.ds(start, size)], mask=mask, other=0)

        parts = [(0, rank), (rank, width - rank)] if width > rank else [(0, rank)]
        queries = [load_q(*part) for part in parts]
        precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
        dot = functools.partial(pltriton.dot, precision=precision)
        # Keys are the scores' columns, or their rows: then a number of a query row stands for a column.
        transposed = config.transposed

        def to_rows(x):
            return x[None, :] if transposed else x[:, None]

        def fetch(i):
            """Latent and rope columns of a step's keys, in q's dtype, which of them exist, and which they are."""
            start = first + i * np.int32(config.block_keys)
            key = start + jnp.arange(config.block_keys, dtype=jnp.int32)
            place, present = _places(
                b, start, key, key < end, table_refs, page_size, keys_ref.shape[0], capacity, config
            )

            def load_keys(column, size):
                mask = present[:, None] & (jnp.arange(size) >= 0)[None]
                if isinstance(place, jax.Array):
                    at = keys_ref.at[place[:, None], column + jnp.arange(size, dtype=jnp.int32)[None]]
                else:
                    at = keys_ref.at[place, pl.ds(column, size)]
                loaded = pltriton.load(at, mask=mask, other=0)
                if loaded.dtype == jnp.uint8:
                    loaded = e4m3_triton.to_bf16(loaded, capability=capability)
                return loaded if loaded.dtype == q_ref.dtype else loaded.astype(jnp.float32).astype(q_ref.dtype)

            return tuple(load_keys(*part) for part in parts), present, key

        def attend(sums, keys, present, key):
            m, total, acc = sums
            products = [dot(k, q.T) if transposed else dot(q, k.T) for q, k in zip(queries, keys, strict=True)]
            scores = functools.reduce(jnp.add, products)
            if transposed:
                shown = present[:, None] & (key[:, None] < seen[None, :])
            else:
                shown = present[None, :] & (key[None, :] < seen[:, None])
            scores = jnp.where(shown, scores * (scale * LOG2_E), -jnp.inf)
            of_keys = 0 if transposed else 1
            new_m = jnp.maximum(m, jnp.max(scores, axis=of_keys))
            p = jnp.exp2(scores - to_rows(new_m))
            kept = jnp.exp2(m - new_m)
            p16 = p.astype(q_ref.dtype)
            # In this order, and with the key of `fetch`: in others Triton gives the loop of 16 rows a program 128
            # registers, not 188, and it took a quarter longer (an H100, bfloat16).
            scaled = acc * to_rows(kept)
            acc = scaled + (dot(keys[0].T, p16) if transposed else dot(p16, keys[0]))
            return new_m, total * kept + jnp.sum(p, axis=of_keys), acc

        def step(i, state):
            sums, loaded = state
            here = loaded if config.ahead else fetch(i)
            following = fetch(i + 1) if config.ahead else loaded
            return attend(sums, *here), following

        zeros = (
            jnp.full((config.block_rows,), LOWEST, jnp.float32),
            jnp.zeros((config.block_rows,), jnp.float32),
            jnp.zeros((rank, config.block_rows) if transposed else (config.block_rows, rank), jnp.float32),
        )
        steps = jax.lax.div(
            jnp.maximum(end - first, 0) + np.int32(config.block_keys - 1), np.int32(config.block_keys)
        )
        start = (zeros, fetch(np.int32(0)) if config.ahead else ())
        (m, total, acc), _ = jax.lax.fori_loop(np.int32(0), steps, step, start)
        nothing = total == 0
        safe = jnp.where(nothing, 1.0, total)
        out = acc * to_rows(out_scale / safe)
        if transposed:
            out = out.T
        lse = jnp.where(nothing, -jnp.inf, m * (1 / LOG2_E) + jnp.log(safe))
        mask = in_rows[:, None] & (jnp.arange(rank) >= 0)[None]
        pltriton.store(out_ref.at[split, b, row_slice, pl.ds(0, rank)], out.astype(out_ref.dtype), mask=mask)
        pltriton.store(lse_ref.at[split, b, row_slice], lse, mask=in_rows)


def _places(b, start, key, wanted, table_refs, page_size, total, capacity, config: Config):
    """Where the keys of a step lie among all keys, and which of them exist."""
    if page_size is None:
        return pl.ds(b * np.int32(capacity) + start, config.block_keys), wanted
    (table_ref,) = table_refs
    pages = total // page_size
    if page_size % config.block_keys == 0:  # one page holds the whole step
        page = table_ref[b, jnp.minimum(jax.lax.div(start, np.int32(page_size)), table_ref.shape[1] - 1)]
        exists = (page >= 0) & (page < pages)
        first = jnp.where(exists, page, 0) * np.int32(page_size) + jax.lax.rem(start, np.int32(page_size))
        return pl.ds(first, config.block_keys), wanted & exists
    column = jnp.where(wanted, jax.lax.div(key, np.int32(page_size)), 0)
    page = pltriton.load(table_ref.at[b, column], mask=wanted, other=-1)
    present = wanted & (page >= 0) & (page < pages)
    return jnp.where(present, page * np.int32(page_size) + jax.lax.rem(key, np.int32(page_size)), 0), present


def default_config(
    rows: int, dtype, cache_dtype, page_size: int | None, capability: tuple[int, int] | None
) -> Config:
    """Tiles for the rows that share a cache entry, in q's dtype, as bench.decode_variants found them on an H100."""
    if jnp.dtype(dtype) == jnp.float32:
        return Config(16, 16, 8, 1)
    if rows <= 16:
        return Config(16, 32, 4, 2)
    if rows <= 32:
        return Config(32, 32, 4, 2)
    if capability is None or capability[0] not in _ROOMY or jnp.dtype(cache_dtype).itemsize > 2:
        return Config(64, 32, 8, 2)
    if jnp.dtype(cache_dtype).itemsize == 1:
        return Config(64, 64, 8, 1)  # entries are decoded in registers
    # 64 keys are the rows of a warpgroup's product; with the places of more than one page's keys it would spill.
    return Config(64, 64, 8, 2) if page_size is None or page_size >= 64 else Config(64, 32, 8, 3)


def programs_per_processor(rows: int) -> int:
    """Of one SM, at once, with default_config: those of few rows are small, and two hide each other's waits."""
    return 2 if rows <= 32 else 1


def unsupported(q, entries, page_table, *, kv_lora_rank: int) -> str | None:
    """Why this kernel cannot take these operands (arrays or anything with shape and dtype), or None."""
    if jnp.dtype(q.dtype).name not in _DTYPES:
        return f"q must be one of {', '.join(_DTYPES)}; got {jnp.dtype(q.dtype).name}."
    if jnp.dtype(entries.dtype).name not in _CACHE_DTYPES:
        return f"the cache must be one of {', '.join(_CACHE_DTYPES)}; got {jnp.dtype(entries.dtype).name}."
    rope = entries.shape[-1] - kv_lora_rank
    for name, size in (("L", kv_lora_rank), ("R", rope)):
        if size & (size - 1) or 0 < size < 16:
            return f"{name} must be a power of 2 of at least 16; got {size}."
    if math.prod(entries.shape) >= _INT32_ELEMENTS:
        return f"the cache must have fewer than 2^31 elements (offsets are 32 bits); got {math.prod(entries.shape)}."
    return None


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
