"""The FP4 linear kernel for one to eight tokens on Hopper: the warps of a CTA share the contraction, no clusters.

    out[m, n] = sum_k x[m, k] A[n, k]        A in fragment order (fragments.py), exact

A CTA has 16 outputs; each of its eight warps has one part of the contraction. A warp asks for all of its codes,
scales and x at once, by cp.async to its own shared memory, so that warps wait for each other only at the end, where
their partial results are added in the order of the parts. The products are mma.sync m16n8k16, those of a block under
the decode of the next.

What this saves is a cluster and its exchange of partial results: 7168 -> 2112 takes an H200 5.1 us with one token
instead of 5.9. But every CTA reads all of x, four times as often as where one has 64 outputs: with four tokens 5.6 us
instead of 5.9, with eight 7.0 (bench/results/2026-11-28_h200_fp4_linear_few.json). So fp4_linear_h200.py takes it for
up to four.

An output is eight chains of k16 steps over ascending k, each in one float32 accumulator, added in order: the bits
that fp4_linear_wgmma.py gives with as many parts. That mma.sync and wgmma round a step alike is what every GPU test
saw, no promise of PTX.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.fp4_bmm_tiles import SHARED_MEMORY_BYTES, check_rules
from pallas_kernels.fp4_fragment_ptx import Constants, bias_scales, decode_block
from pallas_kernels.fp4_linear_exchange import ALL
from pallas_kernels.fp4_linear_tiles import BLOCK_BYTES, EXCHANGE_PAD, NAME, SCALE_WORD_BYTES, Problem
from pallas_kernels.fp4_linear_weights import weight_of
from pallas_kernels.fragments import BLOCK
from pallas_kernels.ptx import Ptx, vector

ROWS = 16  # outputs of a CTA and of an mma
MOST_TOKENS = 8  # of an mma
SPLIT = 8  # parts of the contraction, one for each warp of a CTA
WARPGROUPS = SPLIT // 4  # of a CTA
_THREADS = 32 * SPLIT
_BLOCKS = 2  # 64-k blocks of a stage
_PART_UNIT = _BLOCKS * BLOCK * SPLIT
_TILE_BYTES = BLOCK_BYTES // 4  # codes of 16 outputs of a block, 16 bytes a lane
_CODE_BYTES = _BLOCKS * _TILE_BYTES  # of a stage
_SCALE_BYTES = _BLOCKS * SCALE_WORD_BYTES  # of a stage, for a row g
_ROW_BYTES = _BLOCKS * BLOCK * 2  # of a token's x in a stage
# 16 more: 8 rows are then 16 bytes apart modulo 128, all banks, as ldmatrix wants them.
_ROW_PITCH = _ROW_BYTES + 16
# Bytes from a token's partial results to the next's: 4 float32 more, so that a warp's are in all banks.
_PARTIAL_PITCH = (ROWS + EXCHANGE_PAD) * 4
_ALIGNMENT = 16  # of cp.async and ldmatrix
_WARP = "0xffffffff"


@dataclasses.dataclass(frozen=True)
class Config:
    """There is nothing to choose: its warps are the parts of the contraction, SPLIT of them."""


def ctas(problem: Problem) -> int:
    """In the grid."""
    return problem.outputs // ROWS


def stages(problem: Problem) -> int:
    """Of a warp's part."""
    return problem.contraction // _PART_UNIT


def stage_bytes(problem: Problem) -> int:
    """Of a warp: codes [block][lane][16 bytes], then x [token][_ROW_PITCH]."""
    return _CODE_BYTES + problem.batch * _ROW_PITCH


def scale_pitch(problem: Problem) -> int:
    """Bytes from one g's scales of a part to the next's: an odd number of 8, lest two of them share a bank."""
    return _SCALE_BYTES * (stages(problem) | 1)


def warp_bytes(problem: Problem) -> int:
    """A warp's stages, then its scales [g][block of the part][4]."""
    size = stages(problem) * stage_bytes(problem) + 8 * scale_pitch(problem)
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def shared_memory_bytes(problem: Problem) -> int:
    """All warps', and what aligning may cost. Partial results fit in a warp's first stage, whose place they take."""
    return _ALIGNMENT + SPLIT * warp_bytes(problem)


def check_config(problem: Problem) -> None:
    """Raise ValueError unless the kernel can do the problem."""
    p = problem
    rules = {
        "M must be at most 8": p.batch <= MOST_TOKENS,
        "64 must divide N and the first weight's outputs": p.outputs % BLOCK == p.first_outputs % BLOCK == 0,
        f"{_PART_UNIT} must divide K": p.contraction % _PART_UNIT == 0,
        "shared memory must hold at most 227 KiB": shared_memory_bytes(p) <= SHARED_MEMORY_BYTES,
    }
    check_rules(NAME, rules, problem, Config())


def program(problem: Problem) -> str:
    """The whole kernel: $0 x, $1 codes, $2 scales, $3 out (64-bit addresses), $4 shared memory (32-bit).

    Of a second weight below the first: $5 codes, $6 scales.
    """
    return _Kernel(problem).emit()


class _Kernel:
    """Emits the program; the steps are in the order of the methods."""

    def __init__(self, problem: Problem):
        self.p, self.ptx = problem, Ptx()
        self.stages = stages(problem)
        self.k_blocks = problem.contraction // BLOCK

    def emit(self) -> str:
        self._indices()
        self._sources()
        self._destinations()
        self._ask()
        self._multiply()
        self._write_partial_results()
        self._add_and_store()
        return self.ptx.text()

    def _indices(self) -> None:
        """The CTA's tile of 16 outputs, the warp (its part of the contraction), the lane's place in it."""
        ptx = self.ptx
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
            f"add.u32 {self.shared}, $4, {_ALIGNMENT - 1};",
            f"and.b32 {self.shared}, {self.shared}, -{_ALIGNMENT};",
            f"mad.lo.u32 {self.mine}, {self.warp}, {warp_bytes(self.p)}, {self.shared};",
        )

    def _sources(self) -> None:
        """Addresses in global memory of what this lane copies of the part's first stage."""
        ptx, p = self.ptx, self.p
        self.codes, self.scales, self.x = (ptx.reg(name, "b64") for name in ("codes", "scales", "x"))
        row, tile = ptx.reg("row"), ptx.reg("tile_of_weight")
        ptx(f"mov.u32 {tile}, {self.tile};")
        codes, scales = weight_of(ptx, tile, p.first_outputs // ROWS, self.pred)
        ptx(
            # codes [64 rows][block][16 rows][lane][16 bytes]
            f"shr.u32 {self.tmp}, {tile}, 2;",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {self.k_blocks * BLOCK_BYTES};",
            f"add.u64 {self.codes}, {codes}, {self.wide};",
            f"and.b32 {self.tmp}, {tile}, 3;",
            f"mul.lo.u32 {self.tmp}, {self.tmp}, {_TILE_BYTES};",
            f"mad.lo.u32 {self.tmp}, {self.lane}, 16, {self.tmp};",
            f"mad.lo.u32 {self.tmp}, {self.warp}, {self.stages * _BLOCKS * BLOCK_BYTES}, {self.tmp};",
            f"cvt.u64.u32 {self.wide}, {self.tmp};",
            f"add.u64 {self.codes}, {self.codes}, {self.wide};",
            # scales [16 rows][g][block][4]: lane t copies those of stages t, t + 4, ... of the part
            f"mad.lo.u32 {self.tmp}, {tile}, 8, {self.g};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {self.k_blocks * SCALE_WORD_BYTES};",
            f"add.u64 {self.scales}, {scales}, {self.wide};",
            f"mad.lo.u32 {self.tmp}, {self.warp}, {self.stages}, {self.t};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {_SCALE_BYTES};",
            f"add.u64 {self.scales}, {self.scales}, {self.wide};",
            # x: chunk lane % 16 of 16 bytes of row lane / 16, then of every second row
            f"shr.u32 {row}, {self.lane}, 4;",
            f"mul.wide.u32 {self.wide}, {row}, {2 * p.contraction};",
            f"add.u64 {self.x}, $0, {self.wide};",
            f"and.b32 {self.tmp}, {self.lane}, 15;",
            f"mul.lo.u32 {self.tmp}, {self.tmp}, 16;",
            f"mad.lo.u32 {self.tmp}, {self.warp}, {self.stages * _ROW_BYTES}, {self.tmp};",
            f"cvt.u64.u32 {self.wide}, {self.tmp};",
            f"add.u64 {self.x}, {self.x}, {self.wide};",
            f"setp.lt.u32 {self.last_rows}, {row}, {p.batch % 2};",
            f"setp.lt.u32 {self.last_scales}, {self.t}, {self.stages % 4};",
        )

    def _destinations(self) -> None:
        """Addresses in the first stage: of this lane's codes (copied and read), x and scales (copied; read)."""
        ptx, p = self.ptx, self.p
        self.code_at, self.x_to, self.x_at, self.scale_to, self.scale_at = (
            ptx.reg(name) for name in ("code_at", "x_to", "x_at", "scale_to", "scale_at")
        )
        row = ptx.reg("row")
        ptx(
            f"mad.lo.u32 {self.code_at}, {self.lane}, 16, {self.mine};",
            f"shr.u32 {self.tmp}, {self.lane}, 4;",
            f"mad.lo.u32 {self.x_to}, {self.tmp}, {_ROW_PITCH}, {self.mine};",
            f"and.b32 {self.tmp}, {self.lane}, 15;",
            f"mad.lo.u32 {self.x_to}, {self.tmp}, 16, {self.x_to};",
            f"add.u32 {self.x_to}, {self.x_to}, {_CODE_BYTES};",
            f"mad.lo.u32 {self.scale_at}, {self.g}, {scale_pitch(p)}, {self.mine};",
            f"add.u32 {self.scale_at}, {self.scale_at}, {self.stages * stage_bytes(p)};",
            f"mad.lo.u32 {self.scale_to}, {self.t}, {_SCALE_BYTES}, {self.scale_at};",
            # Lane 8i + j gives ldmatrix row j of its matrix i, eight k of each token; absent tokens are the last
            # again, whose columns nobody stores.
            f"and.b32 {row}, {self.lane}, 7;",
            f"min.u32 {row}, {row}, {p.batch - 1};",
            f"mad.lo.u32 {self.x_at}, {row}, {_ROW_PITCH}, {self.mine};",
            f"shr.u32 {self.tmp}, {self.lane}, 3;",
            f"mad.lo.u32 {self.x_at}, {self.tmp}, 16, {self.x_at};",
            f"add.u32 {self.x_at}, {self.x_at}, {_CODE_BYTES};",
        )

    def _ask(self) -> None:
        """Start copying everything: a group for each stage, all scales with the first."""
        ptx, p = self.ptx, self.p
        for stage in range(self.stages):
            to = stage * stage_bytes(p)
            for block in range(_BLOCKS):
                source = (stage * _BLOCKS + block) * BLOCK_BYTES
                ptx(
                    "cp.async.cg.shared.global.L2::128B "
                    f"[{self.code_at}+{to + block * _TILE_BYTES}], [{self.codes}+{source}], 16;"
                )
            for row in range(0, p.batch, 2):
                guard = f"@{self.last_rows} " if row + 2 > p.batch else ""
                at, source = to + row * _ROW_PITCH, row * 2 * p.contraction + stage * _ROW_BYTES
                ptx(f"{guard}cp.async.cg.shared.global [{self.x_to}+{at}], [{self.x}+{source}], 16;")
            if stage == 0:
                self._ask_for_scales()
            ptx("cp.async.commit_group;")

    def _ask_for_scales(self) -> None:
        """Those of a stage by each of four lanes."""
        for first in range(0, self.stages, 4):
            guard = f"@{self.last_scales} " if first + 4 > self.stages else ""
            at = first * _SCALE_BYTES
            self.ptx(
                f"{guard}cp.async.ca.shared.global [{self.scale_to}+{at}], [{self.scales}+{at}], {_SCALE_BYTES};"
            )

    def _multiply(self) -> None:
        """The loop over stages. Both blocks have fragments of their own; each is multiplied under the next's decode.

        Before the first there is one of zeros.
        """
        ptx = self.ptx
        stage, zero = ptx.reg("stage"), ptx.reg("zero")
        again = ptx.label("stage")
        ptx(f"mov.u32 {zero}, 0;")
        self.constants = Constants(ptx, zero)
        self.factors = ptx.regs("factor", 2)
        # [block][k step][4] of weights, [block][k step][2] of x
        self.a = [[ptx.regs("a", 4) for _ in range(4)] for _ in range(_BLOCKS)]
        self.b = [[ptx.regs("b", 2) for _ in range(4)] for _ in range(_BLOCKS)]
        self.acc = ptx.regs("acc", 4, "f32")
        self.words = [ptx.regs("word", 4) for _ in range(_BLOCKS)]
        self.scale_words = ptx.regs("scale", _BLOCKS)
        for step in (*self.a[-1], *self.b[-1]):
            ptx(*(f"mov.u32 {register}, 0;" for register in step))
        ptx(
            *(f"mov.f32 {register}, 0f00000000;" for register in self.acc),
            f"mov.u32 {stage}, 0;",
            f"{again}:",
            # An empty group a round, below, keeps the number of those that are younger than this stage's.
            f"cp.async.wait_group {self.stages - 1};",
            f"bar.warp.sync {_WARP};",
        )
        self._compute()
        ptx(
            "cp.async.commit_group;",
            f"add.u32 {self.code_at}, {self.code_at}, {stage_bytes(self.p)};",
            f"add.u32 {self.x_at}, {self.x_at}, {stage_bytes(self.p)};",
            f"add.u32 {self.scale_at}, {self.scale_at}, {_SCALE_BYTES};",
            f"add.u32 {stage}, {stage}, 1;",
            f"setp.lt.u32 {self.pred}, {stage}, {self.stages};",
            f"@{self.pred} bra {again};",
        )
        self._products(_BLOCKS - 1)

    def _compute(self) -> None:
        """Read a stage, decode both blocks; multiply the last one of the stage before, then the first of this."""
        ptx = self.ptx
        ptx(f"ld.shared.v2.b32 {vector(self.scale_words)}, [{self.scale_at}];")
        for block, words in enumerate(self.words):
            ptx(f"ld.shared.v4.b32 {vector(words)}, [{self.code_at}+{block * _TILE_BYTES}];")
        bias_scales(ptx, self.constants, self.scale_words)
        for block, (words, scales) in enumerate(zip(self.words, self.scale_words, strict=True)):
            self._products(1 - block)
            steps = self.b[block]
            for step in (0, 2):  # 32 k
                into = vector([*steps[step], *steps[step + 1]])
                at = f"{self.x_at}+{block * BLOCK * 2 + step * 32}"
                ptx(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {into}, [{at}];")
            decode_block(ptx, self.constants, words, scales, self.factors, self.a[block])

    def _products(self, block: int) -> None:
        """Those of a block's four k steps."""
        acc = vector(self.acc)
        for a, b in zip(self.a[block], self.b[block], strict=True):
            self.ptx(f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {acc}, {vector(a)}, {vector(b)}, {acc};")

    def _write_partial_results(self) -> None:
        """Accumulators to the warp's memory, float32 [token][output]; then all of the CTA's are there."""
        ptx, to = self.ptx, self.ptx.reg("to")
        ptx(
            f"bar.warp.sync {_WARP};",  # all lanes have read what lies there
            f"mad.lo.u32 {to}, {self.t}, {2 * _PARTIAL_PITCH}, {self.mine};",
            f"mad.lo.u32 {to}, {self.g}, 4, {to};",
        )
        for i, register in enumerate(self.acc):  # row g at tokens 2t, 2t + 1, then row g + 8
            ptx(f"st.shared.f32 [{to}+{i % 2 * _PARTIAL_PITCH + i // 2 * 32}], {register};")
        ptx(f"bar.sync {ALL}, {_THREADS};")

    def _add_and_store(self) -> None:
        """Add the warps' partial results in their order, round and store: 2 outputs of a token, one thread each."""
        ptx, p = self.ptx, self.p
        pairs = ROWS // 2
        token, pair, at = ptx.reg("token"), ptx.reg("pair"), ptx.reg("at")
        total, more = ptx.regs("total", 2, "f32"), ptx.regs("more", 2, "f32")
        out, done = ptx.reg("out", "b64"), ptx.label("stored")
        ptx(f"setp.ge.u32 {self.pred}, {self.tid}, {p.batch * pairs};", f"@{self.pred} bra {done};")
        ptx.divide(token, pair, self.tid, pairs, _THREADS)
        ptx(
            f"mad.lo.u32 {at}, {token}, {_PARTIAL_PITCH}, {self.shared};",
            f"mad.lo.u32 {at}, {pair}, 8, {at};",
            f"ld.shared.v2.f32 {vector(total)}, [{at}];",
        )
        for part in range(1, SPLIT):
            ptx(f"ld.shared.v2.f32 {vector(more)}, [{at}+{part * warp_bytes(p)}];")
            ptx(*(f"add.f32 {a}, {a}, {b};" for a, b in zip(total, more, strict=True)))
        ptx(
            f"mul.wide.u32 {out}, {token}, {p.outputs * p.out_bytes};",
            f"add.u64 {out}, $3, {out};",
            f"mad.lo.u32 {pair}, {self.tile}, {pairs}, {pair};",
            f"mul.wide.u32 {self.wide}, {pair}, {2 * p.out_bytes};",
            f"add.u64 {out}, {out}, {self.wide};",
        )
        if p.out_bytes == 2:
            ptx(f"cvt.rn.bf16x2.f32 {at}, {total[1]}, {total[0]};", f"st.global.b32 [{out}], {at};")
        else:
            ptx(f"st.global.v2.f32 [{out}], {vector(total)};")
        ptx(f"{done}:")
