"""The latent cache: what is written where, and that nothing else is ever touched or seen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mla_fp4_jax.cache import PAGE_SIZES, PagedLatentCache, cache_specs, init_cache
from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.sharding import MLASharding

CONFIG = MLAConfig(
    hidden_size=64,
    num_attention_heads=2,
    kv_lora_rank=6,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
)
KINDS = [None, *PAGE_SIZES]


def contents(cache, size=None):
    """Every sequence's visible entries, through the same blocks that attention reads."""
    size = size or (cache.capacity if not isinstance(cache, PagedLatentCache) else cache.page_size)
    out = np.full((cache.length.shape[0], cache.capacity, CONFIG.cache_dim), np.nan, np.float32)
    for index in range(-(-cache.capacity // size)):
        entries, slots = cache.block(jnp.int32(index), size)
        for b, s in np.argwhere(np.asarray(slots) >= 0):
            assert np.isnan(out[b, slots[b, s]]).all(), "a slot was read twice"
            out[b, slots[b, s]] = entries[b, s]
    return out


def made(page_size, batch=3, capacity=16, **kwargs):
    return init_cache(CONFIG, batch, capacity, dtype=jnp.float32, page_size=page_size, **kwargs)


@pytest.mark.parametrize("page_size", KINDS)
def test_appends_land_in_order(rng, page_size):
    cache, expected = made(page_size), [[], [], []]
    for tokens in (1, 3, 2, 5):
        entries = rng.standard_normal((3, tokens, CONFIG.cache_dim)).astype(np.float32)
        active = rng.random((3, tokens)) < 0.7
        cache = cache.append(jnp.asarray(entries), jnp.asarray(active))
        for b in range(3):
            expected[b].extend(entries[b, active[b]])
    seen = contents(cache)
    for b in range(3):
        assert int(cache.length[b]) == len(expected[b])
        np.testing.assert_array_equal(seen[b, : len(expected[b])], np.array(expected[b]))
        assert np.isnan(seen[b, len(expected[b]) :]).all()


@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_overflow_is_dropped_and_harms_nobody(rng, page_size):
    cache = made(page_size, capacity=16)
    first = jnp.asarray(rng.standard_normal((3, 15, CONFIG.cache_dim)), jnp.float32)
    cache = cache.append(first, jnp.ones((3, 15), bool))
    before = contents(cache)
    more = jnp.full((3, 4, CONFIG.cache_dim), 7.0)
    cache = cache.append(more, jnp.array([[True] * 4, [False] * 4, [True] * 4]))
    after = contents(cache)
    np.testing.assert_array_equal(cache.length, [16, 15, 16])
    np.testing.assert_array_equal(after[:, :15], before[:, :15])
    assert (after[[0, 2], 15] == 7).all() and np.isnan(after[1, 15]).all()


def test_pages_may_be_reordered_and_shared(rng):
    cache = made(16, capacity=48, num_pages=8)
    assert (np.asarray(cache.page_table) == -1).all()
    prefix = jnp.asarray(rng.standard_normal((3, 16, CONFIG.cache_dim)), jnp.float32)
    table = jnp.array([[5, 2, 7], [5, 0, 1], [6, 3, 4]])
    cache = dataclasses.replace(cache, page_table=table)
    # Sequence 0 writes the shared page; sequence 1 only points at it.
    cache = cache.append(prefix, jnp.array([[True] * 16, [False] * 16, [True] * 16]))
    cache = dataclasses.replace(cache, length=jnp.array([16, 16, 16]))
    tail = jnp.asarray(rng.standard_normal((3, 5, CONFIG.cache_dim)), jnp.float32)
    seen = contents(cache.append(tail, jnp.ones((3, 5), bool)))
    np.testing.assert_array_equal(seen[1, :16], prefix[0])
    np.testing.assert_array_equal(seen[2, :16], prefix[2])
    np.testing.assert_array_equal(seen[:, 16:21], tail)


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1, -(2**31)])
def test_pages_that_do_not_exist(rng, bad):
    cache = made(16, capacity=32, num_pages=8)
    cache = dataclasses.replace(
        cache,
        pages=jnp.full_like(cache.pages, jnp.nan),
        page_table=jnp.array([[1, 2], [3, bad], [bad, 4]], jnp.int32),
    )
    entries = jnp.asarray(rng.standard_normal((3, 20, CONFIG.cache_dim)), jnp.float32)
    cache = cache.append(entries, jnp.ones((3, 20), bool))
    seen = contents(cache)
    np.testing.assert_array_equal(seen[0, :20], entries[0])
    np.testing.assert_array_equal(seen[1, :16], entries[1, :16])
    np.testing.assert_array_equal(seen[2, 16:20], entries[2, 16:20])
    assert np.isnan(seen[1, 16:]).all() and np.isnan(seen[2, :16]).all()
    untouched = np.asarray(cache.pages)[[0, 5, 6, 7]]
    assert np.isnan(untouched).all()


@pytest.mark.parametrize("page_size", [None, 1, 16])
@pytest.mark.parametrize("size", [16, 32])
def test_blocks_cover_a_ragged_capacity_once(rng, page_size, size):
    cache = made(page_size, capacity=80)
    entries = jnp.asarray(rng.standard_normal((3, 77, CONFIG.cache_dim)), jnp.float32)
    cache = cache.append(entries, jnp.arange(77)[None] < jnp.array([77, 0, 33])[:, None])
    seen = contents(cache, size)
    np.testing.assert_array_equal(seen[0, :77], entries[0])
    np.testing.assert_array_equal(seen[2, :33], entries[2, :33])
    assert np.isnan(seen[1]).all() and np.isnan(seen[2, 33:]).all()


@pytest.mark.parametrize("page_size", KINDS)
def test_garbage_past_the_length_reads_as_zero(page_size):
    cache = made(page_size, capacity=128)
    cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.ndim == 3 else leaf, cache)
    cache = cache.append(jnp.ones((3, 2, CONFIG.cache_dim)), jnp.ones((3, 2), bool))
    entries, slots = cache.block(jnp.int32(0), 128)
    np.testing.assert_array_equal(np.asarray(slots >= 0).sum(1), [2, 2, 2])
    assert (np.asarray(entries)[:, 2:] == 0).all()


@pytest.mark.parametrize("page_size", [None, 16])
def test_structure_survives_an_append(page_size):
    cache = made(page_size)
    after = jax.eval_shape(lambda c: c.append(jnp.ones((3, 2, CONFIG.cache_dim)), jnp.ones((3, 2), bool)), cache)
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(cache)
    ]
    assert len({leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)}) == len(jax.tree.leaves(cache))


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("scale", [1.0, 4.0, 2.0**-7])
def test_e4m3_entries_are_stored_in_units_of_the_scale(rng, page_size, scale):
    cache = init_cache(CONFIG, 3, 16, dtype=jnp.float8_e4m3fn, page_size=page_size, entries_scale=scale)
    entries = rng.standard_normal((3, 5, CONFIG.cache_dim)) * scale * 2.0 ** rng.integers(-10, 8, (3, 5, 1))
    entries[0, 0, :3] = 1e6 * scale, -np.inf, np.nan
    entries = entries.astype(np.float32)
    append = jax.jit(lambda cache, new: cache.append(new, jnp.ones((3, 5), bool)), donate_argnums=0)
    after = append(cache, jnp.asarray(entries))
    assert after.entries_scale == scale and jax.tree.structure(after) == jax.tree.structure(cache)
    expected = np.clip(entries.astype(np.float64) / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(contents(after)[:, :5], expected.astype(np.float32))


@pytest.mark.parametrize("page_size", [None, 16])
def test_the_scale_is_static_and_survives_specs(page_size):
    cache = init_cache(CONFIG, 4, 16, dtype=jnp.float8_e4m3fn, page_size=page_size, entries_scale=0.5)
    mesh = jax.make_mesh((1,), ("b",))
    specs = cache_specs(cache, MLASharding(mesh, batch="b"))
    assert jax.tree.structure(specs) == jax.tree.structure(cache)
    assert jax.tree.map(jnp.copy, cache).entries_scale == 0.5
    assert len(jax.tree.leaves(cache)) == len(jax.tree.leaves(made(page_size)))


@pytest.mark.bad_input
@pytest.mark.parametrize("scale", [0, 0.0, -1.0, 3.0, 0.3, float("nan"), float("inf"), -float("inf"), "1"])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match=r"init_cache: entries_scale must be a power of 2"):
        init_cache(CONFIG, 1, 8, dtype=jnp.float8_e4m3fn, entries_scale=scale)
    with pytest.raises(ValueError, match="entries_scale"):
        dataclasses.replace(made(16), entries_scale=scale)


@pytest.mark.bad_input
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_scale_needs_e4m3(dtype):
    with pytest.raises(ValueError, match=r"entries_scale must be 1 with a cache in"):
        init_cache(CONFIG, 1, 8, dtype=dtype, entries_scale=2.0)
    assert init_cache(CONFIG, 1, 8, dtype=dtype, entries_scale=1).entries_scale == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_length"),
        ({"page_size": 8}, "page_size"),
        ({"page_size": 0}, "page_size"),
        ({"num_pages": 4}, "num_pages"),
        ({"page_size": 16, "num_pages": 0}, "num_pages"),
    ],
)
def test_bad_sizes(kwargs, names):
    with pytest.raises(ValueError, match=names):
        init_cache(CONFIG, **{"batch_size": 1, "max_length": 8, **kwargs})
