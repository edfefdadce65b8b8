"""float8_e4m3fn from global memory to f16 tiles in shared memory, through one warpgroup's registers.

Every e4m3 number, NaN included, is an f16 number, and one instruction makes two of them; bf16 would take a dozen.

A tile is 64 keys of 64 columns. Thread t of 128 has the 16 columns 16 (t % 4) .. of the keys t / 4 and t / 4 + 32, so
that a warp reads 64 bytes of each of 8 keys at once and writes its 16-byte pieces without bank conflicts.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import SCALAR, TILED, FragmentedArray, arith, inline, ir, llvm, mgpu_utils, plgpu, vector

WORDS = 8  # 32-bit words of a tile that a thread has
TILE_BYTES = 64  # of one key, in global memory
_LAYOUT = plgpu.Layout.WG_STRIDED((WORDS * 128,), vec_size=1)


def fetch(keys_ref, firsts: Sequence[jax.Array], last, wanted, *, tile: int, width: int) -> jax.Array:
    """Ask for a tile of the cache: int32 [1024], 8 words a thread, there once they are used.

    Args:
        keys_ref: float8_e4m3fn in global memory, rows of `width` bytes, row-major whatever its shape.
        firsts: row numbers at which the 1, 2 or 4 equal pieces of the 64 keys start.
        last: no row after this one is read; rows past it read as this one.
        wanted: whether to read at all; if not, the words are 0.
        tile: its columns are 64 tile .. 64 tile + 63.
        width: bytes of a row.
    """
    pieces = len(firsts)

    @inline(
        arg_types=(plgpu.RefType(), SCALAR, SCALAR, *[SCALAR] * pieces),
        return_type=plgpu.ShapeDtypeStruct((WORDS * 128,), jnp.int32, layout=_LAYOUT),
    )
    def emit(ctx, keys, last, wanted, *firsts):
        del ctx
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        firsts = [_scalar(first) for first in firsts]
        base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(keys))
        row, part = _row_and_part()
        words = []
        for half in (0, 32):
            key = arith.addi(row, _number(half))
            piece = arith.shrui(key, _number((64 // pieces).bit_length() - 1))
            first = firsts[0]
            for i, other in enumerate(firsts[1:], 1):
                is_it = arith.cmpi(arith.CmpIPredicate.eq, piece, _number(i))
                first = arith.select(is_it, other, first)
            place = arith.addi(first, arith.andi(key, _number(64 // pieces - 1)))
            place = arith.minsi(place, _scalar(last))
            offset = arith.muli(arith.extui(i64, place), arith.constant(i64, ir.IntegerAttr.get(i64, width)))
            column = arith.addi(arith.shli(part, _number(4)), _number(tile * TILE_BYTES))
            address = arith.addi(base, arith.addi(offset, arith.extui(i64, column)))
            text = """{ .reg .pred p; setp.ne.b32 p, $5, 0;
                mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
                @p ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4]; }"""
            struct = llvm.StructType.get_literal([i32] * 4)
            got = _asm(struct, [address, _scalar(wanted)], text, "=&r,=&r,=&r,=&r,l,r")
            words += [llvm.extractvalue(i32, got, [i]) for i in range(4)]
        one = ir.VectorType.get((1,), i32)
        registers = np.empty(len(words), dtype=object)
        for i, word in enumerate(words):
            registers[i] = vector.broadcast(one, word)
        return FragmentedArray(_registers=registers, _layout=_LAYOUT.to_mgpu(), _is_signed=True)

    return emit(keys_ref, last, wanted, *firsts)


def prefetch(keys_ref, first, last, wanted, *, rows: int, width: int) -> None:
    """Ask L2 for rows first .. first + rows - 1 of the cache, if wanted and if they exist.

    Args:
        keys_ref: see `fetch`.
        first: a row whose first byte, as `rows * width`, is a multiple of 16.
        last: the last row there is.
        wanted: see `fetch`.
        rows: how many.
        width: bytes of a row.
    """

    @inline(arg_types=(plgpu.RefType(), SCALAR, SCALAR, SCALAR))
    def emit(ctx, keys, first, last, wanted):
        del ctx
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        row, predicate = _scalar(first), arith.CmpIPredicate
        offset = arith.muli(arith.extui(i64, row), arith.constant(i64, ir.IntegerAttr.get(i64, width)))
        address = arith.addi(llvm.ptrtoint(i64, mgpu_utils.memref_ptr(keys)), offset)
        thread = arith.andi(mgpu_utils.thread_idx(), _number(127))
        alone = arith.cmpi(predicate.eq, thread, _number(0))
        inside = arith.cmpi(predicate.sle, arith.addi(row, _number(rows - 1)), _scalar(last))
        go = arith.andi(arith.extui(i32, arith.andi(alone, inside)), _scalar(wanted))
        text = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p cp.async.bulk.prefetch.L2.global [$0], SIZE; }"
        _asm(None, [address, go], text.replace("SIZE", str(rows * width)), "l,r,~{memory}")

    emit(keys_ref, first, last, wanted)


def store(words, tile_ref) -> None:
    """Write a fetched tile as f16; `publish` must follow before wgmma reads it.

    Args:
        words: of `fetch`.
        tile_ref: 16-bit numbers [64, 64] in shared memory, in 128-byte swizzle.
    """

    @inline(arg_types=(_LAYOUT, plgpu.RefType(TILED)))
    def emit(ctx, words, tile):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        row, part = _row_and_part()
        # Pieces 2 part and 2 part + 1 of the row's eight, at the places that the swizzle gives them.
        swizzled = arith.xori(arith.shli(part, _number(1)), arith.andi(row, _number(7)))
        offset = arith.addi(arith.shli(row, _number(7)), arith.shli(swizzled, _number(4)))
        base = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(tile))
        registers = [_scalar(register) for register in words.registers.flat]
        for half in (0, 1):
            first = arith.addi(arith.addi(base, offset), _number(half * 32 * 128))
            second = arith.addi(arith.addi(base, arith.xori(offset, _number(16))), _number(half * 32 * 128))
            _asm(None, [*registers[4 * half : 4 * half + 4], first, second], _CONVERT, "r,r,r,r,r,r,~{memory}")

    emit(words, tile_ref)


def publish() -> None:
    """Let wgmma read what this thread has stored, once it has arrived at an mbarrier that the reader waits for."""

    @inline()
    def emit(ctx):
        del ctx
        _asm(None, [], "fence.proxy.async.shared::cta;", "~{memory}")

    emit()


def _convert() -> str:
    """16 numbers of $0 .. $3 as f16 to the 16-byte places $4 and $5."""
    lines = ["{", ".reg .b32 y<8>; .reg .b16 l, h;"]
    for i in range(4):
        lines += [f"mov.b32 {{l, h}}, ${i};"]
        lines += [f"cvt.rn.f16x2.e4m3x2 y{2 * i}, l;", f"cvt.rn.f16x2.e4m3x2 y{2 * i + 1}, h;"]
    lines += ["st.shared.v4.b32 [$4], {y0, y1, y2, y3};", "st.shared.v4.b32 [$5], {y4, y5, y6, y7};", "}"]
    return "\n".join(lines)


_CONVERT = _convert()


def _row_and_part():
    thread = arith.andi(mgpu_utils.thread_idx(), _number(127))
    return arith.shrui(thread, _number(2)), arith.andi(thread, _number(3))


def _number(x: int):
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, x))


def _scalar(register):
    if isinstance(register, FragmentedArray):
        register = register.registers.item()
    return vector.extract(register, [], [0]) if isinstance(register.type, ir.VectorType) else register


def _asm(result, operands, text, constraints):
    return llvm.inline_asm(result, operands, text, constraints, asm_dialect=0, has_side_effects=True)
