"""What an MLA layer is: its sizes and its rotary embedding."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mla_fp4_jax.errors import CheckpointError

MAX_CONFIG_BYTES = 16 << 20
MAX_DIMENSION = 1 << 24


def _require_size(where: str, name: str, value: object, *, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_DIMENSION:
        raise ValueError(f"{where}: {name} must be an integer in {low} .. {MAX_DIMENSION}; got {value!r}.")


def _require_number(where: str, name: str, value: object, *, low: float, inclusive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: {name} must be a finite number; got {value!r}.")
    if value < low or (value == low and not inclusive):
        raise ValueError(f"{where}: {name} must be {'>=' if inclusive else '>'} {low}; got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: plain, or YaRN (arXiv 2309.00071) with DeepSeek's two mscale knobs.

    Attributes:
        theta: base of the frequencies.
        rope_type: "default", "yarn" or "longrope" (arXiv 2402.13753, with one list of factors).
        factor: YaRN's context extension, >= 1.
        original_max_position_embeddings: the context length trained before extension (YaRN).
        beta_fast, beta_slow: turns at which YaRN's ramp begins and ends.
        mscale, mscale_all_dim: None or 0 mean absent.
        attention_factor: multiplies cos and sin; None derives it from the mscales.
        truncate: floor and ceil the ramp's ends to whole dimensions.
        frequency_divisors: LongRoPE's factors, one to a pair.
        llama_4_scaling_beta: Mistral's temperature for long contexts: a query at position p is multiplied
            by 1 + beta * ln(1 + floor(p / original_max_position_embeddings)); None for 1.

    Raises:
        ValueError: an unknown rope_type or a value out of its range.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    frequency_divisors: tuple[float, ...] | None = None
    llama_4_scaling_beta: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("default", "yarn", "longrope"):
            raise ValueError(
                f"RopeConfig: rope_type must be 'default', 'yarn' or 'longrope'; got {self.rope_type!r}. "
                "Other rotary variants are not implemented."
            )
        if (self.rope_type == "longrope") != (self.frequency_divisors is not None):
            raise ValueError("RopeConfig: frequency_divisors must be given for longrope, and only for it.")
        for value in self.frequency_divisors or ():
            _require_number("RopeConfig", "frequency_divisors", value, low=0.0, inclusive=False)
        for name in ("theta", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
            _require_number("RopeConfig", name, getattr(self, name), low=0.0, inclusive=False)
        for name in ("mscale", "mscale_all_dim", "attention_factor", "llama_4_scaling_beta"):
            if getattr(self, name) is not None:
                _require_number("RopeConfig", name, getattr(self, name), low=0.0, inclusive=True)
        if self.rope_type == "yarn" and self.factor < 1:
            raise ValueError(f"RopeConfig: factor must be >= 1 for YaRN; got {self.factor}. It extends the context.")

    @property
    def softmax_mscale(self) -> float:
        """What the softmax scale is multiplied by: m(factor, mscale_all_dim)^2 under YaRN, else 1."""
        if self.rope_type != "yarn" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2

    @property
    def cos_sin_scale(self) -> float:
        """What cos and sin are multiplied by (1 for DeepSeek's own configs, whose two mscales are equal)."""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None or self.rope_type == "longrope":
            return 1.0 if self.attention_factor is None else self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 * mscale * ln(factor) + 1, and 1 where nothing is extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Sizes of one Multi-head Latent Attention layer, under Hugging Face's names.

    Letters used everywhere else: E hidden_size, H num_attention_heads, Q q_lora_rank, L kv_lora_rank,
    P qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim. In the shapes of annotations a sum is written LR for L + R.

    Attributes:
        q_lora_rank: rank of the query's low-rank pair; None projects queries straight from the hidden state.
        qk_rope_head_dim: even; 0 leaves rotary embedding out.
        attention_bias: q_a_proj, kv_a_proj_with_mqa and o_proj have a bias (no other projection ever does).
        rope_interleave: the checkpoint's rotary pairs are (x0, x1), (x2, x3), ... rather than two halves.
        layernorm_eps: of q_a_layernorm and kv_a_layernorm. Hugging Face builds both with the class default
            1e-6 whatever config.rms_norm_eps says, so from_hf leaves it alone.
        q_scale: multiplies the queries; part of softmax_scale (LongCat: sqrt(E / Q)).
        latent_scale: multiplies the latent after its norm, not the rope key (LongCat: sqrt(E / L)).

    Raises:
        ValueError: a size out of its range.
    """

    hidden_size: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    attention_bias: bool = False
    rope: RopeConfig = RopeConfig()
    rope_interleave: bool = True
    layernorm_eps: float = 1e-6
    q_scale: float = 1.0
    latent_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"):
            _require_size("MLAConfig", name, getattr(self, name), low=1)
        _require_size("MLAConfig", "qk_rope_head_dim", self.qk_rope_head_dim, low=0)
        if self.q_lora_rank is not None:
            _require_size("MLAConfig", "q_lora_rank", self.q_lora_rank, low=1)
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"MLAConfig: qk_rope_head_dim must be even; got {self.qk_rope_head_dim}. Rotary pairs need two."
            )
        _require_number("MLAConfig", "layernorm_eps", self.layernorm_eps, low=0.0, inclusive=True)
        for name in ("q_scale", "latent_scale"):
            _require_number("MLAConfig", name, getattr(self, name), low=0.0, inclusive=False)
        divisors = self.rope.frequency_divisors
        if divisors is not None and len(divisors) != self.qk_rope_head_dim // 2:
            raise ValueError(
                f"MLAConfig: rope.frequency_divisors must be one to a pair of {self.qk_rope_head_dim} columns; got "
                f"{len(divisors)}. Take them from the checkpoint's config."
            )

    @property
    def qk_head_dim(self) -> int:
        """P + R, a query head's width."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """L + R, what the cache holds per token: the normed latent, then the rotated rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """(P + R)^-1/2, times YaRN's squared mscale and q_scale. Absorption leaves it alone: never (L + R)^-1/2."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_mscale * self.q_scale

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> MLAConfig:
        """Read a Hugging Face config: a dict, a config.json, or a directory that holds one.

        Both spellings of the rotary settings are read: `rope_theta` + `rope_scaling` (real checkpoints) and
        `rope_parameters` (transformers 5); `rope_type` wins over `type`. hugging_face.py lists the families.

        Raises:
            CheckpointError: no such file, not JSON, a missing or impossible value, a model_type whose attention is
                unknown or differs in a way that is not implemented.
        """
        from mla_fp4_jax.config.hugging_face import read_hf_config  # which makes an MLAConfig

        values, where = (source, "config") if isinstance(source, Mapping) else _read_json(Path(source))
        return read_hf_config(values, where).config


def _read_json(path: Path) -> tuple[Mapping[str, Any], str]:
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{file}: a config must be at most {MAX_CONFIG_BYTES} bytes; this is no config.")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Give a checkpoint directory.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: is not valid JSON ({type(error).__name__}: {error}).") from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{file}: must hold a JSON object; got {type(values).__name__}.")
    return values, str(file)
