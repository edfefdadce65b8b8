"""MLAConfig and RopeConfig: the numbers a model depends on, and both spellings of Hugging Face's configs."""

from __future__ import annotations

import json
import math

import numpy as np
import oracle
import pytest

from mla_fp4_jax.config import MLAConfig, RopeConfig
from mla_fp4_jax.errors import CheckpointError
from mla_fp4_jax.rope import inverse_frequencies

V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}


def test_both_rope_spellings_read_alike():
    old = MLAConfig.from_hf({**V3, "rope_scaling": YARN})
    new = MLAConfig.from_hf(
        {
            **V3,
            "rope_theta": None,
            "rope_parameters": {**YARN, "rope_type": "yarn", "type": "x", "rope_theta": 10000},
        }
    )
    assert old == new and hash(old) == hash(new)


def test_v3_softmax_scale_is_the_models_own():
    # 192^-1/2 * (0.1 ln 40 + 1)^2: neither inverted, nor 576^-1/2, nor without the squared mscale.
    config = MLAConfig.from_hf({**V3, "rope_scaling": YARN})
    assert config.softmax_scale == pytest.approx(0.1352337788608801, rel=1e-12)
    assert config.rope.cos_sin_scale == 1.0
    assert MLAConfig.from_hf(V3).softmax_scale == pytest.approx(192**-0.5)


def test_v2_lite_mscale():
    rope = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
    config = MLAConfig.from_hf({**V3, "model_type": "deepseek_v2", "q_lora_rank": None, "rope_scaling": rope})
    assert config.q_lora_rank is None
    assert config.softmax_scale == pytest.approx(192**-0.5 * (0.0707 * math.log(40) + 1) ** 2)


@pytest.mark.parametrize(
    ("settings", "cos_sin", "softmax"),
    [
        ({"mscale": None, "mscale_all_dim": None}, 0.1 * math.log(40) + 1, 1.0),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 0.1 * math.log(40) + 1, 1.0),
        ({"mscale": 0.5, "mscale_all_dim": 1.0}, (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1), None),
        ({"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.25}, 1.25, None),
        ({"factor": 1.0, "mscale": None, "mscale_all_dim": None}, 1.0, 1.0),
    ],
)
def test_yarn_scales(settings, cos_sin, softmax):
    rope = MLAConfig.from_hf({**V3, "rope_scaling": {**YARN, **settings}}).rope
    assert rope.cos_sin_scale == pytest.approx(cos_sin)
    assert rope.softmax_mscale == pytest.approx((0.1 * math.log(40) + 1) ** 2 if softmax is None else softmax)


def test_norm_eps_is_the_class_default_whatever_the_config_says():
    assert MLAConfig.from_hf(V3).layernorm_eps == 1e-6


def test_original_context_defaults_to_the_models():
    settings = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    config = MLAConfig.from_hf({**V3, "max_position_embeddings": 8192, "rope_scaling": settings})
    assert config.rope.original_max_position_embeddings == 8192


@pytest.mark.parametrize("dim", [0, 32, 64])
@pytest.mark.parametrize(
    ("theta", "factor", "original"), [(10000.0, 40.0, 4096), (50000.0, 32.0, 4096), (1e6, 4.0, 32768)]
)
def test_yarn_frequencies_match_the_float64_oracle(dim, theta, factor, original):
    rope = RopeConfig(
        theta=theta,
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        mscale_all_dim=1.0,
    )
    expected = oracle.yarn_inv_freq(dim, theta, factor, original, 32, 1)
    # float32 pow, division and two products: a few units of 2^-24 relative.
    np.testing.assert_allclose(inverse_frequencies(rope, dim), expected, rtol=5e-7)


def test_untruncated_ramp_differs():
    kwargs = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    exact, whole = (inverse_frequencies(RopeConfig(truncate=t, **kwargs), 64) for t in (False, True))
    assert not np.array_equal(exact, whole) and exact.shape == whole.shape == (32,)


def test_reads_a_directory_and_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert MLAConfig.from_hf(tmp_path) == MLAConfig.from_hf(tmp_path / "config.json") == MLAConfig.from_hf(V3)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_attention_heads": 10**30}, "num_attention_heads"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank"),
        ({"kv_lora_rank": 512.0}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"v_head_dim": True}, "v_head_dim"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"model_type": "llama"}, "llama"),
        ({"rope_scaling": {**YARN, "type": "longrope"}}, "longrope"),
        ({"rope_scaling": {**YARN, "factor": float("nan")}}, "factor"),
        ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor"),
        ({"rope_scaling": {**YARN, "beta_fast": "32"}}, "beta_fast"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_theta": -1}, "theta"),
    ],
)
def test_bad_configs_are_refused_by_name(change, names):
    with pytest.raises(CheckpointError, match=names):
        MLAConfig.from_hf({**V3, **change})


@pytest.mark.bad_input
@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff", "[" * 100_000])
def test_files_that_are_no_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match="config.json"):
        MLAConfig.from_hf(tmp_path)


@pytest.mark.bad_input
def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        MLAConfig.from_hf(tmp_path / "nowhere")
