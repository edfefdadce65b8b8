"""MLAAttention against the naive float64 oracle: every variant, prefill and decode, ragged, padded, inactive."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import make_layer, oracle_layer, small_config

from mla_fp4_jax import MLAAttention, MLAConfig, RopeConfig

YARN = RopeConfig(rope_type="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0)
VARIANTS = {
    "plain": {},
    "no_q_lora": {"q_lora_rank": None},
    "bias": {"attention_bias": True},
    "bias_no_q_lora": {"attention_bias": True, "q_lora_rank": None},
    "half_split": {"rope_interleave": False},
    "yarn": {"rope": YARN},
    "yarn_scaled_cos": {"rope": dataclasses.replace(YARN, mscale_all_dim=None)},
    "yarn_untruncated": {"rope": dataclasses.replace(YARN, truncate=False)},
    "nope": {"qk_rope_head_dim": 0},
    "one_head": {"num_attention_heads": 1},
    "glm": {"qk_nope_head_dim": 192, "v_head_dim": 256, "num_attention_heads": 2},
    "mistral": {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "v_head_dim": 128, "num_attention_heads": 2},
    "eps": {"layernorm_eps": 0.5},
}
# float32 against float64 through five matmuls and a softmax on values of order 1; the recorded Hugging Face
# float32 layers differ from each other by 1e-5 (formats.md section 1), design.md allows 5e-5.
ATOL = 5e-5


def inputs(rng, batch, tokens, config: MLAConfig):
    return jnp.asarray(rng.standard_normal((batch, tokens, config.hidden_size)), jnp.float32)


def run(layer, x, *, decode_from, page_size=None, **kwargs):
    """Prefill x[:, :decode_from] and decode the rest one by one; all outputs and the cache."""
    cache = layer.init_cache(x.shape[0], x.shape[1], page_size=page_size)
    outputs = []
    if decode_from:
        y, cache = layer.prefill(x[:, :decode_from], cache, **kwargs)
        outputs.append(y)
    for t in range(decode_from, x.shape[1]):
        y, cache = layer.decode(x[:, t : t + 1], cache)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_then_decode_matches_the_oracle(rng, variant):
    layer = make_layer(small_config(**VARIANTS[variant]), seed=1)
    x = inputs(rng, 2, 7, layer.config)
    y, cache = run(layer, x, decode_from=4)
    for b in range(2):
        expected, latent, k_rope = oracle_layer(layer, x[b])
        np.testing.assert_allclose(y[b], expected, atol=ATOL, rtol=0)
        np.testing.assert_allclose(cache.latent[b], latent, atol=ATOL, rtol=0)
        np.testing.assert_allclose(cache.k_rope[b], k_rope, atol=ATOL, rtol=0)


def test_the_attention_named_is_the_one_that_runs(rng):
    """Triton's interpreter for prefill and decode, also when it is named on a layer that exists."""
    config = small_config(kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
    layer = make_layer(config, attention_implementation="triton_interpret")
    x = inputs(rng, 1, 3, config)
    y, _ = run(layer, x, decode_from=2)
    np.testing.assert_allclose(y[0], oracle_layer(layer, x[0])[0], atol=ATOL, rtol=0)
    layer.attention_implementation = "mosaic_gpu"
    with pytest.raises(NotImplementedError, match="mla_prefill.*GPU"):
        layer.prefill(x, layer.init_cache(1, 4))
    with pytest.raises(NotImplementedError, match="mla_decode.*GPU"):
        layer.decode(x, layer.init_cache(1, 4))


def test_the_split_size_reaches_the_attention(rng):
    """Given to the layer or set on one that exists."""
    config = small_config(kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)
    layer = make_layer(config, attention_implementation="triton_interpret", split_size=100)
    x, cache = inputs(rng, 1, 3, config), layer.init_cache(1, 131)  # of two splits, if they are of 128
    with pytest.raises(ValueError, match="split_size must be a positive multiple of 128"):
        jax.eval_shape(MLAAttention.decode, layer, x, cache)
    layer.split_size = 128
    y, _ = jax.jit(MLAAttention.decode)(layer, x, cache)
    np.testing.assert_allclose(y[0], oracle_layer(layer, x[0])[0], atol=ATOL, rtol=0)
    layer.split_size = 200
    with pytest.raises(ValueError, match="split_size must be a positive multiple of 128"):
        jax.eval_shape(MLAAttention.decode, layer, x, cache)


@pytest.mark.parametrize("kv_b_format", ["dense", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("linears", ["dense", "mxfp4", "nvfp4"])
def test_each_projection_may_have_its_own_format(rng, kv_b_format, linears):
    config = small_config(q_lora_rank=64, v_head_dim=32)
    formats = {name: linears for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")}
    layer = make_layer(config, kv_b_format=kv_b_format, linear_formats=formats)
    x = inputs(rng, 1, 5, config)
    y, _ = run(layer, x, decode_from=2)
    np.testing.assert_allclose(y[0], oracle_layer(layer, x[0])[0], atol=ATOL, rtol=0)


@pytest.mark.parametrize("page_size", [None, 1, 16])
def test_any_split_into_chunks_gives_the_same(rng, page_size):
    layer = make_layer(small_config(rope=YARN))
    x = inputs(rng, 2, 6, layer.config)
    whole, _ = run(layer, x, decode_from=6, page_size=page_size)
    for split in range(1, 6):
        cache = layer.init_cache(2, 6, page_size=page_size)
        first, cache = layer.prefill(x[:, :split], cache)
        second, cache = layer.prefill(x[:, split:], cache)
        np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=ATOL, rtol=0)
    speculated = layer.init_cache(2, 6, page_size=page_size)
    first, speculated = layer.decode(x[:, :2], speculated)
    second, speculated = layer.decode(x[:, 2:], speculated)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=ATOL, rtol=0)


def test_bf16_is_within_the_models_own_noise(rng):
    config = small_config(hidden_size=256, kv_lora_rank=128, num_attention_heads=4)
    layer = make_layer(config, dtype=jnp.bfloat16)
    x = inputs(rng, 2, 24, config).astype(jnp.bfloat16)
    y, cache = run(layer, x, decode_from=17)
    assert y.dtype == cache.dtype == jnp.bfloat16
    for b in range(2):
        expected = oracle_layer(layer, x[b].astype(jnp.float32))[0]
        error = np.asarray(y[b].astype(jnp.float32)) - expected
        assert np.sqrt((error**2).mean() / (expected**2).mean()) <= 0.015


@pytest.mark.parametrize("page_size", [None, 16])
def test_ragged_prompts_and_inactive_rows(rng, page_size):
    layer = make_layer(small_config(attention_bias=True))
    x = inputs(rng, 4, 6, layer.config)
    lengths = jnp.array([6, 0, 3, 1])
    cache = layer.init_cache(4, 16, page_size=page_size)
    y, cache = layer.prefill(
        jnp.where(jnp.arange(6)[None, :, None] < lengths[:, None, None], x, jnp.nan), cache, lengths=lengths
    )
    for b, n in enumerate([6, 0, 3, 1]):
        assert (np.asarray(y)[b, n:] == 0).all()
        if n:
            np.testing.assert_allclose(y[b, :n], oracle_layer(layer, x[b, :n])[0], atol=ATOL, rtol=0)
    before = jax.tree.map(np.asarray, cache)
    # Rows 1 and 3 sit this step out: their input is garbage, their output 0, their cache untouched.
    new = inputs(rng, 4, 1, layer.config)
    active = jnp.array([1, 0, 1, 0])
    step, cache = layer.decode(jnp.where(active[:, None, None] > 0, new, jnp.nan), cache, lengths=active)
    np.testing.assert_array_equal(cache.length, [7, 0, 4, 1])
    assert (np.asarray(step)[[1, 3]] == 0).all()
    for b, n in ((0, 6), (2, 3)):
        sequence = jnp.concatenate([x[b, :n], new[b]])
        np.testing.assert_allclose(step[b], oracle_layer(layer, sequence)[0][-1:], atol=ATOL, rtol=0)
    if page_size is None:
        np.testing.assert_array_equal(np.asarray(cache.entries)[[1, 3]], before.entries[[1, 3]])
    else:
        own = np.asarray(cache.page_table)[[1, 3]].reshape(-1)
        np.testing.assert_array_equal(np.asarray(cache.pages)[own], before.pages[own])


@pytest.mark.parametrize("scale", [1.0, 0.25, 8.0])
@pytest.mark.parametrize("page_size", [None, 16])
def test_an_e4m3_cache_with_a_scale(rng, page_size, scale):
    """Prefill and decode on it; entries off by at most 2^-4 of themselves move a result by less than that."""
    layer = make_layer(small_config())
    x = inputs(rng, 2, 14, layer.config)
    exact = np.stack([oracle_layer(layer, np.asarray(row))[0] for row in x])
    how = {"page_size": page_size, "dtype": jnp.float8_e4m3fn, "entries_scale": scale}
    first, cache = layer.prefill(x[:, :9], layer.init_cache(2, 14, **how))
    rest, cache = layer.decode(x[:, 9:], cache)
    error = np.concatenate([first, rest], axis=1) - exact
    for part, whole in ((error[:, :9], exact[:, :9]), (error[:, 9:], exact[:, 9:])):
        assert 0 < np.sqrt((part**2).mean()) < 2.0**-4 * np.sqrt((whole**2).mean())
    assert cache.entries_scale == scale and cache.dtype == jnp.float8_e4m3fn


def test_padding_anywhere_is_not_there(rng):
    layer = make_layer(small_config(rope=YARN))
    x = inputs(rng, 3, 8, layer.config)
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [1, 0, 1, 0, 0, 1, 1, 0]], bool)
    y, cache = layer.prefill(
        jnp.where(mask[..., None], x, jnp.nan), layer.init_cache(3, 9), padding_mask=jnp.asarray(mask)
    )
    np.testing.assert_array_equal(cache.length, mask.sum(1))
    for b in range(3):
        expected = oracle_layer(layer, np.asarray(x[b])[mask[b]])[0]
        np.testing.assert_allclose(np.asarray(y[b])[mask[b]], expected, atol=ATOL, rtol=0)
        assert (np.asarray(y[b])[~mask[b]] == 0).all()


def test_positions_are_the_callers_to_set(rng):
    layer = make_layer(small_config(rope=YARN))
    x = inputs(rng, 1, 5, layer.config)
    positions = np.array([[7, 8, 20, 21, 22]])
    y, _ = layer.prefill(x, layer.init_cache(1, 5), positions=jnp.asarray(positions))
    expected = oracle_layer(layer, x[0], positions[0])[0]
    np.testing.assert_allclose(y[0], expected, atol=ATOL, rtol=0)
    assert np.abs(np.asarray(y[0]) - oracle_layer(layer, x[0])[0]).max() > 1e-3


def test_a_sequence_does_not_see_its_neighbours(rng):
    layer = make_layer(small_config())
    x = inputs(rng, 2, 5, layer.config)
    alone, _ = run(layer, x[:1], decode_from=3)
    poisoned, _ = run(layer, x.at[1].set(jnp.nan), decode_from=3)
    np.testing.assert_allclose(poisoned[0], alone[0], atol=1e-6, rtol=0)


def test_absorbed_equals_expanded_per_token(rng):
    layer = make_layer(small_config())
    x = inputs(rng, 2, 6, layer.config)
    a, b = (run(layer, x, decode_from=n)[0] for n in (0, 6))
    np.testing.assert_allclose(a, b, atol=ATOL, rtol=0)


def test_decoding_past_the_capacity_under_jit_harms_nothing(rng):
    layer = make_layer(small_config())
    x = inputs(rng, 2, 4, layer.config)
    y, cache = layer.prefill(x, layer.init_cache(2, 4))
    step = jax.jit(MLAAttention.decode)
    out, after = step(layer, x[:, :1], cache)
    assert (np.asarray(out) == 0).all()
    np.testing.assert_array_equal(after.entries, cache.entries)
    np.testing.assert_array_equal(after.length, [4, 4])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda a, x, c: a.prefill(x[0], c), "x must be"),
        (lambda a, x, c: a.prefill(x[:0], c), "x must be"),
        (lambda a, x, c: a.prefill(x[..., :-1], c), "E = 96"),
        (lambda a, x, c: a.prefill(x[:1], c), "B = 1"),
        (lambda a, x, c: a.decode(x, a.init_cache(2, 3)), "room"),
        (lambda a, x, c: a.decode(x, c, lengths=jnp.array([1])), "lengths"),
        (lambda a, x, c: a.decode(x, c, lengths=jnp.array([1, 5])), "0 .. T = 4"),
        (lambda a, x, c: a.decode(x, c, lengths=jnp.array([-1, 1])), "0 .. T = 4"),
        (lambda a, x, c: a.decode(x, c, lengths=jnp.array([0.5, 1])), "integers"),
        (lambda a, x, c: a.prefill(x, c, padding_mask=jnp.ones((2, 3), bool)), "padding_mask"),
        (
            lambda a, x, c: a.prefill(x, c, padding_mask=jnp.ones((2, 4), bool), lengths=jnp.array([4, 4])),
            "both",
        ),
        (lambda a, x, c: a.prefill(x, c, positions=jnp.zeros((2, 3), jnp.int32)), "positions"),
        (lambda a, x, c: a.prefill(x, make_layer(small_config(kv_lora_rank=32)).init_cache(2, 8)), "L \\+ R"),
    ],
)
def test_bad_calls(rng, call, names):
    layer = make_layer(small_config())
    with pytest.raises(ValueError, match=names):
        call(layer, inputs(rng, 2, 4, layer.config), layer.init_cache(2, 8))


@pytest.mark.bad_input
def test_bad_constructions():
    from flax import nnx

    config, layer = small_config(), make_layer(small_config())
    with pytest.raises(ValueError, match="weights and rngs"):
        MLAAttention(config)
    with pytest.raises(ValueError, match="int4"):
        MLAAttention(config, kv_b_format="int4", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="q_proj"):
        MLAAttention(config, linear_formats={"q_proj": "mxfp4"}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="o_proj"):
        MLAAttention(config, weights=dataclasses.replace(layer.weights, o_proj=jnp.zeros((96, 5))))
    with pytest.raises(ValueError, match="q_a_proj"):
        MLAAttention(small_config(q_lora_rank=None), weights=layer.weights)
