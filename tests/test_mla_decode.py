"""mla_decode on a CPU: XLA and the Triton kernel in the interpreter against the float64 oracle."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mla_decode_cases import SCALE, Case, build, check, one_key_of_every_code, run_steps

from mla_fp4_jax.ops import mla_decode
from pallas_kernels import mla_decode_triton as triton
from pallas_kernels.split_plan import STEP, choose_split_size

IMPLEMENTATIONS = ("xla", "triton_interpret")
CASES = (
    Case((0, 1, 15, 16, 17, 300)),
    Case((0, 1, 15, 16, 17, 40), page=16, dtype="float32"),
    Case((0, 1, 63, 64, 65, 192), page=64, heads=20),
    Case((0, 1, 127, 128, 129, 200), page=128, rope=0),
    Case((2, 33, 130), tokens=3, heads=20, page=64),
    Case((8, 9, 40), tokens=8, heads=2, page=16, dtype="float32"),
    Case((3, 5, 9), tokens=2, page=1),
    Case((40, 100, 129), page=16, bad_pages=True),
    Case((40, 100, 193), page=64, bad_pages=True, tokens=2),
    Case((130, 7), tokens=4, capacity=512),
    Case((4, 63, 130), tokens=4, heads=20, page=16),  # 80 rows: a token is in two row blocks
    Case((131, 64, 5), tokens=5, page=64, bad_pages=True),
    Case((129, 70, 3), tokens=6, heads=8, page=16, bad_pages=True),  # the last one's first three see nothing
    Case((7, 20, 128), tokens=7, heads=20, page=64, cache_dtype="float8_e4m3fn"),
    Case((0, 17, 130), page=16, cache_dtype="float8_e4m3fn"),
    Case((0, 17, 130), tokens=2, cache_dtype="float8_e4m3fn"),
    Case((0, 17, 130), page=64, cache_dtype="float8_e4m3fn", entries_scale=4.0),
    Case((90, 17, 128), cache_dtype="float8_e4m3fn", entries_scale=2.0**-5),
)


def run(built, *, implementation, split_size=None):
    call = functools.partial(
        mla_decode, scale=SCALE, return_lse=True, split_size=split_size, implementation=implementation
    )
    return jax.jit(call)(built.q, built.cache, built.visible)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_oracle(case, implementation, rng):
    built = build(case, rng)
    check(*run(built, implementation=implementation, split_size=128), case, built)


TILINGS = [
    triton.Config(16, 64, 4, 2, transposed=True),
    triton.Config(16, 64, 8, 1, transposed=True, ahead=True),
    triton.Config(32, 32, 4, 1, ahead=True),
]


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_every_tiling_of_the_triton_kernel(tiling, cache_dtype, rng, monkeypatch):
    monkeypatch.setattr(triton, "default_config", lambda *operands: tiling)
    case = Case((0, 1, 63, 130), heads=20, page=16, bad_pages=True, cache_dtype=cache_dtype)
    built = build(case, rng)
    check(*run(built, implementation="triton_interpret", split_size=128), case, built)


def test_split_sizes_give_the_same_attention(rng):
    case = Case((0, 130, 257, 384), page=64)
    built = build(case, rng)
    for split_size in (128, 256, 384, None):
        check(*run(built, implementation="triton_interpret", split_size=split_size), case, built)


def test_a_sequence_does_not_depend_on_its_neighbours(rng):
    built = build(Case((300, 1, 129, 0), page=64, tokens=2), rng)
    together = run(built, implementation="triton_interpret", split_size=128)
    for b in range(4):
        cache = built.cache
        one = dataclasses.replace(cache, page_table=cache.page_table[b : b + 1], length=cache.length[b : b + 1])
        alone = dataclasses.replace(built, q=built.q[b : b + 1], cache=one, visible=built.visible[b : b + 1])
        for x, y in zip(together, run(alone, implementation="triton_interpret", split_size=128), strict=True):
            assert np.array_equal(np.asarray(x[b : b + 1], np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_finite_e4m3_code_is_read_exactly(implementation, rng):
    """A sequence of one key has that key's latent as its output, whatever the score."""
    q, cache, visible, exact = one_key_of_every_code(rng, heads=2, rank=32, rope=16)
    out = mla_decode(q, cache, visible, scale=SCALE, split_size=128, implementation=implementation)
    assert np.array_equal(np.asarray(out.astype(jnp.float32)), exact)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_that_is_seen_shows(implementation, cache_dtype, rng):
    built = build(Case((200, 70), cache_dtype=cache_dtype), rng)
    for column in (3, 35):  # of the latent, of the rope key
        entries = built.cache.entries.at[0, 150, column].set(jnp.nan)
        poisoned = dataclasses.replace(built, cache=dataclasses.replace(built.cache, entries=entries))
        out = np.asarray(run(poisoned, implementation=implementation, split_size=128)[0].astype(jnp.float32))
        assert np.all(np.isnan(out[0])) and np.all(np.isfinite(out[1]))


@pytest.mark.parametrize("page", [None, 16])
def test_a_thousand_steps_are_one_prefill(page, rng):
    case = Case((1000, 700), tokens=1000, page=page)
    built = build(case, rng)
    check(*run_steps(built, implementation="xla"), case, built)
    check(*run(built, implementation="xla"), case, built)


def test_sequences_may_share_pages(rng):
    built = build(Case((100, 100), page=16), rng)
    table = built.cache.page_table
    shared = dataclasses.replace(built.cache, page_table=jnp.stack([table[0], table[0]]))
    twice = dataclasses.replace(built, cache=shared, q=jnp.stack([built.q[0], built.q[0]]))
    out, lse = run(twice, implementation="triton_interpret")
    assert np.array_equal(np.asarray(out[0], np.float32), np.asarray(out[1], np.float32))
    assert np.array_equal(lse[0], lse[1])


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shared_pages_hold_every_sequences_keys(implementation, cache_dtype, rng):
    """A second sequence begins with the first one's whole pages, a third ends in the midst of one of them."""
    case = Case((100, 150, 70), tokens=2, page=16, cache_dtype=cache_dtype)
    built = build(case, rng)
    first, second, third = built.entries
    table = built.cache.page_table
    shared = dataclasses.replace(built.cache, page_table=table.at[1, :4].set(table[0, :4]).at[2].set(table[0]))
    entries = [first, first[:64] + second[64:], first[: len(third)]]
    built = dataclasses.replace(built, cache=shared, entries=entries)
    check(*run(built, implementation=implementation, split_size=128), case, built)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_takes_no_part_gets_zeros(implementation, rng):
    built = build(Case((40, 40), tokens=3), rng)
    out, lse = run(dataclasses.replace(built, visible=built.visible.at[0, 1].set(0)), implementation=implementation)
    assert np.all(np.asarray(out[0, 1], np.float32) == 0) and np.all(np.isneginf(lse[0, 1]))
    assert np.all(np.isfinite(np.asarray(out, np.float32)))


def test_the_check_sees_one_key_too_many(rng):
    case = Case((40, 41))
    built = build(case, rng)
    fewer = dataclasses.replace(built, visible=built.visible - 1)
    with pytest.raises(AssertionError):
        check(*run(fewer, implementation="xla"), case, built)


def test_lengths_past_the_capacity_read_nothing_else(rng):
    case = Case((64, 64), page=16)
    built = build(case, rng)
    cache = dataclasses.replace(built.cache, length=jnp.array([1000, 64], jnp.int32))
    longer = dataclasses.replace(built, cache=cache, visible=built.visible.at[0].set(1000))
    check(*run(longer, implementation="triton_interpret"), case, dataclasses.replace(longer, visible=built.visible))


def test_lengths_do_not_retrace(rng):
    built = build(Case((40, 7), page=16), rng)
    traces = []

    @jax.jit
    def step(cache, visible):
        traces.append(1)
        return mla_decode(built.q, cache, visible, scale=SCALE)

    for length in (1, 17, 40):
        step(dataclasses.replace(built.cache, length=jnp.array([length, 7], jnp.int32)), built.visible)
    assert len(traces) == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"split_size": 100}, ValueError, "multiple of 128"),
        ({"implementation": "cuda"}, ValueError, "implementation must be"),
        ({"visible": jnp.zeros((2, 2), jnp.int32)}, ValueError, r"visible must be \[B, T\]"),
        ({"visible": jnp.zeros((2, 1))}, TypeError, "visible must be integers"),
        ({"q": jnp.zeros((2, 1, 3, 47), jnp.bfloat16)}, ValueError, "q must be"),
    ],
)
def test_bad_input(change, error, text, rng):
    built = build(Case((4, 4)), rng)
    operands = {"q": built.q, "cache": built.cache, "visible": built.visible, "scale": SCALE} | change
    with pytest.raises(error, match=text):
        mla_decode(**operands)


def test_a_named_implementation_never_falls_back(rng):
    built = build(Case((4, 4)), rng)
    for name in ("mosaic_gpu", "triton"):
        with pytest.raises(NotImplementedError, match="cannot run"):
            mla_decode(built.q, built.cache, built.visible, scale=SCALE, implementation=name)


@pytest.mark.parametrize("programs", [1, 2, 64, 200, 4096])
@pytest.mark.parametrize("capacity", [1, 128, 1000, 16384, 131072])
def test_split_sizes_are_whole_steps(programs, capacity):
    size = choose_split_size(programs, capacity)
    assert size % STEP == 0 and STEP <= size < capacity + STEP
    if programs >= 200:
        assert size >= min(capacity, 2048)  # a full GPU gains nothing from small splits
