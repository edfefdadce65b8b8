"""A layer over many devices: the same numbers as on one, no weight or cache gathered, sizes that fit or an error."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, layer_tensors, write_checkpoint
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layers import make_layer, oracle_layer, small_config

from mla_fp4_jax import FP4Array, MLAAttention, MLASharding, init_cache, load_mla_layer, mla_decode
from mla_fp4_jax.kernel_order import ordered

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
CONFIG4 = small_config(num_attention_heads=4)
LAYOUTS = {
    "heads": {"heads": "t"},
    "batch": {"batch": "d"},
    "context": {"context": "c"},
    "all": {"heads": "t", "batch": "d", "context": "c"},
    "two axes": {"heads": ("t", "c"), "batch": "d"},
}
COLLECTIVE = re.compile(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter|ragged-\S+?)(?:-start)?\(")


# Shared, so that layers that are alike compile once.
PREFILL = jax.jit(MLAAttention.prefill)
STEP = jax.jit(MLAAttention.decode, donate_argnames=("cache",))


def mesh(kind: AxisType = AUTO, sizes=(2, 2, 2), names=("d", "t", "c")) -> Mesh:
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names), devices=jax.devices()[: int(np.prod(sizes))])


def spread(layer: MLAAttention, sharding: MLASharding) -> MLAAttention:
    return MLAAttention(layer.config, weights=layer.weights, dtype=layer.dtype, sharding=sharding)


def run(layer: MLAAttention, x: jax.Array, page_size: int | None = None, capacity: int = 13):
    """A prompt of 5 tokens, of 3 in the second sequence, then two steps."""
    cache = layer.init_cache(x.shape[0], capacity, page_size=page_size)
    lengths = jnp.full((x.shape[0],), 5).at[1].set(3)
    outputs = []
    y, cache = PREFILL(layer, x[:, :5], cache, lengths=lengths)
    outputs.append(y)
    for t in (5, 6):
        y, cache = STEP(layer, x[:, t : t + 1], cache)
        outputs.append(y)
    return np.concatenate([np.asarray(y) for y in outputs], axis=1), cache


def collectives(layer: MLAAttention, batch: int, page_size: int | None = None) -> list[tuple[str, str]]:
    """(operation, result) of a compiled decode step."""
    x, cache = (
        jnp.ones((batch, 1, layer.config.hidden_size), layer.dtype),
        layer.init_cache(batch, 16, page_size=page_size),
    )
    hlo = jax.jit(MLAAttention.decode).lower(layer, x, cache).compile().as_text()
    return sorted((operation, result) for result, operation in COLLECTIVE.findall(hlo))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((4, 7, 96)), jnp.float32)


@pytest.mark.parametrize(
    ("layout", "kind", "page_size"),
    [
        ("heads", EXPLICIT, None),
        ("batch", AUTO, 1),
        ("context", EXPLICIT, 1),
        ("context", AUTO, None),
        ("all", AUTO, None),
        ("all", EXPLICIT, 1),
        ("two axes", AUTO, 1),
    ],
)
def test_many_devices_give_what_one_gives(layout, kind, page_size, x):
    """float32, so the bound is that of another order of sums: 1e-5 against outputs of about 1."""
    plain = make_layer(CONFIG4)
    expected, _ = run(plain, x, page_size)
    sharding = MLASharding(mesh(kind), **LAYOUTS[layout])
    layer = spread(plain, sharding)
    got, cache = run(layer, x, page_size)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(cache.length, [7, 5, 7, 7])
    # The cache comes back as it lay.
    for before, after in zip(
        jax.tree.leaves(layer.init_cache(4, 13, page_size=page_size)), jax.tree.leaves(cache), strict=True
    ):
        assert after.sharding.is_equivalent_to(before.sharding, before.ndim) and after.shape == before.shape


def test_the_oracle_agrees(x):
    layer = spread(make_layer(CONFIG4), MLASharding(mesh(), heads="t", batch="d", context="c"))
    cache = layer.init_cache(4, 8)
    y, cache = layer.prefill(x[:, :6], cache)
    z, _ = layer.decode(x[:, 6:], cache)
    plain = make_layer(CONFIG4)
    for b in range(4):
        exact = oracle_layer(plain, np.asarray(x[b]))[0]
        np.testing.assert_allclose(np.concatenate([y[b], z[b]]), exact, atol=5e-5, rtol=0)


def test_heads_hold_their_share_of_the_bytes():
    layer = spread(make_layer(CONFIG4), MLASharding(mesh(), heads="t", batch="d", context="c"))
    w, c = layer.weights, CONFIG4
    assert {s.data.shape for s in w.kv_b_proj.codes.addressable_shards} == {(2, 40, 64)}
    assert {s.data.shape for s in w.kv_b_proj.scales.addressable_shards} == {(2, 40, 2)}
    assert {s.data.shape for s in w.q_b_proj.addressable_shards} == {(2 * c.qk_head_dim, 40)}
    assert {s.data.shape for s in w.o_proj.addressable_shards} == {(96, 2 * c.v_head_dim)}
    assert w.q_a_proj.is_fully_replicated and w.kv_a_proj_with_mqa.is_fully_replicated
    cache = layer.init_cache(4, 13)
    assert cache.entries.shape == (4, 14, 72)  # as many slots on each device
    assert {s.data.shape for s in cache.entries.addressable_shards} == {(2, 7, 72)}
    paged = layer.init_cache(4, 40, page_size=16)
    assert {s.data.shape for s in paged.pages.addressable_shards} == {(4, 16, 72)}
    assert all((np.asarray(s.data) == [[0, 1], [2, 3]]).all() for s in paged.page_table.addressable_shards)


@pytest.mark.parametrize(("kind", "page_size"), [(AUTO, None), (EXPLICIT, 16)])
def test_a_tensor_parallel_step_has_one_all_reduce_and_gathers_nothing(kind, page_size):
    layer = spread(make_layer(CONFIG4, dtype=jnp.float32), MLASharding(mesh(kind, (4,), ("t",)), heads="t"))
    assert collectives(layer, 2, page_size) == [("all-reduce", "f32[2,1,96]{2,1,0}")]


def test_data_parallel_steps_share_nothing():
    layer = spread(make_layer(CONFIG4), MLASharding(mesh(), batch="d"))
    assert collectives(layer, 4) == []


def test_context_parallel_steps_share_one_number_a_head_and_the_output():
    layer = spread(make_layer(CONFIG4), MLASharding(mesh(), heads="t", context="c"))
    found = collectives(layer, 4)
    assert [operation for operation, _ in found] == ["all-gather", "all-reduce"]
    assert re.match(r"f32\[2,4,1,2\]", found[0][1]) and re.match(r"f32\[4,1,96\]", found[1][1])


def test_a_gather_would_be_seen():
    split = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh(), P("t")))
    everywhere = jax.jit(lambda a: a * 2, out_shardings=NamedSharding(mesh(), P()))
    assert [found for _, found in COLLECTIVE.findall(everywhere.lower(split).compile().as_text())] == ["all-gather"]


def identity_o_proj(layer: MLAAttention) -> MLAAttention:
    """y is then the heads themselves: every column has one head's value and, from the other devices, zeros."""
    eye = jnp.eye(layer.config.hidden_size, dtype=layer.dtype)
    weights = dataclasses.replace(layer.weights, o_proj=eye)
    return MLAAttention(layer.config, weights=weights, dtype=layer.dtype)


@pytest.mark.parametrize("parts", [2, 4])
def test_heads_are_bitwise_those_of_one_device_before_the_reduction(parts, x):
    plain = identity_o_proj(make_layer(CONFIG4, dtype=jnp.bfloat16))
    layer = spread(plain, MLASharding(mesh(AUTO, (parts,), ("t",)), heads="t"))
    x = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(run(layer, x)[0], run(plain, x)[0])


@pytest.mark.parametrize("parts", [2, 4])
def test_a_device_computes_the_layer_of_its_heads(parts, x):
    """Bit for bit in float32 too, where one device with all heads may sum in another order, as XLA does."""
    plain = identity_o_proj(make_layer(CONFIG4))
    got, _ = run(spread(plain, MLASharding(mesh(AUTO, (parts,), ("t",)), heads="t")), x)
    w, heads = plain.weights, 4 // parts
    for i in range(parts):
        rows = slice(i * heads * CONFIG4.qk_head_dim, (i + 1) * heads * CONFIG4.qk_head_dim)
        columns = slice(i * heads * 24, (i + 1) * heads * 24)
        mine = dataclasses.replace(
            w,
            q_b_proj=w.q_b_proj[rows],
            kv_b_proj=w.kv_b_proj[i * heads : (i + 1) * heads],
            o_proj=w.o_proj[:, columns],
        )
        config = dataclasses.replace(CONFIG4, num_attention_heads=heads)
        alone, _ = run(MLAAttention(config, weights=mine, dtype=jnp.float32), x)
        np.testing.assert_array_equal(got[..., columns], alone[..., columns])


@pytest.mark.parametrize("parts", [2, 4])
def test_the_reduction_costs_no_more_than_its_roundings(parts, x):
    """Of k bfloat16 addends a_i, each within u |a_i| of its float32 value and their sum rounded k - 1 times at most:
    |error| <= u sum |a_i| + (k - 1) u max |partial sum|, and one device's result has an error of u |y|; u = 2^-9."""
    plain = make_layer(CONFIG4, dtype=jnp.bfloat16)
    x = x.astype(jnp.bfloat16)
    expected, _ = run(plain, x)
    got, _ = run(spread(plain, MLASharding(mesh(AUTO, (parts,), ("t",)), heads="t")), x)
    addends = []
    for i in range(parts):  # one device's heads alone
        columns = jnp.arange(4 * 24) // (4 * 24 // parts) == i
        o_proj = jnp.where(columns[None], plain.weights.o_proj, 0)
        weights = dataclasses.replace(plain.weights, o_proj=o_proj)
        addends.append(run(MLAAttention(CONFIG4, weights=weights, dtype=jnp.bfloat16), x)[0].astype(np.float64))
    bound = 2.0**-9 * ((1 + parts) * np.sum(np.abs(addends), axis=0) + np.abs(expected.astype(np.float64)))
    difference = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    assert (difference <= bound).all() and difference.max() > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sequences_are_bitwise_those_of_one_device(dtype, x):
    plain = make_layer(CONFIG4, dtype=dtype)
    layer = spread(plain, MLASharding(mesh(AUTO, (2,), ("d",)), batch="d"))
    x = x.astype(dtype).at[3].set(x[1].astype(dtype))
    got, cache = run(layer, x)
    for rows in (slice(0, 2), slice(2, 4)):
        own, own_cache = [], plain.init_cache(2, 13)
        lengths = jnp.array([5, 3]) if rows.start == 0 else jnp.array([5, 5])
        y, own_cache = PREFILL(plain, x[rows, :5], own_cache, lengths=lengths)
        own.append(y)
        for t in (5, 6):
            y, own_cache = STEP(plain, x[rows, t : t + 1], own_cache)
            own.append(y)
        np.testing.assert_array_equal(got[rows], np.concatenate(own, axis=1))
        np.testing.assert_array_equal(cache.entries[rows], own_cache.entries)


@pytest.mark.parametrize("parts", [2, 8])
def test_contexts_hold_every_other_slot_and_merge_to_the_whole(parts, x, rng):
    plain = make_layer(CONFIG4)
    layer = spread(plain, MLASharding(mesh(AUTO, (parts,), ("c",)), context="c"))
    (expected, whole), (got, split) = run(plain, x, capacity=16), run(layer, x, capacity=16)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0)
    for s in range(7):
        stored = s % parts * (16 // parts) + s // parts
        np.testing.assert_allclose(split.entries[0, stored], whole.entries[0, s], rtol=1e-6, atol=1e-6)
    # A poisoned slot past the lengths, on every device, and a sequence that takes no part.
    full = np.asarray(split.entries).copy()
    full[:, [i for i in range(16) if i % (16 // parts) * parts + i // (16 // parts) >= 7]] = np.nan
    poisoned = dataclasses.replace(split, entries=jax.device_put(full, split.entries.sharding))
    token = jnp.asarray(rng.standard_normal((4, 1, 96)), jnp.float32)
    y, _ = STEP(layer, token, poisoned, lengths=jnp.array([1, 1, 0, 1]))
    z, _ = STEP(plain, token, whole, lengths=jnp.array([1, 1, 0, 1]))
    np.testing.assert_allclose(y, z, atol=1e-5, rtol=0)
    assert not np.asarray(y[2]).any()


def test_a_merge_in_bfloat16_costs_its_roundings(x):
    """Against the float32 layer, whose own error is far less: on top of one device's error the addends' one rounding
    of 2^-9 each and the all-reduce's, so three times one device's rms error is generous by derivation, not by taste:
    one device rounds q, latents, probabilities, heads and y, at least two roundings of 2^-9 on each path."""
    plain = make_layer(CONFIG4, dtype=jnp.bfloat16)
    wide = MLAAttention(
        CONFIG4,
        weights=jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, plain.weights),
        dtype=jnp.float32,
    )
    exact = run(wide, x.astype(jnp.bfloat16).astype(jnp.float32))[0]

    def error(layer):
        got = run(layer, x.astype(jnp.bfloat16))[0].astype(np.float64)
        return np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2))

    one = error(plain)
    many = error(spread(plain, MLASharding(mesh(AUTO, (4,), ("c",)), context="c")))
    assert 0 < one < 0.02 and many <= np.sqrt(one**2 + 2 * 2.0**-18 * 4)


def test_capacity_is_that_of_all_devices(x):
    layer = spread(make_layer(CONFIG4), MLASharding(mesh(AUTO, (2,), ("c",)), context="c"))
    cache = layer.init_cache(4, 4)
    y, cache = jax.jit(MLAAttention.prefill)(layer, x[:, :6], cache)  # traced: dropped, not an error
    assert not np.asarray(y[:, 4:]).any() and np.asarray(y[:, :4]).any() and (cache.length == 4).all()
    with pytest.raises(ValueError, match="must have room"):
        layer.decode(x[:, :1], cache)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_inside_a_users_own_shard_map(kind, x):
    """Over all axes the step runs on the parts as they are; over one, the rest is split within."""
    plain = make_layer(CONFIG4)
    layer = spread(plain, MLASharding(mesh(kind), heads="t", batch="d"))
    cache = layer.init_cache(4, 8)
    expected, _ = plain.decode(x[:, :1], plain.init_cache(4, 8))

    def specs(tree, keep=("d", "t")):
        return jax.tree.map(lambda a: P(*(n if n in keep else None for n in a.sharding.spec)), tree)

    def step(layer, x, cache):
        return layer.decode(x, cache)

    token = jax.device_put(x[:, :1], NamedSharding(layer.sharding.mesh, P("d")))
    for names in ({"d", "t", "c"}, {"d"}):
        mapped = jax.shard_map(
            step,
            mesh=layer.sharding.mesh,
            in_specs=(specs(layer, names), P("d"), specs(cache, names)),
            out_specs=(P("d"), specs(cache, names)),
            axis_names=names,
            check_vma=False,
        )
        y, after = jax.jit(mapped)(layer, token, cache)
        np.testing.assert_allclose(y, expected, atol=1e-5, rtol=0)
        assert (after.length == 1).all()


def test_under_a_mesh_in_use_and_within_scan(x):
    plain = make_layer(CONFIG4)
    layer = spread(plain, MLASharding(mesh(EXPLICIT), heads="t", batch="d"))
    xs = jnp.moveaxis(x, 1, 0)[:, :, None]

    @jax.jit
    def scanned(layer, xs, cache):
        def body(cache, x):
            y, cache = layer.decode(x, cache)
            return cache, y

        return jax.lax.scan(body, cache, xs)[1]

    with jax.set_mesh(layer.sharding.mesh):
        got = scanned(layer, jax.device_put(xs, P(None, "d")), layer.init_cache(4, 8))
    np.testing.assert_allclose(got, scanned(plain, xs, plain.init_cache(4, 8)), atol=1e-5, rtol=0)
    with jax.set_mesh(mesh(AUTO, (8,), ("t",))), pytest.raises(ValueError, match="must be the one in use"):
        jax.jit(MLAAttention.decode)(layer, x[:, :1], layer.init_cache(4, 8))


def test_random_layers_biases_and_packed_linears(x):
    """rngs make the same weights on any devices; a bias is added once; o_proj's groups are split along the heads."""
    config = small_config(num_attention_heads=4, v_head_dim=32, attention_bias=True)
    kwargs = {"linear_formats": {"o_proj": "mxfp4", "q_b_proj": "dense"}, "kv_b_format": "nvfp4"}
    plain = make_layer(config, **kwargs)
    again = MLAAttention(
        config, dtype=jnp.float32, rngs=nnx.Rngs(0), sharding=MLASharding(mesh(), heads="t"), **kwargs
    )
    for a, b in zip(jax.tree.leaves(plain.weights.o_proj), jax.tree.leaves(again.weights.o_proj), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    layer = spread(plain, MLASharding(mesh(), heads="t", batch="d", context="c"))
    assert {s.data.shape for s in layer.weights.o_proj.scales.addressable_shards} == {(96, 2)}
    np.testing.assert_allclose(run(layer, x)[0], run(plain, x)[0], atol=1e-5, rtol=0)


def test_checkpoints_load_to_their_devices(tmp_path, rng):
    config = CONFIG | {"num_attention_heads": 4}
    tensors = layer_tensors(rng, kv_b="dense")
    for name, shape in {"q_b_proj": (4 * 24, 40), "o_proj": (96, 4 * 32)}.items():
        tensors[f"model.layers.0.self_attn.{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
    del tensors["model.layers.0.self_attn.kv_b_proj.weight"]
    rows = {"weight": (4 * 48, 32), "weight_scale": (4 * 48, 2)}
    for suffix, shape in rows.items():
        tensors[f"model.layers.0.self_attn.kv_b_proj.{suffix}"] = rng.integers(118, 127, shape, np.uint8)
    root = write_checkpoint(tmp_path, tensors, config)
    plain = load_mla_layer(root, 0, dtype=jnp.float32)
    sharding = MLASharding(mesh(), heads="t", batch="d", context="c")
    layer = load_mla_layer(root, 0, dtype=jnp.float32, sharding=sharding)
    assert layer.sharding == sharding and isinstance(layer.weights.kv_b_proj, FP4Array)
    for a, b in zip(jax.tree.leaves(layer.weights), jax.tree.leaves(plain.weights), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert {s.data.shape for s in layer.weights.kv_b_proj.codes.addressable_shards} == {(2, 48, 64)}
    x = jnp.asarray(rng.standard_normal((2, 7, 96)), jnp.float32)
    expected = run(plain, x)[0]
    np.testing.assert_allclose(run(layer, x)[0], expected, atol=2e-6 * np.abs(expected).max() + 1e-5, rtol=0)


def test_fragment_order_is_made_shard_by_shard(x):
    """What a Hopper GPU's layer holds. Heads have an order each; o_proj's columns one for each device's part."""
    config = small_config(
        hidden_size=128, num_attention_heads=4, qk_nope_head_dim=64, v_head_dim=64, kv_lora_rank=128, q_lora_rank=64
    )
    formats = {"linear_formats": {"o_proj": "mxfp4", "q_b_proj": "mxfp4"}}
    plain = make_layer(config, **formats)
    for kind in (AUTO, EXPLICIT):
        sharding = MLASharding(mesh(kind), heads="t")
        layer = spread(plain, sharding)
        w, whole = layer.weights, plain.weights
        kv_b, o_proj = ordered(w.kv_b_proj, "kv_b_proj", 64, sharding), ordered(w.o_proj, "o_proj", 0, sharding)
        q_b = ordered(w.q_b_proj, "q_b_proj", 0, sharding)
        assert q_b.order is None  # 144 rows on a device, no multiple of 64
        assert {s.data.shape for s in kv_b.codes.addressable_shards} == {(2, 128, 128)}
        same(kv_b, whole.kv_b_proj.in_fragment_order(64))
        assert o_proj.order.column_parts == 2
        for shard in o_proj.codes.addressable_shards:
            columns = shard.index[1]
            part = FP4Array.from_packed(
                whole.o_proj.packed[:, columns.start // 2 : columns.stop // 2],
                whole.o_proj.scales[:, columns.start // 32 : columns.stop // 32],
            )
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(part.in_fragment_order().codes))
        if kind == EXPLICIT:
            continue
        # It knows the way back, and the step does not care.
        same(o_proj.in_checkpoint_order(), whole.o_proj)
        weights = dataclasses.replace(w, kv_b_proj=kv_b, o_proj=o_proj)
        reordered = MLAAttention(config, weights=weights, dtype=jnp.float32, sharding=sharding)
        assert reordered.weights.o_proj.order == o_proj.order
        wide = jnp.concatenate([x, x[..., :32]], -1)
        np.testing.assert_array_equal(run(reordered, wide)[0], run(layer, wide)[0])


def test_a_global_scale_belongs_to_every_shard():
    config = small_config(
        hidden_size=128, num_attention_heads=4, qk_nope_head_dim=64, v_head_dim=64, kv_lora_rank=128, q_lora_rank=64
    )
    plain, sharding = make_layer(config, kv_b_format="nvfp4"), MLASharding(mesh(), heads="t")
    w = spread(plain, sharding).weights.kv_b_proj
    assert w.global_scale is not None
    same(ordered(w, "kv_b_proj", 64, sharding), plain.weights.kv_b_proj.in_fragment_order(64))


def same(a: FP4Array, b: FP4Array) -> None:
    assert a.order == b.order
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_an_order_that_cannot_be_split_is_undone(x):
    """A layer that one device has put in order, spread over two: o_proj's whole order is no order of its parts."""
    config = small_config(hidden_size=128, num_attention_heads=4, v_head_dim=64, kv_lora_rank=128)
    plain = make_layer(config, linear_formats={"o_proj": "mxfp4"})
    weights = dataclasses.replace(plain.weights, o_proj=plain.weights.o_proj.in_fragment_order())
    layer = MLAAttention(config, weights=weights, dtype=jnp.float32, sharding=MLASharding(mesh(), heads="t"))
    assert layer.weights.o_proj.order is None
    same(layer.weights.o_proj, plain.weights.o_proj)
    assert MLAAttention(config, weights=weights, sharding=MLASharding(mesh(), batch="d")).weights.o_proj.order


# Refusals


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"heads": "tp"}, r"heads must name axes of the mesh; got 'tp', the mesh has \('d', 't', 'c'\)"),
        ({"heads": "t", "batch": "t"}, "must have mesh axes of its own; got 't' twice"),
        ({"heads": ("t", "t")}, "twice"),
    ],
)
def test_rules_name_axes_of_the_mesh_once(rules, match):
    with pytest.raises(ValueError, match=match):
        MLASharding(mesh(), **rules)


@pytest.mark.bad_input
def test_no_head_is_cut():
    with pytest.raises(ValueError, match=r"divide num_attention_heads = 3; got size 2\. Legal sizes: \[1, 3\]"):
        spread(make_layer(small_config()), MLASharding(mesh(), heads="t"))


@pytest.mark.bad_input
def test_more_devices_than_heads():
    weights, cache = make_layer(CONFIG4).weights, init_cache(CONFIG4, 2, 8, dtype=jnp.float32)
    sharding = MLASharding(mesh(AUTO, (8,), ("t",)), heads="t")
    with pytest.raises(ValueError, match=r"num_attention_heads = 4; got size 8\. Legal sizes: \[1, 2, 4\]"):
        mla_decode(weights, jnp.ones((2, 1, 96)), cache, CONFIG4, dtype=jnp.float32, sharding=sharding)


@pytest.mark.bad_input
def test_no_scale_group_is_cut():
    config = small_config(num_attention_heads=8, v_head_dim=8)  # 64 columns of o_proj, two groups
    plain = make_layer(config, linear_formats={"o_proj": "mxfp4"})
    with pytest.raises(ValueError, match=r"scale groups of 32 whole .* got size 4\. Legal sizes: \[1, 2\]"):
        spread(plain, MLASharding(mesh(AUTO, (4,), ("t",)), heads="t"))
    spread(plain, MLASharding(mesh(AUTO, (2,), ("t",)), heads="t"))


@pytest.mark.bad_input
def test_a_checkpoint_that_cannot_be_split_is_not_read(tmp_path, rng, monkeypatch):
    from mla_fp4_jax.checkpoint.safetensors import SafetensorsFile

    root = write_checkpoint(tmp_path, layer_tensors(rng))  # 3 heads
    read = []
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: read.append(name))
    with pytest.raises(ValueError, match="divide num_attention_heads = 3"):
        load_mla_layer(root, 0, sharding=MLASharding(mesh(), heads="t"))
    assert read == []


@pytest.mark.bad_input
def test_sequences_slots_and_pages_divide():
    sharding = MLASharding(mesh(), batch="d", context="c")
    with pytest.raises(ValueError, match=r"multiple of the 2 devices along batch; got 3\. Pad it to 4"):
        init_cache(CONFIG4, 3, 8, sharding=sharding)
    with pytest.raises(ValueError, match="num_pages must be a positive multiple of 4 devices; got 6"):
        init_cache(CONFIG4, 2, 8, page_size=16, num_pages=6, sharding=sharding)
    layer = spread(make_layer(CONFIG4), sharding)
    with pytest.raises(ValueError, match=r"S, the cache's capacity, must be a multiple of the 2 .*; got 7"):
        layer.decode(jnp.ones((2, 1, 96)), init_cache(CONFIG4, 2, 7, dtype=jnp.float32))
    with pytest.raises(ValueError, match="along batch; got 1"):
        layer.decode(jnp.ones((1, 1, 96)), init_cache(CONFIG4, 1, 8, dtype=jnp.float32))


@pytest.mark.bad_input
def test_with_explicit_axes_misplaced_weights_are_refused():
    sharding = MLASharding(mesh(EXPLICIT), heads="t")
    weights = spread(make_layer(CONFIG4), sharding).weights
    wrong = jax.device_put(weights.q_b_proj, NamedSharding(sharding.mesh, P(None, "t")))
    weights = dataclasses.replace(weights, q_b_proj=wrong)
    cache = init_cache(CONFIG4, 2, 8, dtype=jnp.float32, sharding=sharding)
    with pytest.raises(ValueError, match="weights and cache must lie as it says"):
        mla_decode(weights, jnp.ones((2, 1, 96)), cache, CONFIG4, dtype=jnp.float32, sharding=sharding)
