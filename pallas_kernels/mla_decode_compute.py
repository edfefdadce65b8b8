"""The two warpgroups that compute, of the Mosaic GPU decoding attention; the schedule is in mla_decode_mosaic_gpu."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels import shared_memory, wgmma
from pallas_kernels.backend import pl
from pallas_kernels.mla_decode_block import (
    COMPUTE_REGISTERS,
    E4M3_COMPUTE_REGISTERS,
    E4M3_Q_EXPONENT,
    KEYS,
    LOG2_E,
    LOWEST,
    ROWS,
    SLACK,
    TILES,
    Block,
    L,
    R,
)
from pallas_kernels.mosaic import ROW, WGMMA, load_array, plgpu

SOME_ROWS = 16  # stored by one copy, or not at all


def compute(block: Block, w: int) -> None:
    """Warpgroup w's whole work: columns 256 w .. 256 w + 255 of the output."""
    plgpu.set_max_registers(E4M3_COMPUTE_REGISTERS if block.problem.e4m3 else COMPUTE_REGISTERS, action="increase")
    s = block.shared
    s["zero"][...] = plgpu.layout_cast(jnp.full((128,), 0, jnp.int32), plgpu.Layout.WG_STRIDED((128,), vec_size=1))
    plgpu.commit_smem()
    plgpu.barrier_wait(s["q_full"])
    if block.problem.e4m3:
        half = s["q_right" if w else "q_left"]
        shared_memory.bf16_to_f16(half, 0, ROWS * L, E4M3_Q_EXPONENT)
        shared_memory.bf16_to_f16(s["q_rope"], w * ROWS * R, ROWS * R, E4M3_Q_EXPONENT)
        plgpu.commit_smem()
        _meet(block)
    step = functools.partial((_even, _odd)[w], block)
    start = (wgmma.zeros(L // 2), _row(LOWEST), _row(0.0))
    acc, m, total = lax.fori_loop(0, block.steps, step, start)
    _finish(block, w, acc, m, total)
    if block.problem.cluster == 2:
        # The other block may still arrive at this one's barriers.
        plgpu.barrier_arrive(s["finished"])
        plgpu.barrier_wait(s["finished"])


def _even(block, i, carry):
    """Warpgroup 0's step."""
    acc, m, total = carry
    zero = shared_memory.read_word(block.shared["zero"])
    scores = _scores(block, 0, i, zero)
    new_m, p = _numerators(block, scores, m)
    p16 = p.astype(jnp.float16 if block.problem.e4m3 else jnp.bfloat16)
    _hand_over(block, 0, block.shared["m_even"], new_m, p16)
    kept = jnp.exp2(m - new_m)
    acc = wgmma.rescale(acc, kept)
    _clear(block, 0, 0, i)
    acc = wgmma.attend(acc, _values(block, 0, 0), zero, p=p16, kind=block.problem.kind)
    total = total * kept + p.sum(axis=1)
    acc = _release(block, acc, 0, 0)

    plgpu.barrier_wait(block.shared["handed"].at[1])
    m_odd = load_array(block.shared["m_odd"], layout=ROW)
    kept = jnp.exp2(new_m - m_odd)
    acc = wgmma.rescale(acc, kept)
    _clear(block, 1, 0, i)
    acc = wgmma.attend(acc, _values(block, 1, 0), zero, p_ref=block.shared["rope"].at[1], kind=block.problem.kind)
    acc = _release(block, acc, 1, 0)
    return acc, m_odd, total * kept


def _odd(block, i, carry):
    """Warpgroup 1's step."""
    acc, m, total = carry
    zero = shared_memory.read_word(block.shared["zero"])
    scores = _scores(block, 1, i, zero)
    plgpu.barrier_wait(block.shared["handed"].at[0])
    m_even = load_array(block.shared["m_even"], layout=ROW)
    kept = jnp.exp2(m - m_even)
    acc = wgmma.rescale(acc, kept)
    _clear(block, 0, 1, i)
    acc = wgmma.attend(acc, _values(block, 0, 1), zero, p_ref=block.shared["rope"].at[0], kind=block.problem.kind)

    new_m, p = _numerators(block, scores, m_even)  # runs under that product
    p16 = p.astype(jnp.float16 if block.problem.e4m3 else jnp.bfloat16)
    _hand_over(block, 1, block.shared["m_odd"], new_m, p16)
    acc = _release(block, acc, 0, 1)
    kept_odd = jnp.exp2(m_even - new_m)
    total = total * (kept * kept_odd) + p.sum(axis=1)
    acc = wgmma.rescale(acc, kept_odd)
    _clear(block, 1, 1, i)
    acc = wgmma.attend(acc, _values(block, 1, 1), zero, p=p16, kind=block.problem.kind)
    acc = _release(block, acc, 1, 1)
    return acc, new_m, total


def _scores(block, slot, i, zero):
    """The step's scores [64, 64] of a slot, -inf where a row does not see a key."""
    acc, kind = None, block.problem.kind
    # In the order in which the tiles are asked for.
    for tile in range(TILES):
        plgpu.barrier_wait(block.shared["full"].at[slot * TILES + tile])
        if tile == TILES - 1:
            acc = wgmma.scores(block.queries[2], block.shared["rope"].at[slot], zero, acc, kind=kind)
        else:
            keys = block.shared["latent"].at[slot, tile]
            acc = wgmma.scores(block.queries[tile // 4], keys, zero, acc, q_tile=tile % 4, q_tiles=4, kind=kind)
    scores = wgmma.values(wgmma.wait(acc))
    first, present = _tile_set(block, slot, i)
    whole = (first + KEYS <= block.least) & (present == block.problem.all_present)

    def hide(scores):
        key = first + plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=WGMMA)
        seen = key < _columns(_row_visible(block), KEYS)
        if block.table_ref is not None:
            piece = lax.shift_right_logical(key - first, jnp.int32(block.problem.piece.bit_length() - 1))
            bits = lax.broadcast_in_dim(present, (ROWS, KEYS), ())
            seen &= (lax.shift_right_logical(bits, piece) & 1) == 1
        return jnp.where(seen, scores, -jnp.inf)

    return lax.cond(whole, lambda scores: scores, hide, scores)


def _tile_set(block, slot, i):
    """The first key of a step's slot, and which of its pages exist."""
    first = (2 * (block.first + i) + slot) * KEYS
    if block.table_ref is None:
        return first, jnp.int32(block.problem.all_present)
    return first, shared_memory.read_word(block.shared["present"].at[pl.ds(slot, 1)])


def _row_visible(block):
    """How many keys each row of this block sees, int32 [64]: read again, not kept in registers."""
    problem, visible = block.problem, block.visible()
    rows = lax.broadcast_in_dim(visible[0], (ROWS,), ())
    if problem.tokens == 1:
        return plgpu.layout_cast(rows, ROW)
    row = block.index * ROWS + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
    for t in range(1, problem.tokens):
        rows = jnp.where(row >= t * problem.heads, visible[t], rows)
    return rows


def _numerators(block, scores, m):
    """The new reference, and 2^(score - reference), scores in powers of 2."""
    c = block.problem.score_scale
    highest = scores.max(axis=1) * c
    new_m = jnp.where(highest - m > SLACK, highest, m)
    return new_m, jnp.exp2(scores * c - _columns(new_m, KEYS))


def _hand_over(block, slot, m_ref, m, p16):
    m_ref[...] = m
    # The tile's dtype is a name: what reads it is told the kind.
    block.shared["rope"][slot] = lax.bitcast_convert_type(p16, jnp.bfloat16) if block.problem.e4m3 else p16
    plgpu.commit_smem()
    plgpu.barrier_arrive(block.shared["handed"].at[slot])


def _clear(block, slot, half, i):
    """Zero what holds no key in this warpgroup's half of a slot's values."""
    first, present = _tile_set(block, slot, i)

    @pl.when((first + KEYS > block.most) | (present != block.problem.all_present))
    def _():
        shared_memory.clear_rows(_values(block, slot, half), block.most - first, present, block.problem.piece)
        plgpu.commit_smem()


def _values(block, slot, half):
    return block.shared["latent"].at[slot, pl.ds(4 * half, 4)]


def _release(block, acc, slot, half):
    acc = wgmma.wait(acc)
    plgpu.barrier_arrive(block.shared["empty"].at[2 * slot + half])
    return acc


def _meet(block):
    plgpu.barrier_arrive(block.shared["both"])
    plgpu.barrier_wait(block.shared["both"])


def _finish(block, w, acc, m, total):
    problem, sums = block.problem, (block.shared["m_even"], block.shared["m_odd"])
    _meet(block)
    sums[w][...] = total
    _meet(block)
    total = total + load_array(sums[1 - w], layout=ROW)  # each warpgroup summed its own tile sets
    nothing = total == 0
    inverse = jnp.where(nothing, 0.0, problem.out_scale / total)
    out = wgmma.values(acc) * _columns(inverse, L // 2)
    rows, columns = pl.ds(block.index * ROWS, ROWS), pl.ds(w * (L // 2), L // 2)
    if problem.splits == 1:
        staged = block.queries[w]  # both warpgroups are done with the queries
        staged[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, block.out_ref.at[0, block.b, rows, columns])
    else:
        block.shared["out"][w] = out
        plgpu.commit_smem()
        for first in range(0, ROWS, SOME_ROWS):
            some = block.shared["out"].at[w, pl.ds(first, SOME_ROWS)]
            to = block.out_ref.at[block.split, block.b, pl.ds(block.index * ROWS + first, SOME_ROWS), columns]
            pl.when(block.index * ROWS + first < problem.rows)(functools.partial(plgpu.copy_smem_to_gmem, some, to))
    _meet(block)
    if w == 0:
        lse = (m + jnp.log(total) * LOG2_E) * (1 / LOG2_E)
        sums[0][...] = jnp.where(nothing, -jnp.inf, lse)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums[0], block.lse_ref.at[block.split, block.b, rows])
    plgpu.wait_smem_to_gmem(0)


def _row(value: float):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW)


def _columns(x, n: int):
    """x [64] as [64, n]."""
    return lax.broadcast_in_dim(x, (x.shape[0], n), [0])
