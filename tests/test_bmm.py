"""fp4_bmm and fp4_linear, every implementation that runs on a CPU, against the float64 oracle."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from bmm_cases import GROUP, NAN_BYTE, Case, decode, operands, rounded, ulp

from mla_fp4_jax import FP4Array, fp4_bmm, fp4_linear, quantize_mxfp4
from mla_fp4_jax.ops import implementations
from pallas_kernels.fp4_bmm_triton import Config

IMPLEMENTATIONS = ["xla", "triton_interpret"]
each = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

# k_up ("rows": P rows before V more, the query's rope columns after x) and v_up ("columns": V rows after P) over
# design.md's ranges of P, V, L, H, small B; then plain linears with contractions and outputs that fit no tile.
MODEL_CASES = [
    Case("rows", 1, 3, 64 + 128, 128, rows=(0, 64), rest_x=32),
    Case("rows", 2, 2, 128 + 128, 512, rows=(0, 128), rest_x=64),
    Case("rows", 17, 1, 192 + 256, 256, rows=(0, 192), rest_x=64),
    Case("rows", 3, 5, 256 + 64, 128, rows=(0, 256)),
    Case("rows", 7, 4, 96 + 32, 160, rows=(0, 96), first_x=8, rest_x=24),
    Case("columns", 1, 3, 64 + 128, 128, rows=(64, 128)),
    Case("columns", 2, 2, 128 + 128, 512, rows=(128, 128)),
    Case("columns", 17, 1, 192 + 256, 256, rows=(192, 256)),
    Case("columns", 3, 5, 256 + 64, 128, rows=(256, 64)),
    Case("columns", 16, 8, 16 + 24, 64, rows=(16, 24), first_x=8, rest_x=4),
]
TAIL_CASES = [
    *(Case("columns", 2, 1, n, 32) for n in (1, 16, 63, 65, 127)),
    *(Case("columns", 3, 2, 40, k) for k in (96, 160, 224, 544)),
    *(Case("rows", 3, 2, k, 96) for k in (1, 31, 33, 65, 160, 320)),
    *(Case("columns", b, 2, 48, 64) for b in (1, 15, 33, 65)),
    *(Case("rows", b, 2, 48, 64) for b in (1, 15, 33, 65)),
]


def compiled(x, w, contract, **kwargs):
    """fp4_bmm under jit: much faster here than operation by operation, which a few tests below keep to."""
    return jax.jit(lambda x, w: fp4_bmm(x, w, contract, **kwargs))(x, w)


@each
@pytest.mark.parametrize("case", MODEL_CASES + TAIL_CASES, ids=str)
def test_exact_regime_is_exact(rng, case, implementation):
    x, w, expected, _ = operands(rng, case)
    out = compiled(x, w, **case.kwargs, preferred_element_type=jnp.float32, implementation=implementation)
    assert out.shape == (case.batch, case.heads, case.out) and out.dtype == jnp.float32
    np.testing.assert_array_equal(out, expected)


NVFP4_CASES = [
    Case("rows", 2, 3, 64 + 32, 80, rows=(0, 64), rest_x=8),
    Case("columns", 3, 2, 48 + 40, 112, rows=(48, 40)),
    Case("columns", 17, 1, 33, 16),
]


@each
@pytest.mark.parametrize("case", NVFP4_CASES, ids=str)
def test_exact_regime_of_nvfp4(rng, case, implementation):
    x, w, expected, _ = operands(rng, case, format="nvfp4")
    out = compiled(x, w, **case.kwargs, preferred_element_type=jnp.float32, implementation=implementation)
    np.testing.assert_array_equal(out, expected)


SMALL = [
    Case("rows", 5, 3, 40 + 24, 96, rows=(0, 40), rest_x=8),
    Case("columns", 5, 3, 40 + 24, 96, rows=(40, 24), first_x=8),
]


@each
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_every_dtype_in_and_out(rng, case, dtype, out_dtype, implementation):
    x, w, expected, _ = operands(rng, case, dtype=dtype)
    out = compiled(x, w, **case.kwargs, preferred_element_type=out_dtype, implementation=implementation)
    assert out.dtype == jnp.dtype(out_dtype or dtype)
    # One rounding of the exact sum, to nearest even, as NumPy's.
    np.testing.assert_array_equal(np.asarray(out, np.float32), rounded(expected, out.dtype).astype(np.float32))


CONFIGS = {
    "rows": [
        Config(16, 32, 16, 1, 1),
        Config(16, 64, 64, 4, 2),
        Config(32, 128, 32, 8, 3),
        Config(64, 32, 128, 2, 4),
    ],
    "columns": [
        Config(16, 16, 32, 1, 1),
        Config(16, 64, 64, 4, 2),
        Config(32, 32, 128, 8, 3),
        Config(64, 128, 32, 2, 4),
    ],
}


@pytest.mark.parametrize(
    ("contract", "config"), [(contract, config) for contract, configs in CONFIGS.items() for config in configs]
)
def test_every_tile_gives_the_same_bits(rng, contract, config):
    case = Case(contract, 33, 2, 80 + 24, 160, rows=(0, 80), rest_x=8)
    x, w, expected, _ = operands(rng, case)
    out = compiled(
        x,
        w,
        **case.kwargs,
        preferred_element_type=jnp.float32,
        implementation="triton_interpret",
        config=config,
    )
    np.testing.assert_array_equal(out, expected)


def readout(w: FP4Array, contract: str, implementation: str, dtype=jnp.float32) -> np.ndarray:
    """w [H, N, C] through the product with an identity: each output is one weight, plus zeros."""
    heads, rows, columns = w.shape
    size = columns if contract == "columns" else rows
    identity = jnp.broadcast_to(jnp.eye(size, dtype=dtype)[:, None], (size, heads, size))
    out = compiled(identity, w, contract, preferred_element_type=jnp.float32, implementation=implementation)
    return np.asarray(out).transpose((1, 2, 0) if contract == "columns" else (1, 0, 2))


@each
@pytest.mark.parametrize("contract", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_all_16_codes_under_every_finite_scale(contract, dtype, implementation):
    # Scale bytes 0 .. 252, whose every product is finite; the others would spread NaN (0 * inf) over the sums.
    scales = np.minimum(np.arange(256), 252).astype(np.uint8).reshape(4, 8, 8)
    packed = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, np.uint8), (4, 8, 8))
    got = readout(FP4Array.from_packed(packed, scales), contract, implementation, dtype)
    expected = decode(packed, scales, "mxfp4")
    normal = (np.abs(expected) >= 2.0**-126) | (expected == 0)
    assert normal.mean() > 0.98
    np.testing.assert_array_equal(got[normal], expected[normal])
    # XLA's CPU back end takes subnormal operands for 0; there is nothing between the two.
    assert ((got[~normal] == 0) | (got[~normal] == expected[~normal])).all()


@each
@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_scales_at_the_end_of_the_range(contract, implementation):
    """253 and 254 overflow to infinity from code 4.0 on, and nowhere else; 255 is NaN, code 0 included."""
    scales = np.array([253, 254, 255], np.uint8)
    if contract == "rows":  # one row, whose every column is an output
        packed = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, np.uint8), (1, 1, 3))
        w = FP4Array.from_packed(packed, scales.reshape(1, 1, 3))
    else:  # a code and 31 zeros in each row, so that no other product of the sum is infinite
        packed = np.zeros((1, 48, 16), np.uint8)
        packed[0, :, 0] = np.tile(np.arange(16), 3)
        w = FP4Array.from_packed(packed, np.repeat(scales, 16).reshape(1, 48, 1))
    x = np.zeros((1, 1, 1 if contract == "rows" else 32), np.float32)
    x[0, 0, 0] = 1.0
    out = compiled(jnp.asarray(x), w, contract, implementation=implementation)
    got = np.asarray(out).reshape(3, -1)[:, :16]
    with np.errstate(over="ignore"):
        expected = (oracle.E2M1 * oracle.e8m0(scales)[:, None]).astype(np.float32)
    np.testing.assert_array_equal(got, expected)
    assert np.isnan(got[2]).all() and np.isinf(got[0]).sum() == 4 and np.isinf(got[1]).sum() == 8


@each
@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_all_codes_under_every_nvfp4_scale(contract, implementation):
    scales = np.arange(256, dtype=np.uint8).reshape(4, 4, 16)
    scales = np.where((scales & 127) == 127, 1, scales).astype(np.uint8)
    packed = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8), (4, 4, 16))
    w = FP4Array.from_packed(packed, scales, np.float32(0.25), format="nvfp4")
    np.testing.assert_array_equal(readout(w, contract, implementation), decode(packed, scales, "nvfp4", 0.25))


@each
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_each_scale_reaches_its_own_columns_and_no_other(contract, format, implementation):
    """A delta probe: each group's scale doubled alone changes exactly that group of that row of that head."""
    group, (heads, rows, columns) = GROUP[format], (2, 3, 96)
    packed = np.full((heads, rows, columns // 2), 0x22, np.uint8)
    one = {"mxfp4": 127, "nvfp4": 7 << 3}[format]
    two = {"mxfp4": 128, "nvfp4": 8 << 3}[format]
    scales = np.full((heads, rows, columns // group), one, np.uint8)
    f = jax.jit(lambda s: readout_traced(packed, s, contract, format, implementation))
    for head, row, index in np.ndindex(scales.shape):
        hot = scales.copy()
        hot[head, row, index] = two
        expected = np.ones((heads, rows, columns))
        expected[head, row, group * index : group * (index + 1)] = 2
        got = np.asarray(f(jnp.asarray(hot)))
        np.testing.assert_array_equal(got.transpose((1, 2, 0) if contract == "columns" else (1, 0, 2)), expected)


def readout_traced(packed, scales, contract, format, implementation):
    w = FP4Array.from_packed(jnp.asarray(packed), scales, format=format)
    size = w.shape[2] if contract == "columns" else w.shape[1]
    identity = jnp.broadcast_to(jnp.eye(size)[:, None], (size, w.shape[0], size))
    return fp4_bmm(identity, w, contract, implementation=implementation)


@each
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_a_nan_scale_stays_in_its_row_or_its_columns(rng, format, implementation):
    for contract in ("rows", "columns"):
        case = Case(contract, 3, 2, 24, 64)
        x, w, expected, _ = operands(rng, case, format=format)
        packed, scales, *glob = (np.asarray(part) for part in w.to_packed())
        scales = scales.copy()
        scales[1, 5, 1] = NAN_BYTE[format]
        bad = FP4Array.from_packed(packed, scales, *glob, format=format)
        out = np.asarray(
            compiled(x, bad, contract, preferred_element_type=jnp.float32, implementation=implementation)
        )
        nan = np.zeros(expected.shape, bool)
        if contract == "columns":
            nan[:, 1, 5] = True
        else:
            nan[:, 1, GROUP[format] : 2 * GROUP[format]] = True
        assert np.isnan(out[nan]).all()
        np.testing.assert_array_equal(out[~nan], expected[~nan])


RANDOM_CASES = [
    Case("rows", 4, 2, 192 + 64, 512, rows=(0, 192), rest_x=64),
    Case("columns", 4, 2, 64 + 128, 512, rows=(64, 128)),
]


@each
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("case", RANDOM_CASES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_random_operands_are_as_good_as_a_plain_dot(rng, case, dtype, format, implementation):
    x, w, expected, (inner, dense) = operands(rng, case, format=format, exact=False, dtype=dtype)
    out = compiled(x, w, **case.kwargs, implementation=implementation)
    error = np.abs(np.asarray(out).astype(np.float64) - expected)
    # Elementwise: a sum of K products, each exact or rounded once, in float32 (Higham, gamma_K), NVFP4's global
    # scale (2 roundings), and the rounding to out's dtype.
    magnitude = oracle.bmm(np.abs(inner.astype(np.float64)), np.abs(dense), case.contract)
    assert (error <= (case.contraction + 3) * 2.0**-24 * magnitude + ulp(expected, out.dtype) / 2).all()
    # And against the yardstick: the dot that XLA makes of the same operands, weights dequantised, accumulated in
    # float32; design.md's 2 x and 1.25 x.
    spec = {"columns": "bhc,hnc->bhn", "rows": "bhn,hnc->bhc"}[case.contract]
    plain = jnp.einsum(spec, jnp.asarray(inner, jnp.float32), jnp.asarray(dense, jnp.float32), precision="highest")
    plain_error = np.abs(np.asarray(plain.astype(dtype)).astype(np.float64) - expected)
    assert error.max() <= 2 * plain_error.max() + ulp(np.abs(expected).max(), out.dtype)
    if dtype != jnp.float32:  # in float32 both are noise of the order of summation
        assert np.sqrt((error**2).mean()) <= 1.25 * np.sqrt((plain_error**2).mean())


@each
def test_float32_is_not_cut_to_tf32(implementation):
    """4096 terms of 4097 - 4096 + ...: TF32, with 11 bits, would take 4097 for 4096 and give 0."""
    w = quantize_mxfp4(jnp.ones((1, 2, 4096)))
    x = jnp.tile(jnp.array([4097.0, -4096.0], jnp.float32), 2048).reshape(1, 1, 4096)
    out = compiled(x, w, "columns", implementation=implementation)
    np.testing.assert_array_equal(out, np.full((1, 1, 2), 2048.0))


# Gradients.


@each
@pytest.mark.parametrize("case", [*SMALL, Case("rows", 3, 2, 33, 64), Case("columns", 3, 2, 33, 64)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradients(rng, case, dtype, implementation):
    """Exact regime: dx is bit for bit the oracle's, and 0 in the columns of x that are not used."""
    x, w, _, (_, dense) = operands(rng, case, dtype=dtype, poison=False)
    g = rng.integers(-2, 3, (case.batch, case.heads, case.out))

    @jax.jit
    def gradient(x, w, g):
        return jax.vjp(lambda x: fp4_bmm(x, w, **case.kwargs, implementation=implementation), x)[1](g)[0]

    dx = gradient(x, w, jnp.asarray(g, dtype))
    assert dx.shape == x.shape and dx.dtype == x.dtype
    expected = np.zeros(x.shape)
    other = "rows" if case.contract == "columns" else "columns"
    expected[..., case.first_x : case.first_x + case.contraction] = oracle.bmm(g, dense, other)
    np.testing.assert_array_equal(np.asarray(dx, np.float32), rounded(expected, dtype).astype(np.float32))


@each
def test_gradients_of_nvfp4_in_another_dtype_under_jit(rng, implementation):
    case = NVFP4_CASES[0]
    x, w, _, (_, dense) = operands(rng, case, format="nvfp4", poison=False)

    @jax.jit
    def grad(x, w):
        return jax.grad(
            lambda x: (
                3 * fp4_bmm(x, w, **case.kwargs, preferred_element_type=jnp.float32, implementation=implementation)
            ).sum()
        )(x)

    expected = np.zeros(x.shape)
    ones = np.full((case.batch, case.heads, case.out), 3.0)
    expected[..., : case.contraction] = oracle.bmm(ones, dense, "columns")
    np.testing.assert_array_equal(
        np.asarray(grad(x, w), np.float32), rounded(expected, jnp.bfloat16).astype(np.float32)
    )


# JAX's transformations.


@each
def test_jit_vmap_and_scan_over_layers(rng, implementation):
    case, layers = SMALL[1], 3
    parts = [operands(rng, case) for _ in range(layers)]
    x = jnp.stack([part[0] for part in parts])
    w = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[1] for part in parts))
    expected = np.stack([part[2] for part in parts])

    def f(x, w):
        return fp4_bmm(x, w, **case.kwargs, preferred_element_type=jnp.float32, implementation=implementation)

    np.testing.assert_array_equal(jax.vmap(f)(x, w), expected)
    np.testing.assert_array_equal(jax.jit(f)(x[1], w[1]), expected[1])
    _, scanned = jax.jit(lambda x, w: jax.lax.scan(lambda carry, xw: (carry, f(*xw)), 0, (x, w)))(x, w)
    np.testing.assert_array_equal(scanned, expected)
    np.testing.assert_array_equal(jax.jit(lambda x: f(x, w[2]))(x[2]), expected[2])  # w a constant


@each
@pytest.mark.parametrize("case", SMALL[:1], ids=str)
def test_operation_by_operation(rng, case, implementation):
    x, w, expected, _ = operands(rng, case)
    out, vjp = jax.vjp(lambda x: fp4_bmm(x, w, **case.kwargs, implementation=implementation), x)
    np.testing.assert_array_equal(np.asarray(out, np.float32), rounded(expected, x.dtype).astype(np.float32))
    assert vjp(jnp.zeros_like(out))[0].shape == x.shape


@each
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_eval_shape_is_the_shape(rng, case, implementation):
    x, w, expected, _ = operands(rng, case)
    shape = jax.eval_shape(lambda x, w: fp4_bmm(x, w, **case.kwargs, implementation=implementation), x, w)
    assert shape.shape == expected.shape and shape.dtype == x.dtype


@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_a_row_does_not_depend_on_its_batch(rng, contract):
    """Bit for bit, on random operands: the kernel's config may look at the batch only where no sum changes."""
    case = Case(contract, 33, 2, 160, 160)
    x, w, _, _ = operands(rng, case, exact=False)
    config = Config(16, 64, 64, 4, 2)

    def rows(n):
        out = compiled(x[:n], w, contract, implementation="triton_interpret", config=config)
        return np.asarray(out.astype(jnp.float32))

    whole = rows(33)
    for n in (1, 2, 7, 17):
        np.testing.assert_array_equal(rows(n), whole[:n])


@each
def test_heads_do_not_depend_on_each_other(rng, implementation):
    """A head alone, or beside others, poisoned ones included, gives the same bits."""
    case = Case("columns", 2, 5, 24, 64)
    x, w, expected, _ = operands(rng, case)
    for heads in (slice(0, 1), slice(1, 4), slice(4, 5)):
        out = compiled(x[:, heads], w[heads], "columns", implementation=implementation)
        np.testing.assert_array_equal(
            np.asarray(out, np.float32), rounded(expected[:, heads], x.dtype).astype(np.float32)
        )
    bad = FP4Array(w.codes, w.scales.at[2].set(255))
    out = np.asarray(compiled(x.at[:, 3].set(jnp.nan), bad, "columns", implementation=implementation), np.float32)
    keep = [0, 1, 4]
    np.testing.assert_array_equal(out[:, keep], rounded(expected[:, keep], x.dtype).astype(np.float32))
    assert np.isnan(out[:, 2:4]).all()


@each
@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_any_number_of_heads_per_device(rng, contract, implementation):
    """H heads are the first H of 128, whatever H: counts that some device or other holds."""
    case = Case(contract, 2, 128, 8, 32)
    x, w, expected, _ = operands(rng, case)
    for heads in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 32, 64, 128):
        out = compiled(
            x[:, :heads],
            w[:heads],
            contract,
            preferred_element_type=jnp.float32,
            implementation=implementation,
        )
        np.testing.assert_array_equal(out, expected[:, :heads])


# Sizes of zero.


@each
@pytest.mark.parametrize(
    "case",
    [
        *(Case(contract, 0, 2, 24, 64) for contract in ("rows", "columns")),
        *(Case(contract, 2, 0, 24, 64) for contract in ("rows", "columns")),
        *(Case(contract, 2, 3, 24, 64, rows=(8, 0), first_x=5) for contract in ("rows", "columns")),
        *(Case(contract, 2, 3, 24, 0) for contract in ("rows", "columns")),
        *(Case(contract, 2, 3, 0, 64) for contract in ("rows", "columns")),
    ],
    ids=str,
)
def test_nothing_to_do(rng, case, implementation):
    x, w, expected, _ = operands(rng, case)
    out = compiled(x, w, **case.kwargs, implementation=implementation)
    assert out.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)
    dx = jax.jit(jax.grad(lambda x: fp4_bmm(x, w, **case.kwargs, implementation=implementation).sum()))(x)
    assert dx.shape == x.shape and ((case.contraction and case.out) or not np.asarray(dx, np.float32).any())


# Dispatch.


def test_a_named_implementation_never_falls_back(rng):
    x, w, _, _ = operands(rng, SMALL[0])
    if jax.default_backend() == "gpu":
        pytest.skip("Triton runs here")
    with pytest.raises(NotImplementedError, match="implementation 'triton' cannot run: it needs a GPU.* Use None"):
        fp4_bmm(x, w, **SMALL[0].kwargs, implementation="triton")
    with pytest.raises(NotImplementedError, match="cannot run"):
        jax.jit(lambda x: fp4_bmm(x, w, **SMALL[0].kwargs, implementation="triton"))(x)


def test_groups_that_the_kernel_cannot_take(rng):
    packed = rng.integers(0, 256, (1, 3, 48), np.uint8)
    w = FP4Array.from_packed(packed, np.full((1, 3, 2), 127, np.uint8))  # groups of 48
    x = jnp.ones((2, 1, 3))
    with pytest.raises(
        NotImplementedError, match="'triton_interpret' cannot run: the group size must be a power of 2"
    ):
        fp4_bmm(x, w, "rows", implementation="triton_interpret")
    expected = oracle.bmm(np.ones((2, 1, 3)), oracle.dequantize(oracle.unpack(packed), np.ones((1, 3, 2))), "rows")
    for implementation in (None, "xla"):
        np.testing.assert_array_equal(fp4_bmm(x, w, "rows", implementation=implementation), expected)


def test_none_says_once_what_it_chose_and_why(rng, caplog):
    if jax.default_backend() == "gpu":
        pytest.skip("Triton is chosen here")
    x, w, expected, _ = operands(rng, SMALL[0])
    implementations.log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="mla_fp4_jax"):
        for _ in range(3):
            out = fp4_bmm(x, w, **SMALL[0].kwargs, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(out, expected)
    records = [record for record in caplog.records if record.name == "mla_fp4_jax"]
    assert len(records) == 1 and records[0].levelno == logging.INFO
    message = records[0].getMessage()
    assert message.startswith("fp4_bmm: xla (") and "it needs a GPU; this process has none." in message


def test_what_is_available():
    available = implementations.available()
    assert available["xla"] is None and list(available) == list(implementations.PREFERENCE)
    if jax.default_backend() != "gpu":
        assert "needs a GPU" in available["triton"]


# Errors.


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"w": jnp.zeros((3, 64, 96))}, TypeError, "w must be an FP4Array; got ArrayImpl"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of .*'xla'.*; got 'cuda'"),
        ({"contract": "cols"}, ValueError, "contract must be 'rows' or 'columns'; got 'cols'"),
        ({"x": jnp.zeros((5, 3, 96), jnp.int32)}, TypeError, "x must be bfloat16, float16 or float32; got int32"),
        ({"x": jnp.zeros((5, 3, 96), jnp.float8_e4m3fn)}, TypeError, "got float8_e4m3fn. Cast it first"),
        ({"x": jnp.zeros((3, 96))}, ValueError, r"x must be \[B, H, X\] and w \[H, N, C\].*\(3, 96\)"),
        ({"x": jnp.zeros((5, 2, 96))}, ValueError, "of the same H; got x"),
        ({"x": jnp.zeros((5, 3, 95))}, ValueError, "as many columns as w has columns to sum over, 96; got 95"),
        ({"contract": "rows"}, ValueError, r"rows to sum over, 64; got 96. Pass x_columns=\(first, 64\)"),
        ({"rows": (60, 5)}, ValueError, r"rows must be \(first, number\) within 0 .. 64; got \(60, 5\)"),
        ({"rows": (-1, 4)}, ValueError, "rows must be"),
        ({"rows": (0, -4)}, ValueError, "rows must be"),
        ({"x_columns": (1, 96)}, ValueError, r"x_columns must be \(first, number\) within 0 .. 96"),
        ({"x_columns": (0, 95)}, ValueError, "to sum over, 96; got 95"),
        ({"preferred_element_type": jnp.int8}, TypeError, "preferred_element_type must be a float dtype; got int8"),
        ({"config": Config(16, 16, 48, 4, 2), "implementation": "triton_interpret"}, ValueError, "power of 2"),
        ({"config": Config(8, 16, 32, 4, 2), "implementation": "triton_interpret"}, ValueError, "at least 16"),
        (
            {"config": Config(16, 16, 16, 4, 2), "implementation": "triton_interpret"},
            ValueError,
            "whole groups of 32",
        ),
        ({"config": Config(16, 16, 32, 4, 9), "implementation": "triton_interpret"}, ValueError, "between 1 and 8"),
        ({"config": Config(128, 256, 256, 4, 8), "implementation": "triton_interpret"}, ValueError, "shared memory"),
    ],
)
def test_what_fp4_bmm_refuses(rng, change, error, text):
    w = quantize_mxfp4(jnp.ones((3, 64, 96)))
    given = {"x": jnp.ones((5, 3, 96)), "w": w, "contract": "columns", **change}
    with pytest.raises(error, match=text):
        fp4_bmm(given.pop("x"), given.pop("w"), given.pop("contract"), **given)


# fp4_linear.


@each
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 0, 3)])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_linear_takes_any_leading_axes(rng, shape, format, implementation):
    case = Case("columns", int(np.prod(shape)), 1, 40, 96)
    x, w, expected, _ = operands(rng, case, format=format)
    x, w = x.reshape(*shape, 96), w.reshape(40, 96)
    out = fp4_linear(x, w, preferred_element_type=jnp.float32, implementation=implementation)
    assert out.shape == (*shape, 40)
    np.testing.assert_array_equal(out, expected.reshape(*shape, 40))
    assert fp4_linear(x, w, implementation=implementation).dtype == x.dtype


@pytest.mark.bad_input
def test_what_fp4_linear_refuses():
    w = quantize_mxfp4(jnp.ones((40, 96)))
    with pytest.raises(ValueError, match=r"fp4_linear: w must be an FP4Array \[N, C\]; got shape \(1, 40, 96\)"):
        fp4_linear(jnp.ones((2, 96)), w.reshape(1, 40, 96))
    with pytest.raises(ValueError, match=r"fp4_linear: w must be an FP4Array \[N, C\]; got ArrayImpl"):
        fp4_linear(jnp.ones((2, 96)), jnp.ones((40, 96)))
    with pytest.raises(ValueError, match=r"x must be \[..., C = 96\]; got \(2, 40\)"):
        fp4_linear(jnp.ones((2, 40)), w)
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        fp4_linear(jnp.ones((2, 96)), w, implementation="cuda")
