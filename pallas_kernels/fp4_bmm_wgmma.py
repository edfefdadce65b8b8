"""The batched FP4 matmul for Hopper: weights decoded into wgmma's register operand, tokens as its N side.

    out[b, h, m] = sum_k x[b, h, x0 + k] A[h, m, k]        A in fragment order (fragments.py), exact

A CTA owns `warpgroups * tiles` blocks of 64 outputs of one head and `token_tiles` tiles of `tokens` tokens. Every
thread first asks for all the weight bytes it will ever need (16-byte loads, all in flight at once: at few tokens
the kernel is as fast as those bytes arrive), then the CTA asks for x, which cp.async lays into shared memory as wgmma
wants it (rows of 128 bytes, 128-byte swizzle). Weights are decoded once, into registers that serve every token tile.
Results go through shared memory (stmatrix, transposed) to 16-byte stores of rows of the output.

Batch invariance: whatever the config, an output is one chain of wgmma k16 steps over ascending k into one float32
accumulator. A row's result does not depend, bit for bit, on the batch that it sits in.
"""

from __future__ import annotations

import functools

from pallas_kernels.fp4_bmm_operands import ALL, Operands
from pallas_kernels.fp4_bmm_rope import Rope, rotate
from pallas_kernels.fp4_bmm_tiles import ALIGNMENT, SLAB_BYTES, Config, Problem, box_bytes, slot_bytes
from pallas_kernels.fp4_fragment_ptx import Constants, bias_scales, decode_word, e4m3_pair, multiply, scale_pair
from pallas_kernels.fragments import BLOCK
from pallas_kernels.ptx import vector

# wgmma's descriptor of x (PTX ISA, "Matrix descriptor"): 128-byte swizzle, 1024 bytes from 8 rows to the next.
_DESCRIPTOR = (1 << 62) | ((ALIGNMENT >> 4) << 32) | (1 << 16)


def program(problem: Problem, config: Config, rope: Rope | None = None) -> str:
    """The whole kernel: $0 x, $1 codes, $2 scales, $3 out (64-bit addresses), $4 shared memory (32-bit).

    Then, where there are such, NVFP4's global scale, and with rope cos and sin; out has the rotated columns after the
    outputs.
    """
    return _Kernel(problem, config, rope).emit()


class _Kernel(Operands):
    """Emits the program; the steps are in the order of the methods."""

    def __init__(self, problem: Problem, config: Config, rope: Rope | None = None):
        super().__init__(problem, config)
        self.rope = rope
        self.out_width = problem.outputs + (0 if rope is None else rope.columns)
        # Decode each 16 k just before their product; with fewer tokens products are too short to hide it.
        self.interleave = not problem.transposed and config.tokens >= 16

    def emit(self) -> str:
        self.indices()
        self.load_weights()
        self.x_addresses()
        self._output_addresses()
        prologue = 1 if self.c.delay else self.c.slots
        for tile in range(prologue):
            self.load_x(tile)
        self._hold_loads()
        if self.rope is not None:
            place = {"thread": self.thread, "tile": self.tile, "token": self.token, "head": self.head}
            rotate(self.ptx, self.rope, self.p, self.c, place, ("$6", "$7") if self.nvfp4 else ("$5", "$6"))
        self._multiply()
        end = self.ptx.label("end")
        self.ptx(f"bra.uni {end};", f"{self.lost}:", "trap;", f"{end}:")
        return self.ptx.text()

    def _hold_loads(self) -> None:
        """Have every load above under way before anything below.

        To save registers ptxas would decode the first words before it asks for the last ones. The constants that
        decoding needs are therefore made to depend on the barrier itself: it counts the threads for which a predicate
        holds, none, and nobody but us knows that.
        """
        none = self.ptx.reg("none")
        self.ptx(
            f"setp.eq.u32 {self.pred}, {self.tid}, -1;",
            f"bar.red.popc.u32 {none}, {ALL}, {self.threads()}, {self.pred};",
        )
        self.constants = Constants(self.ptx, none)
        self.never, self.lost = self.ptx.reg("never", "pred"), self.ptx.label("lost")
        self.ptx(f"setp.ne.u32 {self.never}, {none}, 0;")

    def _wall(self) -> None:
        """Have nothing below decoded before the products above are under way.

        ptxas would: decoding depends on nothing but its loads. Products would then wait for weights that others need,
        and run one after the other once all is decoded. A branch ends what ptxas reorders; this one is never taken,
        which, again, only we know.
        """
        again = self.ptx.reg("again")
        self.ptx(
            f"vote.sync.ballot.b32 {again}, {self.never}, 0xffffffff;",
            f"setp.ne.u32 {self.never}, {again}, 0;",
            f"@{self.never} bra.uni {self.lost};",
        )

    def _warpgroup_barrier(self) -> None:
        if self.c.warpgroups == 1:  # ptxas sets a CTA's barriers aside by the largest number it sees
            self.ptx(f"bar.sync {ALL}, 128;")
        else:
            self.ptx(f"add.u32 {self.tmp2}, {self.wg}, {ALL + 1};", f"bar.sync {self.tmp2}, 128;")

    def _output_addresses(self) -> None:
        """Where this lane's stmatrix rows and this thread's 16-byte stores go.

        A staging box is [tokens][64 outputs], swizzled like x. stmatrix.x4: lane 8i + j gives the address of row
        (token) j of matrix i; i & 1 are the outputs 8 .. 15 of 16, i >> 1 the next eight tokens.
        """
        ptx, p, c = self.ptx, self.p, self.c
        self.stage, self.box, self.out_row = ptx.reg("stage"), ptx.reg("box"), ptx.reg("out_row")
        self.out = ptx.reg("out", "b64")
        boxes = c.slots * slot_bytes(p, c)
        ptx(
            f"mad.lo.u32 {self.stage}, {self.wg}, {2 * box_bytes(c)}, {self.shared};",
            f"add.u32 {self.stage}, {self.stage}, {boxes};",
            # this thread's chunk (tid % 8) of row (thread / 8)
            f"shr.u32 {self.out_row}, {self.thread}, 3;",
            f"and.b32 {self.tmp}, {self.thread}, 7;",
            f"xor.b32 {self.tmp2}, {self.tmp}, {self.out_row};",
            f"and.b32 {self.tmp2}, {self.tmp2}, 7;",
            f"shl.b32 {self.tmp2}, {self.tmp2}, 4;",
            f"mad.lo.u32 {self.tmp2}, {self.out_row}, {SLAB_BYTES}, {self.tmp2};",
            f"add.u32 {self.box}, {self.stage}, {self.tmp2};",
            f"mul.lo.u32 {self.tmp2}, {self.tile}, {BLOCK};",
            f"mad.lo.u32 {self.tmp2}, {self.tmp}, 8, {self.tmp2};",
            f"mul.wide.u32 {self.wide}, {self.tmp2}, 2;",
            f"add.u64 {self.out}, $3, {self.wide};",
            f"add.u32 {self.tmp}, {self.token}, {self.out_row};",
            f"mad.lo.u32 {self.tmp}, {self.tmp}, {p.heads}, {self.head};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, {self.out_width * 2};",
            f"add.u64 {self.out}, {self.out}, {self.wide};",
            # this lane's stmatrix row
            f"and.b32 {self.tmp}, {self.lane}, 7;",
            f"mad.lo.u32 {self.stage}, {self.tmp}, {SLAB_BYTES}, {self.stage};",
            f"shr.u32 {self.tmp2}, {self.lane}, 4;",
            f"mad.lo.u32 {self.stage}, {self.tmp2}, {8 * SLAB_BYTES}, {self.stage};",
            f"shr.u32 {self.tmp2}, {self.lane}, 3;",
            f"and.b32 {self.tmp2}, {self.tmp2}, 1;",
            f"mad.lo.u32 {self.tmp2}, {self.w}, 2, {self.tmp2};",
            f"xor.b32 {self.tmp}, {self.tmp}, {self.tmp2};",
            f"mad.lo.u32 {self.stage}, {self.tmp}, 16, {self.stage};",
        )

    def _multiply(self) -> None:
        ptx, c = self.ptx, self.c
        self.descriptor, self.at = ptx.regs("descriptor", 2, "b64")
        ptx(
            f"shr.u32 {self.tmp}, {self.shared}, 4;",
            f"and.b32 {self.tmp}, {self.tmp}, 0x3FFF;",
            f"cvt.u64.u32 {self.descriptor}, {self.tmp};",
            f"or.b64 {self.descriptor}, {self.descriptor}, {_DESCRIPTOR};",
        )
        self.factors, self.packed = ptx.regs("factor", 2), ptx.regs("packed", 4)
        fragments = [[ptx.regs("a", 4) for _ in range(self.k_steps)] for _ in range(c.tiles)]
        accumulators = [ptx.regs("acc", c.tokens // 2, "f32") for _ in range(c.accumulators)]
        # Output tiles outside: the first pass over the token tiles needs the first tile's weights only.
        steps = [(tile, token_tile) for tile in range(c.tiles) for token_tile in range(c.token_tiles)]
        groups = []  # wgmma groups committed by each step
        for number, (tile, token_tile) in enumerate(steps):
            groups.append(self._step(tile, token_tile, fragments[tile], accumulators[number % c.accumulators]))
            done = number - (c.accumulators - 1)
            if done >= 0:
                self._finish(done, steps[done], accumulators[done % c.accumulators], sum(groups[done + 1 :]))
        for done in range(max(len(steps) - c.accumulators + 1, 0), len(steps)):
            self._finish(done, steps[done], accumulators[done % c.accumulators], sum(groups[done + 1 :]))

    def _step(self, tile: int, token_tile: int, fragments: list[list[str]], acc: list[str]) -> int:
        """One output tile by one token tile; decodes the weights on first use."""
        ptx, c = self.ptx, self.c
        groups = 0
        for first in range(0, self.k_steps, 4):
            decode = token_tile == 0
            if decode and self.interleave and (tile or first):
                self._wall()
            if decode and not self.interleave:
                for step in range(first, first + 4):
                    self._decode(tile, step, fragments[step])
            if decode:
                if c.delay and tile == 0 and first == 4 * (c.delay - 1):
                    for later in range(1, c.slots):
                        self.load_x(later)
            if tile == 0 and first == 0:
                self.await_x(token_tile)
                free = token_tile - c.accumulators  # its products are complete
                if free >= 0 and free + c.slots < c.token_tiles:
                    self.load_x(free + c.slots)
            if not self.interleave if decode else first == 0:
                ptx("wgmma.fence.sync.aligned;")
            for step in range(first, first + 4):
                if decode and self.interleave:
                    self._decode(tile, step, fragments[step])
                    ptx("wgmma.fence.sync.aligned;")
                slot = (token_tile % c.slots) * slot_bytes(self.p, c)
                offset = (slot + step // 4 * box_bytes(c)) // 16 + (step % 4) * 2
                ptx(
                    f"add.u64 {self.at}, {self.descriptor}, {offset};",
                    f"wgmma.mma_async.sync.aligned.m64n{c.tokens}k16.f32.bf16.bf16 {vector(acc)}, "
                    f"{vector(fragments[step])}, {self.at}, {int(step > 0)}, 1, 1, 0;",
                )
            if decode or first + 4 == self.k_steps:
                ptx("wgmma.commit_group.sync.aligned;")
                groups += 1
        return groups

    def _decode(self, tile: int, step: int, into: list[str]) -> None:
        ptx, scales = self.ptx, self.scales[tile]
        pair = functools.partial(e4m3_pair, ptx, self.constants) if self.nvfp4 else functools.partial(scale_pair, ptx)
        if step == 0 and not self.nvfp4:
            bias_scales(ptx, self.constants, scales)
        decode_word(ptx, self.constants, self.words[tile][step], into)
        low, high = self.factors
        if self.p.transposed:  # a factor for each of the thread's four k, the same for both rows
            pair(scales[step], 0, 1, low)
            pair(scales[step], 2, 3, high)
        elif 16 * step % self.p.group == 0:  # a factor for each of its two rows, the same for a group of k
            word, byte = divmod(2 * (16 * step // self.p.group), 4)
            pair(scales[word], byte, byte, low)
            pair(scales[word], byte + 1, byte + 1, high)
        for p, register in enumerate(into):
            multiply(ptx, register, self.factors[p >> 1 if self.p.transposed else p & 1])

    def _finish(self, number: int, step: tuple[int, int], acc: list[str], later: int) -> None:
        """Round a step's results, the number-th, to bfloat16 and store them; `later` wgmma groups may still run."""
        ptx, p, c = self.ptx, self.p, self.c
        tile, token_tile = step
        ptx(f"wgmma.wait_group.sync.aligned {later};")
        if self.nvfp4:
            ptx(*(f"mul.rn.f32 {register}, {register}, {self.global_scale};" for register in acc))
        buffer = number % 2 * box_bytes(c)
        for first in range(0, c.tokens // 8, 2):
            count = min(2, c.tokens // 8 - first)
            for e in range(2 * count):  # accumulators 4n .. 4n + 3: row g at tokens 2t, 2t + 1, then row g + 8
                i = 4 * (first + (e >> 1)) + 2 * (e & 1)
                ptx(f"cvt.rn.bf16x2.f32 {self.packed[e]}, {acc[i + 1]}, {acc[i]};")
            ptx(
                f"stmatrix.sync.aligned.m8n8.x{2 * count}.trans.shared.b16 "
                f"[{self.stage}+{buffer + first * 8 * SLAB_BYTES}], {vector(self.packed[: 2 * count])};"
            )
        self._warpgroup_barrier()
        for first in range(0, c.tokens, 16):
            token = token_tile * c.tokens + first
            ptx(
                f"add.u32 {self.tmp}, {self.token}, {self.out_row};",
                f"add.u32 {self.tmp}, {self.tmp}, {token};",
                f"setp.lt.u32 {self.pred}, {self.tmp}, {p.batch};",
            )
            if first + 16 > c.tokens:
                ptx(f"setp.lt.and.u32 {self.pred}, {self.out_row}, {c.tokens - first}, {self.pred};")
            to = token * p.heads * self.out_width * 2 + tile * BLOCK * 2
            ptx(
                f"@{self.pred} ld.shared.v4.b32 {vector(self.packed)}, [{self.box}+{buffer + first * SLAB_BYTES}];",
                f"@{self.pred} st.global{self.hint('out')}.v4.b32 [{self.out}+{to}], "
                f"{vector(self.packed)}{self.policy_of('out')};",
            )
