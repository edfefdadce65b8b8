"""The FP4 linear kernel for many tokens on Hopper: x by TMA, weights straight to registers.

    out[m, n] = sum_k x[m, k] A[n, k]        A in fragment order (fragments.py), exact

A CTA has 128 outputs (64 for each of two warpgroups) by up to 256 tokens, the widest wgmma. A third warpgroup's
first thread loads x, block of 64 k by block, through a ring of slots with a barrier for full and one for empty. Codes
and scales go from global memory to the registers of the thread that decodes them, a few pairs of blocks ahead, and
are decoded under the wgmma of the block before. `split` CTAs of a cluster share the contraction; their partial
results meet in shared memory, in the ring's place, and are added in the order of the parts.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.fp4_bmm_tiles import ALIGNMENT, SHARED_MEMORY_BYTES, SLAB_BYTES, check_rules
from pallas_kernels.fp4_fragment_ptx import Constants, bias_scales, decode_block
from pallas_kernels.fp4_linear_tiles import BLOCK_BYTES, EXCHANGE_PAD, NAME, SCALE_WORD_BYTES, Problem
from pallas_kernels.fp4_linear_weights import weight_of
from pallas_kernels.fragments import BLOCK
from pallas_kernels.ptx import Ptx, vector

WARPGROUPS = 3  # of a CTA: two that multiply, one that loads
_CONSUMERS = 2
_THREADS = 128 * _CONSUMERS
_ROWS = BLOCK * _CONSUMERS  # outputs of a CTA
_ALL = 1  # named barrier of the warpgroups that multiply (Mosaic has 0)
# Registers of a thread: 2 * 240 + 24 is what three warpgroups of 168 have together.
_CONSUMER_REGISTERS, _LOADER_REGISTERS = 240, 24
_PAIRS = 3  # of blocks whose codes and scales are in registers, or on their way there
_AHEAD = 8  # blocks between a weight's way to the L2 cache and to the registers
# wgmma's descriptor of x (PTX ISA, "Matrix descriptor"): 128-byte swizzle, 1024 bytes from 8 rows to the next.
_DESCRIPTOR = (1 << 62) | ((ALIGNMENT >> 4) << 32) | (1 << 16)


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled; only `split` changes bits of the result.

    Attributes:
        split: CTAs of a cluster that share the contraction.
        tokens: of a CTA, a multiple of 8 up to 256.
        slots: 64-k blocks of x in shared memory at once, an even number.
    """

    split: int
    tokens: int = 256
    slots: int = 6


def token_tiles(problem: Problem, config: Config) -> int:
    """CTAs along the tokens."""
    return -(-problem.batch // config.tokens)


def clusters(problem: Problem, config: Config) -> int:
    """In the grid: token tiles vary fastest, so that those that share weights run together."""
    return -(-problem.outputs // _ROWS) * token_tiles(problem, config)


def slot_bytes(config: Config) -> int:
    """Of x for a block."""
    return config.tokens * SLAB_BYTES


def shared_memory_bytes(config: Config) -> int:
    """The ring or the partial results in its place, barriers, and what aligning may cost."""
    exchange = config.tokens * (_ROWS + EXCHANGE_PAD) * 4
    return ALIGNMENT + max(config.slots * slot_bytes(config), exchange) + 16 * config.slots


def box(config: Config) -> tuple[int, int]:
    """Of x that one TMA loads: tokens and k."""
    return config.tokens, BLOCK


def check_config(problem: Problem, config: Config) -> None:
    """Raise ValueError unless the config fits the problem."""
    c = config
    rules = {
        "tokens must be a multiple of 8 in 8 .. 256": 8 <= c.tokens <= 256 and c.tokens % 8 == 0,
        "split must be 1 .. 8": 1 <= c.split <= 8,
        "split must be at most K / 128": c.split <= problem.contraction // (2 * BLOCK),
        "64 must divide the first weight's outputs": problem.first_outputs % BLOCK == 0,
        "slots must be an even number from 4 on": c.slots >= 4 and c.slots % 2 == 0,
        "shared memory must hold at most 227 KiB": shared_memory_bytes(c) <= SHARED_MEMORY_BYTES,
    }
    check_rules(NAME, rules, problem, config)


def program(problem: Problem, config: Config) -> str:
    """The whole kernel: $0 x, $1 codes, $2 scales, $3 out (64-bit addresses), $4 shared memory (32-bit).

    Of a second weight below the first: $5 codes, $6 scales. Last x's tensor map.
    """
    return _Kernel(problem, config).emit()


class _Kernel:
    """Emits the program; the steps are in the order of the methods."""

    def __init__(self, problem: Problem, config: Config):
        self.p, self.c, self.ptx = problem, config, Ptx()

    def emit(self) -> str:
        ptx = self.ptx
        self._indices()
        self._prepare_barriers()
        loader, end = ptx.label("loader"), ptx.label("end")
        ptx(f"setp.ge.u32 {self.pred}, {self.wg}, {_CONSUMERS};", f"@{self.pred} bra {loader};")
        ptx(f"setmaxnreg.inc.sync.aligned.u32 {_CONSUMER_REGISTERS};")
        self._sources()
        self._multiply()
        self._write_partial_results()
        self._add_and_store()
        ptx(f"bra {end};", f"{loader}:", f"setmaxnreg.dec.sync.aligned.u32 {_LOADER_REGISTERS};")
        self._load()
        if self.c.split > 1:
            ptx("barrier.cluster.arrive.relaxed;", "barrier.cluster.wait;")
        ptx(f"{end}:")
        if self.c.split > 1:  # a CTA's memory must outlive the others' use of it
            ptx("barrier.cluster.arrive.relaxed;", "barrier.cluster.wait;")
        return ptx.text()

    def _indices(self) -> None:
        """This CTA's place in the grid (row_tile, token, part of the contraction) and the thread's in it."""
        ptx, p, c = self.ptx, self.p, self.c
        self.tid, self.thread, self.lane = ptx.reg("tid"), ptx.reg("thread"), ptx.reg("lane")
        self.w, self.wg, self.g, self.t = (ptx.reg(name) for name in ("w", "wg", "g", "t"))
        self.row_tile, self.token, self.part = (ptx.reg(name) for name in ("row_tile", "token", "part"))
        self.first, self.blocks = ptx.reg("first"), ptx.reg("blocks")
        self.tmp, self.tmp2 = ptx.regs("tmp", 2)
        self.shared, self.barriers = ptx.reg("shared"), ptx.reg("barriers")
        self.wide = ptx.reg("wide", "b64")
        self.pred, self.more = ptx.reg("pred", "pred"), ptx.reg("more", "pred")
        tiles, count = token_tiles(p, c), clusters(p, c)
        ring = max(c.slots * slot_bytes(c), c.tokens * (_ROWS + EXCHANGE_PAD) * 4)
        ptx(
            f"mov.u32 {self.tid}, %tid.x;",
            f"and.b32 {self.thread}, {self.tid}, 127;",
            f"and.b32 {self.lane}, {self.tid}, 31;",
            f"shr.u32 {self.w}, {self.thread}, 5;",
            f"shr.u32 {self.wg}, {self.tid}, 7;",
            f"shr.u32 {self.g}, {self.lane}, 2;",
            f"and.b32 {self.t}, {self.lane}, 3;",
            f"mov.u32 {self.tmp}, %ctaid.x;",
        )
        # ctaid = (row_tile * token tiles + token tile) * split + part
        ptx.divide(self.tmp2, self.part, self.tmp, c.split, count * c.split)
        ptx.divide(self.row_tile, self.token, self.tmp2, tiles, count)
        pairs = p.contraction // (2 * BLOCK)
        ptx(
            f"mul.lo.u32 {self.token}, {self.token}, {c.tokens};",
            f"mul.lo.u32 {self.tmp}, {self.part}, {pairs};",
            f"add.u32 {self.tmp2}, {self.tmp}, {pairs};",
        )
        scratch = ptx.reg("scratch")
        ptx.divide(self.first, scratch, self.tmp, c.split, pairs * c.split + 1)
        ptx.divide(self.blocks, scratch, self.tmp2, c.split, pairs * c.split + 1)
        ptx(
            f"sub.u32 {self.blocks}, {self.blocks}, {self.first};",
            f"shl.b32 {self.blocks}, {self.blocks}, 1;",
            f"shl.b32 {self.first}, {self.first}, 1;",
            f"add.u32 {self.shared}, $4, {ALIGNMENT - 1};",
            f"and.b32 {self.shared}, {self.shared}, -{ALIGNMENT};",
            f"add.u32 {self.barriers}, {self.shared}, {ring};",
        )

    def _prepare_barriers(self) -> None:
        """For each slot one for full, after all of them one for empty, where every warp that multiplies arrives."""
        ptx, c = self.ptx, self.c
        skip, warps = ptx.label("not_the_first"), 4 * _CONSUMERS
        ptx(f"setp.ne.u32 {self.pred}, {self.tid}, 0;", f"@{self.pred} bra {skip};")
        for slot in range(c.slots):
            ptx(
                f"mbarrier.init.shared::cta.b64 [{self.barriers}+{8 * slot}], 1;",
                f"mbarrier.init.shared::cta.b64 [{self.barriers}+{8 * (c.slots + slot)}], {warps};",
            )
        ptx("fence.mbarrier_init.release.cluster;", f"{skip}:")
        ptx(f"bar.sync 0, {128 * WARPGROUPS};")

    def _load(self) -> None:
        """One thread: x, block after block."""
        ptx, c = self.ptx, self.c
        block, slot, parity, at, k = (ptx.reg(name) for name in ("block", "slot", "parity", "at", "k"))
        full = ptx.reg("full")
        again, done = ptx.label("load"), ptx.label("loaded")
        tensor_map = "$7" if self.p.first_outputs else "$5"
        ptx(
            f"setp.ne.u32 {self.pred}, {self.thread}, 0;",
            f"@{self.pred} bra {done};",
            f"mov.u32 {block}, 0;",
            f"mov.u32 {slot}, 0;",
            f"mov.u32 {parity}, 1;",
            f"shl.b32 {k}, {self.first}, 6;",
        )
        ptx(f"{again}:", f"mad.lo.u32 {full}, {slot}, 8, {self.barriers};")
        self._await(full, 8 * c.slots, parity)
        ptx(
            f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [{full}], {slot_bytes(c)};",
            f"mad.lo.u32 {at}, {slot}, {slot_bytes(c)}, {self.shared};",
            f"cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            f"[{at}], [{tensor_map}, {{{k}, {self.token}}}], [{full}];",
            f"add.u32 {k}, {k}, {BLOCK};",
        )
        self._next(slot, parity)
        ptx(
            f"add.u32 {block}, {block}, 1;",
            f"setp.lt.u32 {self.pred}, {block}, {self.blocks};",
            f"@{self.pred} bra {again};",
            f"{done}:",
        )

    def _await(self, barrier: str, offset: int, parity: str) -> None:
        ptx = self.ptx
        again = ptx.label("await")
        ptx(
            f"{again}:",
            f"mbarrier.try_wait.parity.shared::cta.b64 {self.pred}, [{barrier}+{offset}], {parity};",
            f"@!{self.pred} bra {again};",
        )

    def _next(self, slot: str, parity: str | None) -> None:
        """Move on to the ring's next slot; the parity turns at its end."""
        ptx = self.ptx
        ptx(f"add.u32 {slot}, {slot}, 1;", f"setp.eq.u32 {self.pred}, {slot}, {self.c.slots};")
        ptx(f"selp.b32 {slot}, 0, {slot}, {self.pred};")
        if parity is not None:
            ptx(f"@{self.pred} xor.b32 {parity}, {parity}, 1;")

    def _sources(self) -> None:
        """Addresses in global memory of this thread's codes and scales; they move on with the blocks."""
        ptx, p = self.ptx, self.p
        self.codes, self.scales = ptx.reg("codes", "b64"), ptx.reg("scales", "b64")
        tile, k_blocks = ptx.reg("tile"), p.contraction // BLOCK
        ptx(
            # Past the last tile of 64 outputs there is work for nothing: the last one's again.
            f"mad.lo.u32 {tile}, {self.row_tile}, {_CONSUMERS}, {self.wg};",
            f"min.u32 {tile}, {tile}, {p.outputs // BLOCK - 1};",
        )
        codes, scales = weight_of(ptx, tile, p.first_outputs // BLOCK, self.pred)
        ptx(
            # codes [tile][block][thread][16 bytes]
            f"mad.lo.u32 {self.tmp}, {tile}, {k_blocks}, {self.first};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {BLOCK_BYTES};",
            f"add.u64 {self.codes}, {codes}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.thread}, 16;",
            f"add.u64 {self.codes}, {self.codes}, {self.wide};",
            # scales [16 rows][g][block][4]
            f"mad.lo.u32 {self.tmp}, {tile}, 4, {self.w};",
            f"mad.lo.u32 {self.tmp}, {self.tmp}, 8, {self.g};",
            f"mad.lo.u32 {self.tmp}, {self.tmp}, {k_blocks}, {self.first};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {SCALE_WORD_BYTES};",
            f"add.u64 {self.scales}, {scales}, {self.wide};",
        )

    def _multiply(self) -> None:
        """The loop over pairs of blocks, _PAIRS in a round: each has registers of its own for what it decodes.

        A pair's registers are filled again, for the pair _PAIRS further on, as soon as they are decoded. ptxas puts
        such loads off to the end of what it can reorder, and that ends where the next pair waits for x.
        """
        ptx, c = self.ptx, self.c
        zero, self.block = ptx.reg("zero"), ptx.reg("block")
        ptx(f"mov.u32 {zero}, 0;")
        self.constants = Constants(ptx, zero)
        self.factors = ptx.regs("factor", 2)
        self.fragments = [[ptx.regs("a", 4) for _ in range(4)] for _ in range(2)]  # [set][k step]
        self.acc = ptx.regs("acc", c.tokens // 2, "f32")
        self.words = [[ptx.regs("word", 4) for _ in range(2)] for _ in range(_PAIRS)]
        self.scale_words = [ptx.regs("scale", 2) for _ in range(_PAIRS)]
        self.slot, self.parity, self.free = ptx.reg("slot"), ptx.reg("parity"), ptx.reg("free")
        self.release, self.full = ptx.reg("release"), ptx.reg("full")
        self.descriptor, self.at = ptx.regs("descriptor", 2, "b64")
        self.releases, self.again = ptx.reg("releases", "pred"), ptx.reg("again", "pred")
        again, done = ptx.label("round"), ptx.label("multiplied")
        ptx(*(f"mov.f32 {register}, 0f00000000;" for register in self.acc))
        ptx(
            f"mov.u32 {self.block}, 0;",
            f"mov.u32 {self.slot}, 0;",
            f"mov.u32 {self.parity}, 0;",
            f"mov.u32 {self.free}, {c.slots - 2};",  # of the block before the last
            f"add.u32 {self.release}, {self.barriers}, {8 * c.slots};",
        )
        for pair in range(_PAIRS):
            self._fetch(pair, pair)
        ptx(f"{again}:")
        for pair in range(_PAIRS):
            self._pair(pair)
            ptx(f"setp.ge.u32 {self.pred}, {self.block}, {self.blocks};", f"@{self.pred} bra {done};")
        ptx(f"bra {again};", f"{done}:", "wgmma.wait_group.sync.aligned 0;", f"bar.sync {_ALL}, {_THREADS};")

    def _fetch(self, pair: int, ahead: int) -> None:
        """Codes and scales of the pair so many ahead, if there is one, to the registers of a round's pair."""
        ptx, codes = self.ptx, self.words[pair]
        ptx(
            f"add.u32 {self.tmp}, {self.block}, {2 * ahead};",
            f"setp.lt.u32 {self.more}, {self.tmp}, {self.blocks};",
        )
        for b in range(2):
            offset = (2 * ahead + b) * BLOCK_BYTES
            ptx(f"@{self.more} ld.global.nc.L1::no_allocate.v4.b32 {vector(codes[b])}, [{self.codes}+{offset}];")
        offset = 2 * ahead * SCALE_WORD_BYTES
        ptx(f"@{self.more} ld.global.nc.v2.b32 {vector(self.scale_words[pair])}, [{self.scales}+{offset}];")

    def _pair(self, pair: int) -> None:
        """Decode and multiply two blocks, then ask for those that take their registers."""
        ptx = self.ptx
        ptx(f"mad.lo.u32 {self.full}, {self.slot}, 8, {self.barriers};")
        # Both of the pair, here: with a branch between decode and products, ptxas would run these one by one.
        for b in range(2):
            self._await(self.full, 8 * b, self.parity)
        far = 2 * _PAIRS + _AHEAD
        ptx(
            f"add.u32 {self.tmp}, {self.block}, {far};",
            f"setp.lt.u32 {self.more}, {self.tmp}, {self.blocks};",
            f"@{self.more} prefetch.global.L2 [{self.codes}+{far * BLOCK_BYTES}];",
            f"@{self.more} prefetch.global.L2 [{self.codes}+{(far + 1) * BLOCK_BYTES}];",
            f"setp.eq.u32 {self.again}, {self.lane}, 0;",  # for its warp
            f"setp.ne.and.u32 {self.releases}, {self.block}, 0, {self.again};",
        )
        bias_scales(ptx, self.constants, self.scale_words[pair])
        for b in range(2):
            self._block(pair, b)
        self._fetch(pair, _PAIRS)
        ptx(
            f"add.u64 {self.codes}, {self.codes}, {2 * BLOCK_BYTES};",
            f"add.u64 {self.scales}, {self.scales}, {2 * SCALE_WORD_BYTES};",
            f"add.u32 {self.block}, {self.block}, 2;",
        )

    def _block(self, pair: int, b: int) -> None:
        """Decode block b of the pair under the products of the one before it, then multiply."""
        ptx, c = self.ptx, self.c
        fragments = self.fragments[b]
        # What used these fragments last is complete, and its slot of x is free.
        ptx("wgmma.wait_group.sync.aligned 1;", f"mad.lo.u32 {self.tmp}, {self.free}, 8, {self.release};")
        ptx(f"@{self.releases} mbarrier.arrive.shared::cta.b64 _, [{self.tmp}];")
        self._next(self.free, None)
        decode_block(ptx, self.constants, self.words[pair][b], self.scale_words[pair][b], self.factors, fragments)
        ptx(
            f"mad.lo.u32 {self.tmp}, {self.slot}, {slot_bytes(c)}, {self.shared};",
            f"shr.u32 {self.tmp}, {self.tmp}, 4;",
            f"cvt.u64.u32 {self.descriptor}, {self.tmp};",
            f"or.b64 {self.descriptor}, {self.descriptor}, {_DESCRIPTOR};",
            "wgmma.fence.sync.aligned;",
        )
        for step in range(4):
            ptx(
                f"add.u64 {self.at}, {self.descriptor}, {step * 2};",
                f"wgmma.mma_async.sync.aligned.m64n{c.tokens}k16.f32.bf16.bf16 {vector(self.acc)}, "
                f"{vector(fragments[step])}, {self.at}, 1, 1, 1, 0;",
            )
        ptx("wgmma.commit_group.sync.aligned;")
        self._next(self.slot, self.parity)

    def _write_partial_results(self) -> None:
        """Accumulators to shared memory, float32 [token][row]; then all of the parts' are there."""
        ptx, c = self.ptx, self.c
        pitch = (_ROWS + EXCHANGE_PAD) * 4
        to = ptx.reg("to")
        # accumulators 4n .. 4n + 3: row g at tokens 8n + 2t, 8n + 2t + 1, then row g + 8
        ptx(
            f"mad.lo.u32 {to}, {self.t}, {2 * pitch}, {self.shared};",
            f"mad.lo.u32 {to}, {self.g}, 4, {to};",
            f"mad.lo.u32 {to}, {self.w}, {16 * 4}, {to};",
            f"mad.lo.u32 {to}, {self.wg}, {BLOCK * 4}, {to};",
        )
        for i, register in enumerate(self.acc):
            ptx(f"st.shared.f32 [{to}+{(8 * (i // 4) + i % 2) * pitch + 8 * (i // 2 % 2) * 4}], {register};")
        if c.split > 1:  # arrive.release would wait for global memory too
            ptx("fence.acq_rel.cluster;", "barrier.cluster.arrive.relaxed;", "barrier.cluster.wait.acquire;")
        else:
            ptx(f"bar.sync {_ALL}, {_THREADS};")

    def _add_and_store(self) -> None:
        """The parts' CTAs take turns at groups of 8 outputs: each adds its groups' partial results, in order."""
        ptx, p, c = self.ptx, self.p, self.c
        groups = _ROWS // 8  # of a token
        items, step = c.tokens * groups, _THREADS * c.split
        token, group, at, item, there = ptx.regs("item", 5)
        total, more = ptx.regs("total", 8, "f32"), ptx.regs("more", 8, "f32")
        out = ptx.reg("out", "b64")
        ptx(f"mad.lo.u32 {item}, {self.part}, {_THREADS}, {self.tid};")
        for first in range(0, items, step):
            done = ptx.label("stored")
            ptx(
                f"add.u32 {token}, {item}, {first};",
                f"and.b32 {group}, {token}, {groups - 1};",
                f"shr.u32 {token}, {token}, {groups.bit_length() - 1};",
                f"mad.lo.u32 {at}, {token}, {(_ROWS + EXCHANGE_PAD) * 4}, {self.shared};",
                f"mad.lo.u32 {at}, {group}, 32, {at};",
            )
            if first + step > items:
                ptx(f"setp.ge.u32 {self.pred}, {token}, {c.tokens};", f"@{self.pred} bra {done};")
            ptx(
                f"add.u32 {token}, {token}, {self.token};",
                f"mad.lo.u32 {group}, {self.row_tile}, {groups}, {group};",
                f"setp.ge.u32 {self.pred}, {token}, {p.batch};",
                f"setp.ge.or.u32 {self.pred}, {group}, {p.outputs // 8}, {self.pred};",
                f"@{self.pred} bra {done};",
            )
            for part in range(c.split):
                into = total if part == 0 else more
                space, source = "shared", at
                if c.split > 1:
                    ptx(f"mapa.shared::cluster.u32 {there}, {at}, {part};")
                    space, source = "shared::cluster", there
                for i in (0, 4):
                    ptx(f"ld.{space}.v4.f32 {vector(into[i : i + 4])}, [{source}+{i * 4}];")
                if part:
                    ptx(*(f"add.f32 {a}, {a}, {b};" for a, b in zip(total, more, strict=True)))
            ptx(
                f"mul.wide.u32 {out}, {token}, {p.outputs * p.out_bytes};",
                f"add.u64 {out}, $3, {out};",
                f"mul.wide.u32 {self.wide}, {group}, {8 * p.out_bytes};",
                f"add.u64 {out}, {out}, {self.wide};",
            )
            words = total
            if p.out_bytes == 2:
                words = ptx.regs("packed", 4)
                for i, word in enumerate(words):
                    ptx(f"cvt.rn.bf16x2.f32 {word}, {total[2 * i + 1]}, {total[2 * i]};")
            for i in range(0, len(words), 4):
                ptx(f"st.global.v4.b32 [{out}+{i * 4}], {vector(words[i : i + 4])};")
            ptx(f"{done}:")
