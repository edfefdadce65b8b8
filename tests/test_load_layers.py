"""load_mla_layers: every layer or none, straight to the devices it is sharded over, with little host memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, layer_tensors, write_checkpoint, write_shards
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from producers import PRODUCERS

from mla_fp4_jax import CheckpointError, FP4Array, MLAAttention, load_mla_layer, load_mla_layers

LAYERS = 4
H4 = CONFIG | {"num_attention_heads": 4, "num_hidden_layers": LAYERS}


def prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def some_layers(rng, count=LAYERS, **kwargs):
    tensors = {}
    for i in range(count):
        tensors |= layer_tensors(rng, prefix=prefix(i), **kwargs)
    return tensors


def same(a, b):
    leaves = zip(jax.tree.leaves(a.weights), jax.tree.leaves(b.weights), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)) for x, y in leaves)


@pytest.mark.parametrize("layers", [None, [2], [3, 0], range(1, 3), []])
def test_the_layers_are_those_of_load_mla_layer(tmp_path, rng, layers):
    config = CONFIG | {"num_hidden_layers": LAYERS}
    root = write_shards(tmp_path, some_layers(rng, LAYERS + 1), config=config)  # one of multi-token prediction
    loaded = load_mla_layers(root, layers)
    numbers = list(range(LAYERS)) if layers is None else list(layers)
    assert len(loaded) == len(numbers)
    for layer, number in zip(loaded, numbers, strict=True):
        assert same(layer, load_mla_layer(root, number))


def test_without_a_count_all_layers_there_are_load(tmp_path, rng):
    config = {key: value for key, value in CONFIG.items() if key != "num_hidden_layers"}
    root = write_checkpoint(tmp_path, some_layers(rng, 3), config)
    assert len(load_mla_layers(root)) == 3


def test_progress_is_shown_when_asked_for(tmp_path, rng, capfd):
    root = write_checkpoint(tmp_path, some_layers(rng, 2), CONFIG | {"num_hidden_layers": 2})
    load_mla_layers(root)
    assert capfd.readouterr().err == ""  # no terminal here
    load_mla_layers(root, progress=True)
    assert "loading: 100%" in capfd.readouterr().err


def sharded_tensors(rng, producer):
    """A layer of 4 heads whose kv_b_proj and o_proj are packed by a producer."""
    tensors = layer_tensors(rng, kv_b="dense")
    make = PRODUCERS[producer][0]
    shapes = {"kv_b_proj": (4 * 48, 64), "o_proj": (96, 4 * 32), "q_b_proj": (4 * 24, 40)}
    for module, shape in shapes.items():
        del tensors[f"{prefix(0)}{module}.weight"]
        if module == "q_b_proj":
            tensors[f"{prefix(0)}{module}.weight"] = rng.standard_normal(shape).astype(np.float32)
            continue
        parts, _, _ = make(rng, *shape)
        tensors |= {f"{prefix(0)}{module}.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    return tensors


SPECS = {"kv_b_proj": P("x"), "o_proj": P(None, "x"), "q_b_proj": P("x")}


@pytest.mark.parametrize("producer", ["quark mxfp4", "compressed-tensors nvfp4", "deepseek fp8"])
def test_weights_arrive_in_their_sharding(tmp_path, rng, producer):
    root = write_checkpoint(tmp_path, sharded_tensors(rng, producer), H4 | {"num_hidden_layers": 1})
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    (layer,) = load_mla_layers(root, sharding=lambda field, shape: NamedSharding(mesh, SPECS.get(field, P())))
    assert same(layer, load_mla_layer(root, 0))
    weights = layer.weights
    for field, spec in SPECS.items():
        weight = getattr(weights, field)
        for leaf in (weight.codes, weight.scales) if isinstance(weight, FP4Array) else (weight,):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    kv_b = weights.kv_b_proj.codes if isinstance(weights.kv_b_proj, FP4Array) else weights.kv_b_proj
    assert {shard.data.shape for shard in kv_b.addressable_shards} == {(1, 48, 64)}
    # A sharded layer computes.
    x = jnp.ones((1, 3, 96), layer.dtype)
    y = layer.prefill(x, layer.init_cache(1, 4))[0]
    plain = load_mla_layer(root, 0)
    expected = plain.prefill(x, plain.init_cache(1, 4))[0]
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(expected, np.float32), atol=scale * 2**-6)


def test_one_sharding_serves_all_weights(tmp_path, rng):
    root = write_checkpoint(tmp_path, layer_tensors(rng))
    other = jax.sharding.SingleDeviceSharding(jax.devices()[2])
    layer = load_mla_layer(root, 0, sharding=other)
    assert all(leaf.devices() == {jax.devices()[2]} for leaf in jax.tree.leaves(layer.weights))
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    layer = load_mla_layer(root, 0, sharding=NamedSharding(mesh, P()))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(layer.weights))


def test_the_default_device_is_obeyed(tmp_path, rng):
    root = write_checkpoint(tmp_path, layer_tensors(rng))
    with jax.default_device(jax.devices()[1]):
        layer = load_mla_layer(root, 0)
    assert all(leaf.devices() == {jax.devices()[1]} for leaf in jax.tree.leaves(layer.weights))


def many(root, rng, spoil=lambda tensors: None):
    """Twelve layers, more than threads."""
    tensors = {}
    for i in range(12):
        tensors |= layer_tensors(rng, prefix=f"model.layers.{i}.self_attn.")
    spoil(tensors)
    return write_shards(root, tensors, shards=5, config=CONFIG | {"num_hidden_layers": 12})


def test_layers_loaded_in_threads_obey_the_callers_default_device(tmp_path, rng):
    root, second = many(tmp_path, rng), jax.devices()[1]
    with jax.default_device(second):
        layers = load_mla_layers(root)
    assert all(leaf.devices() == {second} for layer in layers for leaf in jax.tree.leaves(layer.weights))
    assert not any(leaf.committed for layer in layers for leaf in jax.tree.leaves(layer.weights))
    with jax.set_mesh(Mesh(np.array(jax.devices()[:2]), ("x",))):
        layers = load_mla_layers(root, [0, 1, 2])
    first = jax.devices()[0]
    assert all(leaf.devices() == {first} for layer in layers for leaf in jax.tree.leaves(layer.weights))


@pytest.mark.bad_input
def test_an_error_in_a_thread_is_raised_as_it_is(tmp_path, rng):
    name = "model.layers.7.self_attn.kv_b_proj.weight_scale"
    root = many(tmp_path, rng, lambda tensors: tensors[name].__setitem__((3, 1), 255))
    with pytest.raises(CheckpointError, match=rf"{name} must not hold 255, e8m0's NaN; found at \[3, 1\]"):
        load_mla_layers(root)


@pytest.mark.parametrize("producer", ["quark mxfp4", "compressed-tensors nvfp4", "deepseek fp8"])
def test_a_loaded_layer_compiles_ahead_of_time(tmp_path, rng, producer):
    """Weights are uncommitted: jax 0.10 compiles for other layouts than it gives committed float4 arrays."""
    root = write_checkpoint(tmp_path, sharded_tensors(rng, producer), H4 | {"num_hidden_layers": 1})
    layer = load_mla_layer(root, 0)
    x, cache = jnp.ones((1, 1, 96), layer.dtype), layer.init_cache(1, 4)
    step = jax.jit(MLAAttention.decode).lower(layer, x, cache).compile()
    assert np.array_equal(
        np.asarray(step(layer, x, cache)[0]), np.asarray(jax.jit(MLAAttention.decode)(layer, x, cache)[0])
    )
    assert not any(leaf.committed for leaf in jax.tree.leaves(layer.weights))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("spec", "match"),
    [(P("x"), "sharding must divide a weight"), (P(None, None, "x"), "must not cut a scale group|must divide")],
)
def test_a_sharding_that_does_not_fit_is_refused(tmp_path, rng, spec, match):
    root = write_checkpoint(tmp_path, layer_tensors(rng))  # 3 heads, two groups along 64 columns
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    with pytest.raises(ValueError, match=match):
        load_mla_layer(
            root, 0, sharding=lambda field, shape: NamedSharding(mesh, spec if field == "kv_b_proj" else P())
        )


@pytest.mark.bad_input
def test_nothing_is_read_unless_every_layer_is_right(tmp_path, rng, monkeypatch):
    from mla_fp4_jax.checkpoint.safetensors import SafetensorsFile

    tensors = some_layers(rng)
    del tensors[f"{prefix(3)}o_proj.weight"]
    root = write_shards(tmp_path, tensors, config=CONFIG | {"num_hidden_layers": LAYERS})
    read = []
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: read.append(name))
    with pytest.raises(CheckpointError, match=r"layers\.3\.self_attn\.o_proj\.weight .* is missing"):
        load_mla_layers(root)
    assert read == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("layers", "error"), [([0, -1], ValueError), (["0"], TypeError), ([True], TypeError), ([9], CheckpointError)]
)
def test_layers_that_are_none(tmp_path, rng, layers, error):
    root = write_checkpoint(tmp_path, layer_tensors(rng))
    with pytest.raises(error):
        load_mla_layers(root, layers)


@pytest.mark.bad_input
def test_a_dtype_is_checked_before_anything_else(tmp_path):
    with pytest.raises(TypeError, match="dtype must be"):
        load_mla_layers(tmp_path / "nowhere", dtype=jnp.int8)
