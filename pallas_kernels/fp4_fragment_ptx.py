"""PTX that decodes FP4 weights in fragment order (see fragments.py) and folds their scales in."""

from __future__ import annotations

from collections.abc import Sequence

from pallas_kernels.ptx import Ptx

# Sign (15), exponent (8, 7) and mantissa (6) of both halves of a register; see fragments.py.
_FIELDS = "0x81C081C0"
_FIELDS_BUT_MANTISSA = "0x81808180"
_MANTISSA = "0x00400040"
_OR_AND = "0xEA"  # lop3's table of (a & b) | c
# Added to four scale bytes at once: byte + 126 is the exponent field of 2^(byte - 1), which undoes the 2^-126 of a
# decoded code as well. No byte carries into the next, for fragment order holds bytes up to 128 only.
_SCALE_BIAS = "0x7E7E7E7E"
_TWO_TO_127, _TWO_TO_112 = "0x7F007F00", "0x77807780"  # pairs of bfloat16
E4M3_UNIT = "0f43000000"  # 2^7 as a float32: what results of such weights have to be multiplied by


class Constants:
    """The constants of decoding in registers, each increased by `zero`, a register that holds 0."""

    def __init__(self, ptx: Ptx, zero: str):
        self.fields, self.others, self.mantissa, self.bias, self.large, self.larger = ptx.regs("constant", 6)
        for register, value in (
            (self.fields, _FIELDS),
            (self.others, _FIELDS_BUT_MANTISSA),
            (self.mantissa, _MANTISSA),
            (self.bias, _SCALE_BIAS),
            (self.large, _TWO_TO_112),
            (self.larger, _TWO_TO_127),
        ):
            ptx(f"add.u32 {register}, {zero}, {value};")


def decode_word(ptx: Ptx, constants: Constants, word: str, into: Sequence[str]) -> None:
    """Eight codes to the four registers of an A fragment: bfloat16 pairs e2m1 * 2^-126."""
    a, b, c, d = into
    t = ptx.regs("decode", 3)
    ptx(
        f"and.b32 {a}, {word}, {constants.fields};",
        f"shf.r.wrap.b32 {t[0]}, {word}, {word}, 4;",
        f"and.b32 {b}, {t[0]}, {constants.fields};",
        f"shl.b32 {t[1]}, {word}, 6;",
        f"and.b32 {c}, {t[1]}, {constants.fields};",
        f"shf.r.wrap.b32 {t[2]}, {word}, {word}, 6;",
        f"and.b32 {d}, {t[2]}, {constants.others};",
        f"shl.b32 {t[2]}, {word}, 2;",
        f"lop3.b32 {d}, {t[2]}, {constants.mantissa}, {d}, {_OR_AND};",
    )


def bias_scales(ptx: Ptx, constants: Constants, scales: Sequence[str]) -> None:
    """Turn scale bytes, four to a register, into exponent fields, in place."""
    for word in scales:
        ptx(f"add.u32 {word}, {word}, {constants.bias};")


def scale_pair(ptx: Ptx, word: str, low: int, high: int, into: str) -> None:
    """Two of a word's exponent fields as bfloat16 powers of two, one to a half."""
    # prmt's digits choose bytes from the last: low, 0, high, 0 (4 is a byte of the zero operand).
    ptx(f"prmt.b32 {into}, {word}, 0, 0x4{high}4{low};", f"shl.b32 {into}, {into}, 7;")


def e4m3_pair(ptx: Ptx, constants: Constants, word: str, low: int, high: int, into: str) -> None:
    """Two of a word's bytes, e4m3 from 0 to 448, as bfloat16 scale * 2^119, one to a half.

    Four bits up, an e4m3 is the bfloat16 scale * 2^-120 (subnormals too). Two factors bring it to where a decoded
    code, e2m1 * 2^-126, becomes e2m1 * scale * 2^-7: at most six significant bits and a normal number, so exact.
    """
    ptx(
        f"prmt.b32 {into}, {word}, 0, 0x4{high}4{low};",
        f"shl.b32 {into}, {into}, 4;",
        f"mul.rn.bf16x2 {into}, {into}, {constants.larger};",
        f"mul.rn.bf16x2 {into}, {into}, {constants.large};",
    )


def multiply(ptx: Ptx, register: str, factor: str) -> None:
    """register *= factor, as bfloat16 pairs; exact here: two significant bits times a power of two or four bits."""
    ptx(f"mul.rn.bf16x2 {register}, {register}, {factor};")


def decode_block(
    ptx: Ptx,
    constants: Constants,
    words: Sequence[str],
    scale: str,
    factors: Sequence[str],
    into: Sequence[Sequence[str]],
) -> None:
    """A block's four words to the fragments of its four k steps, its (biased) scales folded in; not of key rows.

    factors are two registers to work with.
    """
    for step in range(4):
        decode_word(ptx, constants, words[step], into[step])
        if step % 2 == 0:  # a factor for each of the thread's two rows, the same for 32 k
            scale_pair(ptx, scale, step, step, factors[0])
            scale_pair(ptx, scale, step + 1, step + 1, factors[1])
        for p, register in enumerate(into[step]):
            multiply(ptx, register, factors[p & 1])
