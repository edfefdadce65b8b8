"""Fragment order to a dense bfloat16 matrix, for Hopper: one pass over the bytes, for a library's matmul to follow.

    out[h, n, c] = e2m1 * scale, exact, row-major

A warpgroup takes up to four 64 x 64 blocks that are neighbours along k (fragments.py). It decodes them as the matmul
kernels do, puts the fragments into shared memory as matrices (stmatrix, transposed for key rows, which fragment order
holds transposed), and writes rows of 16-byte pieces.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.fp4_bmm_tiles import ALIGNMENT, SLAB_BYTES
from pallas_kernels.fp4_fragment_ptx import Constants, bias_scales, decode_word, multiply, scale_pair
from pallas_kernels.fp4_linear_tiles import BLOCK_BYTES, SCALE_WORD_BYTES
from pallas_kernels.fragments import BLOCK, GROUP, FragmentOrder
from pallas_kernels.ptx import Ptx, vector

_BOX_BYTES = BLOCK * SLAB_BYTES  # a decoded block in shared memory
_ALL = 1  # named barrier (Mosaic has 0)


# Jitted, so that a program of many equal calls lowers one.
@functools.partial(jax.jit, static_argnames=("order",))
def fp4_dequantize_mosaic_gpu(
    codes: UInt8[Array, "H N half"], scales: UInt8[Array, "H N groups"], order: FragmentOrder
) -> Float[Array, "H N C"]:
    """The values, bfloat16.

    Args:
        codes: packed bytes in fragment order.
        scales: scale bytes likewise, none above 128.
        order: where the key rows end.
    """
    from pallas_kernels.mosaic import mosaic_kernel  # names that jax before 0.11 lacks

    heads, rows, half = codes.shape
    program = _Dequantize(heads, rows, 2 * half, order.key_rows)
    return mosaic_kernel(
        program.emit,
        out_shape=jax.ShapeDtypeStruct((heads, rows, 2 * half), jnp.bfloat16),
        grid=heads * (program.key_groups + program.other_groups),
        warpgroups=1,
        shared_memory_bytes=ALIGNMENT + max(program.key_blocks, program.other_blocks) * _BOX_BYTES,
    )(codes, scales)


def unsupported(shape: tuple[int, ...]) -> str | None:
    """Why weights of this shape, in fragment order, cannot be decoded by this kernel, or None."""
    size = math.prod(shape)
    if not 0 < size < 2**32:  # of a head, in fact; offsets within one are 32 bits
        return f"weights must have 1 .. 2^32 - 1 elements; got {size}."
    return None


class _Dequantize:
    """Emits the kernel: $0 codes, $1 scales, $2 out (64-bit addresses), $3 shared memory (32-bit)."""

    def __init__(self, heads: int, rows: int, columns: int, key_rows: int):
        self.heads, self.rows, self.columns, self.key_rows = heads, rows, columns, key_rows
        # Blocks of a warpgroup, and groups of so many blocks in a head.
        self.key_blocks = _largest_divisor(key_rows // BLOCK)
        self.other_blocks = _largest_divisor(columns // BLOCK)
        block_columns = columns // BLOCK
        self.key_groups = key_rows // BLOCK * block_columns // self.key_blocks if key_rows else 0
        self.other_groups = (rows - key_rows) // BLOCK * block_columns // self.other_blocks

    def emit(self) -> str:
        self.ptx = ptx = Ptx()
        self.thread, self.w, self.g, self.t = (ptx.reg(name) for name in ("thread", "w", "g", "t"))
        self.tmp, self.tmp2, self.head, self.group = (ptx.reg(name) for name in ("tmp", "tmp2", "head", "group"))
        self.lane, self.shared = ptx.reg("lane"), ptx.reg("shared")
        self.codes, self.scales, self.out, self.wide = ptx.regs("wide", 4, "b64")
        pred, zero = ptx.reg("pred", "pred"), ptx.reg("zero")
        groups = self.key_groups + self.other_groups
        ptx(
            f"mov.u32 {self.thread}, %tid.x;",
            f"and.b32 {self.lane}, {self.thread}, 31;",
            f"shr.u32 {self.w}, {self.thread}, 5;",
            f"shr.u32 {self.g}, {self.lane}, 2;",
            f"and.b32 {self.t}, {self.lane}, 3;",
            f"add.u32 {self.shared}, $3, {ALIGNMENT - 1};",
            f"and.b32 {self.shared}, {self.shared}, -{ALIGNMENT};",
            f"mov.u32 {zero}, 0;",
            f"mov.u32 {self.tmp}, %ctaid.x;",
        )
        self.constants = Constants(ptx, zero)
        ptx.divide(self.head, self.group, self.tmp, groups, groups * self.heads)
        ptx(
            f"mul.wide.u32 {self.wide}, {self.head}, {self.rows * self.columns // 2};",
            f"add.u64 {self.codes}, $0, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.thread}, 16;",
            f"add.u64 {self.codes}, {self.codes}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.head}, {self.rows * self.columns // GROUP};",
            f"add.u64 {self.scales}, $1, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.head}, {self.rows * self.columns};",
            f"shl.b64 {self.wide}, {self.wide}, 1;",
            f"add.u64 {self.out}, $2, {self.wide};",
        )
        others, end = ptx.label("others"), ptx.label("end")
        if self.key_groups and self.other_groups:
            ptx(f"setp.ge.u32 {pred}, {self.group}, {self.key_groups};", f"@{pred} bra {others};")
        if self.key_groups:
            self._convert(True)
        if self.key_groups and self.other_groups:
            ptx(f"bra {end};", f"{others}:", f"sub.u32 {self.group}, {self.group}, {self.key_groups};")
        if self.other_groups:
            self._convert(False)
        ptx(f"{end}:")
        return ptx.text()

    def _convert(self, keys: bool) -> None:
        """Blocks group * n .. of the key rows' matrix [C, P], or of the others' [N - P, C]."""
        ptx = self.ptx
        count = self.key_blocks if keys else self.other_blocks
        k_blocks = (self.key_rows if keys else self.columns) // BLOCK
        first_code = 0 if keys else self.key_rows * self.columns // 2
        first_scale = 0 if keys else self.key_rows * self.columns // GROUP
        tile, block = ptx.regs("place", 2)
        words = [ptx.regs("word", 4) for _ in range(count)]
        scales = [ptx.regs("scale", 4 if keys else 1) for _ in range(count)]
        # group -> tile (64 outputs of the matrix) and the first 64-k block
        ptx.divide(tile, block, self.group, k_blocks // count, self.key_groups + self.other_groups)
        ptx(
            f"mul.lo.u32 {block}, {block}, {count};",
            f"mul.wide.u32 {self.wide}, {self.group}, {count * BLOCK_BYTES};",
            f"add.u64 {self.codes}, {self.codes}, {self.wide};",
        )
        for i, four in enumerate(words):
            ptx(f"ld.global.nc.L1::no_allocate.v4.b32 {vector(four)}, [{self.codes}+{first_code + i * BLOCK_BYTES}];")
        if keys:  # [m/32][t][k/16][4]: 16 bytes a block
            ptx(
                f"shr.u32 {self.tmp}, {self.w}, 1;",
                f"mad.lo.u32 {self.tmp}, {tile}, 2, {self.tmp};",
                f"mad.lo.u32 {self.tmp}, {self.tmp}, 4, {self.t};",
                f"mad.lo.u32 {self.tmp}, {self.tmp}, {k_blocks}, {block};",
            )
            step = 16
        else:  # [m/16][g][k/64][4]: 4 bytes a block
            ptx(
                f"mad.lo.u32 {self.tmp}, {tile}, 4, {self.w};",
                f"mad.lo.u32 {self.tmp}, {self.tmp}, 8, {self.g};",
                f"mad.lo.u32 {self.tmp}, {self.tmp}, {k_blocks}, {block};",
            )
            step = SCALE_WORD_BYTES
        ptx(
            f"mul.wide.u32 {self.wide}, {self.tmp}, {step};",
            f"add.u64 {self.scales}, {self.scales}, {self.wide};",
        )
        for i, some in enumerate(scales):
            suffix, into = (".v4", vector(some)) if keys else ("", some[0])
            ptx(f"ld.global.nc{suffix}.b32 {into}, [{self.scales}+{first_scale + i * step}];")
        self._to_shared(keys, words, scales)
        ptx(f"bar.sync {_ALL}, 128;")
        self._store(keys, count, tile, block)

    def _to_shared(self, keys: bool, words: list[list[str]], scales: list[list[str]]) -> None:
        """Decoded blocks to boxes [64 rows][64 columns] of the result, rows of 128 bytes in 128-byte swizzle.

        stmatrix.x4: lane 8i + j gives the address of row j of matrix i, which is register i of the fragment: 8 more
        rows of A for i & 1, 8 more k for i >> 1.
        """
        ptx = self.ptx
        low, high = ptx.regs("factor", 2)
        fragment = ptx.regs("a", 4)
        row, chunk, j, to = ptx.regs("place", 4)
        ptx(
            f"and.b32 {j}, {self.lane}, 7;",
            f"shr.u32 {self.tmp2}, {self.lane}, 4;",
            f"shr.u32 {self.tmp}, {self.lane}, 3;",
            f"and.b32 {self.tmp}, {self.tmp}, 1;",
        )
        # The row's part that depends on the lane, and the chunk's: of what the k step adds, see below.
        if keys:  # row k = 16q + 8 (i >> 1) + j, chunk 2w + (i & 1)
            ptx(
                f"mad.lo.u32 {row}, {self.tmp2}, 8, {j};",
                f"mad.lo.u32 {chunk}, {self.w}, 2, {self.tmp};",
            )
        else:  # row 16w + 8 (i & 1) + j, chunk 2q + (i >> 1)
            ptx(
                f"mad.lo.u32 {row}, {self.w}, 16, {j};",
                f"mad.lo.u32 {row}, {self.tmp}, 8, {row};",
                f"mov.u32 {chunk}, {self.tmp2};",
            )
        for i, (four, some) in enumerate(zip(words, scales, strict=True)):
            bias_scales(ptx, self.constants, some)
            for q in range(4):
                decode_word(ptx, self.constants, four[q], fragment)
                if keys:  # a factor for each of the thread's four k
                    scale_pair(ptx, some[q], 0, 1, low)
                    scale_pair(ptx, some[q], 2, 3, high)
                elif q % 2 == 0:  # for each of its two rows
                    scale_pair(ptx, some[0], q, q, low)
                    scale_pair(ptx, some[0], q + 1, q + 1, high)
                for p, register in enumerate(fragment):
                    multiply(ptx, register, (low, high)[p >> 1 if keys else p & 1])
                ptx(
                    f"add.u32 {self.tmp}, {chunk}, {0 if keys else 2 * q};",
                    f"xor.b32 {self.tmp}, {self.tmp}, {j};",
                    f"mad.lo.u32 {to}, {row}, {SLAB_BYTES}, {self.shared};",
                    f"mad.lo.u32 {to}, {self.tmp}, 16, {to};",
                    f"stmatrix.sync.aligned.m8n8.x4{'.trans' if keys else ''}.shared.b16 "
                    f"[{to}+{i * _BOX_BYTES + (16 * q * SLAB_BYTES if keys else 0)}], {vector(fragment)};",
                )

    def _store(self, keys: bool, count: int, tile: str, block: str) -> None:
        """Boxes to global memory: a thread's chunk (thread % 8) of rows thread / 8, 16 further, ...."""
        ptx = self.ptx
        row, at = ptx.regs("from", 2)
        packed = ptx.regs("packed", 4)
        ptx(
            f"shr.u32 {row}, {self.thread}, 3;",
            f"and.b32 {self.tmp}, {self.thread}, 7;",
            f"xor.b32 {self.tmp2}, {self.tmp}, {row};",
            f"and.b32 {self.tmp2}, {self.tmp2}, 7;",
            f"mad.lo.u32 {at}, {self.tmp2}, 16, {self.shared};",
            f"mad.lo.u32 {at}, {row}, {SLAB_BYTES}, {at};",
        )
        # Key rows: the result's row 64 block + row, columns 64 tile ...; others: 64 tile + row after them, ....
        by_row, by_column = (block, tile) if keys else (tile, block)
        ptx(
            f"mad.lo.u32 {row}, {by_row}, {BLOCK}, {row};",
            f"mul.wide.u32 {self.wide}, {row}, {2 * self.columns};",
            f"add.u64 {self.out}, {self.out}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {by_column}, {SLAB_BYTES};",
            f"add.u64 {self.out}, {self.out}, {self.wide};",
            f"mul.wide.u32 {self.wide}, {self.tmp}, 16;",
            f"add.u64 {self.out}, {self.out}, {self.wide};",
        )
        first = 0 if keys else self.key_rows * 2 * self.columns
        for rows in range(0, BLOCK, 16):
            for i in range(count):
                to = first + rows * 2 * self.columns + i * (BLOCK * 2 * self.columns if keys else SLAB_BYTES)
                ptx(
                    f"ld.shared.v4.b32 {vector(packed)}, [{at}+{i * _BOX_BYTES + rows * SLAB_BYTES}];",
                    f"st.global.v4.b32 [{self.out}+{to}], {vector(packed)};",
                )


def _largest_divisor(number: int) -> int:
    """4, 2 or 1: the largest that divides number."""
    return next(divisor for divisor in (4, 2, 1) if number % divisor == 0)
