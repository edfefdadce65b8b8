"""What the machine allows: kernels that only touch bytes, the floor under every weight-bound kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8

from pallas_kernels.mosaic import mosaic_kernel
from pallas_kernels.ptx import Ptx, vector

_THREADS = 128
_VECTOR_BYTES = 16
_NEVER = "0x12345678"  # a combination of all bytes that is stored if met, so that no load can be left out


def touch(data: UInt8[Array, "bytes"], *, loads: int = 8) -> Array:
    """Read every byte of an array once, `loads` 16-byte loads a thread, all in flight together; write nothing.

    The array's size must be a multiple of 128 * 16 * loads bytes.
    """
    ctas, rest = divmod(data.size, _THREADS * _VECTOR_BYTES * loads)
    if rest:
        raise ValueError(f"touch: data must hold whole CTAs of {_THREADS * 16 * loads} bytes; got {data.size}.")
    return mosaic_kernel(
        lambda: _program(loads),
        out_shape=jax.ShapeDtypeStruct((4,), jnp.int32),
        grid=ctas,
        warpgroups=1,
        shared_memory_bytes=1024,
    )(data)


def _program(loads: int) -> str:
    ptx = Ptx()
    cta, thread, total, all_ones = (ptx.reg(name) for name in ("cta", "thread", "total", "never"))
    wide, at = ptx.regs("wide", 2, "b64")
    met = ptx.reg("met", "pred")
    ptx(
        f"mov.u32 {cta}, %ctaid.x;",
        f"mov.u32 {thread}, %tid.x;",
        f"mul.wide.u32 {wide}, {cta}, {_THREADS * _VECTOR_BYTES * loads};",
        f"add.u64 {at}, $0, {wide};",
        f"mul.wide.u32 {wide}, {thread}, {_VECTOR_BYTES};",
        f"add.u64 {at}, {at}, {wide};",
        f"mov.u32 {total}, 0;",
        f"mov.u32 {all_ones}, {_NEVER};",
    )
    words = [ptx.regs("word", 4) for _ in range(loads)]
    for i, four in enumerate(words):
        ptx(f"ld.global.L1::no_allocate.v4.b32 {vector(four)}, [{at}+{i * _THREADS * _VECTOR_BYTES}];")
    ptx(f"bar.sync 1, {_THREADS};")
    for four in words:
        ptx(*(f"xor.b32 {total}, {total}, {word};" for word in four))
    ptx(f"setp.eq.u32 {met}, {total}, {all_ones};", f"@{met} st.global.b32 [$1], {total};")
    return ptx.text()
