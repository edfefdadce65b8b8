"""Fragment order: a bijection of the checkpoint's bytes that decodes into what the tensor cores want."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mla_fp4_jax import FP4Array
from pallas_kernels.fragments import FragmentOrder, unsupported

SHAPES = [(2, 256, 512, 128), (3, 128, 128, 64), (1, 448, 512, 192), (2, 128, 256, 0), (1, 64, 64, 64)]


def random_array(rng, heads, rows, columns, format="mxfp4") -> tuple[FP4Array, np.ndarray, np.ndarray]:
    group, end = {"mxfp4": (32, 129), "nvfp4": (16, 0x7F)}[format]
    packed = rng.integers(0, 256, (heads, rows, columns // 2), np.uint8)
    scales = rng.integers(0, end, (heads, rows, columns // group), np.uint8)
    global_scale = None if format == "mxfp4" else np.float32(0.3)
    return FP4Array.from_packed(packed, scales, global_scale, format=format), packed, scales


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(("heads", "rows", "columns", "key_rows"), SHAPES)
def test_there_and_back_is_byte_exact(rng, heads, rows, columns, key_rows, format):
    w, packed, scales = random_array(rng, heads, rows, columns, format)
    ordered = w.in_fragment_order(key_rows)
    assert ordered.shape == w.shape and ordered.nbytes_packed == w.nbytes_packed
    assert (np.asarray(ordered.packed) != packed).any()
    back = ordered.to_packed()
    np.testing.assert_array_equal(back[0], packed)
    np.testing.assert_array_equal(back[1], scales)
    np.testing.assert_array_equal(ordered.dequantize(), w.dequantize())
    # A head's bytes stay within the head, and key rows' bytes among theirs: a shard over heads is still a shard.
    cut = key_rows * columns // 2
    for h in range(heads):
        flat = np.asarray(ordered.packed)[h].reshape(-1)
        for part in (slice(0, cut), slice(cut, None)):
            bits = [np.bincount(np.unpackbits(a.reshape(-1)[part]), minlength=2) for a in (flat, packed[h])]
            np.testing.assert_array_equal(*bits)


def decode_registers(word: np.ndarray) -> np.ndarray:
    """The nine instructions, on NumPy integers: [..., 4 registers]."""
    word = word.astype(np.uint64)

    def rotr(n):
        return ((word >> np.uint64(n)) | (word << np.uint64(32 - n))) & np.uint64(0xFFFFFFFF)

    fields = np.uint64(0x81C081C0)
    third = (rotr(6) & np.uint64(0x81808180)) | ((word << np.uint64(2)) & np.uint64(0x00400040))
    return np.stack([word & fields, rotr(4) & fields, (word << np.uint64(6)) & fields, third], -1).astype(np.uint32)


@pytest.mark.parametrize("part", ["key rows", "other rows"])
def test_a_thread_decodes_its_fragment(rng, part):
    key_rows, columns, rows = 128, 192, 64
    codes = rng.integers(0, 16, (1, key_rows + rows, columns), np.uint8)
    w = FP4Array.from_codes(jnp.asarray(codes), jnp.full((1, key_rows + rows, columns // 32), 127, jnp.uint8))
    ordered = np.asarray(w.in_fragment_order(key_rows).packed).reshape(-1)
    values = oracle.E2M1[codes[0]]
    matrix = values[:key_rows].T if part == "key rows" else values[key_rows:]
    cut = key_rows * columns // 2
    words = (ordered[:cut] if part == "key rows" else ordered[cut:]).view(np.uint32)
    m, k = matrix.shape
    blocks = words.reshape(m // 64, k // 64, 4, 8, 4, 4)  # tile, block, w, g, t, q
    registers = decode_registers(blocks)
    for tile, block, warp, g, t, q in np.ndindex(*blocks.shape):
        for p in range(4):
            for f in range(2):
                half = np.uint32(registers[tile, block, warp, g, t, q, p] >> np.uint32(16 * f)) & np.uint32(0xFFFF)
                value = float((half << np.uint32(16)).view(np.float32)) * 2.0**126
                row = 64 * tile + 16 * warp + g + 8 * (p & 1)
                column = 64 * block + 16 * q + 2 * t + 8 * (p >> 1) + f
                assert value == matrix[row, column]


@pytest.mark.parametrize(("format", "size"), [("mxfp4", 32), ("nvfp4", 16)])
def test_scales_lie_where_a_thread_looks(rng, format, size):
    key_rows, rows, columns = 128, 64, 128
    w, _, scales = random_array(rng, 1, key_rows + rows, columns, format)
    flat = np.asarray(w.in_fragment_order(key_rows).scales).reshape(-1)
    keys = flat[: key_rows * columns // size].reshape(columns // size, 4, key_rows // 16, 4)
    for group, t, step, i in np.ndindex(*keys.shape):
        assert keys[group, t, step, i] == scales[0, 16 * step + 2 * t + 8 * (i >> 1) + (i & 1), group]
    others = flat[key_rows * columns // size :].reshape(rows // 16, 8, columns // size, 2)
    for block, g, group, row8 in np.ndindex(*others.shape):
        assert others[block, g, group, row8] == scales[0, key_rows + 16 * block + g + 8 * row8, group]


def test_it_survives_jit_and_head_slices(rng):
    w, packed, _ = random_array(rng, 4, 128, 64)
    ordered = w.in_fragment_order(64)
    np.testing.assert_array_equal(jax.jit(lambda w: w.to_packed()[0])(ordered), packed)
    np.testing.assert_array_equal(ordered[1:3].to_packed()[0], packed[1:3])
    np.testing.assert_array_equal(ordered.reshape(512, 64).to_packed()[0], packed.reshape(512, 32))
    assert ordered.in_fragment_order(64) is ordered and ordered.in_fragment_order(0).order == FragmentOrder(0)
    linear = FP4Array.from_packed(packed[0], np.full((128, 2), 120, np.uint8)).in_fragment_order()
    np.testing.assert_array_equal(linear.to_packed()[0], packed[0])


@pytest.mark.parametrize(
    ("format", "byte"),
    [("mxfp4", 129), ("mxfp4", 200), ("mxfp4", 254), ("mxfp4", 255)] + [("nvfp4", 127), ("nvfp4", 128)],
)
def test_scales_beyond_the_kernels_are_refused(format, byte):
    scales = np.full((1, 64, {"mxfp4": 2, "nvfp4": 4}[format]), 120, np.uint8)
    scales[0, 5, 1] = byte
    w = FP4Array.from_packed(np.zeros((1, 64, 32), np.uint8), scales, format=format)
    with pytest.raises(ValueError, match=f"largest is {byte}"):
        w.in_fragment_order()


@pytest.mark.parametrize(
    ("shape", "group", "key_rows", "names"),
    [((1, 96, 64), 32, 0, "other rows"), ((1, 128, 64), 32, 32, "key rows"), ((1, 64, 96), 32, 0, "columns")]
    + [((1, 64, 64), 64, 0, "groups"), ((2, 1, 64, 64), 32, 0, "axes"), ((1, 64, 64), 32, 128, "other rows")],
)
def test_what_it_cannot_hold_is_named(shape, group, key_rows, names):
    assert names in unsupported(shape, group, FragmentOrder(key_rows))
