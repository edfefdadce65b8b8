"""The FP4 linear kernel for Hopper: weights streamed through shared memory, decoded into wgmma's register operand.

    out[m, n] = sum_k x[m, k] A[n, k]        A in fragment order (fragments.py), exact

A CTA owns `warpgroups * tiles` blocks of 64 outputs, `tokens` tokens and one part of `split` of the contraction,
which the CTAs of a cluster share. Weights, scales and x come through a ring of slots by cp.async, each slot a stage
of `blocks` blocks of 64 k; what a thread decodes it has loaded itself, x it shares (rows of 128 bytes in 128-byte
swizzle, as wgmma wants them). While the tensor cores run one block, the next is decoded into the other of two sets of
registers. At the end the cluster's partial results meet in shared memory, and are added in the order of the parts.

An output is `split` chains of wgmma k16 steps over ascending k, each in one float32 accumulator, added in order: its
bits depend on `split` alone, hence not on the batch that a token sits in.
"""

from __future__ import annotations

from pallas_kernels import fp4_linear_tiles as tiling
from pallas_kernels.fp4_bmm_tiles import ALIGNMENT, SLAB_BYTES
from pallas_kernels.fp4_fragment_ptx import Constants, bias_scales, decode_block
from pallas_kernels.fp4_linear_exchange import ALL, Exchange
from pallas_kernels.fp4_linear_tiles import BLOCK_BYTES, SCALE_WORD_BYTES, Config, Problem
from pallas_kernels.fp4_linear_weights import weight_of
from pallas_kernels.fragments import BLOCK
from pallas_kernels.ptx import vector

# wgmma's descriptor of x (PTX ISA, "Matrix descriptor"): 128-byte swizzle, 1024 bytes from 8 rows to the next.
DESCRIPTOR = (1 << 62) | ((ALIGNMENT >> 4) << 32) | (1 << 16)


def program(problem: Problem, config: Config) -> str:
    """The whole kernel: $0 x, $1 codes, $2 scales, $3 out (64-bit addresses), $4 shared memory (32-bit).

    Of a second weight below the first: $5 codes, $6 scales.
    """
    return Kernel(problem, config).emit()


class Kernel(Exchange):
    """Emits the program; the steps are in the order of the methods, the exchange last."""

    def __init__(self, problem: Problem, config: Config):
        super().__init__(problem, config)
        self.stages = tiling.stages(problem, config)
        self.ahead = config.slots - 2
        self.row_bytes = problem.contraction * 2  # of x

    def emit(self) -> str:
        """The program."""
        self._indices()
        self._sources()
        self._destinations()
        for stage in range(self.ahead):
            if stage < self.stages:
                self._load(stage * tiling.stage_bytes(self.c))
            self.ptx("cp.async.commit_group;")
        if self.c.push:
            self.expect_partial_results()
        self._multiply()
        self.exchange_and_store()
        return self.ptx.text()

    def _indices(self) -> None:
        """This thread's place in the grid (part, token, rank) and in the warpgroup (w, g, t)."""
        ptx, p, c = self.ptx, self.p, self.c
        self.tid, self.thread, self.lane = ptx.reg("tid"), ptx.reg("thread"), ptx.reg("lane")
        self.w, self.wg, self.g, self.t = (ptx.reg(name) for name in ("w", "wg", "g", "t"))
        self.part, self.token, self.rank, self.tile = (ptx.reg(name) for name in ("part", "token", "rank", "tile"))
        self.tmp, self.tmp2 = ptx.regs("tmp", 2)
        self.shared, self.wide = ptx.reg("shared"), ptx.reg("wide", "b64")
        self.pred, self.scales_too, self.last_rows = (ptx.reg(name, "pred") for name in ("pred", "scales", "rows"))
        token_tiles, clusters = tiling.token_tiles(p, c), tiling.clusters(p, c)
        ptx(
            f"mov.u32 {self.tid}, %tid.x;",
            f"and.b32 {self.thread}, {self.tid}, 127;",
            f"and.b32 {self.lane}, {self.tid}, 31;",
            f"shr.u32 {self.w}, {self.thread}, 5;",
            f"shr.u32 {self.wg}, {self.tid}, 7;",
            f"shr.u32 {self.g}, {self.lane}, 2;",
            f"and.b32 {self.t}, {self.lane}, 3;",
            f"mov.u32 {self.tmp}, %ctaid.x;",
            f"and.b32 {self.rank}, {self.tmp}, {c.split - 1};",
            f"shr.u32 {self.tmp}, {self.tmp}, {c.split.bit_length() - 1};",
        )
        ptx.divide(self.part, self.token, self.tmp, token_tiles, clusters)
        ptx(
            f"mul.lo.u32 {self.token}, {self.token}, {c.tokens};",
            f"mad.lo.u32 {self.tile}, {self.part}, {c.warpgroups}, {self.wg};",
            f"mul.lo.u32 {self.tile}, {self.tile}, {c.tiles};",
            f"setp.lt.u32 {self.scales_too}, {self.t}, {c.tiles};",
            f"add.u32 {self.shared}, $4, {ALIGNMENT - 1};",
            f"and.b32 {self.shared}, {self.shared}, -{ALIGNMENT};",
        )

    def _sources(self) -> None:
        """Addresses in global memory of what this thread copies; they move on with the stages."""
        ptx, p, c = self.ptx, self.p, self.c
        self.codes, self.scales, self.x = (ptx.reg(name, "b64") for name in ("codes", "scales", "x"))
        k_blocks = p.contraction // BLOCK
        part_blocks = k_blocks // c.split
        codes, scales = weight_of(ptx, self.tile, p.first_outputs // BLOCK, self.pred)
        self.scale_bytes = scales  # of all
        ptx(
            # codes [tile][block][thread][16 bytes]
            f"mul.wide.u32 {self.wide}, {self.tile}, {k_blocks * BLOCK_BYTES};",
            f"add.u64 {self.codes}, {codes}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.rank}, {part_blocks * BLOCK_BYTES};",
            f"add.u64 {self.codes}, {self.codes}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.thread}, 16;",
            f"add.u64 {self.codes}, {self.codes}, {self.wide};",
            # scales [16 rows][g][block][4]: lane t copies those of the warpgroup's tile t
            f"add.u32 {self.tmp}, {self.tile}, {self.t};",
            f"mad.lo.u32 {self.tmp}, {self.tmp}, 4, {self.w};",
            f"mad.lo.u32 {self.tmp}, {self.tmp}, 8, {self.g};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {k_blocks * SCALE_WORD_BYTES};",
            f"add.u64 {self.scales}, {scales}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.rank}, {part_blocks * SCALE_WORD_BYTES};",
            f"add.u64 {self.scales}, {self.scales}, {self.wide};",
            # x: chunk tid % 8 of 16 bytes of row tid / 8
            f"shr.u32 {self.tmp2}, {self.tid}, 3;",
            f"add.u32 {self.tmp}, {self.token}, {self.tmp2};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {self.row_bytes};",
            f"add.u64 {self.x}, $0, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.rank}, {part_blocks * SLAB_BYTES};",
            f"add.u64 {self.x}, {self.x}, {self.wide};",
            f"and.b32 {self.tmp2}, {self.tid}, 7;",
            f"mul.wide.u32 {self.wide}, {self.tmp2}, 16;",
            f"add.u64 {self.x}, {self.x}, {self.wide};",
        )
        # Bytes to copy of this thread's row in each pass over the tokens: none past the batch, which become zeros.
        self.pass_rows = 16 * c.warpgroups
        self.sizes = ptx.regs("size", -(-c.tokens // self.pass_rows))
        for i, size in enumerate(self.sizes):
            ptx(
                f"add.u32 {size}, {self.tmp}, {i * self.pass_rows};",
                f"setp.lt.u32 {self.pred}, {size}, {p.batch};",
                f"selp.b32 {size}, 16, 0, {self.pred};",
            )

    def _destinations(self) -> None:
        """Addresses in slot 0: of this thread's codes (copied and read), its scales (copied; read), its x."""
        ptx, c = self.ptx, self.c
        self.code_at, self.scale_to, self.scale_at, self.x_to = (
            ptx.reg(name) for name in ("code_at", "scale_to", "scale_at", "x_to")
        )
        share = 32 * c.blocks * SCALE_WORD_BYTES  # scales of a tile in a stage
        after_x, after_codes = tiling.x_bytes(c), tiling.x_bytes(c) + tiling.code_bytes(c)
        ptx(
            f"mad.lo.u32 {self.code_at}, {self.wg}, {c.tiles * c.blocks * BLOCK_BYTES}, {self.shared};",
            f"mad.lo.u32 {self.code_at}, {self.thread}, 16, {self.code_at};",
            f"add.u32 {self.code_at}, {self.code_at}, {after_x};",
            f"mad.lo.u32 {self.tmp}, {self.w}, 8, {self.g};",
            f"mad.lo.u32 {self.scale_at}, {self.tmp}, {c.blocks * SCALE_WORD_BYTES}, {self.shared};",
            f"mad.lo.u32 {self.scale_at}, {self.wg}, {c.tiles * share}, {self.scale_at};",
            f"add.u32 {self.scale_at}, {self.scale_at}, {after_codes};",
            f"mad.lo.u32 {self.scale_to}, {self.t}, {share}, {self.scale_at};",
            f"shr.u32 {self.tmp2}, {self.tid}, 3;",  # the row of x; the swizzle is chunk ^ (row % 8)
            f"xor.b32 {self.tmp}, {self.tid}, {self.tmp2};",
            f"and.b32 {self.tmp}, {self.tmp}, 7;",
            f"mad.lo.u32 {self.x_to}, {self.tmp}, 16, {self.shared};",
            f"mad.lo.u32 {self.x_to}, {self.tmp2}, {SLAB_BYTES}, {self.x_to};",
        )
        if c.tokens % self.pass_rows:
            ptx(f"setp.lt.u32 {self.last_rows}, {self.tmp2}, {c.tokens % self.pass_rows};")

    def _load(self, slot: int | str) -> None:
        """Start copying the next stage to a slot (its offset in bytes, or a register that holds it)."""
        ptx, p, c = self.ptx, self.p, self.c
        code_to, scale_to, x_to, offset = self.code_at, self.scale_to, self.x_to, 0
        if isinstance(slot, int):
            offset = slot
        else:
            code_to, scale_to, x_to = ptx.regs("to", 3)
            ptx(
                f"add.u32 {code_to}, {self.code_at}, {slot};",
                f"add.u32 {scale_to}, {self.scale_to}, {slot};",
                f"add.u32 {x_to}, {self.x_to}, {slot};",
            )
        tile_bytes = p.contraction // BLOCK * BLOCK_BYTES
        for tile in range(c.tiles):
            for block in range(c.blocks):
                to = offset + (tile * c.blocks + block) * BLOCK_BYTES
                source = tile * tile_bytes + block * BLOCK_BYTES
                ptx(f"cp.async.cg.shared.global.L2::128B [{code_to}+{to}], [{self.codes}+{source}], 16;")
        bytes_ = c.blocks * SCALE_WORD_BYTES
        kind = "cg" if bytes_ == 16 else "ca"
        ptx(
            f"@{self.scales_too} cp.async.{kind}.shared.global.L2::128B "
            f"[{scale_to}+{offset}], [{self.scales}], {bytes_};"
        )
        for i, size in enumerate(self.sizes):
            guard = f"@{self.last_rows} " if (i + 1) * self.pass_rows > c.tokens else ""
            for block in range(c.blocks):
                to = offset + (block * c.tokens + i * self.pass_rows) * SLAB_BYTES
                source = i * self.pass_rows * self.row_bytes + block * SLAB_BYTES
                ptx(f"{guard}cp.async.cg.shared.global [{x_to}+{to}], [{self.x}+{source}], 16, {size};")
        ptx(
            f"add.u64 {self.codes}, {self.codes}, {c.blocks * BLOCK_BYTES};",
            f"add.u64 {self.scales}, {self.scales}, {bytes_};",
            f"add.u64 {self.x}, {self.x}, {c.blocks * SLAB_BYTES};",
        )

    def _multiply(self) -> None:
        """The loop over stages."""
        ptx, c = self.ptx, self.c
        stage_bytes, ring = tiling.stage_bytes(c), c.slots * tiling.stage_bytes(c)
        stage, slot, ahead, zero = (ptx.reg(name) for name in ("stage", "slot", "ahead", "zero"))
        again, no_more = ptx.label("stage"), ptx.label("no_more")
        ptx(f"mov.u32 {zero}, 0;")
        self.constants = Constants(ptx, zero)
        self.factors = ptx.regs("factor", 2)
        self.fragments = [[ptx.regs("a", 4) for _ in range(4)] for _ in range(2)]  # [set][k step]
        self.acc = [ptx.regs("acc", c.tokens // 2, "f32") for _ in range(c.tiles)]
        self.words = [[ptx.regs("word", 4) for _ in range(c.blocks)] for _ in range(c.tiles)]
        self.scale_words = [ptx.regs("scale", c.blocks) for _ in range(c.tiles)]
        self.descriptor, self.at = ptx.regs("descriptor", 2, "b64")
        for accumulators in self.acc:
            ptx(*(f"mov.f32 {register}, 0f00000000;" for register in accumulators))
        ptx(
            f"mov.u32 {stage}, 0;",
            f"mov.u32 {slot}, 0;",
            f"mov.u32 {ahead}, {self.ahead * stage_bytes};",
            f"{again}:",
            f"cp.async.wait_group {self.ahead - 1};",
            "fence.proxy.async.shared::cta;",
            # All have this stage, and all have done with the stage before the last: its slot is free.
            f"bar.sync {ALL}, {self.threads};",
            f"setp.ge.s32 {self.pred}, {stage}, {self.stages - self.ahead};",
            f"@{self.pred} bra {no_more};",
        )
        self._load(ahead)
        ptx(f"{no_more}:", "cp.async.commit_group;")
        self._compute(slot)
        for offset in (slot, ahead):
            ptx(
                f"add.u32 {offset}, {offset}, {stage_bytes};",
                f"setp.eq.u32 {self.pred}, {offset}, {ring};",
                f"selp.b32 {offset}, 0, {offset}, {self.pred};",
            )
        ptx(
            f"add.u32 {stage}, {stage}, 1;",
            f"setp.lt.u32 {self.pred}, {stage}, {self.stages};",
            f"@{self.pred} bra {again};",
            "wgmma.wait_group.sync.aligned 0;",
            "cp.async.wait_group 0;",
            f"bar.sync {ALL}, {self.threads};",
        )

    def _compute(self, slot: str) -> None:
        """One stage: blocks outside, tiles inside; the two sets of fragments take turns."""
        ptx, c = self.ptx, self.c
        code_at, scale_at = ptx.regs("from", 2)
        ptx(
            f"add.u32 {code_at}, {self.code_at}, {slot};",
            f"add.u32 {scale_at}, {self.scale_at}, {slot};",
            f"add.u32 {self.tmp}, {self.shared}, {slot};",
            f"shr.u32 {self.tmp}, {self.tmp}, 4;",
            f"cvt.u64.u32 {self.descriptor}, {self.tmp};",
            f"or.b64 {self.descriptor}, {self.descriptor}, {DESCRIPTOR};",
        )
        suffix = f".v{c.blocks}" if c.blocks > 1 else ""
        for tile, words in enumerate(self.scale_words):
            into = vector(words) if c.blocks > 1 else words[0]
            ptx(f"ld.shared{suffix}.b32 {into}, [{scale_at}+{tile * 32 * c.blocks * SCALE_WORD_BYTES}];")
            for block in range(c.blocks):
                four = vector(self.words[tile][block])
                ptx(f"ld.shared.v4.b32 {four}, [{code_at}+{(tile * c.blocks + block) * BLOCK_BYTES}];")
        for words in self.scale_words:
            bias_scales(ptx, self.constants, words)
        unit = 0
        for block in range(c.blocks):
            for tile in range(c.tiles):
                fragments = self.fragments[unit % 2]
                unit += 1
                ptx("wgmma.wait_group.sync.aligned 1;")  # what used these fragments last is complete
                decode_block(
                    ptx,
                    self.constants,
                    self.words[tile][block],
                    self.scale_words[tile][block],
                    self.factors,
                    fragments,
                )
                self._products(fragments, self.acc[tile], block)

    def _products(self, fragments: list[list[str]], accumulators: list[str], block: int) -> None:
        """Start those of a block's four k steps."""
        ptx, c = self.ptx, self.c
        ptx("wgmma.fence.sync.aligned;")
        for step in range(4):
            offset = (block * c.tokens * SLAB_BYTES + step * 32) // 16
            ptx(
                f"add.u64 {self.at}, {self.descriptor}, {offset};",
                f"wgmma.mma_async.sync.aligned.m64n{c.tokens}k16.f32.bf16.bf16 {vector(accumulators)}, "
                f"{vector(fragments[step])}, {self.at}, 1, 1, 1, 0;",
            )
        ptx("wgmma.commit_group.sync.aligned;")
