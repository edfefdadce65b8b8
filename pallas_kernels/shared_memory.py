"""Small operations on shared memory that Pallas does not offer, for Mosaic GPU kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import SCALAR, TILED, FragmentedArray, arith, inline, ir, llvm, mgpu_utils, plgpu


def read_word(ref) -> jax.Array:
    """The first int32 of ref [1..], read now by every thread: no compiler moves the load or knows its result."""

    @inline(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=SCALAR))
    def read(ctx, ref):
        i32 = ir.IntegerType.get_signless(32)
        text = "ld.volatile.shared.u32 $0, [$1];"
        pointer = mgpu_utils.memref_ptr(ref)
        value = llvm.inline_asm(i32, [pointer], text, "=r,r", asm_dialect=0, has_side_effects=True)
        return FragmentedArray.splat(value, (), is_signed=True)

    return read(ref)


def clear_rows(ref, kept, present, page_rows: int) -> None:
    """Zero the rows of tiles that hold no key, whatever lies there, NaN included.

    Args:
        ref: [n, 64, 64] bf16 tiles in 128-byte swizzle, which keeps every row within its own 128 bytes.
        kept: int32; the rows from this one on are zeroed.
        present: int32; so are the rows of page i of these 64 where bit i is 0.
        page_rows: rows of a page, a power of 2.

    The warpgroup must commit_smem before a product reads the tiles.
    """
    tiles = ref.shape[0]

    @inline(arg_types=(plgpu.RefType(TILED), SCALAR, SCALAR))
    def emit(ctx, ref, kept, present):
        i32 = ir.IntegerType.get_signless(32)

        def number(x):
            return arith.constant(i32, ir.IntegerAttr.get(i32, x))

        thread = arith.andi(mgpu_utils.thread_idx(), number(127))
        row = arith.shrui(thread, number(1))  # two threads a row, 64 bytes each
        page = arith.shrui(row, number(page_rows.bit_length() - 1))
        bit = arith.andi(arith.shrui(present.registers.item(), page), number(1))
        inside = arith.cmpi(arith.CmpIPredicate.slt, row, kept.registers.item())
        keep = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.ne, bit, number(0)))
        offset = arith.muli(thread, number(64))
        address = arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref)), offset)
        stores = [
            f"@!p st.shared.v4.b32 [$0+{t * 8192 + i * 16}], {{z, z, z, z}};" for t in range(tiles) for i in range(4)
        ]
        text = "\n".join(["{ .reg .pred p; .reg .b32 z; mov.b32 z, 0; setp.ne.b32 p, $1, 0;", *stores, "}"])
        llvm.inline_asm(
            None, [address, arith.extui(i32, keep)], text, "r,r,~{memory}", asm_dialect=0, has_side_effects=True
        )

    emit(ref, kept, present)


def bf16_to_f16(ref, first: int, size: int, exponent: int) -> None:
    """Turn bf16 numbers into f16 of the same value times 2^exponent, in their places.

    Exact for numbers whose product lies in 2^-14 .. 65504; above is infinite, below rounds to multiples of 2^-24.

    Args:
        ref: in shared memory, of any layout: neither shape nor dtype matters.
        first: byte of ref at which this warpgroup starts.
        size: bytes, a multiple of 2048.
        exponent: see above.

    The warpgroup must commit_smem before a product reads it.
    """
    bits = f"0f{(127 + exponent) << 23:08x}"
    lines = ["{ .reg .b32 w<4>, l, h; .reg .f32 a, b;"]
    for i in range(size // 2048):
        lines += [f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [$0+{i * 2048}];"]
        for j in range(4):
            lines += [f"shl.b32 l, w{j}, 16; and.b32 h, w{j}, 0xffff0000; mov.b32 a, l; mov.b32 b, h;"]
            lines += [f"mul.f32 a, a, {bits}; mul.f32 b, b, {bits}; cvt.rn.f16x2.f32 w{j}, b, a;"]
        lines += [f"st.shared.v4.b32 [$0+{i * 2048}], {{w0, w1, w2, w3}};"]

    @inline(arg_types=(plgpu.RefType(TILED),))
    def emit(ctx, ref):
        del ctx
        i32 = ir.IntegerType.get_signless(32)

        def number(x):
            return arith.constant(i32, ir.IntegerAttr.get(i32, x))

        thread = arith.andi(mgpu_utils.thread_idx(), number(127))
        offset = arith.addi(arith.muli(thread, number(16)), number(first))
        address = arith.addi(llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref)), offset)
        text = "\n".join([*lines, "}"])
        llvm.inline_asm(None, [address], text, "r,~{memory}", asm_dialect=0, has_side_effects=True)

    emit(ref)
