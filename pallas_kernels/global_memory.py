"""Storing a part of a warpgroup's array to global memory, for Mosaic GPU kernels."""

from __future__ import annotations

from pallas_kernels.mosaic import SCALAR, WGMMA, arith, inline, ir, mgpu_utils, plgpu, scf, vector


def store_rows(ref, x, rows) -> None:
    """Store the first `rows` rows of x, float32 [64, n] in the WGMMA layout, to ref [64, n] in global memory.

    The others need not exist. `rows` is an int32 and may pass 64.
    """

    @inline(arg_types=(plgpu.RefType(), WGMMA, SCALAR))
    def emit(ctx, ref, x, rows):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()

        def number(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        # PTX ISA, wgmma's accumulator: warp w, lane 4g + t hold rows 16w + g and 8 further, columns 8j + 2t and + 1.
        thread = arith.andi(mgpu_utils.thread_idx(), number(127))
        lane = arith.andi(thread, number(31))
        first = arith.addi(arith.muli(arith.shrui(thread, number(5)), number(16)), arith.shrui(lane, number(2)))
        column = arith.index_cast(index, arith.muli(arith.andi(lane, number(3)), number(2)))
        registers = list(x.registers.flat)
        for half in (0, 1):
            row = arith.addi(first, number(8 * half))
            inside = arith.cmpi(arith.CmpIPredicate.slt, row, rows.registers.item())
            with ir.InsertionPoint(scf.IfOp(inside).then_block):
                row = arith.index_cast(index, row)
                for j, register in enumerate(registers[half::2]):
                    at = arith.addi(column, arith.constant(index, ir.IntegerAttr.get(index, 8 * j)))
                    vector.store(register, ref, [row, at])
                scf.yield_([])

    emit(ref, x, rows)
