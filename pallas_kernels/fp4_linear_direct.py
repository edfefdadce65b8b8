"""The FP4 linear kernel for a few tokens and a short part of the contraction: weights straight to registers.

As fp4_linear_wgmma.py, and the same bits; but a thread asks for all of its codes and scales at once, so that the
whole weight is on its way when the kernel has begun, and no stage waits for another. Only x goes through shared
memory.
"""

from __future__ import annotations

from pallas_kernels.fp4_bmm_tiles import SLAB_BYTES
from pallas_kernels.fp4_fragment_ptx import Constants, bias_scales, decode_block
from pallas_kernels.fp4_linear_exchange import ALL
from pallas_kernels.fp4_linear_tiles import BLOCK_BYTES, SCALE_WORD_BYTES, Config, Problem
from pallas_kernels.fp4_linear_wgmma import DESCRIPTOR, Kernel
from pallas_kernels.fragments import BLOCK
from pallas_kernels.ptx import vector


def program(problem: Problem, config: Config) -> str:
    """The whole kernel; its operands are the other one's."""
    return _Direct(problem, config).emit()


class _Direct(Kernel):
    """One stage of all the blocks of the CTA's part."""

    def emit(self) -> str:
        self._indices()
        self._sources()
        self._destinations()
        self._ask()
        self._multiply()
        self.exchange_and_store()
        return self.ptx.text()

    def _ask(self) -> None:
        """All of this thread's codes and scales to registers, x to shared memory."""
        ptx, p, c = self.ptx, self.p, self.c
        k_blocks = p.contraction // BLOCK
        self.words = [ptx.regs("word", 4) for _ in range(c.blocks)]
        self.scale_words = ptx.regs("scale", c.blocks)
        # Not .nc: such loads ptxas would put off until after the barrier, one by one.
        for block, words in enumerate(self.words):
            ptx(f"ld.global.L1::no_allocate.v4.b32 {vector(words)}, [{self.codes}+{block * BLOCK_BYTES}];")
        ptx(  # scales [16 rows][g][block][4]
            f"mad.lo.u32 {self.tmp}, {self.tile}, 4, {self.w};",
            f"mad.lo.u32 {self.tmp}, {self.tmp}, 8, {self.g};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {k_blocks * SCALE_WORD_BYTES};",
            f"add.u64 {self.scales}, {self.scale_bytes}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.rank}, {c.blocks * SCALE_WORD_BYTES};",
            f"add.u64 {self.scales}, {self.scales}, {self.wide};",
        )
        width = next(n for n in (4, 2, 1) if c.blocks % n == 0)
        for first in range(0, c.blocks, width):
            some = self.scale_words[first : first + width]
            suffix, into = (f".v{width}", vector(some)) if width > 1 else ("", some[0])
            ptx(f"ld.global{suffix}.b32 {into}, [{self.scales}+{first * SCALE_WORD_BYTES}];")
        for i, size in enumerate(self.sizes):
            guard = f"@{self.last_rows} " if (i + 1) * self.pass_rows > c.tokens else ""
            for block in range(c.blocks):
                to = (block * c.tokens + i * self.pass_rows) * SLAB_BYTES
                source = i * self.pass_rows * self.row_bytes + block * SLAB_BYTES
                ptx(f"{guard}cp.async.cg.shared.global [{self.x_to}+{to}], [{self.x}+{source}], 16, {size};")
        ptx("cp.async.commit_group;")
        if c.push:
            self.expect_partial_results()

    def _multiply(self) -> None:
        """Block after block, decoded under the products of the one before."""
        ptx, c = self.ptx, self.c
        zero = ptx.reg("zero")
        ptx(f"mov.u32 {zero}, 0;")
        self.constants = Constants(ptx, zero)
        self.factors = ptx.regs("factor", 2)
        self.fragments = [[ptx.regs("a", 4) for _ in range(4)] for _ in range(2)]  # [set][k step]
        self.acc = [ptx.regs("acc", c.tokens // 2, "f32")]
        self.descriptor, self.at = ptx.regs("descriptor", 2, "b64")
        ptx(
            *(f"mov.f32 {register}, 0f00000000;" for register in self.acc[0]),
            f"shr.u32 {self.tmp}, {self.shared}, 4;",
            f"cvt.u64.u32 {self.descriptor}, {self.tmp};",
            f"or.b64 {self.descriptor}, {self.descriptor}, {DESCRIPTOR};",
            "cp.async.wait_group 0;",
            "fence.proxy.async.shared::cta;",
            f"bar.sync {ALL}, {self.threads};",
        )
        for block in range(c.blocks):
            ptx("wgmma.wait_group.sync.aligned 1;")
            bias_scales(ptx, self.constants, self.scale_words[block : block + 1])
            fragments = self.fragments[block % 2]
            decode_block(ptx, self.constants, self.words[block], self.scale_words[block], self.factors, fragments)
            self._products(fragments, self.acc[0], block)
        ptx("wgmma.wait_group.sync.aligned 0;", f"bar.sync {ALL}, {self.threads};")
