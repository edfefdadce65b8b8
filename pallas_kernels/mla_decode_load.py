"""The warp that loads, of the Mosaic GPU decoding attention: queries once, then cache entries tile by tile.

A slot's tiles are asked for in the order in which the scores take them, its two halves each as soon as the last
product that reads the half is done. A page id is checked before it becomes an address: one outside 0 .. N-1 loads
page 0 instead, and the slot's presence bits tell the warpgroups that compute to hide it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import pl
from pallas_kernels.mla_decode_block import KEYS, LOADER_REGISTERS, ROWS, TILES, Block
from pallas_kernels.mosaic import in_first_warp, plgpu


def load(block: Block) -> None:
    """The third warpgroup's whole work, done by its first warp."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    in_first_warp(functools.partial(_produce, block))


def load_queries(block: Block) -> None:
    """Ask for them."""
    for j, ref in enumerate(block.queries):
        rows = block.q_ref.at[block.b, pl.ds(block.index * ROWS, ROWS), pl.ds(j * 256, ref.shape[1])]
        plgpu.copy_gmem_to_smem(rows, ref, block.shared["q_full"])


def _produce(block):
    load_queries(block)

    @pl.when(block.steps > 0)
    def _():
        ids = page_ids(block, 0)
        for slot in (0, 1):
            _fill(block, 0, slot, ids[slot], first=True)

        def step(i, ids):
            # The ids of the step after this one, asked for a step before they are needed.
            following = page_ids(block, i + 1)
            if block.problem.cluster == 2:
                _prefetch(block, i, ids)
            for slot in (0, 1):
                _fill(block, i, slot, ids[slot], first=False)
            return following

        lax.fori_loop(1, block.steps, step, page_ids(block, 1))


def page_ids(block: Block, i) -> list[tuple]:
    """By slot, the table's entries for a step's tile set, one a piece; none where the cache is contiguous."""
    if block.table_ref is None:
        return [(), ()]
    problem, width = block.problem, block.table_ref.shape[1]
    per_page = max(1, problem.page_size // KEYS)

    def entry(slot, piece):
        tile = 2 * (block.first + i) + slot
        column = lax.div(tile, jnp.int32(per_page)) if per_page > 1 else tile * problem.pieces + piece
        # A step may start past the table: any page does there, none of its keys is visible.
        return block.table_ref[block.b, jnp.minimum(column, width - 1)]

    return [tuple(entry(slot, piece) for piece in range(problem.pieces)) for slot in (0, 1)]


def find_places(block: Block, i, slot, ids) -> tuple[list[tuple], Any]:
    """Where a slot's tile set lies, (leading index, first row) by piece, and which of its pages exist."""
    tile = 2 * (block.first + i) + slot
    if not ids:
        return [(block.b, tile * KEYS)], None
    problem, places, present = block.problem, [], jnp.int32(0)
    per_page = max(1, problem.page_size // KEYS)
    row = lax.rem(tile, jnp.int32(per_page)) * KEYS if per_page > 1 else 0
    for piece, page in enumerate(ids):
        exists = (page >= 0) & (page < problem.pages)
        places.append((jnp.where(exists, page, 0), row))
        present = present + exists.astype(jnp.int32) * (1 << piece)
    return places, present


def _fill(block, i, slot, ids, *, first):
    places, present = find_places(block, i, slot, ids)
    shared: dict[str, Any] = dict(collective_axes="h") if block.problem.cluster == 2 else {}

    def copy(tile, ref):
        for piece, (page, row) in enumerate(places):
            size = block.problem.piece
            source = block.kv_ref.at[page, pl.ds(row, size), pl.ds(tile * 64, 64)]
            target = ref if size == KEYS else ref.at[pl.ds(piece * size, size)]
            plgpu.copy_gmem_to_smem(source, target, block.shared["full"].at[slot * TILES + tile], **shared)

    for half in (0, 1):
        if not first:
            plgpu.barrier_wait(block.shared["empty"].at[2 * slot + half])
        for tile in range(4 * half, 4 * half + 4):
            copy(tile, block.shared["latent"].at[slot, tile])
    # Both halves of the slot are free: so are its rope tile, which holds P, and its presence bits.
    if present is not None:
        block.shared["present"][slot] = present
    copy(TILES - 1, block.shared["rope"].at[slot])


def _prefetch(block, i, ids):
    """Ask L2 for one tile set of the step; the cluster's other block asks for the other."""
    mine = lax.axis_index("h")
    places, _ = find_places(block, i, mine, tuple(jnp.where(mine == 0, *pair) for pair in zip(*ids, strict=True)))
    for page, row in places:
        for j, ref in enumerate(block.queries):
            columns = pl.ds(j * 256, ref.shape[1])
            plgpu.async_prefetch(block.kv_ref.at[page, pl.ds(row, block.problem.piece), columns])
