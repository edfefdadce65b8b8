"""What a checkpoint's config says of its weights' formats. It confirms what the tensors show; it never decides alone.

One vocabulary for all producers: "dense", "fp8", "mxfp4", "nvfp4", or another name for what is not read. Sources: the
config keys that AMD Quark 0.13, compressed-tensors 0.19, ModelOpt 0.47, AutoRound 0.15 and transformers 5 write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mla_fp4_jax.checkpoint.patterns import Patterns
from mla_fp4_jax.checkpoint.strict_json import quoted
from mla_fp4_jax.errors import CheckpointError

DEEPSEEK_BLOCK = (128, 128)
# Where `mla-fp4 convert` describes its modules if a config of another method stays in charge of other tensors.
OWN_KEY = "mla_fp4_quantization_config"


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the config says of one module.

    Attributes:
        format: None where it says nothing.
        excluded: it is on the list of what was not quantised.
        block: rows and columns that share an FP8 scale, where the config says.
    """

    format: str | None = None
    excluded: bool = False
    block: tuple[int, int] | None = None


NOTHING = Declared()
EXCLUDED = Declared("dense", excluded=True)


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """The rules of a quantization_config: the first that means a module holds, else the default.

    Attributes:
        method: the config's quant_method; None without one.
        rules: patterns, and what they say.
        default: of all other linears.
        activations: whether activations or caches were meant to be quantised too, which this library does not do.
        added: what `mla-fp4 convert` says under a key of its own of modules that the rest lists as excluded.
    """

    method: str | None = None
    rules: tuple[tuple[Patterns, Declared], ...] = ()
    default: Declared = NOTHING
    activations: bool = False
    added: QuantizationConfig | None = None

    def declared(self, module: str) -> Declared:
        """What the config says of a module, "model.layers.0.self_attn.kv_b_proj"."""
        if self.added is not None and self.added.declared(module).format == "mxfp4":
            return self.added.declared(module)
        for patterns, declared in self.rules:
            if patterns.match(module):
                return declared
        return self.default


def read_quantization(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None) -> QuantizationConfig:
    """Read config.json's quantization_config, wherever it lies, or ModelOpt's hf_quant_config.json.

    Raises:
        CheckpointError: values of the wrong type, or patterns that cannot be understood.
    """
    read = _read(find_quantization_config(config), hf_quant_config)
    added = find_quantization_config(config, (OWN_KEY,))
    return read if added is None else dataclasses.replace(read, added=_read(added, None))


def _read(found: Mapping[str, Any] | None, hf_quant_config: Mapping[str, Any] | None) -> QuantizationConfig:
    if found is None and hf_quant_config is not None:
        inner = hf_quant_config.get("quantization", hf_quant_config)
        found = {"quant_method": "modelopt", **_object("quantization", inner)}
    if found is None:
        return QuantizationConfig()
    if isinstance(found.get("quantization"), Mapping):  # ModelOpt's file, put into config.json whole
        found = {**found, **found["quantization"]}
    method = found.get("quant_method")
    if method is None and "quant_algo" in found:
        method = "modelopt"
    if method is not None and not isinstance(method, str):
        raise CheckpointError(f"quant_method must be a string; got {quoted(method)}.")
    try:
        return _PARSERS.get((method or "").lower(), _unknown)(method, found)
    except CheckpointError as error:
        raise CheckpointError(f"quantization_config: {error}") from None


def find_quantization_config(
    config: Mapping[str, Any], keys: Sequence[str] = ("quantization_config", "compression_config")
) -> Mapping[str, Any] | None:
    """The quantization_config of a config, or of the language model in it; None without one."""
    for part in (config, config.get("text_config"), config.get("language_config")):
        for key in keys:
            if isinstance(part, Mapping) and part.get(key) is not None:
                return _object(key, part[key])
    return None


def _unknown(method: str | None, _: Mapping[str, Any]) -> QuantizationConfig:
    return QuantizationConfig(method)


def _quark(method: str | None, found: Mapping[str, Any]) -> QuantizationConfig:
    everywhere = _object("global_quant_config", found.get("global_quant_config"))
    layers = _object("layer_quant_config", found.get("layer_quant_config"))
    types = _object("layer_type_quant_config", found.get("layer_type_quant_config"))
    rules = [(Patterns(_strings("exclude", found.get("exclude"))), EXCLUDED)]
    parts = [everywhere]
    for pattern, part in layers.items():
        part = _object(pattern, part)
        parts.append(part)
        rules.append((Patterns([pattern]), _quark_weight(part)))
    default = _quark_weight(everywhere)
    for kind, part in types.items():
        if kind.strip("<>'").rsplit(".", 1)[-1].lower() == "linear":
            default = _quark_weight(_object(kind, part))
    cache = found.get("kv_cache_quant_config")
    activations = any(part.get("input_tensors") is not None for part in parts) or bool(cache)
    return QuantizationConfig(method, tuple(rules), default, activations)


def _quark_weight(part: Mapping[str, Any]) -> Declared:
    spec = part.get("weight")
    if spec is None:
        return Declared("dense")
    first = spec[0] if isinstance(spec, list) and spec else spec
    first = _object("weight", first)
    dtype, group, scale = first.get("dtype"), first.get("group_size"), first.get("scale_format")
    if dtype == "fp4" and isinstance(spec, list) and len(spec) == 2 and group == 16:
        return Declared("nvfp4")
    if dtype in ("fp4", "mxfp4") and group == 32 and scale in ("e8m0", None):
        return Declared("mxfp4")
    if dtype == "fp8_e4m3" and group == 32 and scale == "e8m0":
        return Declared("fp8", block=(1, 32))
    if dtype in ("fp8_e4m3", "fp8_e5m2"):
        return Declared("fp8", block=_block(first.get("block_size")))
    return Declared(f"Quark's {quoted(dtype)}")


def _compressed_tensors(method: str | None, found: Mapping[str, Any]) -> QuantizationConfig:
    top = found.get("format")
    rules = [(Patterns(_strings("ignore", found.get("ignore"))), EXCLUDED)]
    default, activations = NOTHING, found.get("kv_cache_scheme") is not None
    for name, part in _object("config_groups", found.get("config_groups")).items():
        group = _object(name, part)
        declared = _compressed_tensors_group(group, group.get("format") or top)
        targets = _strings("targets", group.get("targets"))
        if "Linear" in targets:
            default = declared
        rules.append((Patterns([target for target in targets if target != "Linear"]), declared))
        activations |= group.get("input_activations") is not None
    return QuantizationConfig(method, tuple(rules), default, activations)


def _compressed_tensors_group(group: Mapping[str, Any], form: Any) -> Declared:
    weights = group.get("weights")
    if weights is None:
        return Declared("dense")
    weights = _object("weights", weights)
    kind, bits, size = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    if form == "mxfp4-pack-quantized" or (form is None and (kind, bits, size) == ("float", 4, 32)):
        return Declared("mxfp4")
    if form == "nvfp4-pack-quantized" or (form is None and (kind, bits, size) == ("float", 4, 16)):
        return Declared("nvfp4")
    if kind == "float" and bits == 8:
        block = (1, 32) if size == 32 else _block(weights.get("block_structure"))
        return Declared("fp8", block=block)
    if (kind, bits, size) == ("float", 4, 32):
        return Declared("mxfp4")
    if (kind, bits, size) == ("float", 4, 16):
        return Declared("nvfp4")
    return Declared(f"compressed-tensors' {quoted(form or kind)}")


def _modelopt(method: str | None, found: Mapping[str, Any]) -> QuantizationConfig:
    excluded = _strings("exclude_modules", found.get("exclude_modules"))
    excluded += _strings("ignore", found.get("ignore"))
    rules = [(Patterns(excluded), EXCLUDED)]
    algorithm = found.get("quant_algo")
    for name, part in _object("quantized_layers", found.get("quantized_layers")).items():
        rules.append((Patterns([name]), _modelopt_algorithm(_object(name, part).get("quant_algo"))))
    activations = found.get("kv_cache_quant_algo") is not None or not str(algorithm).upper().startswith("W4A16")
    return QuantizationConfig(method, tuple(rules), _modelopt_algorithm(algorithm), activations)


def _modelopt_algorithm(name: Any) -> Declared:
    upper = name.upper() if isinstance(name, str) else ""
    if "NVFP4" in upper:  # AWQ's as well, where its smoothing went into the norm before: see readers.py
        return Declared("nvfp4")
    if "MXFP4" in upper:
        return Declared("mxfp4")
    if upper.startswith("FP8_PB"):  # per block
        return Declared("fp8", block=DEEPSEEK_BLOCK)
    if upper == "MXFP8":
        return Declared("fp8", block=(1, 32))
    if upper.startswith("FP8"):
        return Declared("fp8")
    return NOTHING if upper in ("", "MIXED_PRECISION") else Declared(f"ModelOpt's {quoted(name)}")


def _auto_round(method: str | None, found: Mapping[str, Any]) -> QuantizationConfig:
    rules = []
    for name, part in _object("extra_config", found.get("extra_config")).items():
        merged = {**found, **_object(name, part)}
        pattern = name if not any(c in name for c in "*\\^$[(") else f"re:{name}"
        rules.append((Patterns([pattern]), _auto_round_weight(merged)))
    activations = isinstance(found.get("act_bits"), int) and found["act_bits"] < 16
    return QuantizationConfig(method, tuple(rules), _auto_round_weight(found), activations)


def _auto_round_weight(part: Mapping[str, Any]) -> Declared:
    kind, bits, size = str(part.get("data_type")), part.get("bits"), part.get("group_size")
    if isinstance(bits, int) and bits >= 16:
        return EXCLUDED
    if kind.startswith("mx_fp") and bits == 4 and size == 32:
        return Declared("mxfp4")
    if kind.startswith("nv_fp") and bits == 4 and size == 16:
        return Declared("nvfp4")
    if kind.startswith("mx_fp") and bits == 8 and size == 32:
        return Declared("fp8", block=(1, 32))
    if kind.startswith("fp") and bits == 8:
        return Declared("fp8")
    return Declared(f"AutoRound's {quoted(kind)}")


def _fp8(method: str | None, found: Mapping[str, Any]) -> QuantizationConfig:
    excluded = _strings("modules_to_not_convert", found.get("modules_to_not_convert"))
    excluded += _strings("ignored_layers", found.get("ignored_layers"))
    block = _block(found.get("weight_block_size"))
    activations = found.get("activation_scheme") is not None
    return QuantizationConfig(method, ((Patterns(excluded), EXCLUDED),), Declared("fp8", block=block), activations)


def _mxfp4(method: str | None, found: Mapping[str, Any]) -> QuantizationConfig:
    excluded = _strings("modules_to_not_convert", found.get("modules_to_not_convert"))
    return QuantizationConfig(method, ((Patterns(excluded), EXCLUDED),), Declared("mxfp4"))


_PARSERS = {
    "quark": _quark,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "auto-round": _auto_round,
    "auto_round": _auto_round,
    "intel/auto-round": _auto_round,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp4": _mxfp4,
}


def _object(key: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{quoted(key)} must be an object; got {quoted(value)}.")
    return value


def _strings(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"{key} must be a list of strings; got {quoted(value)}.")
    return value


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    whole = isinstance(value, (list, tuple)) and len(value) == 2
    if not whole or not all(type(item) is int and 1 <= item <= 1 << 24 for item in value):
        raise CheckpointError(f"a block of weights must be two sizes >= 1; got {quoted(value)}.")
    return value[0], value[1]
