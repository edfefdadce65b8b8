"""The FP4 linear kernel for a few tokens and few outputs on Hopper: a CTA's warps share the contraction, no clusters.

    out[m, n] = sum_k x[m, k] A[n, k]        A in fragment order (fragments.py), exact

A CTA has `tiles` blocks of 16 outputs and all tokens; each of its `split` warps has one part of the contraction. A
warp streams its own codes, scales and x through its own ring in shared memory by cp.async, so that warps wait for
each other only at the end, where their partial results are added in the order of the parts. The products are
mma.sync m16n8k16, those of a block under the decode of the next. It is a loop, not unrolled, and weights do not go
straight to registers: fp4_linear_direct.py, which does both, took 0.6 us more than the ring of fp4_linear_wgmma.py
where neither had a cluster (bench/results/2026-11-25_h100_fp4_linear_ablation.json).

No default chooses this kernel: it has been run in an emulation only (tests/ptx_machine.py), on no GPU yet.

An output is `split` chains of k16 steps over ascending k, each in one float32 accumulator, added in order: the bits
that fp4_linear_wgmma.py gives with as many parts.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.fp4_bmm_tiles import SHARED_MEMORY_BYTES
from pallas_kernels.fp4_fragment_ptx import Constants, bias_scales, decode_block
from pallas_kernels.fp4_linear_tiles import BLOCK_BYTES, EXCHANGE_PAD, SCALE_WORD_BYTES, Problem
from pallas_kernels.fragments import BLOCK
from pallas_kernels.ptx import Ptx, vector

ROWS = 16  # outputs of an mma
_TOKENS = 8  # of an mma
MOST_TOKENS = 2 * _TOKENS
_BLOCKS = 2  # 64-k blocks of a stage
_WARP_BLOCK_BYTES = BLOCK_BYTES // 4  # codes of 16 x 64, 16 bytes a lane
_ROW_BYTES = _BLOCKS * BLOCK * 2  # of a token's x in a stage
# 16 more: 8 rows are then 16 bytes apart modulo 128, all banks, as ldmatrix wants them.
_ROW_PITCH = _ROW_BYTES + 16
_ALIGNMENT = 16  # of cp.async and ldmatrix
_ALL = 1  # named barrier of the whole CTA (Mosaic has 0)
_WARP = "0xffffffff"


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled; only `split` changes bits of the result.

    Attributes:
        split: warps of a CTA, which share the contraction, 4 or 8.
        tiles: of 16 outputs, of a CTA, 1 or 2.
        slots: stages of two 64-k blocks that a warp has in shared memory at once, up to all of its part.
    """

    split: int
    tiles: int
    slots: int


def warpgroups(config: Config) -> int:
    """Of a CTA."""
    return config.split // 4


def ctas(problem: Problem, config: Config) -> int:
    """In the grid."""
    return problem.outputs // (ROWS * config.tiles)


def stages(problem: Problem, config: Config) -> int:
    """Of a warp's part."""
    return problem.contraction // (_BLOCKS * BLOCK * config.split)


def slot_bytes(problem: Problem, config: Config) -> int:
    """A stage of a warp: codes [tile][block][lane][16 bytes], then x [token][_ROW_PITCH]."""
    return config.tiles * _BLOCKS * _WARP_BLOCK_BYTES + problem.batch * _ROW_PITCH


def _scale_pitch(problem: Problem, config: Config) -> int:
    """Bytes from one g's scales of a part to the next's: an odd number of 8, so that 8 of them are in all banks."""
    return _BLOCKS * SCALE_WORD_BYTES * (stages(problem, config) | 1)


def warp_bytes(problem: Problem, config: Config) -> int:
    """A warp's ring, then its scales [tile][g][block of the part][4]."""
    scales = config.tiles * 8 * _scale_pitch(problem, config)
    return -(-(config.slots * slot_bytes(problem, config) + scales) // _ALIGNMENT) * _ALIGNMENT


def shared_memory_bytes(problem: Problem, config: Config) -> int:
    """All warps', and what aligning may cost. Partial results take the place of a warp's first slot and fit there."""
    return _ALIGNMENT + config.split * warp_bytes(problem, config)


def check_config(problem: Problem, config: Config) -> None:
    """Raise ValueError unless the config fits the problem."""
    p, c = problem, config
    rules = {
        "M must be at most 16": p.batch <= MOST_TOKENS,
        "split must be 4 or 8": c.split in (4, 8),
        "tiles must be 1 or 2": c.tiles in (1, 2),
        "64 must divide N and the first weight's outputs": p.outputs % BLOCK == p.first_outputs % BLOCK == 0,
        "128 split must divide K": p.contraction % (_BLOCKS * BLOCK * c.split) == 0,
        "slots must be 1 .. K / (128 split)": 1 <= c.slots <= stages(p, c),
        "shared memory must hold at most 227 KiB": shared_memory_bytes(p, c) <= SHARED_MEMORY_BYTES,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(
                f"fp4_linear_mosaic_gpu: {rule}; got {config} for {problem}. Leave config out for a default."
            )


def program(problem: Problem, config: Config) -> str:
    """The whole kernel: $0 x, $1 codes, $2 scales, $3 out (64-bit addresses), $4 shared memory (32-bit).

    Of a second weight below the first: $5 codes, $6 scales.
    """
    return _Kernel(problem, config).emit()


class _Kernel:
    """Emits the program; the steps are in the order of the methods."""

    def __init__(self, problem: Problem, config: Config):
        self.p, self.c, self.ptx = problem, config, Ptx()
        self.stages = stages(problem, config)
        self.slot_bytes = slot_bytes(problem, config)
        self.code_bytes = config.tiles * _BLOCKS * _WARP_BLOCK_BYTES  # of a slot; x follows
        self.k_blocks = problem.contraction // BLOCK
        self.token_tiles = -(-problem.batch // _TOKENS)
        self.threads = 32 * config.split

    def emit(self) -> str:
        self._indices()
        self._sources()
        self._destinations()
        for stage in range(self.c.slots):
            self._load(stage)
            if stage == 0:
                self._load_scales()
            self.ptx("cp.async.commit_group;")
        self._multiply()
        self._write_partial_results()
        self._add_and_store()
        return self.ptx.text()

    def _indices(self) -> None:
        """The CTA's first tile of 16 outputs, the warp (its part of the contraction), the lane's place in it."""
        ptx, c = self.ptx, self.c
        self.tid, self.lane, self.warp = ptx.reg("tid"), ptx.reg("lane"), ptx.reg("warp")
        self.g, self.t, self.tile, self.tmp = (ptx.reg(name) for name in ("g", "t", "tile", "tmp"))
        self.shared, self.mine, self.wide = ptx.reg("shared"), ptx.reg("mine"), ptx.reg("wide", "b64")
        self.pred, self.last_rows, self.last_scales = (ptx.reg(name, "pred") for name in ("pred", "rows", "scales"))
        ptx(
            f"mov.u32 {self.tid}, %tid.x;",
            f"and.b32 {self.lane}, {self.tid}, 31;",
            f"shr.u32 {self.warp}, {self.tid}, 5;",
            f"shr.u32 {self.g}, {self.lane}, 2;",
            f"and.b32 {self.t}, {self.lane}, 3;",
            f"mov.u32 {self.tile}, %ctaid.x;",
            f"mul.lo.u32 {self.tile}, {self.tile}, {c.tiles};",
            f"add.u32 {self.shared}, $4, {_ALIGNMENT - 1};",
            f"and.b32 {self.shared}, {self.shared}, -{_ALIGNMENT};",
            f"mad.lo.u32 {self.mine}, {self.warp}, {warp_bytes(self.p, c)}, {self.shared};",
        )

    def _sources(self) -> None:
        """Addresses in global memory of what this lane copies of the part's first stage."""
        ptx, p = self.ptx, self.p
        self.codes, self.scales, self.x = (ptx.reg(name, "b64") for name in ("codes", "scales", "x"))
        row, part_blocks = ptx.reg("row"), self.stages * _BLOCKS
        codes, scales, tile = "$1", "$2", self.tile
        if p.first_outputs:
            codes, scales = ptx.regs("weight", 2, "b64")
            tile = ptx.reg("tile_of_weight")
            ptx(
                f"setp.ge.u32 {self.pred}, {self.tile}, {p.first_outputs // ROWS};",
                f"selp.b64 {codes}, $5, $1, {self.pred};",
                f"selp.b64 {scales}, $6, $2, {self.pred};",
                f"selp.b32 {tile}, {p.first_outputs // ROWS}, 0, {self.pred};",
                f"sub.u32 {tile}, {self.tile}, {tile};",
            )
        ptx(
            # codes [64 rows][block][16 rows][lane][16 bytes]
            f"shr.u32 {self.tmp}, {tile}, 2;",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {self.k_blocks * BLOCK_BYTES};",
            f"add.u64 {self.codes}, {codes}, {self.wide};",
            f"and.b32 {self.tmp}, {tile}, 3;",
            f"mul.lo.u32 {self.tmp}, {self.tmp}, {_WARP_BLOCK_BYTES};",
            f"mad.lo.u32 {self.tmp}, {self.lane}, 16, {self.tmp};",
            f"mad.lo.u32 {self.tmp}, {self.warp}, {part_blocks * BLOCK_BYTES}, {self.tmp};",
            f"cvt.u64.u32 {self.wide}, {self.tmp};",
            f"add.u64 {self.codes}, {self.codes}, {self.wide};",
            # scales [16 rows][g][block][4]: lane t copies those of block pairs t, t + 4, ... of the part
            f"mad.lo.u32 {self.tmp}, {tile}, 8, {self.g};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {self.k_blocks * SCALE_WORD_BYTES};",
            f"add.u64 {self.scales}, {scales}, {self.wide};",
            f"mad.lo.u32 {self.tmp}, {self.warp}, {part_blocks // _BLOCKS}, {self.t};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {_BLOCKS * SCALE_WORD_BYTES};",
            f"add.u64 {self.scales}, {self.scales}, {self.wide};",
            # x: chunk lane % 16 of 16 bytes of row lane / 16, then of every second row
            f"shr.u32 {row}, {self.lane}, 4;",
            f"mul.wide.u32 {self.wide}, {row}, {2 * p.contraction};",
            f"add.u64 {self.x}, $0, {self.wide};",
            f"and.b32 {self.tmp}, {self.lane}, 15;",
            f"mul.lo.u32 {self.tmp}, {self.tmp}, 16;",
            f"mad.lo.u32 {self.tmp}, {self.warp}, {part_blocks * BLOCK * 2}, {self.tmp};",
            f"cvt.u64.u32 {self.wide}, {self.tmp};",
            f"add.u64 {self.x}, {self.x}, {self.wide};",
            f"setp.lt.u32 {self.last_rows}, {row}, {p.batch % 2};",
            f"setp.lt.u32 {self.last_scales}, {self.t}, {self.stages % 4};",
        )

    def _destinations(self) -> None:
        """Addresses in slot 0: of this lane's codes (copied and read), x (copied; read), scales (copied; read)."""
        ptx, p, c = self.ptx, self.p, self.c
        self.code_at, self.x_to, self.scale_to, self.scale_at = (
            ptx.reg(name) for name in ("code_at", "x_to", "scale_to", "scale_at")
        )
        self.x_at = ptx.regs("x_at", self.token_tiles)
        ptx(
            f"mad.lo.u32 {self.code_at}, {self.lane}, 16, {self.mine};",
            f"shr.u32 {self.tmp}, {self.lane}, 4;",
            f"mad.lo.u32 {self.x_to}, {self.tmp}, {_ROW_PITCH}, {self.mine};",
            f"and.b32 {self.tmp}, {self.lane}, 15;",
            f"mad.lo.u32 {self.x_to}, {self.tmp}, 16, {self.x_to};",
            f"add.u32 {self.x_to}, {self.x_to}, {self.code_bytes};",
            f"mad.lo.u32 {self.scale_at}, {self.g}, {_scale_pitch(p, c)}, {self.mine};",
            f"add.u32 {self.scale_at}, {self.scale_at}, {c.slots * self.slot_bytes};",
            f"mad.lo.u32 {self.scale_to}, {self.t}, {_BLOCKS * SCALE_WORD_BYTES}, {self.scale_at};",
        )
        # Lane 8i + j gives ldmatrix row j of its matrix i, eight k of each token; absent tokens are the last again,
        # whose columns nobody stores.
        row = ptx.reg("row")
        for i, at in enumerate(self.x_at):
            ptx(
                f"and.b32 {row}, {self.lane}, 7;",
                f"add.u32 {row}, {row}, {i * _TOKENS};",
                f"min.u32 {row}, {row}, {p.batch - 1};",
                f"mad.lo.u32 {at}, {row}, {_ROW_PITCH}, {self.mine};",
                f"shr.u32 {self.tmp}, {self.lane}, 3;",
                f"mad.lo.u32 {at}, {self.tmp}, 16, {at};",
                f"add.u32 {at}, {at}, {self.code_bytes};",
            )

    def _load(self, stage: int, slot: str | None = None) -> None:
        """Start copying a stage, counted from where the sources point, to slot `stage` or to the offset `slot`."""
        ptx, p, c = self.ptx, self.p, self.c
        code_to, x_to, offset = self.code_at, self.x_to, stage * self.slot_bytes
        if slot is not None:
            code_to, x_to = ptx.regs("to", 2)
            offset = 0
            ptx(f"add.u32 {code_to}, {self.code_at}, {slot};", f"add.u32 {x_to}, {self.x_to}, {slot};")
        for block in range(_BLOCKS):
            for tile in range(c.tiles):
                to = offset + (tile * _BLOCKS + block) * _WARP_BLOCK_BYTES
                source = (stage * _BLOCKS + block) * BLOCK_BYTES + tile * _WARP_BLOCK_BYTES
                ptx(f"cp.async.cg.shared.global.L2::128B [{code_to}+{to}], [{self.codes}+{source}], 16;")
        for row in range(0, p.batch, 2):
            guard = f"@{self.last_rows} " if row + 2 > p.batch else ""
            source = row * 2 * p.contraction + stage * _ROW_BYTES
            ptx(f"{guard}cp.async.cg.shared.global [{x_to}+{offset + row * _ROW_PITCH}], [{self.x}+{source}], 16;")

    def _load_scales(self) -> None:
        """Start copying the scales of the whole part, two blocks' at a time."""
        ptx, c = self.ptx, self.c
        pair = _BLOCKS * SCALE_WORD_BYTES
        for tile in range(c.tiles):
            for first in range(0, self.stages, 4):
                guard = f"@{self.last_scales} " if first + 4 > self.stages else ""
                to = tile * 8 * _scale_pitch(self.p, c) + first * pair
                source = tile * 8 * self.k_blocks * SCALE_WORD_BYTES + first * pair
                ptx(f"{guard}cp.async.ca.shared.global [{self.scale_to}+{to}], [{self.scales}+{source}], {pair};")

    def _multiply(self) -> None:
        """The loop over stages. Both blocks have fragments of their own; each is multiplied under the next's decode.

        Before the first there is one of zeros.
        """
        ptx, c = self.ptx, self.c
        stage, slot, zero = ptx.reg("stage"), ptx.reg("slot"), ptx.reg("zero")
        again = ptx.label("stage")
        ptx(f"mov.u32 {zero}, 0;")
        self.constants = Constants(ptx, zero)
        self.factors = ptx.regs("factor", 2)
        # [block][tile][k step][4] of weights, [block][token tile][k step][2] of x, [tile][token tile][4] of sums
        self.a = [[[ptx.regs("a", 4) for _ in range(4)] for _ in range(c.tiles)] for _ in range(_BLOCKS)]
        self.b = [[[ptx.regs("b", 2) for _ in range(4)] for _ in range(self.token_tiles)] for _ in range(_BLOCKS)]
        self.acc = [[ptx.regs("acc", 4, "f32") for _ in range(self.token_tiles)] for _ in range(c.tiles)]
        self.words = [[ptx.regs("word", 4) for _ in range(_BLOCKS)] for _ in range(c.tiles)]
        self.scale_words = [ptx.regs("scale", _BLOCKS) for _ in range(c.tiles)]
        for fragments in (*self.a[-1], *self.b[-1]):
            ptx(*(f"mov.u32 {register}, 0;" for step in fragments for register in step))
        for tile in self.acc:
            ptx(*(f"mov.f32 {register}, 0f00000000;" for sums in tile for register in sums))
        refill = c.slots < self.stages
        if refill:  # the sources' next stage
            self._advance(c.slots)
        ptx(
            f"mov.u32 {stage}, 0;",
            f"mov.u32 {slot}, 0;",
            f"{again}:",
            f"cp.async.wait_group {c.slots - 1};",
            f"bar.warp.sync {_WARP};",
        )
        self._compute(slot)
        if refill:
            no_more = ptx.label("no_more")
            ptx(
                f"setp.ge.u32 {self.pred}, {stage}, {self.stages - c.slots};",
                f"@{self.pred} bra {no_more};",
                f"bar.warp.sync {_WARP};",  # all lanes have read this slot
            )
            self._load(0, slot)
            self._advance(1)
            ptx(f"{no_more}:")
        ptx(
            "cp.async.commit_group;",
            f"add.u32 {self.scale_at}, {self.scale_at}, {_BLOCKS * SCALE_WORD_BYTES};",
            f"add.u32 {slot}, {slot}, {self.slot_bytes};",
        )
        if refill:
            ptx(
                f"setp.eq.u32 {self.pred}, {slot}, {c.slots * self.slot_bytes};",
                f"selp.b32 {slot}, 0, {slot}, {self.pred};",
            )
        ptx(
            f"add.u32 {stage}, {stage}, 1;",
            f"setp.lt.u32 {self.pred}, {stage}, {self.stages};",
            f"@{self.pred} bra {again};",
        )
        self._products(_BLOCKS - 1)

    def _advance(self, count: int) -> None:
        """Let the sources of codes and x point so many stages further."""
        self.ptx(
            f"add.u64 {self.codes}, {self.codes}, {count * _BLOCKS * BLOCK_BYTES};",
            f"add.u64 {self.x}, {self.x}, {count * _ROW_BYTES};",
        )

    def _compute(self, slot: str) -> None:
        """Read a stage, decode both blocks; multiply the last one of the stage before, then the first of this."""
        ptx, c = self.ptx, self.c
        code_at, x_at = ptx.reg("code_from"), ptx.regs("x_from", self.token_tiles)
        ptx(f"add.u32 {code_at}, {self.code_at}, {slot};")
        ptx(*(f"add.u32 {here}, {at}, {slot};" for here, at in zip(x_at, self.x_at, strict=True)))
        for tile in range(c.tiles):
            at = f"{self.scale_at}+{tile * 8 * _scale_pitch(self.p, c)}"
            ptx(f"ld.shared.v2.b32 {vector(self.scale_words[tile])}, [{at}];")
            for block, words in enumerate(self.words[tile]):
                at = f"{code_at}+{(tile * _BLOCKS + block) * _WARP_BLOCK_BYTES}"
                ptx(f"ld.shared.v4.b32 {vector(words)}, [{at}];")
            bias_scales(ptx, self.constants, self.scale_words[tile])
        for block in range(_BLOCKS):
            self._products(1 - block)
            for steps, at in zip(self.b[block], x_at, strict=True):
                for step in (0, 2):  # 32 k
                    ptx(
                        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 "
                        f"{vector([*steps[step], *steps[step + 1]])}, [{at}+{block * BLOCK * 2 + step * 32}];"
                    )
            for tile in range(c.tiles):
                decode_block(
                    ptx,
                    self.constants,
                    self.words[tile][block],
                    self.scale_words[tile][block],
                    self.factors,
                    self.a[block][tile],
                )

    def _products(self, block: int) -> None:
        """Those of a block's four k steps, in turn for each tile."""
        for step in range(4):
            for fragments, sums in zip(self.a[block], self.acc, strict=True):
                for steps, acc in zip(self.b[block], sums, strict=True):
                    self.ptx(
                        f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {vector(acc)}, "
                        f"{vector(fragments[step])}, {vector(steps[step])}, {vector(acc)};"
                    )

    def _write_partial_results(self) -> None:
        """Accumulators to the warp's memory, float32 [token][output]; then all of the CTA's are there."""
        ptx, c = self.ptx, self.c
        pitch, to = self._pitch(), ptx.reg("to")
        ptx(
            "cp.async.wait_group 0;",
            f"bar.warp.sync {_WARP};",  # all lanes have read what lies there
            f"mad.lo.u32 {to}, {self.t}, {2 * pitch}, {self.mine};",
            f"mad.lo.u32 {to}, {self.g}, 4, {to};",
        )
        for tile in range(c.tiles):
            for n, acc in enumerate(self.acc[tile]):
                for i, register in enumerate(acc):  # row g at tokens 2t, 2t + 1, then row g + 8
                    at = (n * _TOKENS + i % 2) * pitch + (tile * ROWS + i // 2 * 8) * 4
                    ptx(f"st.shared.f32 [{to}+{at}], {register};")
        ptx(f"bar.sync {_ALL}, {self.threads};")

    def _pitch(self) -> int:
        """Bytes from a token's partial results to the next's; 4 float32 more, so that a warp's are in all banks."""
        return (self.c.tiles * ROWS + EXCHANGE_PAD) * 4

    def _add_and_store(self) -> None:
        """Add the warps' partial results in their order, round and store: 2 outputs a thread."""
        ptx, p, c = self.ptx, self.p, self.c
        pairs = c.tiles * ROWS // 2
        items = p.batch * pairs
        token, pair, at, item = ptx.regs("item", 4)
        total, more = ptx.regs("total", 2, "f32"), ptx.regs("more", 2, "f32")
        out = ptx.reg("out", "b64")
        for first in range(0, items, self.threads):
            done = ptx.label("stored")
            ptx(f"add.u32 {item}, {self.tid}, {first};")
            if first + self.threads > items:
                ptx(f"setp.ge.u32 {self.pred}, {item}, {items};", f"@{self.pred} bra {done};")
            ptx.divide(token, pair, item, pairs, items)
            ptx(
                f"mad.lo.u32 {at}, {token}, {self._pitch()}, {self.shared};",
                f"mad.lo.u32 {at}, {pair}, 8, {at};",
            )
            for part in range(c.split):
                into = total if part == 0 else more
                ptx(f"ld.shared.v2.f32 {vector(into)}, [{at}+{part * warp_bytes(p, c)}];")
                if part:
                    ptx(*(f"add.f32 {a}, {a}, {b};" for a, b in zip(total, more, strict=True)))
            ptx(
                f"mul.wide.u32 {out}, {token}, {p.outputs * p.out_bytes};",
                f"add.u64 {out}, $3, {out};",
                f"mad.lo.u32 {pair}, {self.tile}, {ROWS // 2}, {pair};",
                f"mul.wide.u32 {self.wide}, {pair}, {2 * p.out_bytes};",
                f"add.u64 {out}, {out}, {self.wide};",
            )
            if p.out_bytes == 2:
                ptx(f"cvt.rn.bf16x2.f32 {item}, {total[1]}, {total[0]};", f"st.global.b32 [{out}], {item};")
            else:
                ptx(f"st.global.v2.f32 [{out}], {vector(total)};")
            ptx(f"{done}:")
