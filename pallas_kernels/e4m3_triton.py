"""float8_e4m3fn, given as uint8, in Pallas Triton kernels: exact, NaN included, on any GPU.

From compute capability 8.9 on one instruction makes two float16 of two bytes, and three more make them bfloat16.
Before, bits are moved to where bfloat16 has its exponent and mantissa: that is the number times 2^-120, sub-normals
included, and a product with 2^120 puts it right. Either way four bytes at a time, two numbers to a register.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, UInt8

from pallas_kernels.backend import pltriton


def to_bf16(codes: UInt8[Array, "*shape"], *, capability: tuple[int, int] | None) -> BFloat16[Array, "*shape"]:
    """The numbers of e4m3 bytes.

    Args:
        codes: a multiple of 4 a thread, along the axis that is contiguous in memory.
        capability: of the CUDA GPU; None for plain operations, which any platform and the interpreter know.
    """
    if capability is None:
        return _plain(codes)
    (numbers,) = pltriton.elementwise_inline_asm(
        _CONVERT if capability >= (8, 9) else _MOVE_BITS,
        args=[codes],
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)],
    )
    return numbers


def _plain(codes):
    codes = codes.astype(jnp.int32)
    magnitude = codes & 0x7F
    # Exponent and mantissa go where those of a float32 meet, and the biases differ by 120; sub-normals are multiples
    # of 2^-9, made so that none is a sub-normal float32 on the way.
    normal = jax.lax.bitcast_convert_type((magnitude << 20) + np.int32(120 << 23), jnp.float32)
    value = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * np.float32(2.0**-9), normal)
    value = jnp.where(magnitude == 0x7F, np.float32(np.nan), value)
    return jnp.where(codes >= 0x80, -value, value).astype(jnp.bfloat16)


def _move_bits() -> str:
    """The bytes of $2 as bf16: the first two to $0, the others to $1."""
    lines = ["{", ".reg .b32 x, m, n, k, z;", "mov.b32 k, 0x7b807b80; mov.b32 z, 0x80008000;"]  # 2^120 and -0, twice
    for out, bytes_ in (("$0", "0x5040"), ("$1", "0x7060")):
        lines += [
            f"prmt.b32 x, 0, $2, {bytes_};",  # each the upper byte of 16 bits
            "shr.u32 m, x, 4; and.b32 m, m, 0x07f007f0;",
            # NaN, 0x7f0, is what becomes 0x800 or more with 0x10 added: then 0x7800 is set as well.
            "add.u32 n, m, 0x00100010; and.b32 n, n, 0x08000800; mad.lo.u32 m, n, 15, m;",
            "lop3.b32 m, x, 0x80008000, m, 0xea;",  # (x & sign) | m
            f"fma.rn.bf16x2 {out}, m, k, z;",
        ]
    return "\n".join([*lines, "}"])


_MOVE_BITS = _move_bits()
_CONVERT = """{
.reg .b16 low, high, h<4>; .reg .b32 x, y; .reg .f32 f<4>;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 x, low; cvt.rn.f16x2.e4m3x2 y, high;
mov.b32 {h0, h1}, x; mov.b32 {h2, h3}, y;
cvt.f32.f16 f0, h0; cvt.f32.f16 f1, h1; cvt.f32.f16 f2, h2; cvt.f32.f16 f3, h3;
cvt.rn.bf16x2.f32 $0, f1, f0; cvt.rn.bf16x2.f32 $1, f3, f2;
}"""
