"""What a CTA of the batched FP4 matmul for Hopper reads: its place in the grid, its weights, its x."""

from __future__ import annotations

from pallas_kernels.fp4_bmm_tiles import ALIGNMENT, SLAB_BYTES, Config, Problem, box_bytes, grid, slot_bytes
from pallas_kernels.fp4_fragment_ptx import E4M3_UNIT
from pallas_kernels.fragments import BLOCK, GROUP
from pallas_kernels.ptx import Ptx, vector

ALL = 1  # named barrier of the whole CTA (Mosaic has 0); 2 .. warpgroups + 1 are the warpgroups' own
_BLOCK_BYTES = 2048  # a 64 x 64 block of weights


class Operands:
    """What the kernel inherits: $0 x, $1 codes, $2 scales, $4 shared memory, $5 NVFP4's global scale."""

    def __init__(self, problem: Problem, config: Config):
        self.p, self.c, self.ptx = problem, config, Ptx()
        self.blocks = problem.contraction // BLOCK  # 64-k blocks, also slabs of x
        self.k_steps = problem.contraction // 16
        self.nvfp4 = problem.group != GROUP
        self.committed: list[int] = []  # token tiles in the order of their cp.async groups

    def indices(self) -> None:
        """This thread's place in the grid: head, first output tile, first token; in the warpgroup: w, g, t."""
        ptx, p, c = self.ptx, self.p, self.c
        self.tid, self.thread, self.lane = ptx.reg("tid"), ptx.reg("thread"), ptx.reg("lane")
        self.w, self.wg, self.g, self.t = (ptx.reg(name) for name in ("w", "wg", "g", "t"))
        self.head, self.tile, self.token = ptx.reg("head"), ptx.reg("tile"), ptx.reg("token")
        self.tmp, self.tmp2 = ptx.regs("tmp", 2)
        self.wide = ptx.reg("wide", "b64")
        self.pred, self.fits = ptx.reg("pred", "pred"), ptx.reg("fits", "pred")
        self.policy = ptx.reg("policy", "b64")
        if c.evict_first:
            ptx(f"createpolicy.fractional.L2::evict_first.b64 {self.policy}, 1.0;")
        parts = p.outputs // (BLOCK * c.warpgroups * c.tiles)
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
        ptx.divide(self.tmp2, self.tile, self.tmp, parts, grid(p, c))
        ptx.divide(self.token, self.head, self.tmp2, p.heads, grid(p, c))
        ptx(
            f"mul.lo.u32 {self.token}, {self.token}, {c.tokens * c.token_tiles};",
            f"mad.lo.u32 {self.tile}, {self.tile}, {c.warpgroups}, {self.wg};",
            f"mul.lo.u32 {self.tile}, {self.tile}, {c.tiles};",
        )

    def load_weights(self) -> None:
        """Ask for every byte of weights and scales that this thread will use; see _hold_loads."""
        if self.p.transposed:
            self._load_codes()
            self._load_scales()
        else:  # eight blocks of codes, and none can be decoded without scales
            self._load_scales()
            self._load_codes()

    def _load_codes(self) -> None:
        ptx, p, c = self.ptx, self.p, self.c
        codes = ptx.reg("codes", "b64")
        ptx(
            f"mul.wide.u32 {self.wide}, {self.head}, {p.head_code_bytes};",
            f"add.u64 {codes}, $1, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.tile}, {self.blocks * _BLOCK_BYTES};",
            f"add.u64 {codes}, {codes}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.thread}, 16;",
            f"add.u64 {codes}, {codes}, {self.wide};",
        )
        self.words = [ptx.regs("word", self.k_steps) for _ in range(c.tiles)]  # [tile][k step]
        for tile in range(c.tiles):
            for block in range(self.blocks):
                offset = p.first_code_byte + (tile * self.blocks + block) * _BLOCK_BYTES
                four = vector(self.words[tile][4 * block : 4 * block + 4])
                ptx(f"ld.global.nc.L1::no_allocate.v4.b32 {four}, [{codes}+{offset}];")

    def _load_scales(self) -> None:
        ptx, p, c = self.ptx, self.p, self.c
        scales = ptx.reg("scales", "b64")
        # A thread's scales of a tile: transposed [m / group][t][K/4 bytes], else [m16][g][2 K / group bytes].
        share = p.contraction // 4 if p.transposed else 2 * p.contraction // p.group
        if p.transposed:
            ptx(
                f"shr.u32 {self.tmp}, {self.w}, {p.group // 32};",
                f"mad.lo.u32 {self.tmp}, {self.tile}, {BLOCK // p.group}, {self.tmp};",
                f"mad.lo.u32 {self.tmp}, {self.tmp}, 4, {self.t};",
            )
        else:
            ptx(
                f"mad.lo.u32 {self.tmp}, {self.tile}, 4, {self.w};",
                f"mad.lo.u32 {self.tmp}, {self.tmp}, 8, {self.g};",
            )
        ptx(
            f"mul.wide.u32 {self.wide}, {self.tmp}, {share};",
            f"add.u64 {scales}, $2, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.head}, {p.head_scale_bytes};",
            f"add.u64 {scales}, {scales}, {self.wide};",
        )
        width = 4 if share % 16 == 0 else 2 if share % 8 == 0 else 1
        self.scales: list[list[str]] = []  # [tile][word]
        for tile in range(c.tiles):
            words = []
            for first in range(0, share, 4 * width):
                some = ptx.regs("scale", width)
                offset = p.first_scale_byte + tile * (BLOCK * p.contraction // p.group) + first
                suffix = f".v{width}" if width > 1 else ""
                ptx(f"ld.global.nc{suffix}.b32 {vector(some) if width > 1 else some[0]}, [{scales}+{offset}];")
                words += some
            self.scales.append(words)
        if self.nvfp4:
            self.global_scale = ptx.reg("global", "f32")
            ptx(
                f"ld.global.nc.f32 {self.global_scale}, [$5];",
                f"mul.rn.f32 {self.global_scale}, {self.global_scale}, {E4M3_UNIT};",
            )

    def x_addresses(self) -> None:
        """Thread -> 16-byte chunk tid % 8 of row tid / 8 of a slab; the swizzle is chunk ^ (row % 8)."""
        ptx, p = self.ptx, self.p
        self.shared, self.x_row, self.x_to = ptx.reg("shared"), ptx.reg("x_row"), ptx.reg("x_to")
        self.x_from = ptx.reg("x_from", "b64")
        ptx(
            f"add.u32 {self.shared}, $4, {ALIGNMENT - 1};",
            f"and.b32 {self.shared}, {self.shared}, -{ALIGNMENT};",
            f"shr.u32 {self.x_row}, {self.tid}, 3;",
            f"and.b32 {self.tmp}, {self.tid}, 7;",
            f"add.u32 {self.tmp2}, {self.token}, {self.x_row};",
            f"mad.lo.u32 {self.tmp2}, {self.tmp2}, {p.heads}, {self.head};",
            f"mul.wide.u32 {self.wide}, {self.tmp2}, {p.x_width * 2};",
            f"add.u64 {self.x_from}, $0, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, 16;",
            f"add.u64 {self.x_from}, {self.x_from}, {self.wide};",
            f"xor.b32 {self.tmp}, {self.tmp}, {self.x_row};",
            f"and.b32 {self.tmp}, {self.tmp}, 7;",
            f"shl.b32 {self.tmp}, {self.tmp}, 4;",
            f"shl.b32 {self.tmp2}, {self.x_row}, 7;",
            f"add.u32 {self.x_to}, {self.tmp}, {self.tmp2};",
            f"add.u32 {self.x_to}, {self.x_to}, {self.shared};",
        )

    def load_x(self, tile: int) -> None:
        """Start copying a token tile of x to its slot; tokens past the batch become zeros and are not read."""
        ptx, p, c = self.ptx, self.p, self.c
        slot = (tile % c.slots) * slot_bytes(p, c)
        rows = 16 * c.warpgroups  # that the CTA's threads copy at once
        for first in range(0, c.tokens, rows):
            token = tile * c.tokens + first
            ptx(
                f"add.u32 {self.tmp}, {self.token}, {self.x_row};",
                f"add.u32 {self.tmp}, {self.tmp}, {token};",
                f"setp.lt.u32 {self.pred}, {self.tmp}, {p.batch};",
                f"selp.b32 {self.tmp}, 16, 0, {self.pred};",
            )
            guard = ""
            if first + rows > c.tokens:
                ptx(f"setp.lt.u32 {self.fits}, {self.x_row}, {c.tokens - first};")
                guard = f"@{self.fits} "
            for slab in range(self.blocks):
                to = slot + slab * box_bytes(c) + first * SLAB_BYTES
                source = (token * p.heads * p.x_width + p.first_x + slab * BLOCK) * 2
                ptx(
                    f"{guard}cp.async.cg.shared.global{self.hint('x')} [{self.x_to}+{to}], "
                    f"[{self.x_from}+{source}], 16, {self.tmp}{self.policy_of('x')};"
                )
        ptx("cp.async.commit_group;")
        self.committed.append(tile)

    def await_x(self, tile: int) -> None:
        """All threads' copies of a token tile are there; also, all have done with what they completed before."""
        later = len(self.committed) - 1 - self.committed.index(tile)
        self.ptx(
            f"cp.async.wait_group {later};",
            "fence.proxy.async.shared::cta;",
            f"bar.sync {ALL}, {self.threads()};",
        )

    def hint(self, operand: str) -> str:
        """Of an instruction that reads or writes an operand; the last of its own operands is policy_of."""
        return ".L2::cache_hint" if self.c.evict_first == operand else ""

    def policy_of(self, operand: str) -> str:
        """What follows that instruction's operands."""
        return f", {self.policy}" if self.c.evict_first == operand else ""

    def threads(self) -> int:
        """Of the CTA."""
        return 128 * self.c.warpgroups
