"""Hugging Face configs of the families whose attention is MLA: what they share, where they differ, who is refused.

Read off transformers 5.24's modelling code of each (facts, not text), and of DeepSeek's own inference code:

    deepseek_v2, longcat_flash,      pairs (x0, x1), ... whatever the config says
      deepseek_v32, glm_moe_dsa
    deepseek_v3, kimi_k2, youtu,     rope_interleave decides, true unless given
      glm4_moe_lite, mistral4, axk1
    minicpm3                         two halves
    longcat_flash                    two attentions to a layer; q times sqrt(E/Q), normed latent times sqrt(E/L)
    deepseek_v32, glm_moe_dsa        attend to index_topk tokens that an indexer picks; here to all
    mistral4                         llama_4_scaling_beta
    kimi_k25, mistral3, ...          the language model's config lies in text_config
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from mla_fp4_jax.config.layer import MLAConfig, RopeConfig
from mla_fp4_jax.errors import CheckpointError

SIZES = (
    "hidden_size",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
NESTED = ("text_config", "language_config")
ALWAYS_INTERLEAVED = ("deepseek_v2", "deepseek_v32", "glm_moe_dsa", "longcat_flash")
INDEXED = ("deepseek_v32", "glm_moe_dsa")
MODEL_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "kimi_k2",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "minicpm3",
    "longcat_flash",
    "mistral4",
    "youtu",
    "axk1",
)
# MLA, or what looks like it, with a difference that is not implemented.
REFUSED = {
    "deepseek_v4": "it has no kv_b_proj; its output projection is grouped",
    "kimi_linear": "its MLA layers use no rotary embedding and alternate with linear attention",
    "axk2": "a gate multiplies its attention's output, fused with the queries",
    "bailing_hybrid": "a gate multiplies its attention's output",
    "hy_v4": "a gate multiplies its attention's output",
    "mistral_large4_text": "its layers share keys and values, and some use no rotary embedding",
    "dots3_note_text": "its rope key is normed",
    "glm5_next_text": "its indexer compresses keys, and other layers are linear attention",
}
# Switches of attention that the supported families do not have, and what they must be where they occur.
_MUST_BE = {"use_mla": True, "mla_use_nope": False, "use_qk_norm": False, "qk_layernorm": False, "use_gate": False}


@dataclasses.dataclass(frozen=True)
class HFModel:
    """What a config says of a model's attention.

    Attributes:
        config: of each attention.
        model_type: None where the config has none.
        num_layers: attentions in the model, multi-token prediction not counted; None where the config is silent.
        attentions_per_layer: 2 in LongCat, whose layer N holds self_attn.0 and self_attn.1.
        index_topk: the number of tokens that an indexer would pick; None without one. Attention here is to all:
            the same while there are no more than that.
    """

    config: MLAConfig
    model_type: str | None
    num_layers: int | None
    attentions_per_layer: int = 1
    index_topk: int | None = None


def read_hf_config(values: Mapping[str, Any], where: str = "config") -> HFModel:
    """Read a config's values; `where` names it in errors.

    Raises:
        CheckpointError: a missing or impossible value, a model_type that is unknown or refused.
    """
    try:
        return _read(_language_model(values))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def _language_model(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if values.get("kv_lora_rank") is None:
        for key in NESTED:
            if isinstance(values.get(key), Mapping):
                return values[key]
    return values


def _read(values: Mapping[str, Any]) -> HFModel:
    if "dim" in values and "n_heads" in values and "hidden_size" not in values:
        values = _from_deepseek(values)
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in REFUSED:
        raise CheckpointError(f"model_type {model_type!r} is not implemented: {REFUSED[model_type]}.")
    if model_type is not None and model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"model_type must be one of {', '.join(MODEL_TYPES)}; got {model_type!r}. "
            "Its attention may differ from DeepSeek's; remove the key only if you know that it does not."
        )
    if model_type == "minicpm3" and values.get("v_head_dim") is None and values.get("num_attention_heads"):
        values = {**values, "v_head_dim": values.get("hidden_size", 0) // values["num_attention_heads"]}
    missing = [name for name in SIZES if values.get(name) is None]
    if missing:
        raise CheckpointError(f"an MLA config must have {', '.join(missing)}; found keys {sorted(values)[:40]}.")
    for name in ("attention_bias", "rope_interleave", *_MUST_BE):
        if not isinstance(values.get(name) or False, bool):
            raise CheckpointError(f"{name} must be true or false; got {values[name]!r}.")
        if values.get(name) is not None and values[name] != _MUST_BE.get(name, values[name]):
            raise CheckpointError(f"{name} must be {_MUST_BE[name]}; got {values[name]!r}, which is not implemented.")
    config = MLAConfig(
        **{name: values[name] for name in SIZES},
        q_lora_rank=values.get("q_lora_rank"),
        attention_bias=bool(values.get("attention_bias") or False),
        rope=_rope(values),
        rope_interleave=_interleaved(model_type, values),
    )
    per_layer = 1
    if model_type == "longcat_flash":
        config, per_layer = _longcat(config, values), 2
    layers = values.get("num_hidden_layers", values.get("num_layers"))
    layers = layers * per_layer if type(layers) is int and 0 < layers < 1 << 20 else None
    topk = None
    if model_type in INDEXED or values.get("index_topk") is not None:
        topk = values.get("index_topk", 2048)
        if type(topk) is not int or topk < 1:
            raise CheckpointError(f"index_topk must be an integer >= 1; got {topk!r}.")
    return HFModel(config, model_type, layers, per_layer, topk)


def _interleaved(model_type: str | None, values: Mapping[str, Any]) -> bool:
    if model_type == "minicpm3":
        return False
    if model_type in ALWAYS_INTERLEAVED or values.get("rope_interleave") is None:
        return True
    return values["rope_interleave"]


def _longcat(config: MLAConfig, values: Mapping[str, Any]) -> MLAConfig:
    if config.q_lora_rank is None:
        raise CheckpointError("longcat_flash must have q_lora_rank; got none.")
    scales = {
        "q_scale": ("mla_scale_q_lora", config.q_lora_rank),
        "latent_scale": ("mla_scale_kv_lora", config.kv_lora_rank),
    }
    changes = {}
    for field, (key, rank) in scales.items():
        if values.get(key) not in (None, True, False):
            raise CheckpointError(f"{key} must be true or false; got {values[key]!r}.")
        if values.get(key) is not False:
            changes[field] = math.sqrt(config.hidden_size / rank)
    return dataclasses.replace(config, **changes)


def _rope(values: Mapping[str, Any]) -> RopeConfig:
    settings = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"rope_parameters / rope_scaling must be an object; got {settings!r}.")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    theta = settings.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        theta = 10000000.0 if values.get("model_type") == "longcat_flash" else 10000.0
    original = settings.get("original_max_position_embeddings") or values.get("max_position_embeddings")
    beta = settings.get("llama_4_scaling_beta")
    if rope_type == "default":
        if beta is None:
            return RopeConfig(theta=theta)
        if original is None:
            raise CheckpointError("llama_4_scaling_beta needs original_max_position_embeddings.")
        return RopeConfig(theta=theta, llama_4_scaling_beta=beta, original_max_position_embeddings=original)
    if rope_type == "longrope":
        return _longrope(values, settings, theta)
    if rope_type != "yarn":
        raise CheckpointError(
            f"rope_type must be 'default', 'yarn' or 'longrope'; got {rope_type!r}, which is not implemented."
        )
    optional = (
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
        "factor",
        "llama_4_scaling_beta",
    )
    if original is None:
        raise CheckpointError("YaRN needs original_max_position_embeddings or max_position_embeddings.")
    given = {name: settings[name] for name in optional if settings.get(name) is not None}
    return RopeConfig(theta=theta, rope_type="yarn", original_max_position_embeddings=original, **given)


def _longrope(values: Mapping[str, Any], settings: Mapping[str, Any], theta: Any) -> RopeConfig:
    """LongRoPE where one list of factors serves every length: MiniCPM3 extends nothing."""
    short, long = settings.get("short_factor"), settings.get("long_factor")
    longest: Any = values.get("max_position_embeddings")
    original: Any = settings.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    original = longest if original is None else original
    sizes = isinstance(longest, int) and isinstance(original, int) and min(longest, original) > 1
    if not isinstance(short, list) or not isinstance(long, list) or not sizes:
        raise CheckpointError("longrope must have short_factor, long_factor and max_position_embeddings.")
    if longest > original and short != long:
        raise CheckpointError(
            "longrope with short_factor and long_factor that differ is not implemented: keys would have to be "
            f"rotated again when a sequence passes {original} tokens."
        )
    attention_factor = settings.get("attention_factor")
    if attention_factor is None:
        factor = settings.get("factor") or longest / original
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta=theta,
        rope_type="longrope",
        original_max_position_embeddings=original,
        attention_factor=attention_factor,
        frequency_divisors=tuple(short),
    )


def _from_deepseek(values: Mapping[str, Any]) -> dict[str, Any]:
    """The ModelArgs of DeepSeek's own inference code under Hugging Face's names, its defaults filled in."""
    names = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "v_head_dim": "v_head_dim",
        "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_nope_head_dim",
        "qk_rope_head_dim": "qk_rope_head_dim",
        "index_topk": "index_topk",
    }
    found = {ours: values[theirs] for ours, theirs in names.items() if values.get(theirs) is not None}
    found["q_lora_rank"] = values.get("q_lora_rank") or None  # 0 there
    found["rope_theta"] = values.get("rope_theta", 10000.0)
    longest, original = values.get("max_seq_len", 4096 * 4), values.get("original_seq_len", 4096)
    if longest > original:
        mscale = values.get("mscale", 1.0)
        found["rope_scaling"] = {
            "type": "yarn",
            "factor": values.get("rope_factor", 40),
            "beta_fast": values.get("beta_fast", 32),
            "beta_slow": values.get("beta_slow", 1),
            "mscale": mscale,
            "mscale_all_dim": mscale,
            "original_max_position_embeddings": original,
        }
    return found
