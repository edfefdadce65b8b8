"""What an MLA layer is: its sizes, its rotary embedding, and how both are read from a Hugging Face config."""

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
# model_type -> True where Hugging Face's attention is DeepSeek-V2/V3's own, pair layout and all.
KNOWN_MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")


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
        rope_type: "default" or "yarn".
        factor: YaRN's context extension, >= 1.
        original_max_position_embeddings: the context length trained before extension (YaRN).
        beta_fast, beta_slow: turns at which YaRN's ramp begins and ends.
        mscale, mscale_all_dim: None or 0 mean absent.
        attention_factor: multiplies cos and sin; None derives it from the mscales.
        truncate: floor and ceil the ramp's ends to whole dimensions.

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

    def __post_init__(self) -> None:
        if self.rope_type not in ("default", "yarn"):
            raise ValueError(
                f"RopeConfig: rope_type must be 'default' or 'yarn'; got {self.rope_type!r}. "
                "Other rotary variants are not implemented."
            )
        for name in ("theta", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
            _require_number("RopeConfig", name, getattr(self, name), low=0.0, inclusive=False)
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None:
                _require_number("RopeConfig", name, getattr(self, name), low=0.0, inclusive=True)
        if self.rope_type == "yarn" and self.factor < 1:
            raise ValueError(f"RopeConfig: factor must be >= 1 for YaRN; got {self.factor}. It extends the context.")

    @property
    def softmax_mscale(self) -> float:
        """What the softmax scale is multiplied by: m(factor, mscale_all_dim)^2 under YaRN, else 1."""
        if self.rope_type == "default" or not self.mscale_all_dim:
            return 1.0
        return yarn_mscale(self.factor, self.mscale_all_dim) ** 2

    @property
    def cos_sin_scale(self) -> float:
        """What cos and sin are multiplied by (1 for DeepSeek's own configs, whose two mscales are equal)."""
        if self.rope_type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
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
        """(P + R)^-1/2, times YaRN's squared mscale. Absorption does not change it: never (L + R)^-1/2."""
        return self.qk_head_dim**-0.5 * self.rope.softmax_mscale

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> MLAConfig:
        """Read a Hugging Face config: a dict, a config.json, or a directory that holds one.

        Both spellings of the rotary settings are read: `rope_theta` + `rope_scaling` (real checkpoints) and
        `rope_parameters` (transformers 5); `rope_type` wins over `type`.

        Raises:
            CheckpointError: no such file, not JSON, a missing or impossible value, an unknown model_type.
        """
        values, where = (source, "config") if isinstance(source, Mapping) else _read_json(Path(source))
        try:
            return _from_hf(values)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from None
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{where}: {error}") from error


def _from_hf(values: Mapping[str, Any]) -> MLAConfig:
    model_type = values.get("model_type")
    if model_type is not None and model_type not in KNOWN_MODEL_TYPES:
        raise CheckpointError(
            f"model_type must be one of {', '.join(KNOWN_MODEL_TYPES)}; got {model_type!r}. "
            "Its attention may differ from DeepSeek's; remove the key only if you know that it does not."
        )
    required = ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    missing = [name for name in (*required, "qk_rope_head_dim") if values.get(name) is None]
    if missing:
        raise CheckpointError(f"an MLA config must have {', '.join(missing)}; found keys {sorted(values)[:40]}.")
    if not isinstance(values.get("attention_bias") or False, bool):
        raise CheckpointError(f"attention_bias must be true or false; got {values['attention_bias']!r}.")
    return MLAConfig(
        **{name: values[name] for name in required},
        qk_rope_head_dim=values["qk_rope_head_dim"],
        q_lora_rank=values.get("q_lora_rank"),
        attention_bias=bool(values.get("attention_bias") or False),
        rope=_rope_from_hf(values),
        rope_interleave=bool(values.get("rope_interleave", True)),
    )


def _rope_from_hf(values: Mapping[str, Any]) -> RopeConfig:
    settings = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"rope_parameters / rope_scaling must be an object; got {settings!r}.")
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    theta = settings.get("rope_theta", values.get("rope_theta"))
    theta = 10000.0 if theta is None else theta
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type != "yarn":
        raise CheckpointError(f"rope_type must be 'default' or 'yarn'; got {rope_type!r}, which is not implemented.")
    optional = (
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
        "factor",
    )
    original = settings.get("original_max_position_embeddings") or values.get("max_position_embeddings")
    if original is None:
        raise CheckpointError("YaRN needs original_max_position_embeddings or max_position_embeddings.")
    given = {name: settings[name] for name in optional if settings.get(name) is not None}
    return RopeConfig(theta=theta, rope_type="yarn", original_max_position_embeddings=original, **given)


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
