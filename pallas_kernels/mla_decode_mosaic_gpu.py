"""MLA's latent attention for decoding on Hopper: one cache entry is key and value of all heads, read once.

    out[b, r] = softmax_s(scale q[b, r] . entry[b, s]) entry[b, s, :L],   L = 512, entries of L + R = 576 numbers

The rows r = (t, h) of a sequence, T tokens of H heads, are cut into blocks of 64. A block's output, 64 x 512 in
float32, is shared by two warpgroups, 256 columns each; a third holds one warp that loads. A step takes a pair of
tile sets of 64 keys: warpgroup 0 computes the probabilities of the even one, warpgroup 1 of the odd one, and each
hands them to the other through shared memory, in the keys' rope tile, which is dead by then:

    warpgroup 0   S0 = q K0'; P0 out;           O_left  += P0 V0; wait for P1;   O_left  += P1 V1
    warpgroup 1   S1 = q K1'; wait for P0;      O_right += P0 V0; P1 out;        O_right += P1 V1

so that one's softmax runs under the other's products. Entries arrive as nine 64 x 64 tiles a slot, two slots, each
tile with its own barrier; each half of a slot is refilled as soon as its last product is done. Two row blocks of a
sequence run as a cluster that shares every load by multicast, and fetches the next pair into L2 half each.

The softmax's reference m moves only when the maximum grows by more than 2^8: any reference gives the same result
up to rounding, and most rescalings of O vanish.

A long sequence is cut into splits of a fixed number of keys, whatever the other sequences of the batch are: each
writes its own normalised output and LSE, which mla_decode_combine merges. A split past a sequence's end does nothing.

What is not there: keys past a row's `visible` count score -inf; the values of absent keys are zeroed in shared
memory, so that a NaN in unused memory cannot reach 0 * NaN; a page id outside 0 .. N-1 is never dereferenced.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.backend import pl
from pallas_kernels.mla_decode_block import ROWS, Block, L, Problem, R, shared_memory
from pallas_kernels.mla_decode_compute import compute
from pallas_kernels.mla_decode_load import load
from pallas_kernels.mla_decode_load_e4m3 import load_e4m3
from pallas_kernels.mosaic import compiler_params, plgpu

PAGE_SIZES = (16, 64, 128)
MAX_TOKENS = 8
E4M3 = jnp.dtype(jnp.float8_e4m3fn)


def mla_decode_mosaic_gpu(
    q: BFloat16[Array, "B T H LR"],
    entries: Float[Array, "B S LR"] | Float[Array, "N page LR"],
    page_table: Int32[Array, "B M"] | None,
    visible: Int32[Array, "B T"],
    length: Int32[Array, "B"],
    *,
    scale: float,
    split_size: int,
    entries_scale: float = 1.0,
) -> tuple[Float[Array, "splits B rows L"], Float[Array, "splits B rows"]]:
    """The attention of this module's docstring, split by split.

    Args:
        q: latent then rope queries; beside an e4m3 cache, of less than 2^20.
        entries: a contiguous cache, or pages; bfloat16 or float8_e4m3fn.
        page_table: the page of keys m * page .. of a sequence; None where the cache is contiguous.
        visible: row (b, t) sees the keys 0 .. visible[b, t] - 1 that the cache holds.
        length: keys a sequence holds.
        scale: the softmax scale, > 0.
        split_size: keys a split, a multiple of 128.
        entries_scale: entries stand for this times what they are.

    Returns:
        With one split the output, bf16 [1, B, T * H, L]; else each split's own, float32, T * H rounded up to whole
        blocks of 64, unwritten where the split holds no key. And the natural-log LSE of each split, float32, rows
        rounded up likewise. Rows that see nothing get 0 and -inf.
    """
    batch, tokens, heads, _ = q.shape
    page_size = None if page_table is None else entries.shape[1]
    capacity = entries.shape[1] if page_table is None else page_table.shape[1] * entries.shape[1]
    problem = Problem(
        batch,
        tokens,
        heads,
        capacity,
        page_size,
        entries.shape[0],
        scale * entries_scale,
        entries_scale,
        split_size,
        entries.dtype == E4M3,
    )
    rows = q.reshape(batch, problem.rows, L + R)
    padding = -problem.rows % 8  # TMA takes whole groups of 8 rows; past the last it reads zeros and writes nothing
    if padding:
        rows = jnp.pad(rows, ((0, 0), (0, padding), (0, 0)))
    single = problem.splits == 1
    out_rows = rows.shape[1] if single else problem.blocks * ROWS
    out_type = [
        jax.ShapeDtypeStruct((problem.splits, batch, out_rows, L), jnp.bfloat16 if single else jnp.float32),
        jax.ShapeDtypeStruct((problem.splits, batch, problem.blocks * ROWS), jnp.float32),
    ]
    groups = problem.blocks // problem.cluster
    clusters: dict[str, Any] = dict(cluster=(2,), cluster_names=("h",)) if problem.cluster == 2 else {}

    def mla_decode(*refs, **scratch):  # a profile shows this name
        _kernel(problem, *refs, **scratch)

    out, lse = plgpu.kernel(
        mla_decode,
        out_type=out_type,
        grid=(batch, problem.splits, groups),
        grid_names=("b", "s", "g"),
        num_threads=3,
        thread_name="wg",
        scratch_types=shared_memory(problem),
        compiler_params=compiler_params(),
        **clusters,
    )(rows, entries, *(() if page_table is None else (page_table,)), visible, length)
    return (out[:, :, : problem.rows] if single and padding else out), lse


def _kernel(problem: Problem, q_ref, kv_ref, *refs, **scratch):
    table_ref = None
    if problem.page_size is not None:
        table_ref, *refs = refs
    visible_ref, length_ref, out_ref, lse_ref = refs
    block = Block(problem, q_ref, kv_ref, table_ref, visible_ref, length_ref, out_ref, lse_ref, scratch)

    # A split that starts past the end has nothing to do; a lone one must still write zeros.
    @pl.when((block.steps > 0) | (problem.splits == 1))
    def _():
        warpgroup = lax.axis_index("wg")
        pl.when(warpgroup == 2)(functools.partial(load_e4m3 if problem.e4m3 else load, block))
        pl.when(warpgroup == 0)(functools.partial(compute, block, 0))
        pl.when(warpgroup == 1)(functools.partial(compute, block, 1))


def unsupported(q, entries, page_table, *, kv_lora_rank: int) -> str | None:
    """Why this kernel cannot take these operands (arrays or anything with shape and dtype), or None."""
    if jnp.dtype(q.dtype) != jnp.bfloat16:
        return f"q must be bfloat16; got {jnp.dtype(q.dtype).name}."
    if jnp.dtype(entries.dtype) not in (jnp.bfloat16, E4M3):
        return f"the cache must be bfloat16 or float8_e4m3fn; got {jnp.dtype(entries.dtype).name}."
    if kv_lora_rank != L or entries.shape[-1] != L + R:
        rope = entries.shape[-1] - kv_lora_rank
        return f"entries must have L = {L} and R = {R} columns; got {kv_lora_rank} and {rope}."
    if q.shape[1] > MAX_TOKENS:
        return f"at most {MAX_TOKENS} new tokens; got {q.shape[1]}."
    if page_table is not None and entries.shape[1] not in PAGE_SIZES:
        return f"the page size must be one of {PAGE_SIZES}; got {entries.shape[1]}."
    if page_table is None and entries.shape[1] % 8 and jnp.dtype(entries.dtype) != E4M3:  # TMA takes groups of 8 rows
        return f"a contiguous bfloat16 cache's capacity must be a multiple of 8; got {entries.shape[1]}."
    return None
