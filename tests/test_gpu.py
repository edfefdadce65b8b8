"""On a real GPU: kernels against the oracle, between poisoned neighbours, repeated; layers against the CPU's results.

    python3 -m pytest -m gpu tests/test_gpu.py

The tests that are not marked `gpu` run the same checks on a CPU, in the Pallas interpreter, so that a check that is
itself broken does not wait for a GPU to be found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import kernel_checks as checks
import numpy as np
import pytest
from flax import nnx
from kernel_checks import Case

from mla_fp4_jax import MLAAttention, MLAConfig, MLAWeights, fp4_bmm, quantize_mxfp4, quantize_nvfp4
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.implementations import INTERPRET, PREFERENCE, TRITON, XLA
from mla_fp4_jax.quantize import SCALE_RULES

KERNELS = tuple(name for name in PREFERENCE if name != XLA)
# These take any shape and dtype; another implementation may decline what it was not made for.
UNIVERSAL = (TRITON, INTERPRET, XLA, None)

BATCHES = (0, 1, 2, 3, 7, 16, 17, 64, 65, 129)
HEADS = (1, 2, 3, 4, 5, 8, 10, 16, 20, 64, 128)
SIZES = tuple(itertools.product((64, 128, 192, 256), (64, 128, 256), (128, 256, 512)))  # P, V, L
EXACT = (
    *(Case(BATCHES[1 + i % 9], HEADS[i % 9], *sizes) for i, sizes in enumerate(SIZES)),
    *(Case(batch, 8, 128, 128, 512) for batch in BATCHES),
    *(Case(batch, 5, 192, 256, 512) for batch in BATCHES),
    *(Case(3, heads, 128, 128, 512) for heads in HEADS),
)
OTHER_KINDS = tuple(
    Case(batch, 3, 192, 64, 256, *kind)
    for kind in (
        ("float16",),
        ("float32",),
        ("bfloat16", "mxfp4", "float32"),
        ("bfloat16", "nvfp4"),
        ("float32", "nvfp4"),
    )
    for batch in (2, 17, 65)
)
# Multiples of nothing but the group.
RAGGED = tuple(
    Case(batch, 3, *sizes)
    for sizes in ((40, 24, 96), (1, 1, 32), (100, 36, 160), (33, 65, 224))
    for batch in (1, 17, 65)
)
CONFINED = tuple(
    Case(batch, 3, *sizes)
    for sizes in ((192, 64, 256), (128, 128, 512), (40, 24, 96), (33, 65, 160))
    for batch in (1, 3, 17, 65)
)
TINY = Case(3, 2, 40, 24, 64)

gpu = pytest.mark.gpu


@contextlib.contextmanager
def may_decline(implementation: str | None):
    """Skip where an implementation says that it was not made for these operands."""
    try:
        yield
    except NotImplementedError as error:
        if implementation in UNIVERSAL:
            raise
        pytest.skip(f"{implementation}: {error}")


@pytest.fixture
def can_run(request: pytest.FixtureRequest) -> str | None:
    """The implementation named by the test's parameter, if it can run on this device at all."""
    reason = None if request.param is None else implementations.why_not(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def on(*names: str | None):
    return pytest.mark.parametrize("can_run", names, indirect=True, ids=str)


@gpu
@on(*KERNELS)
@pytest.mark.parametrize("case", [*EXACT, *OTHER_KINDS, *RAGGED], ids=str)
def test_kernels_equal_the_oracle(can_run, case, rng):
    with may_decline(can_run):
        checks.check_exact(can_run, case, rng)


@gpu
@pytest.mark.parametrize("case", [*EXACT[::7], *OTHER_KINDS[::2], *RAGGED[::3]], ids=str)
def test_xla_equals_the_oracle(case, rng):
    checks.check_exact(XLA, case, rng)


@gpu
@on(*KERNELS)
@pytest.mark.parametrize("contract", ["rows", "columns"])
@pytest.mark.parametrize("case", CONFINED, ids=str)
def test_kernels_stay_within_their_operands(can_run, contract, case, rng):
    with may_decline(can_run):
        checks.check_confined(can_run, case, contract, rng, adjacent=True)


@gpu
@on(None, *PREFERENCE)
@pytest.mark.parametrize("contract", ["rows", "columns"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_code_under_every_scale(can_run, dtype, format, contract):
    with may_decline(can_run):
        checks.check_codes(can_run, dtype, contract, flushes=False, format=format)


@gpu
@on(*KERNELS)
@pytest.mark.parametrize("case", [Case(64, 16, 128, 128, 512), Case(7, 5, 192, 256, 512)], ids=str)
def test_twenty_repeats_are_equal(can_run, case, rng):
    with may_decline(can_run):
        checks.check_repeats(can_run, case, rng, 20)


@gpu
@on(*KERNELS)
@pytest.mark.parametrize("kind", [("bfloat16",), ("float32",), ("bfloat16", "nvfp4")], ids="-".join)
def test_rows_do_not_depend_on_their_batch(can_run, kind, rng):
    with may_decline(can_run):
        checks.check_batch_invariance(can_run, Case(129, 4, 192, 128, 512, *kind), rng, BATCHES[1:-1])


# (tokens, warpgroups, tiles, token tiles, slots, accumulators, delay, evict_first): of k_up ("rows"), of v_up.
TILES = {
    "rows": (
        (8, 1, 2, 1, 1, 2, 0, ""),
        (16, 1, 1, 1, 1, 1, 0, ""),
        (32, 1, 2, 2, 2, 2, 0, ""),
        (64, 4, 2, 3, 3, 1, 0, "out"),
        (64, 2, 1, 3, 2, 1, 0, "out"),
    ),
    "columns": (
        (8, 1, 1, 1, 1, 1, 0, ""),
        (16, 2, 1, 2, 2, 1, 0, ""),
        (32, 1, 1, 1, 1, 1, 0, ""),
        (64, 2, 1, 3, 2, 1, 2, "x"),
        (64, 1, 1, 3, 2, 1, 4, "out"),
    ),
}


@gpu
@on("mosaic_gpu")
@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_tiles_change_no_bit(can_run, contract, rng):
    from pallas_kernels.fp4_bmm_tiles import Config

    case = Case(130, 3, 128, 128, 512)
    w = checks.pack_of(checks.random_pack(rng, case, can_run), case, can_run)
    x = jnp.asarray(checks.random_x(rng, case, contract, exact=False))
    columns = (0, case.P) if contract == "rows" else None
    for tiles in TILES[contract]:
        y = fp4_bmm(
            x,
            w,
            contract,
            rows=case.used[contract],
            x_columns=columns,
            implementation=can_run,
            config=Config(*tiles),
        )
        np.testing.assert_array_equal(
            checks.bits(y), checks.bits(checks.run(can_run, case, contract, x, w)), err_msg=str(tiles)
        )


@gpu
@on(None, TRITON, XLA)
def test_gradients_equal_the_oracle(can_run, rng):
    for case in (
        Case(17, 3, 128, 64, 256),
        Case(3, 2, 192, 128, 512, "float32"),
        Case(3, 2, 64, 64, 128, format="nvfp4"),
    ):
        checks.check_gradient(can_run, case, rng)


def check_quantisers(devices, rng):
    awkward = [0, 6, 1.75, 1.5, 2.5, 5, 0.25, 0.75, 2**-126, 2**-149, 3e38, -0.0, 1e-30, -7, 448, 2688]
    w = np.concatenate([np.tile(np.array(awkward, np.float32), 16), rng.standard_normal(256 * 31).astype(np.float32)])
    w = w.reshape(32, 256) * np.exp2(rng.integers(-60, 1, (32, 1))).astype(np.float32)
    quantisers = [
        *((lambda w, rule=rule: quantize_mxfp4(w, scale_rule=rule)) for rule in SCALE_RULES),
        quantize_nvfp4,
    ]
    for quantise, dtype in itertools.product(quantisers, ("float32", "bfloat16")):
        parts = []
        for device in devices:
            x = jax.device_put(w.astype(jnp.dtype(dtype)), device)
            parts.append(
                [[np.asarray(part) for part in call(x).to_packed()] for call in (quantise, jax.jit(quantise))]
            )
        jax.tree.map(np.testing.assert_array_equal, *parts)


@gpu
def test_quantisers_give_the_same_bits_as_on_a_cpu(rng):
    check_quantisers((jax.devices("cpu")[0], jax.devices()[0]), rng)


# Layers. Made on the CPU, since random numbers differ in their last bits from device to device.

CONFIG = MLAConfig(
    hidden_size=512,
    num_attention_heads=5,
    q_lora_rank=192,
    kv_lora_rank=256,
    qk_nope_head_dim=192,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


SMALL = dataclasses.replace(CONFIG, hidden_size=64, num_attention_heads=2, q_lora_rank=32, kv_lora_rank=64)


def cpu_layer(dtype, config: MLAConfig = CONFIG, kv_b_format: str = "mxfp4") -> MLAAttention:
    formats = {"kv_b_format": kv_b_format, "linear_formats": {"o_proj": "mxfp4"}}
    with jax.default_device(jax.devices("cpu")[0]):
        layer = MLAAttention(config, **formats, dtype=dtype, rngs=nnx.Rngs(0), implementation=XLA)
        return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.devices("cpu")[0]), layer)


def moved(layer: MLAAttention, device, implementation: str | None) -> MLAAttention:
    weights: MLAWeights = order_for_device(jax.device_put(layer.weights, device), layer.config, implementation)
    return MLAAttention(layer.config, weights=weights, dtype=layer.dtype, implementation=implementation)


def serve(layer: MLAAttention, x: np.ndarray, device, page_size: int | None) -> np.ndarray:
    """Prefill 17 tokens of ragged prompts, decode 3 at once, then one by one."""
    with jax.default_device(device):
        x = jax.device_put(jnp.asarray(x, layer.dtype), device)
        lengths = jnp.array([17, 0, 5])
        cache = layer.init_cache(3, 64, page_size=page_size)
        y, cache = jax.jit(MLAAttention.prefill)(layer, x[:, :17], cache, lengths=lengths)
        outputs = [y]
        step = jax.jit(MLAAttention.decode, donate_argnames=("cache",))
        for first, last in ((17, 20), *((t, t + 1) for t in range(20, x.shape[1]))):
            y, cache = step(layer, x[:, first:last], cache)
            outputs.append(y)
        return np.asarray(jnp.concatenate(outputs, axis=1).astype(jnp.float32))


def check_layer(implementation, device, dtype, page_size, rng, config=CONFIG, kv_b_format="mxfp4"):
    layer = cpu_layer(dtype, config, kv_b_format)
    x = rng.standard_normal((3, 24, config.hidden_size)).astype(np.float32)
    want = serve(layer, x, jax.devices("cpu")[0], page_size)
    got = serve(moved(layer, device, implementation), x, device, page_size)
    if dtype == jnp.float32:
        np.testing.assert_allclose(got, want, atol=5e-5, rtol=0)  # design: of a float32 layer
    else:
        # Each is within 1.5 % of the exact layer, hence within 3 % of the other.
        assert np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)) <= 0.03
    assert (got[1, :17] == 0).all() and (got[2, 5:17] == 0).all()


@gpu
@on(None, TRITON)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_gives_what_it_gives_on_a_cpu(can_run, dtype, page_size, rng):
    check_layer(can_run, jax.devices()[0], dtype, page_size, rng)


@gpu
def test_a_layer_whose_kv_b_proj_is_nvfp4(rng):
    check_layer(None, jax.devices()[0], jnp.bfloat16, None, rng, kv_b_format="nvfp4")


def check_donated_loop(implementation, device, page_size, rng, steps: int, config=CONFIG):
    layer = moved(cpu_layer(jnp.bfloat16, config), device, implementation)
    x = jnp.asarray(rng.standard_normal((2, 1, config.hidden_size)), jnp.bfloat16)
    results = []
    for donated in ((), ("x", "cache")):
        traces = 0

        def decode(layer, x, cache):
            nonlocal traces
            traces += 1
            return layer.decode(x, cache)

        step = jax.jit(decode, donate_argnames=donated)
        y, cache, outputs = jnp.copy(x), layer.init_cache(2, steps, page_size=page_size), []
        pool = jax.tree.leaves(cache)[0].unsafe_buffer_pointer()
        for _ in range(steps):
            y, cache = step(layer, y, cache)
            outputs.append(checks.bits(y))
        assert traces == 1
        assert not donated or jax.tree.leaves(cache)[0].unsafe_buffer_pointer() == pool
        results.append(np.stack(outputs))
    np.testing.assert_array_equal(*results)


@gpu
@pytest.mark.parametrize("page_size", [None, 16])
def test_a_donated_loop_traces_once_and_stays_where_it_is(page_size, rng):
    check_donated_loop(None, jax.devices()[0], page_size, rng, 64)


def check_bad_pages(implementation, device, rng, config=CONFIG):
    """A sequence whose pages do not exist changes nothing for the others, nor in any page."""
    layer = moved(cpu_layer(jnp.bfloat16, config), device, implementation)
    bad = (-1, 5, 2**31 - 1, -(2**31))
    batch = 1 + len(bad)
    x = jnp.asarray(rng.standard_normal((batch, 6, config.hidden_size)), jnp.bfloat16)
    empty = layer.init_cache(batch, 16, page_size=16, num_pages=5)
    # Page 2 is the good sequence's; the others hold NaN and belong to nobody.
    pages = jnp.full_like(empty.pages, jnp.nan)
    results = []
    for table in ([2, *bad], [2, -1, -1, -1, -1]):
        cache = dataclasses.replace(empty, pages=jnp.copy(pages), page_table=jnp.array(table, jnp.int32)[:, None])
        y, cache = jax.jit(MLAAttention.prefill)(layer, x[:, :3], cache)
        outputs = [y]
        for t in range(3, 6):
            y, cache = jax.jit(MLAAttention.decode)(layer, x[:, t : t + 1], cache)
            outputs.append(y)
        assert np.isnan(np.asarray(cache.pages.astype(jnp.float32))[[0, 1, 3, 4]]).all()
        results.append(np.asarray(jnp.concatenate(outputs, axis=1).astype(jnp.float32)))
    np.testing.assert_array_equal(*results)
    assert np.isfinite(results[0]).all() and (results[0][0] != 0).any() and (results[0][1:] == 0).all()


@gpu
def test_pages_that_do_not_exist(rng):
    check_bad_pages(None, jax.devices()[0], rng)


# The same checks on a CPU.


@pytest.mark.parametrize("implementation", [INTERPRET, XLA])
def test_the_checks_pass_on_a_cpu(implementation, rng):
    for case in (TINY, Case(1, 2, 33, 24, 64, "float32"), Case(17, 1, 16, 16, 64, format="nvfp4")):
        checks.check_exact(implementation, case, rng)
    checks.check_gradient(implementation, TINY, rng)
    checks.check_repeats(implementation, TINY, rng, 2)


@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_the_checks_of_bounds_and_codes_pass_on_a_cpu(contract, rng):
    checks.check_confined(INTERPRET, TINY, contract, rng, adjacent=False)
    for format in ("mxfp4", "nvfp4"):
        checks.check_codes(XLA, "float32", contract, flushes=True, format=format)


def test_the_check_of_batch_invariance_passes_on_a_cpu(rng):
    checks.check_batch_invariance(INTERPRET, Case(5, 1, 16, 16, 32), rng, (1, 2))


def test_the_checks_of_layers_pass_on_a_cpu(rng):
    cpu = jax.devices("cpu")[0]
    check_quantisers((cpu, cpu), rng)
    check_layer(XLA, cpu, jnp.float32, 16, rng, SMALL)
    check_donated_loop(XLA, cpu, None, rng, 3, SMALL)
    check_bad_pages(XLA, cpu, rng, SMALL)


def test_the_checks_can_fail(rng, monkeypatch):
    real = checks.fp4_bmm

    def off_by_a_bit(x, w, contract, **kwargs):
        return real(x, w, contract, **kwargs).at[-1, -1, -1].add(1)

    def reads_the_next_column(x, w, contract, *, x_columns=None, **kwargs):
        return real(x, w, contract, x_columns=(1, x_columns[1]) if x_columns else None, **kwargs)

    def drops_a_row(x, w, contract, **kwargs):
        return real(x, w, contract, **kwargs).at[-1].set(jnp.nan)

    def follows_the_batch(x, w, contract, **kwargs):
        return real(x, w, contract, **kwargs) * x.shape[0]

    for broken in (off_by_a_bit, reads_the_next_column, drops_a_row):
        monkeypatch.setattr(checks, "fp4_bmm", broken)
        with pytest.raises(AssertionError):
            checks.check_exact(XLA, TINY, rng)
        with pytest.raises(AssertionError):
            checks.check_confined(XLA, TINY, "rows", rng, adjacent=False)
    monkeypatch.setattr(checks, "fp4_bmm", follows_the_batch)
    with pytest.raises(AssertionError):
        checks.check_batch_invariance(XLA, Case(5, 1, 16, 16, 32), rng, (1, 2))
    poison = np.full(8, np.nan, np.float32)
    with pytest.raises(AssertionError):
        checks.assert_untouched(jnp.asarray(poison).at[7].set(0), poison)


def test_the_ranges_are_covered():
    cases = [*EXACT, *OTHER_KINDS, *RAGGED]
    assert {case.B for case in cases} == set(BATCHES) and {case.H for case in cases} == set(HEADS)
    assert {(case.P, case.V, case.L) for case in cases} >= set(SIZES) and len(cases) * 2 <= 300
