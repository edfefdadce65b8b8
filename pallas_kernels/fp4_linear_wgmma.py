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
from pallas_kernels.fp4_linear_tiles import BLOCK_BYTES, EXCHANGE_PAD, SCALE_WORD_BYTES, Config, Problem
from pallas_kernels.fragments import BLOCK
from pallas_kernels.ptx import Ptx, vector

ALL = 1  # named barrier of the whole CTA (Mosaic has 0)
# wgmma's descriptor of x (PTX ISA, "Matrix descriptor"): 128-byte swizzle, 1024 bytes from 8 rows to the next.
DESCRIPTOR = (1 << 62) | ((ALIGNMENT >> 4) << 32) | (1 << 16)


def program(problem: Problem, config: Config) -> str:
    """The whole kernel: $0 x, $1 codes, $2 scales, $3 out (64-bit addresses), $4 shared memory (32-bit).

    Of a second weight below the first: $5 codes, $6 scales.
    """
    return Kernel(problem, config).emit()


class Kernel:
    """Emits the program; the steps are in the order of the methods."""

    def __init__(self, problem: Problem, config: Config):
        self.p, self.c, self.ptx = problem, config, Ptx()
        self.threads = 128 * config.warpgroups
        self.stages = tiling.stages(problem, config)
        self.ahead = config.slots - 2
        self.rows = tiling.rows(config)
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
            self._expect_partial_results()
        self._multiply()
        self._exchange_and_store()
        return self.ptx.text()

    def _exchange_and_store(self) -> None:
        if self.c.push:
            self._push_partial_results()
            self._add_pushed_and_store()
        else:
            self._write_partial_results()
            self._add_and_store()

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
        codes, scales = "$1", "$2"
        if p.first_outputs:
            codes, scales = ptx.regs("weight", 2, "b64")
            ptx(
                f"setp.ge.u32 {self.pred}, {self.tile}, {p.first_outputs // BLOCK};",
                f"selp.b64 {codes}, $5, $1, {self.pred};",
                f"selp.b64 {scales}, $6, $2, {self.pred};",
                f"@{self.pred} sub.u32 {self.tile}, {self.tile}, {p.first_outputs // BLOCK};",
            )
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

    def _write_partial_results(self) -> None:
        """Accumulators to shared memory, float32 [token][row]; then all of the cluster's are there."""
        ptx, c = self.ptx, self.c
        pitch = (self.rows + EXCHANGE_PAD) * 4
        to = ptx.reg("to")
        # accumulators 4n .. 4n + 3: row g at tokens 8n + 2t, 8n + 2t + 1, then row g + 8
        ptx(
            f"mad.lo.u32 {to}, {self.t}, {2 * pitch}, {self.shared};",
            f"mad.lo.u32 {to}, {self.g}, 4, {to};",
            f"mad.lo.u32 {to}, {self.w}, {16 * 4}, {to};",
            f"mad.lo.u32 {to}, {self.wg}, {c.tiles * BLOCK * 4}, {to};",
        )
        for tile, accumulators in enumerate(self.acc):
            for i, register in enumerate(accumulators):
                token, row = 8 * (i // 4) + i % 2, 64 * tile + 8 * (i // 2 % 2)
                ptx(f"st.shared.f32 [{to}+{token * pitch + row * 4}], {register};")
        if c.split > 1:  # arrive.release would wait for global memory too
            ptx(
                "fence.acq_rel.cluster;",
                "barrier.cluster.arrive.relaxed.aligned;",
                "barrier.cluster.wait.acquire.aligned;",
            )
        else:
            ptx(f"bar.sync {ALL}, {self.threads};")

    def _add_and_store(self) -> None:
        """Each CTA adds its share of the rows over the cluster, in order, and stores it: 8 outputs a thread."""
        ptx, c = self.ptx, self.c
        groups = tiling.share(c) // 8  # of a token
        items = c.tokens * groups
        token, group, at, item = ptx.regs("item", 4)
        there = ptx.reg("there")
        total, more = ptx.regs("total", 8, "f32"), ptx.regs("more", 8, "f32")
        for first in range(0, items, self.threads):
            done = ptx.label("stored")
            self._item(first, items, groups, item, token, group, done)
            ptx(
                f"mad.lo.u32 {group}, {self.rank}, {groups}, {group};",
                f"mad.lo.u32 {at}, {token}, {(self.rows + EXCHANGE_PAD) * 4}, {self.shared};",
                f"mad.lo.u32 {at}, {group}, 32, {at};",
            )
            for rank in range(c.split):
                into = total if rank == 0 else more
                space, source = "shared", at
                if c.split > 1:
                    ptx(f"mapa.shared::cluster.u32 {there}, {at}, {rank};")
                    space, source = "shared::cluster", there
                for i in (0, 4):
                    ptx(f"ld.{space}.v4.f32 {vector(into[i : i + 4])}, [{source}+{i * 4}];")
                if rank:
                    ptx(*(f"add.f32 {a}, {a}, {b};" for a, b in zip(total, more, strict=True)))
            self._store(token, group, total, done)
        if c.split > 1:  # a CTA's memory must outlive the others' reads of it
            ptx("barrier.cluster.arrive.relaxed;", "barrier.cluster.wait;")

    def _item(self, first: int, items: int, groups: int, item: str, token: str, group: str, done: str) -> None:
        """This thread's token and group of outputs of the items from `first` on; to `done` if there is none."""
        ptx = self.ptx
        ptx(f"add.u32 {item}, {self.tid}, {first};")
        ptx.divide(token, group, item, groups, items + self.threads)
        ptx(f"add.u32 {item}, {token}, {self.token};")
        if first + self.threads > items:
            ptx(f"setp.ge.u32 {self.pred}, {token}, {self.c.tokens};", f"@{self.pred} bra {done};")
        ptx(f"setp.ge.u32 {self.pred}, {item}, {self.p.batch};", f"@{self.pred} bra {done};")

    def _store(self, token: str, group: str, total: list[str], done: str) -> None:
        """Round 2 or 8 totals, of this token of the CTA and group of its rows, and store them."""
        ptx, p, count = self.ptx, self.p, len(total)
        out = ptx.reg("out", "b64")
        ptx(
            f"add.u32 {token}, {token}, {self.token};",
            f"mul.wide.u32 {out}, {token}, {p.outputs * p.out_bytes};",
            f"add.u64 {out}, $3, {out};",
            f"mad.lo.u32 {group}, {self.part}, {self.rows // count}, {group};",
            f"mul.wide.u32 {self.wide}, {group}, {count * p.out_bytes};",
            f"add.u64 {out}, {out}, {self.wide};",
        )
        words = total
        if p.out_bytes == 2:
            words = ptx.regs("packed", count // 2)
            for i, word in enumerate(words):
                ptx(f"cvt.rn.bf16x2.f32 {word}, {total[2 * i + 1]}, {total[2 * i]};")
        for first in range(0, len(words), 4):
            some = words[first : first + 4]
            suffix, value = (f".v{len(some)}", vector(some)) if len(some) > 1 else ("", some[0])
            ptx(f"st.global{suffix}.b32 [{out}+{first * 4}], {value};")
        ptx(f"{done}:")

    def _expect_partial_results(self) -> None:
        """A barrier that opens when all partial results of this CTA's share are there; tell the cluster of it."""
        ptx, c = self.ptx, self.c
        self.exchange, self.barrier = ptx.reg("exchange"), ptx.reg("barrier")
        skip = ptx.label("not_the_first")
        ptx(
            f"add.u32 {self.barrier}, {self.shared}, {c.slots * tiling.stage_bytes(c)};",
            f"add.u32 {self.exchange}, {self.barrier}, {tiling.BARRIER_BYTES};",
            f"setp.ne.u32 {self.pred}, {self.tid}, 0;",
            f"@{self.pred} bra {skip};",
            f"mbarrier.init.shared::cta.b64 [{self.barrier}], 1;",
            "fence.mbarrier_init.release.cluster;",
            f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [{self.barrier}], {self.rows * c.tokens * 4};",
            f"{skip}:",
            "barrier.cluster.arrive.relaxed;",  # waited for before the first push
        )

    def _push_partial_results(self) -> None:
        """Accumulators to the CTA that adds them, [rank][row of its share][token]; its barrier counts their bytes."""
        ptx, c = self.ptx, self.c
        pitch = (c.tokens + tiling.PUSH_PAD) * 4
        groups = tiling.share(c) // 8  # of 8 rows, in a share
        row, at, target, to, there = ptx.regs("push", 5)
        ptx(
            "barrier.cluster.wait.acquire;",
            f"mad.lo.u32 {at}, {self.rank}, {tiling.share(c) * pitch}, {self.exchange};",
            f"mad.lo.u32 {at}, {self.g}, {pitch}, {at};",
            f"mad.lo.u32 {at}, {self.t}, 8, {at};",
        )
        for tile in range(c.tiles):
            for half in range(2):  # accumulators 4n .. 4n + 3: row g at tokens 8n + 2t, 8n + 2t + 1, then row g + 8
                ptx(
                    f"mul.lo.u32 {row}, {self.wg}, {c.tiles * 8};",
                    f"mad.lo.u32 {row}, {self.w}, 2, {row};",
                    f"add.u32 {row}, {row}, {tile * 8 + half};",
                )
                ptx.divide(target, row, row, groups, self.rows // 8)
                ptx(
                    f"mad.lo.u32 {to}, {row}, {8 * pitch}, {at};",
                    f"mapa.shared::cluster.u32 {to}, {to}, {target};",
                    f"mapa.shared::cluster.u32 {there}, {self.barrier}, {target};",
                )
                for n in range(c.tokens // 8):
                    pair = vector(self.acc[tile][4 * n + 2 * half : 4 * n + 2 * half + 2])
                    ptx(
                        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 "
                        f"[{to}+{n * 32}], {pair}, [{there}];"
                    )

    def _add_pushed_and_store(self) -> None:
        """Add what the ranks have pushed, in their order, and store it: 2 outputs a thread."""
        ptx, c = self.ptx, self.c
        share, pitch = tiling.share(c), (c.tokens + tiling.PUSH_PAD) * 4
        items = c.tokens * share // 2
        token, pair, at, item = ptx.regs("item", 4)
        total, more = ptx.regs("total", 2, "f32"), ptx.regs("more", 2, "f32")
        again = ptx.label("await")
        ptx(
            f"{again}:",
            f"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 {self.pred}, [{self.barrier}], 0;",
            f"@!{self.pred} bra {again};",
        )
        for first in range(0, items, self.threads):
            done = ptx.label("stored")
            self._item(first, items, share // 2, item, token, pair, done)
            ptx(
                f"mad.lo.u32 {at}, {pair}, {2 * pitch}, {self.exchange};",
                f"mad.lo.u32 {at}, {token}, 4, {at};",
                f"mad.lo.u32 {pair}, {self.rank}, {share // 2}, {pair};",
            )
            for rank in range(c.split):
                into = total if rank == 0 else more
                for i in range(2):
                    ptx(f"ld.shared.f32 {into[i]}, [{at}+{rank * share * pitch + i * pitch}];")
                if rank:
                    ptx(*(f"add.f32 {a}, {a}, {b};" for a, b in zip(total, more, strict=True)))
            self._store(token, pair, total, done)
