"""Blockwise attention over the cache against the naive float64 oracle; ragged, paged, poisoned."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mla_fp4_jax import attention
from mla_fp4_jax.cache import init_cache
from mla_fp4_jax.config import MLAConfig

H, P, R, V, L = 3, 8, 4, 6, 16
CONFIG = MLAConfig(
    hidden_size=32,
    num_attention_heads=H,
    kv_lora_rank=L,
    qk_nope_head_dim=P,
    qk_rope_head_dim=R,
    v_head_dim=V,
)
SCALE = 0.3


def setting(rng, lengths, tokens, page_size=None, capacity=None, poison=np.nan):
    """A cache filled to `lengths` (the new tokens included), queries, and the oracle's answer."""
    batch = len(lengths)
    capacity = capacity or max(max(lengths), 1)
    entries = rng.standard_normal((batch, max(max(lengths), 1), L + R)).astype(np.float32)
    cache = init_cache(CONFIG, batch, capacity, dtype=jnp.float32, page_size=page_size)
    cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, poison) if leaf.ndim == 3 else leaf, cache)
    active = np.arange(entries.shape[1])[None] < np.array(lengths)[:, None]
    cache = cache.append(jnp.asarray(entries), jnp.asarray(active))
    kv_b = rng.standard_normal((H, P + V, L)).astype(np.float32) * 0.3
    q = rng.standard_normal((batch, tokens, H, P + R)).astype(np.float32)
    visible = np.maximum(np.array(lengths)[:, None] - tokens + 1 + np.arange(tokens)[None], 0)
    expected = np.zeros((batch, tokens, H, V))
    for b, length in enumerate(lengths):
        first = length - tokens
        for t in range(tokens):
            if visible[b, t]:
                expected[b, t] = oracle.attention(
                    q[b, t : t + 1],
                    entries[b, :length, :L],
                    entries[b, :length, L:],
                    kv_b,
                    P,
                    SCALE,
                    first + t,
                )[0]
    return cache, jnp.asarray(q), jnp.asarray(kv_b), jnp.asarray(visible.astype(np.int32)), expected


def absorbed(q, cache, kv_b, visible):
    q_latent = jnp.einsum("bthp,hpl->bthl", q[..., :P], kv_b[:, :P], precision="highest")
    q = jnp.concatenate([q_latent, q[..., P:]], -1)
    attended, lse = attention.absorbed_attention(q, cache, visible, SCALE)
    return jnp.einsum("bthl,hvl->bthv", attended, kv_b[:, P:], precision="highest"), lse


def expanded(q, cache, kv_b, visible):
    def up(latent):
        return jnp.einsum("bkl,hnl->bkhn", latent, kv_b, precision="highest")

    return attention.expanded_attention(q, cache, visible, SCALE, up, P, V)


# Sums of at most 600 products in float32, values of order 1 to 4, scores up to 10.
TOLERANCE = {"atol": 3e-5, "rtol": 0}


@pytest.mark.parametrize("route", [absorbed, expanded])
@pytest.mark.parametrize("page_size", [None, 1, 16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_ragged_and_poisoned(rng, route, page_size, tokens):
    lengths = [15, 16, 17, 8, 33]
    cache, q, kv_b, visible, expected = setting(rng, lengths, tokens, page_size, capacity=40)
    out, _ = route(q, cache, kv_b, visible)
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.parametrize("route", [absorbed, expanded])
@pytest.mark.parametrize("page_size", [None, 16])
def test_several_blocks(rng, route, page_size, monkeypatch):
    monkeypatch.setattr(attention, "KEY_BLOCK", 32)
    monkeypatch.setattr(attention, "SCORE_ELEMENTS", 3 * H * 32 * 4)
    cache, q, kv_b, visible, expected = setting(rng, [100, 31, 64], 9, page_size, capacity=130)
    out, _ = route(q, cache, kv_b, visible)
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.parametrize("route", [absorbed, expanded])
def test_a_query_that_sees_nothing_is_exactly_zero(rng, route):
    cache, q, kv_b, visible, expected = setting(rng, [0, 5, 0], 1, capacity=16)
    out, lse = route(q, cache, kv_b, visible)
    assert (np.asarray(out)[[0, 2]] == 0).all()
    assert np.isneginf(np.asarray(lse)[[0, 2]]).all() and np.isfinite(np.asarray(lse)[1]).all()
    np.testing.assert_allclose(out, expected, **TOLERANCE)


@pytest.mark.parametrize("poison", [0.0, np.nan, np.inf])
def test_poison_changes_no_bit(rng, poison):
    cache, q, kv_b, visible, _ = setting(rng, [3, 9], 1, 16, capacity=32, poison=poison)
    clean = jax.tree.map(lambda leaf: jnp.nan_to_num(leaf, posinf=0.0) if leaf.ndim == 3 else leaf, cache)
    for route in (absorbed, expanded):
        np.testing.assert_array_equal(route(q, cache, kv_b, visible)[0], route(q, clean, kv_b, visible)[0])


def test_slot_zero_of_a_bad_page_is_not_read(rng):
    cache, q, kv_b, visible, _ = setting(rng, [20, 20], 1, 16, capacity=32)
    lost = dataclasses.replace(cache, page_table=cache.page_table.at[1, 0].set(-1))
    out, _ = absorbed(q, lost, kv_b, visible)
    np.testing.assert_array_equal(out[0], absorbed(q, cache, kv_b, visible)[0][0])
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize("route", [absorbed, expanded])
def test_lse_merges_two_halves(rng, route):
    cache, q, kv_b, visible, expected = setting(rng, [24, 24], 1, capacity=24)
    head = dataclasses.replace(cache, length=jnp.array([10, 10]))
    tail = dataclasses.replace(cache, entries=cache.entries[:, 10:], length=jnp.array([14, 14]))
    (a, lse_a), (b, lse_b) = (route(q, part, kv_b, visible) for part in (head, tail))
    total = jnp.logaddexp(lse_a, lse_b)
    merged = a * jnp.exp(lse_a - total)[..., None] + b * jnp.exp(lse_b - total)[..., None]
    np.testing.assert_allclose(merged, expected, **TOLERANCE)
    np.testing.assert_allclose(total, route(q, cache, kv_b, visible)[1], rtol=1e-5)


def test_memory_does_not_grow_with_the_square_of_the_context():
    def temp_bytes(tokens):
        cache = init_cache(CONFIG, 1, tokens, dtype=jnp.float32)
        q = jax.ShapeDtypeStruct((1, tokens, H, P + R), jnp.float32)
        kv_b = jax.ShapeDtypeStruct((H, P + V, L), jnp.float32)
        visible = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        return jax.jit(expanded).lower(q, cache, kv_b, visible).compile().memory_analysis().temp_size_in_bytes

    small, large = temp_bytes(16_384), temp_bytes(65_536)
    assert large < 5 * small, (small, large)
