"""Merging the splits of a decoding attention on Hopper, as mla_decode_combine.py does, and forgetting them.

    lse = log sum_s exp(lse_s),   out = sum_s exp(lse_s - lse) out_s

over the splits that hold a key the sequence sees. A CTA merges one row, a thread four of its columns. What was read
is then discarded from the L2 cache: nobody reads it again, and the kernels that follow would wait for the memory
while it is written back (8 to 17 MB in DeepSeek-V3's shapes; PTX ISA, "discard").
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.ptx import Ptx, vector

WIDTH = 512  # L: four columns for each of 128 threads
_FEW = 4  # splits that are loaded before it is known which were written
_AT_ONCE = 32  # splits that a thread has loads of under way
_LINE = 128  # bytes that are discarded at once
_MINUS_INFINITY, _ONE = "0fFF800000", "0f3F800000"


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static side.

    Attributes:
        splits: of a sequence that fills its cache.
        batch: B.
        padded_rows: of a sequence in the splits' outputs.
        rows: those to merge, T * H.
        tokens: T.
        split_size: keys a split.
    """

    splits: int
    batch: int
    padded_rows: int
    rows: int
    tokens: int
    split_size: int

    @property
    def split_bytes(self) -> int:
        """From a row of one split to that of the next."""
        return self.batch * self.padded_rows * WIDTH * 4


def combine_splits_mosaic_gpu(
    out: Float[Array, "splits B padded L"],
    lse: Float[Array, "splits B padded"],
    visible: Int32[Array, "B T"],
    length: Int32[Array, "B"],
    *,
    rows: int,
    split_size: int,
) -> tuple[Float[Array, "B rows L"], Float[Array, "B rows"]]:
    """combine_splits for L = 512 into bfloat16. `out` must have no other reader: its bytes are undefined after it."""
    splits, batch, padded, width = out.shape
    if width != WIDTH:
        raise NotImplementedError(f"combine_splits_mosaic_gpu: out must have {WIDTH} columns; got {width}.")
    problem = Problem(splits, batch, padded, rows, visible.shape[1], split_size)
    from pallas_kernels.mosaic import mosaic_kernel  # names that jax before 0.11 lacks

    return mosaic_kernel(
        functools.partial(program, problem),
        out_shape=[
            jax.ShapeDtypeStruct((batch, rows, width), jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, rows), jnp.float32),
        ],
        grid=batch * rows,
        warpgroups=1,
        shared_memory_bytes=1024,
        name="mla_decode_combine",
    )(out, lse, visible, length)


def program(problem: Problem) -> str:
    """The whole kernel: $0 out, $1 lse, $2 visible, $3 length, $4 merged, $5 its lse (64-bit addresses)."""
    return _Kernel(problem).emit()


class _Kernel:
    """Emits the program; the steps are in the order of the methods."""

    def __init__(self, problem: Problem):
        self.p, self.ptx = problem, Ptx()
        self.few = problem.splits <= _FEW

    def emit(self) -> str:
        """The program."""
        self._indices()
        self._number_of_splits()
        self._ask_for_lse()
        self.values = [self.ptx.regs("value", 4, "f32") for _ in range(min(self.p.splits, _AT_ONCE))]
        asked = self._ask(0)
        self._weights()
        self._add(asked)
        self._store()
        self._discard()
        self._store_lse()
        return self.ptx.text()

    def _indices(self) -> None:
        """The row of this CTA, and addresses of what this thread reads of its first split."""
        ptx, p = self.ptx, self.p
        self.tid, self.lane, self.cta, self.sequence, self.tmp = ptx.regs("index", 5)
        self.parts, self.at, self.wide = ptx.regs("address", 3, "b64")
        self.pred = ptx.reg("pred", "pred")
        ptx(
            f"mov.u32 {self.tid}, %tid.x;",
            f"and.b32 {self.lane}, {self.tid}, 31;",
            f"mov.u32 {self.cta}, %ctaid.x;",
            f"div.u32 {self.sequence}, {self.cta}, {p.rows};",
            f"mad.lo.u32 {self.tmp}, {self.sequence}, {p.padded_rows - p.rows}, {self.cta};",  # the padded row
            f"mul.wide.u32 {self.parts}, {self.tmp}, {WIDTH * 4};",
            f"add.u64 {self.parts}, $0, {self.parts};",
            f"mul.wide.u32 {self.wide}, {self.tid}, 16;",
            f"add.u64 {self.parts}, {self.parts}, {self.wide};",
        )

    def _number_of_splits(self) -> None:
        """How many were written: those with a key that a token of the sequence sees and the sequence holds."""
        ptx, p = self.ptx, self.p
        self.number, *seen = ptx.regs("keys", 1 + p.tokens)
        ptx(
            f"mul.wide.u32 {self.wide}, {self.sequence}, 4;",
            f"add.u64 {self.at}, $3, {self.wide};",
            f"ld.global.s32 {self.number}, [{self.at}];",
            f"mul.wide.u32 {self.wide}, {self.sequence}, {4 * p.tokens};",
            f"add.u64 {self.at}, $2, {self.wide};",
            *(f"ld.global.s32 {keys}, [{self.at}+{4 * token}];" for token, keys in enumerate(seen)),
        )
        ptx(*(f"max.s32 {seen[0]}, {seen[0]}, {keys};" for keys in seen[1:]))
        ptx(
            f"min.s32 {self.number}, {self.number}, {seen[0]};",
            f"max.s32 {self.number}, {self.number}, 0;",
            f"add.u32 {self.number}, {self.number}, {p.split_size - 1};",
            f"div.u32 {self.number}, {self.number}, {p.split_size};",
            f"min.u32 {self.number}, {self.number}, {p.splits};",
        )

    def _ask_for_lse(self) -> None:
        """Lane l's are those of the splits l, 32 + l, ...; -inf where there is none."""
        ptx, p = self.ptx, self.p
        self.weights = ptx.regs("weight", -(-p.splits // 32), "f32")
        step = p.batch * p.padded_rows * 4
        ptx(
            f"mul.wide.u32 {self.at}, {self.tmp}, 4;",
            f"add.u64 {self.at}, $1, {self.at};",
            f"mul.wide.u32 {self.wide}, {self.lane}, {step};",
            f"add.u64 {self.at}, {self.at}, {self.wide};",
        )
        for i, weight in enumerate(self.weights):
            ptx(
                f"add.u32 {self.tmp}, {self.lane}, {32 * i};",
                f"setp.lt.u32 {self.pred}, {self.tmp}, {self.number};",
                f"mov.f32 {weight}, {_MINUS_INFINITY};",
                f"@{self.pred} ld.global.f32 {weight}, [{self.at}];",
                f"add.u64 {self.at}, {self.at}, {32 * step};",
            )
        ptx(f"mov.u64 {self.at}, {self.parts};")

    def _ask(self, first: int) -> int:
        """Load this thread's columns of the next splits; how many. Few come at once, to be chosen from later."""
        ptx, p = self.ptx, self.p
        count = min(p.splits - first, _AT_ONCE)
        for i, four in enumerate(self.values[:count]):
            if not self.few:
                ptx(*(f"mov.f32 {value}, 0f00000000;" for value in four))
                ptx(f"setp.gt.u32 {self.pred}, {self.number}, {first + i};")
            guard = "" if self.few else f"@{self.pred} "
            ptx(
                f"{guard}ld.global.v4.f32 {vector(four)}, [{self.at}];",
                f"add.u64 {self.at}, {self.at}, {p.split_bytes};",
            )
        return count

    def _weights(self) -> None:
        """exp(lse_s - highest), and their total."""
        ptx = self.ptx
        self.highest, self.total, other = ptx.regs("total", 3, "f32")
        self.nothing = ptx.reg("nothing", "pred")
        ptx(f"mov.f32 {self.highest}, {self.weights[0]};")
        ptx(*(f"max.f32 {self.highest}, {self.highest}, {weight};" for weight in self.weights[1:]))
        self._over_lanes("max", self.highest, other)
        # A row that sees nothing has no maximum; any finite one keeps every weight at 0.
        ptx(
            f"setp.eq.f32 {self.nothing}, {self.highest}, {_MINUS_INFINITY};",
            f"selp.f32 {other}, 0f00000000, {self.highest}, {self.nothing};",
            f"mov.f32 {self.total}, 0f00000000;",
        )
        for weight in self.weights:
            ptx(
                f"sub.f32 {weight}, {weight}, {other};",
                f"mul.f32 {weight}, {weight}, {_float(1 / math.log(2))};",
                f"ex2.approx.f32 {weight}, {weight};",
                f"add.f32 {self.total}, {self.total}, {weight};",
            )
        self._over_lanes("add", self.total, other)

    def _over_lanes(self, operation: str, register: str, other: str) -> None:
        for distance in (16, 8, 4, 2, 1):
            self.ptx(
                f"shfl.sync.bfly.b32 {other}, {register}, {distance}, 31, 0xffffffff;",
                f"{operation}.f32 {register}, {register}, {other};",
            )

    def _add(self, asked: int) -> None:
        """The weighted sum, in the order of the splits."""
        ptx, p = self.ptx, self.p
        self.sum, weight, first = ptx.regs("sum", 4, "f32"), ptx.reg("one", "f32"), 0
        ptx(*(f"mov.f32 {value}, 0f00000000;" for value in self.sum))
        while True:
            for split, four in enumerate(self.values[:asked], first):
                if self.few:  # what was never written may be anything
                    ptx(f"setp.gt.u32 {self.pred}, {self.number}, {split};")
                    ptx(*(f"selp.f32 {value}, {value}, 0f00000000, {self.pred};" for value in four))
                ptx(f"shfl.sync.idx.b32 {weight}, {self.weights[split // 32]}, {split % 32}, 31, 0xffffffff;")
                ptx(*(f"fma.rn.f32 {a}, {value}, {weight}, {a};" for a, value in zip(self.sum, four, strict=True)))
            first += asked
            if first == p.splits:
                return
            asked = self._ask(first)

    def _store(self) -> None:
        ptx = self.ptx
        packed, divisor = ptx.regs("packed", 2), ptx.reg("divisor", "f32")
        ptx(
            f"selp.f32 {divisor}, {_ONE}, {self.total}, {self.nothing};",
            *(f"div.rn.f32 {value}, {value}, {divisor};" for value in self.sum),
            *(f"cvt.rn.bf16x2.f32 {packed[i]}, {self.sum[2 * i + 1]}, {self.sum[2 * i]};" for i in range(2)),
            f"mul.wide.u32 {self.at}, {self.cta}, {WIDTH * 2};",
            f"mul.wide.u32 {self.wide}, {self.tid}, 8;",
            f"add.u64 {self.at}, {self.at}, {self.wide};",
            f"add.u64 {self.at}, $4, {self.at};",
            f"st.global.v2.b32 [{self.at}], {vector(packed)};",
        )

    def _discard(self) -> None:
        """A lane forgets the lines that it and the seven next have read."""
        ptx, p = self.ptx, self.p
        done = ptx.label("discarded")
        ptx(
            "bar.warp.sync 0xffffffff;",  # they all have what they read: they have added it up
            f"and.b32 {self.tmp}, {self.lane}, {_LINE // 16 - 1};",
            f"setp.ne.u32 {self.pred}, {self.tmp}, 0;",
            f"@{self.pred} bra {done};",
        )
        for split in range(p.splits):
            ptx(
                f"setp.gt.u32 {self.pred}, {self.number}, {split};",
                f"@{self.pred} discard.global.L2 [{self.parts}], {_LINE};",
                f"add.u64 {self.parts}, {self.parts}, {p.split_bytes};",
            )
        ptx(f"{done}:")

    def _store_lse(self) -> None:
        ptx, done = self.ptx, self.ptx.label("done")
        ptx(
            f"setp.ne.u32 {self.pred}, {self.tid}, 0;",
            f"@{self.pred} bra {done};",
            f"lg2.approx.f32 {self.total}, {self.total};",
            f"fma.rn.f32 {self.total}, {self.total}, {_float(math.log(2))}, {self.highest};",
            f"selp.f32 {self.total}, {_MINUS_INFINITY}, {self.total}, {self.nothing};",
            f"mul.wide.u32 {self.at}, {self.cta}, 4;",
            f"add.u64 {self.at}, $5, {self.at};",
            f"st.global.f32 [{self.at}], {self.total};",
            f"{done}:",
        )


def _float(value: float) -> str:
    """A float32 as PTX spells it."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"
