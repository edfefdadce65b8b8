"""FP4Array: bytes in, the same bytes out, exact values, and every way that JAX carries a pytree about."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mla_fp4_jax import FP4Array, quantize_mxfp4, quantize_nvfp4

FORMATS = ["mxfp4", "nvfp4"]
GROUP = {"mxfp4": 32, "nvfp4": 16}


def random_bytes(rng, shape, format="mxfp4") -> tuple[np.ndarray, ...]:
    """Packed bytes, scale bytes and (NVFP4) a global scale for a logical shape; every scale byte but NaN."""
    packed = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    scales = rng.integers(0, 255, (*shape[:-1], shape[-1] // GROUP[format]), np.uint8)
    if format == "mxfp4":
        return packed, scales
    return packed, np.where((scales & 127) == 127, 1, scales).astype(np.uint8), np.float32(0.37)


def make(parts, format="mxfp4") -> FP4Array:
    return FP4Array.from_packed(*parts, format=format)


def same(a: FP4Array, b: FP4Array) -> None:
    """Equal bytes, shapes and static parts."""
    assert jax.tree.structure(a) == jax.tree.structure(b) and a.shape == b.shape
    for x, y in zip(a.to_packed(), b.to_packed(), strict=True):
        np.testing.assert_array_equal(x, y)


SHAPES = [(32,), (3, 64), (2, 3, 96), (5, 1, 2, 32), (0, 64), (3, 0)]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_in_and_out(rng, shape, format):
    parts = random_bytes(rng, shape, format)
    w = make(parts, format)
    assert (w.shape, w.ndim, w.size, w.format) == (shape, len(shape), int(np.prod(shape)), format)
    assert w.codes.shape == shape and w.codes.dtype == jnp.float4_e2m1fn and w.scales.dtype == jnp.uint8
    assert w.group_size == (GROUP[format] if shape[-1] else 0)
    assert w.scale_format == {"mxfp4": "e8m0", "nvfp4": "e4m3"}[format]
    assert w.nbytes_packed == sum(part.nbytes for part in parts)
    for given, back in zip(parts, w.to_packed(), strict=True):
        assert back.dtype == given.dtype
        np.testing.assert_array_equal(back, given)
    np.testing.assert_array_equal(w.packed, parts[0])
    same(FP4Array.from_packed(*w.to_packed(), format=format), w)


def test_the_codes_are_in_the_order_of_the_columns():
    w = FP4Array.from_packed(np.full((1, 16), 0x21, np.uint8), np.full((1, 1), 128, np.uint8))
    np.testing.assert_array_equal(w.dequantize(), [[1.0, 2.0] * 16])  # codes 1, 2 = 0.5, 1.0, times 2
    np.testing.assert_array_equal(np.asarray(w.codes).astype(np.float32), [[0.5, 1.0] * 16])


def test_from_codes_is_from_packed(rng):
    packed, scales = random_bytes(rng, (2, 64))
    same(FP4Array.from_codes(jnp.asarray(oracle.unpack(packed)), jnp.asarray(scales)), make((packed, scales)))


def test_scales_under_their_own_dtype_are_the_same_bytes(rng):
    packed, scales = random_bytes(rng, (2, 64))
    same(FP4Array.from_packed(packed, scales.view(ml_dtypes.float8_e8m0fnu)), make((packed, scales)))
    packed, scales, glob = random_bytes(rng, (2, 64), "nvfp4")
    # Without a format: e4m3 scales mean NVFP4, bytes mean MXFP4.
    same(
        FP4Array.from_packed(packed, scales.view(ml_dtypes.float8_e4m3fn), glob),
        make((packed, scales, glob), "nvfp4"),
    )
    assert FP4Array.from_packed(packed, scales).format == "mxfp4"


def test_127_is_one_and_not_a_hundred_and_twenty_seven():
    w = FP4Array.from_packed(np.full((1, 16), 0x22, np.uint8), np.full((1, 1), 127, np.uint8))
    np.testing.assert_array_equal(w.dequantize(), np.ones((1, 32)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_all_16_codes_under_all_256_scales(dtype, compiled):
    packed = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, np.uint8), (256, 1))
    scales = np.arange(256, dtype=np.uint8)[:, None]
    dequantize = jax.jit(lambda w: w.dequantize(dtype)) if compiled else lambda w: w.dequantize(dtype)
    got = np.asarray(dequantize(make((packed, scales))))
    expected = oracle.dequantize(oracle.unpack(packed), oracle.e8m0(scales))
    with np.errstate(over="ignore"):
        expected = expected.astype(jnp.dtype(dtype))
    assert got.dtype == expected.dtype and np.isnan(got[255].astype(np.float32)).all()
    bits = f"u{got.dtype.itemsize}"
    np.testing.assert_array_equal(got[:255].view(bits), expected[:255].view(bits))
    # Byte 0 is 2^-127, a subnormal, and not 0; 254 is 2^127, whose codes 4 and up (2^129) leave both dtypes.
    assert got[0, 1] == 2.0**-128 and got[254, 1] == 2.0**126 and np.isinf(np.float32(got[254, 6]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_nvfp4_values(rng, dtype):
    parts = random_bytes(rng, (16, 256), "nvfp4")
    parts[1][:] = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every scale byte, NaN twice
    w = make(parts, "nvfp4")
    plain = oracle.dequantize(oracle.unpack(parts[0]), oracle.e4m3(parts[1]))
    np.testing.assert_array_equal(np.asarray(w.without_global_scale(dtype), np.float64), plain)  # exact
    # In the producers' order, e2m1 * (scale * global), each product rounded to float32; then once to dtype.
    scales = oracle.e4m3(parts[1]).astype(np.float32) * np.float32(parts[2])
    values = oracle.E2M1[oracle.unpack(parts[0])].astype(np.float32) * np.repeat(scales, 16, axis=-1)
    expected = values.astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(w.dequantize(dtype), np.float32), expected)
    assert np.isnan(plain).sum() == 32
    without = FP4Array.from_packed(*parts[:2], format="nvfp4")
    np.testing.assert_array_equal(np.asarray(without.dequantize(), np.float64), plain)


def test_each_scale_owns_its_own_columns(rng):
    """One hot scale per group changes exactly that group's columns of that row."""
    packed = np.full((3, 4, 48), 0x22, np.uint8)  # ones everywhere
    scales = np.full((3, 4, 3), 127, np.uint8)
    for index in np.ndindex(scales.shape):
        hot = scales.copy()
        hot[index] = 129
        changed = np.asarray(make((packed, hot)).dequantize()) != 1
        expected = np.zeros((3, 4, 96), bool)
        expected[index[0], index[1], 32 * index[2] : 32 * index[2] + 32] = True
        np.testing.assert_array_equal(changed, expected)


def test_leading_axes_index_and_reshape_as_arrays_do(rng):
    parts = random_bytes(rng, (2, 3, 4, 64))
    w, dense = make(parts), np.asarray(make(parts).dequantize())
    for index in (0, -1, slice(1, 2), (1, 2), (slice(None), slice(0, 2), 3), np.array([1, 0, 1])):
        np.testing.assert_array_equal(w[index].dequantize(), dense[index])
    np.testing.assert_array_equal(w.reshape(6, 4, 64).dequantize(), dense.reshape(6, 4, 64))
    np.testing.assert_array_equal(w.reshape(24, 64).reshape(2, 3, 4, 64).packed, parts[0])
    assert w[...] is w
    traced = jax.jit(lambda w, i: w[i].dequantize())(w, 1)
    np.testing.assert_array_equal(traced, dense[1])


# Pytree life.


@pytest.fixture(params=FORMATS)
def array(request, rng) -> FP4Array:
    return make(random_bytes(rng, (4, 6, 64), request.param), request.param)


def test_jit_in_and_out(array):
    same(jax.jit(lambda w: w)(array), array)
    np.testing.assert_array_equal(jax.jit(FP4Array.dequantize)(array), array.dequantize())
    rebuilt = jax.jit(lambda *parts: FP4Array.from_packed(*parts, format=array.format))(*array.to_packed())
    same(rebuilt, array)


def test_the_format_is_static(array):
    traces = []

    @jax.jit
    def f(w):
        traces.append(w.format)
        return w.dequantize()

    f(array), f(array)
    assert traces == [array.format]
    assert hash(jax.tree.structure(array)) == hash(jax.tree.structure(copy.copy(array)))


def test_vmap_and_scan_go_along_the_leading_axis(array):
    if array.global_scale is not None:  # one for the whole array: not mapped
        axes = dataclasses.replace(array, codes=0, scales=0, global_scale=None)
        mapped = jax.vmap(lambda w: w.dequantize(), in_axes=(axes,))(array)
        np.testing.assert_array_equal(mapped, array.dequantize())
        array = dataclasses.replace(array, global_scale=None)
    np.testing.assert_array_equal(jax.vmap(FP4Array.dequantize)(array), array.dequantize())
    same(jax.vmap(lambda p, s: FP4Array.from_packed(p, s, format=array.format))(*array.to_packed()), array)
    _, rows = jax.lax.scan(lambda carry, w: (carry, w.dequantize()), 0, array)
    np.testing.assert_array_equal(rows, array.dequantize())
    carried, _ = jax.lax.scan(lambda w, _: (w, None), array, length=3)
    same(carried, array)


def test_vmapped_quantisers(rng):
    x = jnp.asarray(rng.standard_normal((64, 2, 32)), jnp.float32)
    same(jax.jit(jax.vmap(quantize_mxfp4))(x), jax.jit(quantize_mxfp4)(x))
    each, one = jax.jit(jax.vmap(quantize_nvfp4))(x), jax.jit(quantize_nvfp4)
    for i in range(64):
        same(jax.tree.map(lambda leaf, i=i: leaf[i], each), one(x[i]))


def test_donation(array):
    parts = [np.asarray(part) for part in array.to_packed()]
    passed = jax.jit(lambda w: w, donate_argnums=0)(array)
    assert array.codes.is_deleted()
    for given, back in zip(parts, passed.to_packed(), strict=True):
        np.testing.assert_array_equal(back, given)


@pytest.mark.parametrize("spec", [P("x"), P(None, "y"), P("x", "y"), P()])
def test_sharded_over_four_devices(array, spec):
    assert len(jax.devices()) >= 4, "conftest asks for 4 CPU devices"
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    sharding = NamedSharding(mesh, spec)
    replicated = NamedSharding(mesh, P())
    shardings = dataclasses.replace(
        array, codes=sharding, scales=sharding, global_scale=None if array.global_scale is None else replicated
    )
    placed = jax.device_put(array, shardings)
    assert placed.codes.sharding.is_equivalent_to(sharding, 3)
    shards = placed.codes.addressable_shards
    assert {shard.data.shape for shard in shards} == {sharding.shard_shape(array.shape)}
    same(placed, array)
    dense = jax.jit(FP4Array.dequantize)(placed)
    assert dense.sharding.is_equivalent_to(sharding, 3)
    np.testing.assert_array_equal(dense, array.dequantize())


def test_pickle_and_copies(array):
    for clone in (pickle.loads(pickle.dumps(array)), copy.deepcopy(array), copy.copy(array)):
        same(clone, array)
        np.testing.assert_array_equal(clone.dequantize(), array.dequantize())


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_orbax(array, tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "w", {"w": array})
        checkpointer.wait_until_finished()
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), {"w": array})
        same(checkpointer.restore(tmp_path / "w", target)["w"], array)


def test_abstract_values(array):
    shape = jax.eval_shape(lambda w: w, array)
    assert (shape.shape, shape.format, shape.group_size) == (array.shape, array.format, array.group_size)
    assert shape.nbytes_packed == array.nbytes_packed
    dense = jax.eval_shape(lambda w: w.dequantize(jnp.bfloat16), shape)
    assert (dense.shape, dense.dtype) == (array.shape, jnp.bfloat16)
    quantised = jax.eval_shape(quantize_nvfp4, jax.ShapeDtypeStruct((3, 64), jnp.float32))
    assert quantised.shape == (3, 64) and quantised.scales.shape == (3, 4)


def test_constants_of_a_compiled_function(array, rng):
    """jax 0.10's XLA folds the bitcast of a constant wrongly; nothing here may show it."""
    parts = [np.asarray(part) for part in array.to_packed()]
    dense = np.asarray(array.dequantize())
    np.testing.assert_array_equal(jax.jit(lambda: array.dequantize())(), dense)
    np.testing.assert_array_equal(jax.jit(lambda: array.packed)(), parts[0])
    np.testing.assert_array_equal(jax.jit(lambda: array[1:3].packed)(), parts[0][1:3])
    codes = np.asarray(array.codes).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(lambda: array.codes.astype(jnp.float32))(), codes)

    def build():
        return FP4Array.from_packed(*(jnp.asarray(part) for part in parts), format=array.format)

    same(jax.jit(build)(), array)
    same(jax.jit(lambda: jax.tree.map(lambda leaf: leaf[...], build()))(), array)
    np.testing.assert_array_equal(jax.jit(lambda: build().codes.astype(jnp.float32))(), codes)
    np.testing.assert_array_equal(jax.jit(lambda: build().dequantize())(), dense)


@pytest.mark.parametrize("quantize", [quantize_mxfp4, quantize_nvfp4])
def test_quantising_a_constant_inside_jit(rng, quantize):
    x = jnp.asarray(rng.standard_normal((4, 64)), jnp.float32)
    same(jax.jit(lambda: quantize(x))(), quantize(x))


@pytest.mark.bad_input
@pytest.mark.parametrize("quantize", [quantize_mxfp4, quantize_nvfp4])
def test_a_constant_that_is_not_finite_is_refused_inside_jit_too(quantize):
    x = jnp.full((4, 64), jnp.nan)
    with pytest.raises(ValueError, match="w must be finite; got 256"):
        jax.jit(lambda: quantize(x))()


def test_frozen(array):
    with pytest.raises(dataclasses.FrozenInstanceError):
        array.codes = None


# Errors.

U8 = np.uint8


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("packed", "scales", "kwargs", "error", "text"),
    [
        (np.zeros((2, 16), np.int8), np.zeros((2, 1), U8), {}, TypeError, "packed must be uint8.*got int8"),
        (np.zeros((2, 16), np.float32), np.zeros((2, 1), U8), {}, TypeError, "packed must be uint8.*got float32"),
        (np.zeros((2, 16), U8), np.ones((2, 1), np.float32), {}, TypeError, "scales must be uint8 or float8_e8m0fnu"),
        (np.zeros((2, 16), U8), np.ones((2, 1), np.int32), {}, TypeError, "got int32. Pass the bytes as stored"),
        (
            np.zeros((2, 16), U8),
            np.ones((2, 1), ml_dtypes.float8_e4m3fn),
            {"format": "mxfp4"},
            TypeError,
            "uint8 or float8_e8m0fnu for mxfp4; got float8_e4m3fn",
        ),
        (
            np.zeros((2, 16), U8),
            np.ones((2, 1), ml_dtypes.float8_e8m0fnu),
            {"format": "nvfp4"},
            TypeError,
            "uint8 or float8_e4m3fn for nvfp4; got float8_e8m0fnu",
        ),
        (np.zeros((2, 16), U8), np.zeros((3, 1), U8), {}, ValueError, r"leading axes; got packed \(2, 16\), scales"),
        (np.zeros((2, 16), U8), np.zeros((2,), U8), {}, ValueError, "leading axes"),
        (np.zeros((), U8), np.zeros((), U8), {}, ValueError, "leading axes"),
        (np.zeros((2, 16), U8), np.zeros((2, 3), U8), {}, ValueError, "equal groups; got 32 columns, 3 groups"),
        (np.zeros((2, 16), U8), np.zeros((2, 0), U8), {}, ValueError, "equal groups; got 32 columns, 0 groups"),
        (np.zeros((2, 0), U8), np.zeros((2, 1), U8), {}, ValueError, "equal groups; got 0 columns, 1 groups"),
        (np.zeros((2, 16), U8), np.zeros((2, 1), U8), {"format": "int4"}, ValueError, "format must be one of"),
        (np.zeros((2, 16), U8), np.zeros((2, 1), U8), {"global_scale": 1.0}, ValueError, "None for mxfp4"),
        (
            np.zeros((2, 16), U8),
            np.zeros((2, 2), U8),
            {"global_scale": np.ones(2, np.float32), "format": "nvfp4"},
            ValueError,
            r"global_scale must be one float; got float32\(2,\)",
        ),
        (
            np.zeros((2, 16), U8),
            np.zeros((2, 2), U8),
            {"global_scale": 1, "format": "nvfp4"},
            ValueError,
            "global_scale must be one float; got int32",
        ),
    ],
)
def test_what_from_packed_refuses(packed, scales, kwargs, error, text):
    with pytest.raises(error, match=f"FP4Array.from_packed: .*{text}"):
        FP4Array.from_packed(packed, scales, **kwargs)


@pytest.mark.bad_input
def test_an_odd_number_of_codes():
    with pytest.raises(ValueError, match=r"from_codes: codes must have an even last axis; got \(2, 33\)"):
        FP4Array.from_codes(jnp.zeros((2, 33), jnp.uint8), jnp.zeros((2, 1), jnp.uint8))


@pytest.mark.bad_input
def test_the_last_axis_cannot_be_cut(rng):
    w = make(random_bytes(rng, (2, 3, 64)))
    for index in ((0, 0, 0), (..., 0), (slice(None), slice(None), slice(0, 32))):
        with pytest.raises(IndexError, match="leave the last axis alone"):
            w[index]
    with pytest.raises(IndexError, match="leave the last axis alone"):
        make(random_bytes(rng, (64,)))[0]
    with pytest.raises(TypeError, match="not iterable"):
        list(w)
    for shape in ((2, 96, 2), (384,), ()):
        with pytest.raises(ValueError, match="the last axis must stay 64"):
            w.reshape(*shape)
