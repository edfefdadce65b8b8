"""What a serving loop relies on: no retrace, donation, scan, nnx, abstract values, pickles."""

from __future__ import annotations

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import make_layer, small_config

from mla_fp4_jax import FP4Weight, MLAAttention


def leaves_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("page_size", [None, 16])
def test_64_growing_steps_trace_once(rng, page_size):
    layer = make_layer(small_config())
    traces = 0

    def decode(layer, x, cache):
        nonlocal traces
        traces += 1
        return layer.decode(x, cache)

    step = jax.jit(decode, donate_argnames=("cache",))
    cache = layer.init_cache(2, 70, page_size=page_size)
    for _ in range(64):
        _, cache = step(layer, jnp.asarray(rng.standard_normal((2, 1, 96)), jnp.float32), cache)
    assert traces == 1
    np.testing.assert_array_equal(cache.length, [64, 64])


def test_the_unbound_method_is_the_step(rng):
    layer = make_layer(small_config())
    step = jax.jit(MLAAttention.decode, donate_argnames=("cache",))
    x = jnp.asarray(rng.standard_normal((2, 1, 96)), jnp.float32)
    old = layer.init_cache(2, 8)
    y, cache = step(layer, x, old)
    assert old.entries.is_deleted() and jax.tree.structure(cache) == jax.tree.structure(layer.init_cache(2, 8))
    np.testing.assert_allclose(y, layer.decode(x, layer.init_cache(2, 8))[0], atol=1e-6)


@pytest.mark.parametrize("page_size", [None, 16])
def test_donation_changes_no_bit_over_many_steps(rng, page_size):
    layer = make_layer(small_config())
    xs = jnp.asarray(rng.standard_normal((20, 2, 1, 96)), jnp.float32)
    results = []
    for donate in ((), ("cache",)):
        step, cache, outputs = (
            jax.jit(MLAAttention.decode, donate_argnames=donate),
            layer.init_cache(2, 20),
            [],
        )
        for x in xs:
            y, cache = step(layer, x, cache)
            outputs.append(np.asarray(y))
        results.append((outputs, jax.tree.map(np.asarray, cache)))
    leaves_equal(*results)


def test_nnx_jit_scan_and_eager_agree(rng):
    layer = make_layer(small_config())
    xs = jnp.asarray(rng.standard_normal((6, 2, 1, 96)), jnp.float32)
    cache, eager = layer.init_cache(2, 6), []
    for x in xs:
        y, cache = layer.decode(x, cache)
        eager.append(y)
    step = nnx.jit(lambda layer, x, cache: layer.decode(x, cache))
    jitted, other = [], layer.init_cache(2, 6)
    for x in xs:
        y, other = step(layer, x, other)
        jitted.append(y)

    @jax.jit
    def scanned(layer, cache):
        def body(cache, x):
            y, cache = layer.decode(x, cache)
            return cache, y

        return jax.lax.scan(body, cache, xs)

    last, ys = scanned(layer, layer.init_cache(2, 6))
    for a, b in (
        (jnp.stack(jitted), jnp.stack(eager)),
        (ys, jnp.stack(eager)),
        (last.entries, cache.entries),
    ):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=0)


def test_functional_split_and_merge(rng):
    layer = make_layer(small_config())
    graphdef, state = nnx.split(layer)

    @jax.jit
    def step(state, x, cache):
        return nnx.merge(graphdef, state).decode(x, cache)

    x = jnp.asarray(rng.standard_normal((2, 1, 96)), jnp.float32)
    y, _ = step(state, x, layer.init_cache(2, 4))
    np.testing.assert_allclose(y, layer.decode(x, layer.init_cache(2, 4))[0], atol=2e-6, rtol=0)


def test_packed_weights_are_no_parameters():
    layer = make_layer(small_config())
    _, params, packed = nnx.split(layer, nnx.Param, FP4Weight)
    assert "kv_b_proj" in packed and "kv_b_proj" not in params and "o_proj" in params


def test_gradients_reach_the_input_and_the_dense_weights(rng):
    layer = make_layer(small_config())
    x = jnp.asarray(rng.standard_normal((1, 1, 96)), jnp.float32)

    def loss(layer):
        # The first token sees itself alone, so no loop is differentiated: its output is linear past the norm.
        from mla_fp4_jax.projections import k_up_proj

        q = (x @ layer.q_a_proj[...].T) @ layer.q_b_proj[...].T
        return k_up_proj(q.reshape(1, 1, 3, 24), layer.kv_b_proj[...], 16).sum()

    grads = nnx.grad(loss)(layer)
    assert float(jnp.abs(grads["q_a_proj"][...]).max()) > 0
    assert "kv_b_proj" not in grads


def test_abstract_layers(rng):
    abstract = nnx.eval_shape(lambda: MLAAttention(small_config(), rngs=nnx.Rngs(0)))
    assert abstract.weights.kv_b_proj.shape == (3, 40, 64)
    layer = make_layer(small_config())
    x, cache = jax.ShapeDtypeStruct((2, 1, 96), jnp.float32), layer.init_cache(2, 4)
    shape = jax.eval_shape(MLAAttention.decode, layer, x, cache)
    real = layer.decode(jnp.zeros(x.shape), cache)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shape) == jax.tree.map(lambda a: (a.shape, a.dtype), real)


def test_pickle_and_deepcopy(rng):
    layer = make_layer(small_config(), dtype=jnp.bfloat16)
    x = jnp.asarray(rng.standard_normal((1, 2, 96)), jnp.bfloat16)
    y, cache = layer.prefill(x, layer.init_cache(1, 4, page_size=16))
    for clone in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_array_equal(clone.prefill(x, layer.init_cache(1, 4))[0], y)
    leaves_equal(pickle.loads(pickle.dumps(cache)), cache)


def test_export_of_a_decode_step_on_cpu(rng):
    layer = make_layer(small_config())
    weights, cache = layer.weights, layer.init_cache(1, 4)
    x = jnp.asarray(rng.standard_normal((1, 1, 96)), jnp.float32)
    leaves, treedef = jax.tree.flatten((weights, cache))

    def step(x, *leaves):
        from mla_fp4_jax import mla_decode

        weights, cache = jax.tree.unflatten(treedef, leaves)
        y, cache = mla_decode(weights, x, cache, layer.config, dtype=jnp.float32, implementation="xla")
        return y, *jax.tree.leaves(cache)

    from jax import export

    blob = export.export(jax.jit(step))(x, *leaves).serialize()
    y = export.deserialize(blob).call(x, *leaves)[0]
    np.testing.assert_allclose(y, layer.decode(x, cache)[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize("page_size", [None, 16])
def test_lengths_mask_and_cache_may_be_constants_of_a_compiled_function(rng, page_size):
    layer = make_layer(small_config())
    x = jnp.asarray(rng.standard_normal((2, 3, 96)), jnp.float32)
    cache, lengths = layer.init_cache(2, 8, page_size=page_size), jnp.array([2, 3])
    mask = jnp.arange(3)[None] < lengths[:, None]
    expected = layer.prefill(x, cache, lengths=lengths)
    for compiled in (
        jax.jit(lambda x: layer.prefill(x, cache, lengths=lengths)),
        jax.jit(lambda x: layer.prefill(x, cache, padding_mask=mask)),
        jax.jit(lambda x: layer.decode(x, cache, lengths=lengths)),
    ):
        y, after = compiled(x)
        np.testing.assert_allclose(y, expected[0], atol=5e-5, rtol=0)
        np.testing.assert_array_equal(after.length, [2, 3])
    for bad in (jnp.array([2, 4]), jnp.array([-1, 0])):
        with pytest.raises(ValueError, match="0 .. T = 3"):
            jax.jit(lambda x, bad=bad: layer.decode(x, cache, lengths=bad))(x)
