"""A query's rotated part beside its latent one: what the FP4 matmul writes after its own outputs, if asked to.

    out[b, h, M + j] = a cos - b sin,   out[b, h, M + R/2 + j] = b cos + a sin,    (a, b) the j-th pair of x's last R

The warpgroups that own a head's first outputs do it while their weights are on their way. Four pairs a thread.
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.fp4_bmm_tiles import Config, Problem
from pallas_kernels.ptx import Ptx, vector

PAIRS = 4  # of a thread's step: 16 bytes of x


@dataclasses.dataclass(frozen=True)
class Rope:
    """The static side.

    Attributes:
        columns: R, those of x after the ones multiplied; R / 8 is a power of two.
        interleaved: pairs are (x0, x1), (x2, x3), ...; else (x0, x_{R/2}), (x1, x_{R/2+1}), ...
    """

    columns: int
    interleaved: bool


def unsupported(rope: Rope) -> str | None:
    """Why these columns cannot be rotated by the kernel, or None."""
    chunks, rest = divmod(rope.columns, 2 * PAIRS)
    if rest or chunks < 1 or chunks & (chunks - 1):
        return f"the columns to rotate must be 8 times a power of two; got {rope.columns}."
    return None


def rotate(
    ptx: Ptx, rope: Rope, problem: Problem, config: Config, place: dict[str, str], tables: tuple[str, str]
) -> None:
    """Emit it: $0 x, $3 out.

    Args:
        ptx: the program.
        rope, problem, config: the static side.
        place: registers of this thread: "thread" of its warpgroup, the warpgroup's first "tile", "token", "head".
        tables: operands with the addresses of cos and sin, float32 [B, R/2].
    """
    p, half, chunks = problem, rope.columns // 2, rope.columns // (2 * PAIRS)
    width = p.outputs + rope.columns  # of out
    item, row, chunk, at = ptx.regs("rope", 4)
    x, out, table, wide = ptx.regs("rope_at", 4, "b64")
    stop = ptx.reg("rope_stop", "pred")
    words, results = ptx.regs("rope_word", 4), ptx.regs("rope_result", 4)
    cos, sin, a, b = (ptx.regs(f"rope_{name}", PAIRS, "f32") for name in ("cos", "sin", "a", "b"))
    again, done = ptx.label("rope"), ptx.label("rope_done")
    ptx(
        f"setp.ne.u32 {stop}, {place['tile']}, 0;",
        f"@{stop} bra {done};",
        f"mov.u32 {item}, {place['thread']};",
        f"{again}:",
        f"shr.u32 {row}, {item}, {chunks.bit_length() - 1};",
        f"and.b32 {chunk}, {item}, {chunks - 1};",
        f"setp.ge.u32 {stop}, {row}, {config.tokens * config.token_tiles};",
        f"@{stop} bra {done};",
        f"add.u32 {row}, {row}, {place['token']};",
        f"setp.ge.u32 {stop}, {row}, {p.batch};",
        f"@{stop} bra {done};",
        f"mad.lo.u32 {at}, {row}, {p.heads}, {place['head']};",
        f"mul.wide.u32 {x}, {at}, {p.x_width * 2};",
        f"add.u64 {x}, $0, {x};",
        f"mul.wide.u32 {out}, {at}, {width * 2};",
        f"add.u64 {out}, $3, {out};",
        f"mul.wide.u32 {wide}, {chunk}, {PAIRS * 2};",
        f"add.u64 {out}, {out}, {wide};",
    )
    first = (p.first_x + p.contraction) * 2
    if rope.interleaved:
        ptx(f"add.u64 {x}, {x}, {wide};", f"add.u64 {x}, {x}, {wide};")
        ptx(f"ld.global.v4.b32 {vector(words)}, [{x}+{first}];")
        low, high = list(zip(words, a, strict=True)), list(zip(words, b, strict=True))
    else:
        ptx(f"add.u64 {x}, {x}, {wide};")
        ptx(f"ld.global.v2.b32 {vector(words[:2])}, [{x}+{first}];")
        ptx(f"ld.global.v2.b32 {vector(words[2:])}, [{x}+{first + half * 2}];")
        low = [(words[0], a[0]), (words[1], a[2]), (words[2], b[0]), (words[3], b[2])]
        high = [(words[0], a[1]), (words[1], a[3]), (words[2], b[1]), (words[3], b[3])]
    for number, values in zip(tables, (cos, sin), strict=True):
        ptx(
            f"mad.lo.u32 {at}, {row}, {half}, 0;",
            f"mad.lo.u32 {at}, {chunk}, {PAIRS}, {at};",
            f"mul.wide.u32 {table}, {at}, 4;",
            f"add.u64 {table}, {number}, {table};",
            f"ld.global.v4.f32 {vector(values)}, [{table}];",
        )
    temporary = ptx.reg("rope_bits")
    for word, value in low:  # bfloat16 is float32's upper half
        ptx(f"shl.b32 {temporary}, {word}, 16;", f"mov.b32 {value}, {temporary};")
    for word, value in high:
        ptx(f"and.b32 {temporary}, {word}, 0xFFFF0000;", f"mov.b32 {value}, {temporary};")
    product = ptx.reg("rope_product", "f32")
    rotated = [ptx.regs("rope_out", PAIRS, "f32") for _ in range(2)]
    for i in range(PAIRS):
        ptx(
            f"mul.f32 {product}, {b[i]}, {sin[i]};",
            f"neg.f32 {product}, {product};",
            f"fma.rn.f32 {rotated[0][i]}, {a[i]}, {cos[i]}, {product};",
            f"mul.f32 {product}, {a[i]}, {sin[i]};",
            f"fma.rn.f32 {rotated[1][i]}, {b[i]}, {cos[i]}, {product};",
        )
    for side, values in enumerate(rotated):
        pair = results[2 * side : 2 * side + 2]
        for i, word in enumerate(pair):
            ptx(f"cvt.rn.bf16x2.f32 {word}, {values[2 * i + 1]}, {values[2 * i]};")
        ptx(f"st.global.v2.b32 [{out}+{(p.outputs + side * half) * 2}], {vector(pair)};")
    ptx(f"add.u32 {item}, {item}, 128;", f"bra {again};", f"{done}:")
