"""The prefill attention's kernels and blocks against the oracle: ragged, padded, chunked, paged, poisoned."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import make_layer, oracle_layer, small_config
from prefill_cases import SCALE, Case, build, check, expand

from mla_fp4_jax import mla_prefill
from mla_fp4_jax.ops import mla_prefill_attention

module = sys.modules["mla_fp4_jax.ops.mla_prefill"]
ROUTES = ("xla", "triton_interpret")
CASES = [
    Case((1, 0, 1), 1),
    Case((40, 1, 0, 33), 40),
    Case((40, 1, 0, 33), 40, left=True),
    Case((100, 70, 3), 37, page=16),
    Case((100, 70, 3), 37, page=16, left=True),
    Case((90, 17), 1, capacity=96),
    Case((65, 64, 63), 64, heads=1, P=48, V=64, R=32),
    Case((50, 20), 20, R=0),
    Case((31,), 31, page=1, capacity=40),
    Case((40, 1, 0, 33), 20, page=16, e4m3_scale=0.125),
]


def run(built, implementation, **changes):
    built = dataclasses.replace(built, **changes)
    return mla_prefill_attention(
        built.q,
        built.cache,
        built.visible,
        expand(built.kv_b),
        scale=SCALE,
        v_head_dim=built.out.shape[3],
        implementation=implementation,
    )


@pytest.fixture
def small_blocks(monkeypatch):
    """16 slots at a time."""
    monkeypatch.setattr(module, "keys_at_once", lambda cache, *sizes: min(cache.capacity, 16))


@pytest.mark.parametrize("implementation", ROUTES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(rng, case, implementation):
    built = build(case, rng)
    check(*run(built, implementation), case, built)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_of_slots_are_merged(rng, case, small_blocks):
    built = build(case, rng)
    check(*run(built, "triton_interpret"), case, built)


def test_half_precision(rng, small_blocks):
    case = Case((70, 9, 0), 40, dtype="bfloat16")
    built = build(case, rng)
    check(*run(built, "triton_interpret"), case, built)


@pytest.mark.parametrize("used", [False, True])
def test_a_page_that_does_not_exist_is_not_seen(rng, used, small_blocks):
    """One that holds tokens changes the route, to one that skips them; one past the length changes nothing."""
    case = Case((40, 20), 20, page=16, capacity=64)
    built = build(case, rng)
    column = 1 if used else 3
    bad = -1 if used else 10**6
    lost = dataclasses.replace(built.cache, page_table=built.cache.page_table.at[0, column].set(bad))
    out, lse = run(built, "triton_interpret", cache=lost)
    expected, expected_lse = run(built, "xla", cache=lost)
    np.testing.assert_allclose(out, expected, atol=3e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-5)
    assert used == bool(np.abs(np.asarray(out)[0] - built.out[0]).max() > 1e-3)
    np.testing.assert_allclose(np.asarray(out)[1], built.out[1], atol=3e-5)


@pytest.mark.parametrize("visible", [[[2, 40, 9, 0, 30]], [[-3, 7, 7, 41, 1000]]])
def test_any_numbers_of_visible_slots(rng, visible, small_blocks):
    built = build(Case((40,), 5), rng)
    visible = jnp.asarray(visible, jnp.int32)
    q = jnp.nan_to_num(built.q)
    expected, expected_lse = run(built, "xla", q=q, visible=visible)
    out, lse = run(built, "triton_interpret", q=q, visible=visible)
    np.testing.assert_allclose(out, expected, atol=3e-5)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-5)


def test_merging_knows_empty_parts():
    out, lse = jnp.ones((1, 2, 1, 3)), jnp.zeros((1, 2, 1))
    nothing, empty = jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf)
    for merged in (module.merge(out, lse, nothing, empty), module.merge(nothing, empty, out, lse)):
        np.testing.assert_array_equal(merged[0], out)
        np.testing.assert_array_equal(merged[1], lse)
    merged = module.merge(nothing, empty, nothing, empty)
    assert (np.asarray(merged[0]) == 0).all() and np.isneginf(np.asarray(merged[1])).all()


@pytest.mark.parametrize("sizes", [(23,), (1, 6, 16)])
def test_a_layer_in_chunks_equals_the_oracle(rng, sizes, small_blocks):
    config = small_config(qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)
    layer = make_layer(config)
    x = jnp.asarray(rng.standard_normal((2, sum(sizes), config.hidden_size)), jnp.float32)
    cache, outputs, first = layer.init_cache(2, 40), [], 0
    step = jax.jit(
        lambda x, cache: mla_prefill(
            layer.weights, x, cache, config, dtype=jnp.float32, attention_implementation="triton_interpret"
        )
    )
    for size in sizes:
        y, cache = step(x[:, first : first + size], cache)
        outputs.append(y)
        first += size
    y = jnp.concatenate(outputs, axis=1)
    for b in range(2):
        np.testing.assert_allclose(y[b], oracle_layer(layer, x[b])[0], atol=5e-5, rtol=0)


def test_what_is_expanded_at_once_follows_the_chunk_and_stays_within_memory():
    case = build(Case((8,), 8, capacity=100_000), np.random.default_rng(0))
    for tokens, expected in ((1, 2048), (4096, 4096), (5000, 5120), (16_384, 16_384), (65_536, 16_384)):
        assert module.keys_at_once(case.cache, 1, tokens, 128 * 256) == expected
    assert module.keys_at_once(case.cache, 64, 16_384, 128 * 256) == 512
    short = build(Case((8,), 8, capacity=100), np.random.default_rng(0))
    assert module.keys_at_once(short.cache, 1, 4096, 128 * 256) == 100


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"q": jnp.zeros((2, 5, 2))}, "q must be"),
        ({"q": jnp.zeros((1, 5, 2, 48))}, "q must be"),
        ({"q": jnp.zeros((2, 5, 2, 40))}, "expand must return"),
        ({"visible": jnp.zeros((2, 4), jnp.int32)}, "visible must be"),
        ({"visible": jnp.zeros((2, 5))}, "visible must be"),
        ({"implementation": "cudnn"}, "implementation must be"),
    ],
)
def test_bad_calls(rng, changes, names):
    built = build(Case((9, 5), 5), rng)
    operands = {name: value for name, value in changes.items() if name != "implementation"}
    with pytest.raises(ValueError, match=names):
        run(built, changes.get("implementation"), **operands)


def test_an_implementation_that_cannot_run_says_why(rng):
    built = build(Case((9, 5), 5), rng)
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        run(built, "triton")
    with pytest.raises(NotImplementedError, match="power of 2"):
        run(build(Case((9, 5), 5, V=24), rng), "triton_interpret")
