"""Families of models whose attention is MLA: layers against transformers' own, and refusals by name."""

from __future__ import annotations

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import DATA, write_checkpoint

from mla_fp4_jax import CheckpointError, MLAConfig, load_mla_layer
from mla_fp4_jax.checkpoint import plan_mla_layer
from mla_fp4_jax.config import RopeConfig
from mla_fp4_jax.config.hugging_face import REFUSED, read_hf_config

FAMILIES = json.loads((DATA / "families.json").read_text())
ATOL = 5e-5  # design.md, "Numerics contract"


def family_weights(name, shape):
    spec = importlib.util.spec_from_file_location("make_families", DATA / "make_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.family_weights(name, tuple(shape))


def write_family(root, family):
    about = FAMILIES[family]
    prefix = "model.layers.0.self_attn." + ("0." if family == "longcat_flash" else "")
    tensors = {prefix + name: family_weights(name, shape) for name, shape in about["tensors"].items()}
    return write_checkpoint(root, tensors, about["config"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_layer_gives_what_transformers_computed(tmp_path, family):
    layer = load_mla_layer(write_family(tmp_path, family), 0, dtype=jnp.float32)
    x = jnp.asarray(family_weights("x", (1, 16, 96)) * 4)
    with np.load(DATA / "families.npz") as arrays:
        expected = arrays[family]
    y, _ = layer.prefill(x, layer.init_cache(1, 16))
    np.testing.assert_allclose(np.asarray(y), expected, atol=ATOL, rtol=0)
    _, cache = layer.prefill(x[:, :9], layer.init_cache(1, 16))
    step, _ = layer.decode(x[:, 9:], cache)
    np.testing.assert_allclose(np.asarray(step), expected[:, 9:], atol=ATOL, rtol=0)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_an_indexer_is_left_out_and_said_so(tmp_path, family):
    plan = plan_mla_layer(write_family(tmp_path, family), 0)
    assert plan.unused and all(".indexer." in name for name in plan.unused)
    assert any("indexer picks" in note and "up to 64 tokens" in note for note in plan.notes)


def test_longcats_layers_hold_two_attentions(tmp_path):
    config = FAMILIES["longcat_flash"]["config"] | {"num_layers": 2}
    shapes = FAMILIES["longcat_flash"]["tensors"]
    names = [f"model.layers.{i // 2}.self_attn.{i % 2}." for i in range(4)]
    tensors = {p + n: family_weights(n, s) * (i + 1) for i, p in enumerate(names) for n, s in shapes.items()}
    root = write_checkpoint(tmp_path, tensors, config)
    for i, prefix in enumerate(names):
        assert plan_mla_layer(root, i).prefix == prefix
    assert read_hf_config(config).num_layers == 4


V3 = FAMILIES["deepseek_v3"]["config"] | {"rope_interleave": None}


@pytest.mark.parametrize("model_type", ["kimi_k2", "deepseek_v3", "mistral4"])
@pytest.mark.parametrize("key", ["text_config", "language_config"])
def test_the_language_models_config_may_be_inside(model_type, key):
    inner = V3 | {"model_type": model_type}
    assert MLAConfig.from_hf({"model_type": "kimi_k25", key: inner, "hidden_size": 7}) == MLAConfig.from_hf(inner)


def test_deepseeks_own_arguments():
    given = {
        "dim": 96,
        "n_heads": 3,
        "n_layers": 2,
        "q_lora_rank": 0,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 32,
        "mscale": 0.707,
    }
    config = MLAConfig.from_hf(given)
    assert config.q_lora_rank is None and config.num_attention_heads == 3
    # Its defaults: context extended from 4096 to 16384, by a factor of 40; cos and sin are never scaled.
    assert (config.rope.rope_type, config.rope.factor, config.rope.cos_sin_scale) == ("yarn", 40, 1.0)
    assert config.softmax_scale == pytest.approx(32**-0.5 * (0.0707 * np.log(40) + 1) ** 2)
    assert MLAConfig.from_hf(given | {"max_seq_len": 4096}).rope == RopeConfig()


def test_minicpm3s_value_heads_default_to_the_hidden_size():
    config = {**V3, "model_type": "minicpm3", "v_head_dim": None}
    assert MLAConfig.from_hf(config).v_head_dim == 32
    assert not MLAConfig.from_hf(config).rope_interleave


def test_longcats_factors_may_be_off():
    config = V3 | {"model_type": "longcat_flash", "mla_scale_q_lora": False, "mla_scale_kv_lora": False}
    assert (MLAConfig.from_hf(config).q_scale, MLAConfig.from_hf(config).latent_scale) == (1.0, 1.0)


@pytest.mark.bad_input
@pytest.mark.parametrize("model_type", REFUSED)
def test_mla_that_differs_is_refused_by_name(model_type):
    with pytest.raises(CheckpointError, match=f"model_type '{model_type}' is not implemented: "):
        MLAConfig.from_hf(V3 | {"model_type": model_type})


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "qwen3"}, "model_type must be one of .*; got 'qwen3'"),
        ({"use_mla": False}, "use_mla must be True"),
        ({"mla_use_nope": True}, "mla_use_nope must be False"),
        ({"use_qk_norm": True}, "use_qk_norm must be False"),
        ({"rope_interleave": "yes"}, "rope_interleave must be true or false"),
        ({"model_type": "longcat_flash", "q_lora_rank": None}, "longcat_flash must have q_lora_rank"),
        ({"model_type": "deepseek_v32", "index_topk": -1}, "index_topk must be an integer >= 1"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3', which is not implemented"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4}},
            "longrope must have short_factor",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 128,
                }
            },
            "longrope with short_factor and long_factor that differ",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "must be one to a pair",
        ),
        ({"rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": "x"}}, "llama_4_scaling_beta"),
    ],
)
def test_what_would_compute_something_else_is_refused(change, match):
    with pytest.raises(CheckpointError, match=match):
        MLAConfig.from_hf(V3 | change)
