"""What one program of the Mosaic GPU decoding attention works on: sizes, shared memory, its part of the call."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import TILED, TILED_F32, plgpu

L, R = 512, 64
ROWS = 64  # query rows a block
KEYS = 64  # keys a tile
PAIR = 2 * KEYS  # keys a step
TILES = (L + R) // 64  # of a slot; the last is the rope's
# A block starts with 168 a thread, and waits for ever where it asks for more in all: 2 * 224 + 56 = 3 * 168.
# With 232 and 40 the loading warp spills.
COMPUTE_REGISTERS, LOADER_REGISTERS = 224, 56
# 2 * 200 + 104 likewise: an e4m3 cache passes through the loading warpgroup's registers. With 192 for those that
# compute, ptxas serialises their products.
E4M3_COMPUTE_REGISTERS, E4M3_LOADER_REGISTERS = 200, 104
E4M3_Q_EXPONENT = -4  # queries are f16 times 2^-4 beside an e4m3 cache: up to 2^20, multiples of 2^-20
LOG2_E = math.log2(math.e)
# The reference follows the maximum when it has grown by this many powers of 2: P stays below 2^8, far inside bf16.
SLACK = 8.0
# Below every score, finite so that a row without keys gives exp2(-inf - LOWEST) = 0, never NaN.
LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a call."""

    batch: int
    tokens: int
    heads: int
    capacity: int
    page_size: int | None  # None: contiguous
    pages: int  # N; that of the sequences where the cache is contiguous
    scale: float  # of the scores
    out_scale: float  # of the output
    split_size: int
    e4m3: bool = False  # the cache's dtype, else bf16

    @property
    def rows(self) -> int:
        """Query rows of a sequence, token by token, head by head."""
        return self.tokens * self.heads

    @property
    def blocks(self) -> int:
        """Row blocks of a sequence, the last one perhaps not full."""
        return -(-self.rows // ROWS)

    @property
    def cluster(self) -> int:
        """Row blocks that share their loads, by multicast into shared memory."""
        return 2 if self.blocks % 2 == 0 and not self.e4m3 else 1

    @property
    def kind(self) -> str:
        """The products' operands."""
        return "f16" if self.e4m3 else "bf16"

    @property
    def score_scale(self) -> float:
        """What turns a product's result into a power of 2's exponent."""
        return self.scale * LOG2_E * (2.0**-E4M3_Q_EXPONENT if self.e4m3 else 1.0)

    @property
    def splits(self) -> int:
        """Splits of a sequence that fills the capacity."""
        return max(1, -(-self.capacity // self.split_size))

    @property
    def piece(self) -> int:
        """Keys of a tile that lie together in memory."""
        return KEYS if self.page_size is None else min(KEYS, self.page_size)

    @property
    def pieces(self) -> int:
        """Pieces of a tile."""
        return KEYS // self.piece

    @property
    def all_present(self) -> int:
        """The bits of a tile set all of whose pages exist."""
        return (1 << self.pieces) - 1


def shared_memory(problem: Problem) -> dict:
    """Buffers and barriers of a program, 222 KB of Hopper's 227."""
    tile = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=TILED)
    shared = problem.cluster == 2
    cluster_barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("h",))
    scratch = dict(
        q_left=tile((ROWS, L // 2)),
        q_right=tile((ROWS, L // 2)),
        q_rope=tile((ROWS, R)),
        # The values, and then, where there are splits, the output on its way out: the same 128 KB.
        latent_or_out=plgpu.RefUnion(
            tile((2, TILES - 1, KEYS, 64)),
            plgpu.SMEM((2, ROWS, L // 2), jnp.float32, transforms=TILED_F32),
        ),
        rope=tile((2, KEYS, R)),  # then P
        m_even=plgpu.SMEM((ROWS,), jnp.float32),
        m_odd=plgpu.SMEM((ROWS,), jnp.float32),
        zero=plgpu.SMEM((128,), jnp.int32),
        present=plgpu.SMEM((2,), jnp.int32),
        q_full=plgpu.Barrier(num_arrivals=3),
        full=plgpu.Barrier(num_arrivals=1 if problem.e4m3 else problem.pieces, num_barriers=2 * TILES),
        # (slot, half): the half's last product is done, in both blocks of a cluster.
        empty=(cluster_barrier if shared else plgpu.Barrier)(num_barriers=4),
        handed=plgpu.Barrier(num_barriers=2),  # P of the slot is out
        both=plgpu.Barrier(num_arrivals=2),
    )
    if problem.e4m3:
        scratch["loader_zero"] = plgpu.SMEM((128,), jnp.int32)
    if shared:
        scratch["finished"] = cluster_barrier(num_arrivals=2)
    return scratch


class Block:
    """One row block of one split of one sequence.

    Attributes:
        index: of the row block.
        most, least: keys that the new tokens see at most and at least; what lies past `most` is nobody's.
        first, steps: the split's first step among the sequence's, and how many it has; a step is 128 keys.
        shared: the buffers and barriers of `shared_memory`, by name.
    """

    def __init__(self, problem, q_ref, kv_ref, table_ref, visible_ref, length_ref, out_ref, lse_ref, scratch):
        latent, out = scratch.pop("latent_or_out")
        self.problem, self.shared = problem, scratch | {"latent": latent, "out": out}
        self.q_ref, self.kv_ref, self.table_ref = q_ref, kv_ref, table_ref
        self.out_ref, self.lse_ref = out_ref, lse_ref
        self.b, self.split = lax.axis_index("b"), lax.axis_index("s")
        self.index = lax.axis_index("g")
        if problem.cluster == 2:
            self.index = self.index * 2 + lax.axis_index("h")
        self.visible_ref, self.length_ref = visible_ref, length_ref
        visible = self.visible()
        self.most = functools.reduce(jnp.maximum, visible)
        self.least = functools.reduce(jnp.minimum, visible)
        per_split = problem.split_size // PAIR
        self.first = self.split * per_split
        pairs = lax.div(jnp.maximum(self.most, 0) + (PAIR - 1), jnp.int32(PAIR))
        self.steps = jnp.clip(pairs - self.first, 0, per_split)
        self.queries = (scratch["q_left"], scratch["q_right"], scratch["q_rope"])

    def visible(self):
        """How many keys each new token sees."""
        held = jnp.minimum(self.length_ref[self.b], self.problem.capacity)
        return [jnp.minimum(self.visible_ref[self.b, t], held) for t in range(self.problem.tokens)]
