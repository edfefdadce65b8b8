"""Hopper's warpgroup product (wgmma) on 64 x 64 tiles, bf16 or f16, in shared memory, descriptors made in the loop.

Pallas offers wgmma itself. Two things need this file's own: a right-hand side of several separate tiles in one
instruction (values come in tiles of 64 columns, and one wgmma takes 256), and descriptors that stay out of the
registers. A descriptor is loop-invariant, so ptxas hoists all of a kernel's (about a hundred) out of the loop and
spills them. Here each is its tile's address plus `zero`, an int32 0 that shared_memory.read_word reads once a
step: nothing can hoist that.

A tile lies in 128-byte swizzle: rows of 128 bytes, groups of 8 rows a swizzle atom of 1024 bytes; tile addresses
are multiples of 1024. Accumulators have the layout ACCUMULATOR, products are asynchronous: between a product and
the `wait` that follows it, nothing may touch an accumulator but further products.

Source: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Instructions", shared memory matrix layout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mosaic import (
    ACCUMULATOR,
    ROW,
    SCALAR,
    TILED,
    WGMMA,
    FragmentedArray,
    arith,
    inline,
    ir,
    llvm,
    mgpu_utils,
    nvvm,
    plgpu,
    scf,
    vector,
)

ROWS = 64  # of the left side and of the accumulator: the instruction's m
TILE = 64  # rows and columns of a tile
ATOM_BYTES = 1024
TILE_BYTES = TILE * TILE * 2
_STEPS = TILE // 16  # instructions a tile: each sums 16 products


def scores(q_ref, k_ref, zero, acc=None, *, q_tile: int = 0, q_tiles: int = 1, kind: str = "bf16") -> jax.Array:
    """acc + q k^T over one tile of 64 columns, or just q k^T where acc is None.

    Args:
        q_ref: [64, 64 q_tiles] in shared memory, of which tile q_tile is used.
        k_ref: [64 keys, 64] in shared memory.
        zero: see above.
        acc: [64, 64] float32, in the layout ACCUMULATOR.
        q_tile: the 64 columns of q_ref.
        q_tiles: how many it has.
        kind: what the 16 bits of both are, "bf16" or "f16", whatever the dtypes of the refs say.
    """
    out = plgpu.ShapeDtypeStruct((ROWS, TILE), jnp.float32, layout=ACCUMULATOR)
    reads = (plgpu.RefType(TILED), plgpu.RefType(TILED), SCALAR)

    def emit(q, k, zero, registers):
        # Both sides are contiguous along the contraction: 16 columns are 32 bytes.
        left = _descriptor(q, zero, stride=q_tiles * ATOM_BYTES, offset=q_tile * ATOM_BYTES)
        right = _descriptor(k, zero, stride=ATOM_BYTES)
        return _product(TILE, registers, left, right, left_step=32, right_step=32, transposed=False, kind=kind)

    if acc is None:
        return inline(arg_types=reads, return_type=out)(
            lambda ctx, q, k, zero: _array(emit(q, k, zero, None), (ROWS, TILE))
        )(q_ref, k_ref, zero)
    return inline(arg_types=(*reads, ACCUMULATOR), return_type=out)(
        lambda ctx, q, k, zero, acc: _array(emit(q, k, zero, acc), (ROWS, TILE))
    )(q_ref, k_ref, zero, acc)


def attend(acc, v_ref, zero, *, p=None, p_ref=None, kind: str = "bf16") -> jax.Array:
    """acc + p v for 64 keys.

    Args:
        acc: [64, 64 n] float32, in the layout ACCUMULATOR.
        v_ref: [n, 64 keys, 64] in shared memory: n separate tiles, side by side.
        zero: see above.
        p: [64, 64] in registers (WGMMA layout), or
        p_ref: the same in shared memory.
        kind: see scores.
    """
    in_registers = p is not None

    @inline(
        arg_types=(ACCUMULATOR, WGMMA if in_registers else plgpu.RefType(TILED), plgpu.RefType(TILED), SCALAR),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=ACCUMULATOR),
    )
    def emit(ctx, acc, p, v, zero):
        # v's columns are contiguous and its keys are summed over: 16 of them are two atoms.
        right = _descriptor(v, zero, stride=ATOM_BYTES, leading=TILE_BYTES)
        left = p if in_registers else _descriptor(p, zero, stride=ATOM_BYTES)
        right_step = 2 * ATOM_BYTES
        registers = _product(
            acc.shape[1], acc, left, right, left_step=32, right_step=right_step, transposed=True, kind=kind
        )
        return _array(registers, acc.shape)

    return emit(acc, p if in_registers else p_ref, v_ref, zero)


def wait(acc) -> jax.Array:
    """The accumulator once every product of this warpgroup is done."""

    @inline(arg_types=(ACCUMULATOR,), return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=ACCUMULATOR))
    def emit(ctx, acc):
        # The registers pass through the instruction, so that nothing that uses them moves before it.
        f32 = ir.F32Type.get()
        registers = [_scalar(register) for register in acc.registers.flat]
        count = len(registers)
        constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
        struct = llvm.StructType.get_literal([f32] * count)
        out = _asm(struct, registers, "wgmma.wait_group.sync.aligned 0;", constraints)
        return _array([llvm.extractvalue(f32, out, [i]) for i in range(count)], acc.shape)

    return emit(acc)


def values(acc) -> jax.Array:
    """A waited-for accumulator as an ordinary array in the WGMMA layout."""

    @inline(arg_types=(ACCUMULATOR,), return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA))
    def convert(ctx, acc):
        return acc.to_layout(WGMMA.to_mgpu())

    return convert(acc)


def zeros(columns: int) -> jax.Array:
    """An accumulator [64, columns] of zeros."""

    @inline(return_type=plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, layout=ACCUMULATOR))
    def make(ctx):
        f32 = ir.F32Type.get()
        zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        return FragmentedArray.splat(zero, (ROWS, columns), ACCUMULATOR.to_mgpu())

    return make()


def rescale(acc, factor) -> jax.Array:
    """acc * factor[:, None]; a warp whose 16 factors are all 1 skips it.

    Args:
        acc: a waited-for accumulator [64, columns].
        factor: float32 [64], in the layout of a WGMMA array's rows.
    """

    @inline(
        arg_types=(ACCUMULATOR, ROW),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=ACCUMULATOR),
    )
    def emit(ctx, acc, factor):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        # A thread holds two rows, 8 apart; in the accumulator they alternate in pairs of columns.
        rows = [_scalar(register) for register in factor.registers.flat]
        if len(rows) != 2:
            raise NotImplementedError(f"rescale: a thread must hold 2 rows; got {len(rows)}.")
        one = arith.constant(f32, ir.FloatAttr.get(f32, 1.0))
        differs = [arith.cmpf(arith.CmpFPredicate.UNE, row, one) for row in rows]
        everyone = arith.constant(i32, ir.IntegerAttr.get(i32, -1))
        needed = nvvm.vote_sync(everyone, arith.ori(*differs), "any")
        old = [_scalar(register) for register in acc.registers.flat]
        branch = scf.IfOp(needed, [f32] * len(old), has_else=True)
        with ir.InsertionPoint(branch.then_block):
            scf.yield_([arith.mulf(value, rows[i // 2 % 2]) for i, value in enumerate(old)])
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(old)
        return _array(list(branch.results), acc.shape)

    return emit(acc, factor)


# ---- PTX ---------------------------------------------------------------------------------------------------------


def _product(columns, acc, left, right, *, left_step, right_step, transposed, kind):
    """Registers of acc (None: 0) + left right, 64 products an element, in one asynchronous group."""
    registers = [] if acc is None else [_scalar(register) for register in acc.registers.flat]
    count = ROWS * columns // 128
    if isinstance(left, FragmentedArray):
        left_operands = [_word(register) for register in left.registers.flat]
    else:
        left_operands = [left[0]]
    low, high = right
    names = (f"${i}" for i in range(10**6))

    def take(n):
        return [next(names) for _ in range(n)]

    accumulators = ", ".join(take(count))
    take(len(registers))  # the inputs tied to those outputs
    left_names, (right_name,) = take(len(left_operands)), take(1)
    lines = ["{", ".reg .b64 dl, dr;", ".reg .b32 wl, wr;", ".reg .pred add;", "wgmma.fence.sync.aligned;"]
    lines += [f"mov.b32 wr, {right_name};"]
    if not isinstance(left, FragmentedArray):
        lines += [f"mov.b32 wl, {left_names[0]};"]
    for step in range(_STEPS):
        lines += [f"setp.ne.b32 add, {int(step > 0 or acc is not None)}, 0;", f"mov.b64 dr, {{wr, {high}}};"]
        if isinstance(left, FragmentedArray):
            side, flags = "{" + ", ".join(left_names[4 * step : 4 * step + 4]) + "}", f"1, 1, {int(transposed)}"
        else:
            lines += [f"mov.b64 dl, {{wl, {left[1]}}};"]
            side, flags = "dl", f"1, 1, 0, {int(transposed)}"
        instruction = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind}"
        lines += [f"{instruction} {{{accumulators}}}, {side}, dr, add, {flags};"]
        if step < _STEPS - 1:
            lines += [f"add.u32 wr, wr, {right_step >> 4};"]
            if left_step:
                lines += [f"add.u32 wl, wl, {left_step >> 4};"]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    tied = [str(i) for i in range(count)] if registers else []
    constraints = ",".join(["=f"] * count + tied + ["r"] * (len(left_operands) + 1))
    f32 = ir.F32Type.get()
    struct = llvm.StructType.get_literal([f32] * count)
    out = _asm(struct, [*registers, *left_operands, low], "\n".join(lines), constraints)
    return [llvm.extractvalue(f32, out, [i]) for i in range(count)]


def _descriptor(ref, zero, *, stride: int, leading: int = 0, offset: int = 0):
    """The low word of a descriptor as a register, and the high word as a number.

    stride: bytes between atoms along the rows of 128 bytes; leading: between tiles, where there are several.
    """
    i32 = ir.IntegerType.get_signless(32)

    def number(x):
        return arith.constant(i32, ir.IntegerAttr.get(i32, x))

    address = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref))
    address = arith.addi(arith.addi(address, _scalar(zero.registers.item())), number(offset))
    # In a cluster an address also names its block, above the 18 bits that a descriptor takes.
    address = arith.andi(address, number(0x3FFFF))
    low = arith.ori(arith.shrui(address, number(4)), number((leading >> 4) << 16))
    swizzle_128 = 1 << 30
    return low, (stride >> 4) | swizzle_128


def _asm(result, operands, text, constraints):
    return llvm.inline_asm(result, operands, text, constraints, asm_dialect=0, has_side_effects=True)


def _array(registers, shape):
    """Accumulator registers, in the instruction's order, as an array."""
    layout = ACCUMULATOR.to_mgpu()
    one = ir.VectorType.get((1,), ir.F32Type.get())
    wrapped = np.empty(len(registers), dtype=object)
    for i, register in enumerate(registers):
        wrapped[i] = vector.broadcast(one, register)
    return FragmentedArray(_registers=wrapped.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=None)


def _scalar(register):
    if not isinstance(register.type, ir.VectorType):
        return register
    return vector.extract(register, [], [0])


def _word(register):
    """A register of two 16-bit numbers as one 32-bit word."""
    i32 = ir.IntegerType.get_signless(32)
    return _scalar(vector.bitcast(ir.VectorType.get((1,), i32), register))
