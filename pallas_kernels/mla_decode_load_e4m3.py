"""The warpgroup that loads an e4m3 cache, of the Mosaic GPU decoding attention.

Tensor cores take e4m3 only where the summed axis is contiguous, which it is not for the values, so entries become f16
on their way to shared memory: a warpgroup reads a slot's into registers, 36 KB in flight, while the slot is still in
use, and writes them as soon as a half of it is free. The queries and the probabilities are f16 then, too. There is no
multicast: the row blocks of a sequence meet in L2.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from pallas_kernels import e4m3, shared_memory
from pallas_kernels.backend import pl
from pallas_kernels.mla_decode_block import E4M3_LOADER_REGISTERS, KEYS, TILES, Block, L, R
from pallas_kernels.mla_decode_load import find_places, load_queries, page_ids
from pallas_kernels.mosaic import plgpu

# Tiles are handed over in pairs, a fence each: the last tile of each group, and its first.
PUBLISHED = {1: 0, 3: 2, 5: 4, 7: 6, 8: 8}


def load_e4m3(block: Block) -> None:
    """The third warpgroup's whole work."""
    plgpu.set_max_registers(E4M3_LOADER_REGISTERS, action="decrease")
    load_queries(block)
    zeros = jnp.full((128,), 0, jnp.int32)
    block.shared["loader_zero"][...] = plgpu.layout_cast(zeros, plgpu.Layout.WG_STRIDED((128,), vec_size=1))
    plgpu.commit_smem()

    @pl.when(block.steps > 0)
    def _():
        ids = page_ids(block, 0)
        words, present = _fetch_all(block, 0, 0, ids[0])
        _prefetch(block, 0, 1, ids[1])

        def step(i, carry):
            words, present, ids = carry
            words, present = _pass_on(block, i, 0, words, present, (i, 1, ids))
            # The ids of the step after this one, asked for half a step before they are needed, and after the fences.
            following = page_ids(block, i + 1)
            _prefetch(block, i + 1, 0, following[0])
            words, present = _pass_on(block, i, 1, words, present, (i + 1, 0, following[0]))
            _prefetch(block, i + 1, 1, following[1])
            return words, present, following[1]

        lax.fori_loop(0, block.steps, step, (words, present, ids[1]))


def _pass_on(block, i, slot, words, present, following):
    """Write what is held to a slot; then ask for the following one: (step, slot, page ids)."""
    for tile in range(TILES):
        if tile in (0, 4):
            pl.when(i > 0)(lambda tile=tile: plgpu.barrier_wait(block.shared["empty"].at[2 * slot + tile // 4]))
        if tile == TILES - 1:
            # Both halves of the slot are free: so are its rope tile, which held P, and its presence bits.
            if block.table_ref is not None:
                block.shared["present"][slot] = present
            e4m3.store(words[tile], block.shared["rope"].at[slot])
        else:
            e4m3.store(words[tile], block.shared["latent"].at[slot, tile])
        if tile in PUBLISHED:
            e4m3.publish()
            for done in range(PUBLISHED[tile], tile + 1):
                plgpu.barrier_arrive(block.shared["full"].at[slot * TILES + done])
    # A fence waits for every load that is on its way: no compiler moves these before a word that is read after it.
    return _fetch_all(block, *following)


def _fetch_all(block, i, slot, ids):
    where = _where(block, i, slot, ids)
    return tuple(_fetch(block, where, tile) for tile in range(TILES)), where[1]


def _prefetch(block, i, slot, ids):
    """Ask L2 for a slot's entries while those before it are in flight: registers for more of them there are not."""
    firsts, _, last, wanted = _where(block, i, slot, ids)
    for first in firsts:
        e4m3.prefetch(block.kv_ref, first, last, wanted, rows=block.problem.piece, width=L + R)


def _where(block, i, slot, ids):
    """Of a slot: the rows its pieces start at, which of its pages exist, the last row, whether any key is seen."""
    problem = block.problem
    found, present = find_places(block, i, slot, ids)
    size = problem.capacity if problem.page_size is None else problem.page_size
    firsts = [page * size + row for page, row in found]
    if present is None:
        present = jnp.int32(problem.all_present)
    # A contiguous cache may end within the tile; pages are whole.
    zero = shared_memory.read_word(block.shared["loader_zero"])
    last = (block.b + 1) * size - 1 if problem.page_size is None else jnp.int32(problem.pages * size - 1)
    wanted = ((2 * (block.first + i) + slot) * KEYS < block.most) & (i < block.steps)
    return [first + zero for first in firsts], present, last, wanted.astype(jnp.int32)


def _fetch(block, where, tile):
    firsts, _, last, wanted = where
    return e4m3.fetch(block.kv_ref, firsts, last, wanted, tile=tile, width=L + R)
