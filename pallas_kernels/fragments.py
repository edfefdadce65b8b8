"""The order in which the Hopper kernels hold FP4 weights: tensor core fragments, the same bytes elsewhere.

A head's weights [N, C] are one or two matrices A [M, K], M outputs by K summed elements: the first `key_rows` rows
are used transposed (k_up: M = C, K = key_rows), the rest as they are (v_up, plain linears: M = N - key_rows, K = C).
Each lies where it lay in the row-major bytes, key rows first, and is cut into blocks of 64 x 64, row of blocks by row
of blocks. A block is 2048 bytes: 128 threads (a warpgroup) x 16 bytes, so that a thread loads its share of a block at
once and every 512 bytes are one warp's. Thread 32w + 4g + t holds words q = 0 .. 3, one for each 16 of the block's K;
word q's eight codes are what wgmma m64k16 (and mma.sync m16n8k16) want of that thread as operand A in four registers
p = 0 .. 3 of two halves f = 0, 1 (PTX ISA, "Matrix fragments for wgmma.mma_async.m64nNk16"):

    row of the block  16w + g + 8 (p & 1)        column of the block  16q + 2t + 8 (p >> 1) + f

Inside a word the 32 bits are permuted so that nine instructions turn it into those registers, each half a bfloat16
whose bits are code's sign, 00000, its two exponent bits (at 8 and 7), its mantissa bit (at 6), 000000: the value
e2m1 * 2^-126, subnormal but exact, which the tensor cores take as it is. The instructions (fp4_fragment_ptx.py) are

    p = 0  w & 0x81C081C0                  p = 1  rotr(w, 4) & 0x81C081C0        p = 2  (w << 6) & 0x81C081C0
    p = 3  (rotr(w, 6) & 0x81808180) | ((w << 2) & 0x00400040)

Scale bytes keep their place before or after the others likewise, one to G = 32 elements in MXFP4, to 16 in NVFP4. Of
a transposed matrix there is one for G outputs m and one k: [M/G][t = 0 .. 3][K/16][4], the last axis being k = 2t,
2t + 1, 2t + 8, 2t + 9 of 16. Of the other there is one for an output and G k: [M/16][g = 0 .. 7][K/G][2], the last
axis being row g or g + 8 of 16. A thread's scales are contiguous in both.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

BLOCK = 64
GROUP = 32  # of MXFP4
GROUPS = {"mxfp4": GROUP, "nvfp4": 16}
# MXFP4: the kernels fold a scale into a bfloat16 factor 2^(byte - 1), whose exponent field, byte + 126, ends at 254.
# NVFP4: 448; NaN and the negative scales, which nobody writes, are above.
MAX_SCALE_BYTES = {"mxfp4": 128, "nvfp4": 0x7E}


@dataclasses.dataclass(frozen=True)
class FragmentOrder:
    """Which rows of each head are held transposed.

    Attributes:
        key_rows: the first so many rows are contracted over rows (k_up_proj), the rest over columns.
        column_parts: the columns are in so many equal parts, each in this order by itself, so that as many devices
            can have one each. Kernels take one part.
    """

    key_rows: int
    column_parts: int = 1


def unsupported(shape: tuple[int, ...], group: int, order: FragmentOrder) -> str | None:
    """Why weights [H, N, C] in groups of `group` cannot be held in this order, or None."""
    if len(shape) != 3:
        return f"weights must be [H, N, C]; got {len(shape)} axes."
    if group not in GROUPS.values():
        return f"groups must be of {GROUP} columns, of 16 in NVFP4; got {group}."
    if shape[2] % order.column_parts:
        return f"{order.column_parts} parts must divide the {shape[2]} columns."
    columns = shape[2] // order.column_parts
    sizes = {"key rows": order.key_rows, "other rows": shape[1] - order.key_rows, "columns": columns}
    for name, size in sizes.items():
        if size < 0 or size % BLOCK:
            return f"the number of {name} must be a multiple of {BLOCK}; got {size}."
    return None


def to_fragments(
    codes: UInt8[Array, "H N C"], scales: UInt8[Array, "H N groups"], order: FragmentOrder
) -> tuple[UInt8[Array, "H N half"], UInt8[Array, "H N groups"]]:
    """Codes (a byte each) and scale bytes from row-major order; packed bytes and scale bytes in fragment order."""
    if order.column_parts > 1:
        parts, whole = order.column_parts, dataclasses.replace(order, column_parts=1)
        packed, ordered = to_fragments(_parts_to_heads(codes, parts), _parts_to_heads(scales, parts), whole)
        return _heads_to_parts(packed, parts), _heads_to_parts(ordered, parts)
    heads, rows, columns = codes.shape
    split, groups = order.key_rows, scales.shape[2]
    keys, values = codes[:, :split].swapaxes(1, 2), codes[:, split:]
    packed = jnp.concatenate([_to_words(keys), _to_words(values)], axis=1)
    packed = jax.lax.bitcast_convert_type(packed, jnp.uint8).reshape(heads, rows, columns // 2)
    key_scales = scales[:, :split].swapaxes(1, 2).reshape(heads, groups, split // 16, 2, 4, 2)
    key_scales = key_scales.transpose(0, 1, 4, 2, 3, 5)  # h, group, k16, k8, t, f -> h, group, t, k16, k8, f
    value_scales = scales[:, split:].reshape(heads, (rows - split) // 16, 2, 8, groups)
    value_scales = value_scales.transpose(0, 1, 3, 4, 2)  # h, m16, m8, g, group -> h, m16, g, group, m8
    ordered = jnp.concatenate([key_scales.reshape(heads, -1), value_scales.reshape(heads, -1)], axis=1)
    return packed, ordered.reshape(scales.shape)


def from_fragments(
    packed: UInt8[Array, "H N half"], scales: UInt8[Array, "H N groups"], order: FragmentOrder
) -> tuple[UInt8[Array, "H N C"], UInt8[Array, "H N groups"]]:
    """The inverse of to_fragments."""
    if order.column_parts > 1:
        parts, whole = order.column_parts, dataclasses.replace(order, column_parts=1)
        codes, scales = from_fragments(_parts_to_heads(packed, parts), _parts_to_heads(scales, parts), whole)
        return _heads_to_parts(codes, parts), _heads_to_parts(scales, parts)
    heads, rows, half = packed.shape
    columns, split, groups = 2 * half, order.key_rows, scales.shape[2]
    words = jax.lax.bitcast_convert_type(packed.reshape(heads, -1, 4), jnp.uint32)
    cut = split * columns // 8
    keys = _from_words(words[:, :cut], columns, split).swapaxes(1, 2)
    values = _from_words(words[:, cut:], rows - split, columns)
    flat, cut = scales.reshape(heads, -1), split * groups
    key_scales = flat[:, :cut].reshape(heads, groups, 4, split // 16, 2, 2).transpose(0, 1, 3, 4, 2, 5)
    value_scales = flat[:, cut:].reshape(heads, (rows - split) // 16, 8, groups, 2)
    value_scales = value_scales.transpose(0, 1, 4, 2, 3).reshape(heads, rows - split, groups)
    key_scales = key_scales.reshape(heads, groups, split).swapaxes(1, 2)
    return jnp.concatenate([keys, values], axis=1), jnp.concatenate([key_scales, value_scales], axis=1)


def _parts_to_heads(array: Array, parts: int) -> Array:
    heads, rows, columns = array.shape
    cut = array.reshape(heads, rows, parts, columns // parts).swapaxes(1, 2)
    return cut.reshape(heads * parts, rows, columns // parts)


def _heads_to_parts(array: Array, parts: int) -> Array:
    heads, rows, columns = array.shape
    cut = array.reshape(heads // parts, parts, rows, columns).swapaxes(1, 2)
    return cut.reshape(heads // parts, rows, parts * columns)


def _to_words(codes: UInt8[Array, "H M K"]) -> UInt32[Array, "H words"]:
    heads, m, k = codes.shape
    # m = 64 tile + 16 w + 8 (p & 1) + g;  k = 64 block + 16 q + 8 (p >> 1) + 2 t + f
    cut = codes.reshape(heads, m // BLOCK, 4, 2, 8, k // BLOCK, 4, 2, 4, 2)
    cut = cut.transpose(0, 1, 5, 2, 4, 8, 6, 7, 3, 9)  # h, tile, block, w, g, t, q, p >> 1, p & 1, f
    return _permute_bits(cut.reshape(heads, m * k // 8, 4, 2))


def _from_words(words: UInt32[Array, "H words"], m: int, k: int) -> UInt8[Array, "H M K"]:
    heads = words.shape[0]
    cut = _restore_bits(words).reshape(heads, m // BLOCK, k // BLOCK, 4, 8, 4, 4, 2, 2, 2)
    cut = cut.transpose(0, 1, 3, 8, 4, 2, 6, 7, 5, 9)
    return cut.reshape(heads, m, k)


def source_bit(p: int, f: int, field: int) -> int:
    """Which bit of a word holds a field (0 sign, 1 and 2 exponent, 3 mantissa) of register p, half f."""
    bit = (15, 8, 7, 6)[field] + 16 * f  # where the register wants it
    if p == 3:
        return bit - 2 if field == 3 else (bit + 6) % 32
    return (bit, (bit + 4) % 32, bit - 6)[p]


def _permute_bits(codes: UInt8[Array, "H words 4 2"]) -> UInt32[Array, "H words"]:
    word = jnp.zeros(codes.shape[:-2], jnp.uint32)
    for p in range(4):
        for f in range(2):
            code = codes[..., p, f].astype(jnp.uint32)
            for field in range(4):
                word |= ((code >> (3 - field)) & 1) << source_bit(p, f, field)
    return word


def _restore_bits(words: UInt32[Array, "H words"]) -> UInt8[Array, "H words 4 2"]:
    def code(p: int, f: int) -> Array:
        bits = [((words >> source_bit(p, f, field)) & 1) << (3 - field) for field in range(4)]
        return (bits[0] | bits[1] | bits[2] | bits[3]).astype(jnp.uint8)

    return jnp.stack([jnp.stack([code(p, f) for f in range(2)], -1) for p in range(4)], -2)
