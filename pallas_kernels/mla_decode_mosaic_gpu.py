"""MLA's latent attention for decoding on Hopper: one cache entry is key and value of all heads, read once.

    out[b, r] = softmax_s(scale q[b, r] . entry[b, s]) entry[b, s, :L],   L = 512, entries of L + R = 576 numbers

The rows r = (t, h) of a sequence, T tokens of H heads, are cut into blocks of 64. A block's output, 64 x 512 in
float32, is shared by two warpgroups, 256 columns each; a third holds one warp that loads. A step takes a pair of
64-key tiles sets: warpgroup 0 computes the probabilities of the even one, warpgroup 1 of the odd one, and each
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

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels import shared_memory, wgmma
from pallas_kernels.backend import pl
from pallas_kernels.global_memory import store_rows
from pallas_kernels.mosaic import ROW, TILED, WGMMA, compiler_params, plgpu

L, R = 512, 64
ROWS = 64  # query rows a block
KEYS = 64  # keys a tile
PAIR = 2 * KEYS  # keys a step
TILES = (L + R) // 64  # of a slot; the last is the rope's
PAGE_SIZES = (16, 64, 128)
MAX_TOKENS = 8
# A block starts with 168 a thread, and waits for ever where it asks for more in all: 2 * 224 + 56 = 3 * 168.
# With 232 and 40 the loading warp spills.
COMPUTE_REGISTERS, LOADER_REGISTERS = 224, 56
LOG2_E = math.log2(math.e)
# The reference follows the maximum when it has grown by this many powers of 2: P stays below 2^8, far inside bf16.
SLACK = 8.0
# Below every score, finite so that a row without keys gives exp2(-inf - LOWEST) = 0, never NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What is static about a call."""

    batch: int
    tokens: int
    heads: int
    capacity: int
    page_size: int | None  # None: contiguous
    pages: int
    scale: float
    split_size: int

    @property
    def rows(self) -> int:
        return self.tokens * self.heads

    @property
    def blocks(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def cluster(self) -> int:
        """Row blocks that share their loads."""
        return 2 if self.blocks % 2 == 0 else 1

    @property
    def splits(self) -> int:
        return max(1, -(-self.capacity // self.split_size))

    @property
    def piece(self) -> int:
        """Keys of a tile that lie together in memory."""
        return KEYS if self.page_size is None else min(KEYS, self.page_size)

    @property
    def pieces(self) -> int:
        return KEYS // self.piece

    @property
    def all_present(self) -> int:
        """The bits of a tile set all of whose pages exist."""
        return (1 << self.pieces) - 1


def mla_decode_mosaic_gpu(
    q: BFloat16[Array, "B T H LR"],
    entries: BFloat16[Array, "B S LR"] | BFloat16[Array, "N page LR"],
    page_table: Int32[Array, "B M"] | None,
    visible: Int32[Array, "B T"],
    length: Int32[Array, "B"],
    *,
    scale: float,
    split_size: int,
) -> tuple[Float[Array, "splits B rows L"], Float[Array, "splits B rows"]]:
    """The attention of this module's docstring, split by split.

    Args:
        q: latent then rope queries.
        entries: a contiguous cache, or pages.
        page_table: the page of keys m * page .. of a sequence; None where the cache is contiguous.
        visible: row (b, t) sees the keys 0 .. visible[b, t] - 1 that the cache holds.
        length: keys a sequence holds.
        scale: the softmax scale, > 0.
        split_size: keys a split, a multiple of 128.

    Returns:
        With one split the output, bf16 [1, B, T * H, L]; else each split's own, float32, T * H rounded up to whole
        blocks of 64, unwritten where the split holds no key. And the natural-log LSE of each split, float32, rows
        rounded up likewise. Rows that see nothing get 0 and -inf.
    """
    batch, tokens, heads, _ = q.shape
    paged = page_table is not None
    page_size = entries.shape[1] if paged else None
    capacity = page_table.shape[1] * page_size if paged else entries.shape[1]
    problem = _Problem(batch, tokens, heads, capacity, page_size, entries.shape[0], scale, split_size)
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
    clusters = dict(cluster=(2,), cluster_names=("h",)) if problem.cluster == 2 else {}

    def mla_decode(*refs, **scratch):  # a profile shows this name
        _kernel(problem, *refs, **scratch)

    out, lse = plgpu.kernel(
        mla_decode,
        out_type=out_type,
        grid=(batch, problem.splits, groups),
        grid_names=("b", "s", "g"),
        num_threads=3,
        thread_name="wg",
        scratch_types=_scratch(problem),
        compiler_params=compiler_params(),
        **clusters,
    )(rows, entries, *((page_table,) if paged else ()), visible, length)
    return (out[:, :, : problem.rows] if single and padding else out), lse


def _scratch(problem: _Problem) -> dict:
    tile = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=TILED)
    shared = problem.cluster == 2
    cluster_barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("h",))
    scratch = dict(
        q_left=tile((ROWS, L // 2)),
        q_right=tile((ROWS, L // 2)),
        q_rope=tile((ROWS, R)),
        latent=tile((2, TILES - 1, KEYS, 64)),
        rope=tile((2, KEYS, R)),  # then P
        m_even=plgpu.SMEM((ROWS,), jnp.float32),
        m_odd=plgpu.SMEM((ROWS,), jnp.float32),
        zero=plgpu.SMEM((128,), jnp.int32),
        present=plgpu.SMEM((2,), jnp.int32),
        q_full=plgpu.Barrier(num_arrivals=3),
        full=plgpu.Barrier(num_arrivals=problem.pieces, num_barriers=2 * TILES),
        # (slot, half): the half's last product is done, in both blocks of a cluster.
        empty=(cluster_barrier if shared else plgpu.Barrier)(num_barriers=4),
        handed=plgpu.Barrier(num_barriers=2),  # P of the slot is out
        both=plgpu.Barrier(num_arrivals=2),
    )
    if shared:
        scratch["finished"] = cluster_barrier(num_arrivals=2)
    return scratch


def _kernel(problem: _Problem, q_ref, kv_ref, *refs, **scratch):
    table_ref = None
    if problem.page_size is not None:
        table_ref, *refs = refs
    visible_ref, length_ref, out_ref, lse_ref = refs
    block = _Block(problem, q_ref, kv_ref, table_ref, visible_ref, length_ref, out_ref, lse_ref, scratch)

    # A split that starts past the end has nothing to do; a lone one must still write zeros.
    @pl.when((block.steps > 0) | (problem.splits == 1))
    def _():
        warpgroup = lax.axis_index("wg")
        pl.when(warpgroup == 2)(block.load)
        pl.when(warpgroup == 0)(functools.partial(block.compute, 0))
        pl.when(warpgroup == 1)(functools.partial(block.compute, 1))


class _Block:
    """One row block of one split of one sequence."""

    def __init__(self, problem, q_ref, kv_ref, table_ref, visible_ref, length_ref, out_ref, lse_ref, scratch):
        self.problem, self.s = problem, scratch
        self.q_ref, self.kv_ref, self.table_ref = q_ref, kv_ref, table_ref
        self.out_ref, self.lse_ref = out_ref, lse_ref
        self.b, self.split = lax.axis_index("b"), lax.axis_index("s")
        self.index = lax.axis_index("g")
        if problem.cluster == 2:
            self.index = self.index * 2 + lax.axis_index("h")
        self.visible_ref, self.length_ref = visible_ref, length_ref
        visible = self._visible()
        self.most = functools.reduce(jnp.maximum, visible)
        self.least = functools.reduce(jnp.minimum, visible)
        per_split = problem.split_size // PAIR
        self.first = self.split * per_split
        pairs = lax.div(jnp.maximum(self.most, 0) + (PAIR - 1), jnp.int32(PAIR))
        self.steps = jnp.clip(pairs - self.first, 0, per_split)
        self.queries = (scratch["q_left"], scratch["q_right"], scratch["q_rope"])

    def _visible(self):
        """How many keys each new token sees."""
        held = jnp.minimum(self.length_ref[self.b], self.problem.capacity)
        return [jnp.minimum(self.visible_ref[self.b, t], held) for t in range(self.problem.tokens)]

    # -- the warp that loads ---

    def load(self):
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

        @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
        def _():
            pl.when(lax.axis_index("warp") == 0)(self._produce)

    def _produce(self):
        for j, ref in enumerate(self.queries):
            rows = self.q_ref.at[self.b, pl.ds(self.index * ROWS, ROWS), pl.ds(j * 256, ref.shape[1])]
            plgpu.copy_gmem_to_smem(rows, ref, self.s["q_full"])

        @pl.when(self.steps > 0)
        def _():
            ids = self._page_ids(0)
            for slot in (0, 1):
                self._fill(0, slot, ids[slot], first=True)

            def step(i, ids):
                # The ids of the step after this one, asked for a step before they are needed.
                following = self._page_ids(i + 1)
                if self.problem.cluster == 2:
                    self._prefetch(i, ids)
                for slot in (0, 1):
                    self._fill(i, slot, ids[slot], first=False)
                return following

            lax.fori_loop(1, self.steps, step, self._page_ids(1))

    def _page_ids(self, i):
        """By slot, the table's entries for a step's tile set, one a piece; none where the cache is contiguous."""
        if self.table_ref is None:
            return [(), ()]
        problem, width = self.problem, self.table_ref.shape[1]
        per_page = max(1, problem.page_size // KEYS)

        def entry(slot, piece):
            tile = 2 * (self.first + i) + slot
            column = lax.div(tile, jnp.int32(per_page)) if per_page > 1 else tile * problem.pieces + piece
            # A step may start past the table: any page does there, none of its keys is visible.
            return self.table_ref[self.b, jnp.minimum(column, width - 1)]

        return [tuple(entry(slot, piece) for piece in range(problem.pieces)) for slot in (0, 1)]

    def _places(self, i, slot, ids):
        """Where a slot's tile set lies, (leading index, first row) by piece, and which of its pages exist."""
        tile = 2 * (self.first + i) + slot
        if not ids:
            return [(self.b, tile * KEYS)], None
        problem, places, present = self.problem, [], jnp.int32(0)
        per_page = max(1, problem.page_size // KEYS)
        row = lax.rem(tile, jnp.int32(per_page)) * KEYS if per_page > 1 else 0
        for piece, page in enumerate(ids):
            exists = (page >= 0) & (page < problem.pages)
            places.append((jnp.where(exists, page, 0), row))
            present = present + exists.astype(jnp.int32) * (1 << piece)
        return places, present

    def _fill(self, i, slot, ids, *, first):
        places, present = self._places(i, slot, ids)
        shared = dict(collective_axes="h") if self.problem.cluster == 2 else {}

        def copy(tile, ref):
            for piece, (page, row) in enumerate(places):
                size = self.problem.piece
                source = self.kv_ref.at[page, pl.ds(row, size), pl.ds(tile * 64, 64)]
                target = ref if size == KEYS else ref.at[pl.ds(piece * size, size)]
                plgpu.copy_gmem_to_smem(source, target, self.s["full"].at[slot * TILES + tile], **shared)

        for half in (0, 1):
            if not first:
                plgpu.barrier_wait(self.s["empty"].at[2 * slot + half])
            for tile in range(4 * half, 4 * half + 4):
                copy(tile, self.s["latent"].at[slot, tile])
        # Both halves of the slot are free: so are its rope tile, which holds P, and its presence bits.
        if present is not None:
            self.s["present"][slot] = present
        copy(TILES - 1, self.s["rope"].at[slot])

    def _prefetch(self, i, ids):
        """Ask L2 for one tile set of the step; the cluster's other block asks for the other."""
        mine = lax.axis_index("h")
        places, _ = self._places(i, mine, tuple(jnp.where(mine == 0, *pair) for pair in zip(*ids, strict=True)))
        for page, row in places:
            for j, ref in enumerate(self.queries):
                columns = pl.ds(j * 256, ref.shape[1])
                plgpu.async_prefetch(self.kv_ref.at[page, pl.ds(row, self.problem.piece), columns])

    # -- the warpgroups that compute ---

    def compute(self, w: int):
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        s = self.s
        s["zero"][...] = plgpu.layout_cast(
            jnp.full((128,), 0, jnp.int32), plgpu.Layout.WG_STRIDED((128,), vec_size=1)
        )
        plgpu.commit_smem()
        plgpu.barrier_wait(s["q_full"])
        step = functools.partial((self._even, self._odd)[w])
        start = (wgmma.zeros(L // 2), _row(LOWEST), _row(0.0))
        acc, m, total = lax.fori_loop(0, self.steps, step, start)
        self._finish(w, acc, m, total)
        if self.problem.cluster == 2:
            # The other block may still arrive at this one's barriers.
            plgpu.barrier_arrive(s["finished"])
            plgpu.barrier_wait(s["finished"])

    def _even(self, i, carry):
        """Warpgroup 0's step."""
        acc, m, total = carry
        zero = shared_memory.read_word(self.s["zero"])
        scores = self._scores(0, i, zero)
        new_m, p = self._numerators(scores, m)
        p16 = p.astype(jnp.bfloat16)
        self._hand_over(0, self.s["m_even"], new_m, p16)
        kept = jnp.exp2(m - new_m)
        acc = wgmma.rescale(acc, kept)
        self._clear(0, 0, i)
        acc = wgmma.attend(acc, self._values(0, 0), zero, p=p16)
        total = total * kept + p.sum(axis=1)
        acc = self._release(acc, 0, 0)

        plgpu.barrier_wait(self.s["handed"].at[1])
        m_odd = plgpu.load(self.s["m_odd"], layout=ROW)
        kept = jnp.exp2(new_m - m_odd)
        acc = wgmma.rescale(acc, kept)
        self._clear(1, 0, i)
        acc = wgmma.attend(acc, self._values(1, 0), zero, p_ref=self.s["rope"].at[1])
        acc = self._release(acc, 1, 0)
        return acc, m_odd, total * kept

    def _odd(self, i, carry):
        """Warpgroup 1's step."""
        acc, m, total = carry
        zero = shared_memory.read_word(self.s["zero"])
        scores = self._scores(1, i, zero)
        plgpu.barrier_wait(self.s["handed"].at[0])
        m_even = plgpu.load(self.s["m_even"], layout=ROW)
        kept = jnp.exp2(m - m_even)
        acc = wgmma.rescale(acc, kept)
        self._clear(0, 1, i)
        acc = wgmma.attend(acc, self._values(0, 1), zero, p_ref=self.s["rope"].at[0])

        new_m, p = self._numerators(scores, m_even)  # runs under that product
        p16 = p.astype(jnp.bfloat16)
        self._hand_over(1, self.s["m_odd"], new_m, p16)
        acc = self._release(acc, 0, 1)
        kept_odd = jnp.exp2(m_even - new_m)
        total = total * (kept * kept_odd) + p.sum(axis=1)
        acc = wgmma.rescale(acc, kept_odd)
        self._clear(1, 1, i)
        acc = wgmma.attend(acc, self._values(1, 1), zero, p=p16)
        acc = self._release(acc, 1, 1)
        return acc, new_m, total

    def _scores(self, slot, i, zero):
        """The step's scores [64, 64] of a slot, -inf where a row does not see a key."""
        acc = None
        # In the order in which the tiles are asked for.
        for tile in range(TILES):
            plgpu.barrier_wait(self.s["full"].at[slot * TILES + tile])
            if tile == TILES - 1:
                acc = wgmma.scores(self.queries[2], self.s["rope"].at[slot], zero, acc)
            else:
                keys = self.s["latent"].at[slot, tile]
                acc = wgmma.scores(self.queries[tile // 4], keys, zero, acc, q_tile=tile % 4, q_tiles=4)
        scores = wgmma.values(wgmma.wait(acc))
        first, present = self._tile_set(slot, i)
        whole = (first + KEYS <= self.least) & (present == self.problem.all_present)

        def hide(scores):
            key = first + plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=WGMMA)
            seen = key < _columns(self._row_visible(), KEYS)
            if self.table_ref is not None:
                piece = lax.shift_right_logical(key - first, jnp.int32(self.problem.piece.bit_length() - 1))
                bits = lax.broadcast_in_dim(present, (ROWS, KEYS), ())
                seen &= (lax.shift_right_logical(bits, piece) & 1) == 1
            return jnp.where(seen, scores, -jnp.inf)

        return lax.cond(whole, lambda scores: scores, hide, scores)

    def _tile_set(self, slot, i):
        """The first key of a step's slot, and which of its pages exist."""
        first = (2 * (self.first + i) + slot) * KEYS
        if self.table_ref is None:
            return first, jnp.int32(self.problem.all_present)
        return first, shared_memory.read_word(self.s["present"].at[pl.ds(slot, 1)])

    def _row_visible(self):
        """How many keys each row of this block sees, int32 [64]: read again, not kept in registers."""
        problem, visible = self.problem, self._visible()
        rows = lax.broadcast_in_dim(visible[0], (ROWS,), ())
        if problem.tokens == 1:
            return plgpu.layout_cast(rows, ROW)
        row = self.index * ROWS + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
        for t in range(1, problem.tokens):
            rows = jnp.where(row >= t * problem.heads, visible[t], rows)
        return rows

    def _numerators(self, scores, m):
        """The new reference, and 2^(score - reference), scores in powers of 2."""
        c = self.problem.scale * LOG2_E
        highest = scores.max(axis=1) * c
        new_m = jnp.where(highest - m > SLACK, highest, m)
        return new_m, jnp.exp2(scores * c - _columns(new_m, KEYS))

    def _hand_over(self, slot, m_ref, m, p16):
        m_ref[...] = m
        self.s["rope"][slot] = p16
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.s["handed"].at[slot])

    def _clear(self, slot, half, i):
        """Zero what holds no key in this warpgroup's half of a slot's values."""
        first, present = self._tile_set(slot, i)

        @pl.when((first + KEYS > self.most) | (present != self.problem.all_present))
        def _():
            shared_memory.clear_rows(self._values(slot, half), self.most - first, present, self.problem.piece)
            plgpu.commit_smem()

    def _values(self, slot, half):
        return self.s["latent"].at[slot, pl.ds(4 * half, 4)]

    def _release(self, acc, slot, half):
        acc = wgmma.wait(acc)
        plgpu.barrier_arrive(self.s["empty"].at[2 * slot + half])
        return acc

    def _meet(self):
        plgpu.barrier_arrive(self.s["both"])
        plgpu.barrier_wait(self.s["both"])

    def _finish(self, w, acc, m, total):
        problem, sums = self.problem, (self.s["m_even"], self.s["m_odd"])
        self._meet()
        sums[w][...] = total
        self._meet()
        total = total + plgpu.load(sums[1 - w], layout=ROW)  # each warpgroup summed its own tile sets
        nothing = total == 0
        inverse = jnp.where(nothing, 0.0, 1.0 / total)
        out = wgmma.values(acc) * _columns(inverse, L // 2)
        rows, columns = pl.ds(self.index * ROWS, ROWS), pl.ds(w * (L // 2), L // 2)
        if problem.splits == 1:
            staged = self.queries[w]  # both warpgroups are done with the queries
            staged[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, self.out_ref.at[0, self.b, rows, columns])
        else:
            store_rows(self.out_ref.at[self.split, self.b, rows, columns], out, problem.rows - self.index * ROWS)
        self._meet()
        if w == 0:
            lse = (m + jnp.log(total) * LOG2_E) * (1 / LOG2_E)
            sums[0][...] = jnp.where(nothing, -jnp.inf, lse)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums[0], self.lse_ref.at[self.split, self.b, rows])
        plgpu.wait_smem_to_gmem(0)


def _row(value: float):
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW)


def _columns(x, n: int):
    """x [64] as [64, n]."""
    return lax.broadcast_in_dim(x, (x.shape[0], n), [0])


def unsupported(q, entries, page_table, *, kv_lora_rank: int) -> str | None:
    """Why this kernel cannot take these operands (arrays or anything with shape and dtype), or None."""
    for name, x in (("q", q), ("the cache", entries)):
        if jnp.dtype(x.dtype) != jnp.bfloat16:
            return f"{name} must be bfloat16; got {jnp.dtype(x.dtype).name}."
    if kv_lora_rank != L or entries.shape[-1] != L + R:
        rope = entries.shape[-1] - kv_lora_rank
        return f"entries must have L = {L} and R = {R} columns; got {kv_lora_rank} and {rope}."
    if q.shape[1] > MAX_TOKENS:
        return f"at most {MAX_TOKENS} new tokens; got {q.shape[1]}."
    if page_table is not None and entries.shape[1] not in PAGE_SIZES:
        return f"the page size must be one of {PAGE_SIZES}; got {entries.shape[1]}."
    if page_table is None and entries.shape[1] % 8:
        return f"a contiguous cache's capacity must be a multiple of 8; got {entries.shape[1]}."
    return None
