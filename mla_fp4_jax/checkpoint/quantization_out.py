"""The quantization_config of a converted checkpoint, as AMD Quark or compressed-tensors would write it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mla_fp4_jax.checkpoint.patterns import Patterns
from mla_fp4_jax.checkpoint.quantization import OWN_KEY

QUARK, COMPRESSED_TENSORS = "quark", "compressed-tensors"
METHODS = (QUARK, COMPRESSED_TENSORS)
SUFFIXES = {QUARK: ("weight", "weight_scale"), COMPRESSED_TENSORS: ("weight_packed", "weight_scale")}
_EXCLUDED = {"fp8": "modules_to_not_convert", "mxfp4": "modules_to_not_convert", QUARK: "exclude"}
_ROUNDING = {"mse": "even"}  # what the nearest of Quark's own modes is called; decoding does not depend on it


def converted_config(
    config: Mapping[str, Any],
    method: str,
    scale_rule: str,
    converted: list[str],
    others: list[str],
    *,
    others_quantised: bool,
    elsewhere: bool = False,
) -> tuple[dict[str, Any], str | None]:
    """A config that describes converted modules beside what was there before.

    Args:
        config: the source's config.json.
        method: QUARK or COMPRESSED_TENSORS.
        scale_rule: for the record.
        converted: modules that are MXFP4 now.
        others: every other module with a matrix.
        others_quantised: whether any of those is quantised, so that the source's own description has to stay.
        elsewhere: whether ModelOpt's own file holds it, beside this config or instead.

    Returns:
        The config, and a remark where no other tool will understand all of it.
    """
    result = copy.deepcopy(dict(config))
    holder = _holder(result)
    found = holder.get("quantization_config")
    if not converted:
        return result, None
    stays = others_quantised and (found or elsewhere)
    if not stays and (not found or found.get("quant_method") != method):
        make = _new_quark if method == QUARK else _new_compressed_tensors
        holder["quantization_config"] = make(scale_rule, converted, others)
        return result, None
    if found and found.get("quant_method") == method:
        (_add_to_quark if method == QUARK else _add_to_compressed_tensors)(found, scale_rule, converted, others)
        return result, None
    if found:
        _exclude(found, generalised(converted, others))
    own = holder.get(OWN_KEY)
    if own and own.get("quant_method") == method:  # of an earlier conversion
        (_add_to_quark if method == QUARK else _add_to_compressed_tensors)(own, scale_rule, converted, others)
    else:
        make = _new_quark if method == QUARK else _new_compressed_tensors
        holder[OWN_KEY] = make(scale_rule, converted, others)
    return result, (
        f"other tensors keep their {found.get('quant_method') if found else 'modelopt'} quantisation, which a "
        f"{method} config cannot describe: {'quantization_config' if found else 'hf_quant_config.json'} lists the "
        f"converted modules as excluded and {OWN_KEY} describes them; this library reads both, other tools may not"
    )


def excluding(hf_quant_config: Mapping[str, Any], converted: Iterable[str], others: Iterable[str]) -> dict[str, Any]:
    """ModelOpt's own file with converted modules among those that it leaves alone."""
    result = copy.deepcopy(dict(hf_quant_config))
    inner = result.get("quantization", result)
    inner["exclude_modules"] = [*(inner.get("exclude_modules") or []), *generalised(converted, others)]
    return result


def _exclude(found: dict[str, Any], modules: list[str]) -> None:
    method = str(found.get("quant_method"))
    if "auto" in method:  # AutoRound: by module, 16 bits for none
        found["extra_config"] = {**(found.get("extra_config") or {}), **{module: {"bits": 16} for module in modules}}
    else:
        key = _EXCLUDED.get(method, "ignore")
        found[key] = [*(found.get(key) or []), *modules]


def generalised(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """Globs with * for the layers' numbers that mean these modules and none of the others; names where none can."""
    modules, others = list(modules), list(others)
    numbered = {module: re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", module) for module in modules}
    globs = sorted(set(numbered.values()))
    other_forms = {re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", module) for module in others}
    clashing = {glob for glob in globs if glob in other_forms}
    names = [module for module, glob in numbered.items() if glob in clashing]
    return [glob for glob in globs if glob not in clashing] + sorted(names)


def _holder(config: dict[str, Any]) -> dict[str, Any]:
    for key in ("text_config", "language_config"):
        part = config.get(key)
        if config.get("quantization_config") is None and isinstance(part, dict) and part.get("quantization_config"):
            return part
    return config


def _quark_weight(scale_rule: str) -> dict[str, Any]:
    return {
        "dtype": "fp4",
        "qscheme": "per_group",
        "group_size": 32,
        "ch_axis": -1,
        "scale_format": "e8m0",
        "scale_type": "float",
        "scale_calculation_mode": _ROUNDING.get(scale_rule, scale_rule),
        "round_method": "half_even",
        "observer_cls": "PerBlockMXObserver",
        "is_dynamic": False,
        "symmetric": None,
    }


def _quark_layer(scale_rule: str) -> dict[str, Any]:
    empty = {"bias": None, "input_tensors": None, "output_tensors": None, "target_device": None}
    return {**empty, "weight": _quark_weight(scale_rule)}


def _new_quark(scale_rule: str, converted: list[str], others: list[str]) -> dict[str, Any]:
    return {
        "quant_method": QUARK,
        "quant_mode": "eager_mode",
        "version": "0.13",
        "algo_config": None,
        "global_quant_config": _quark_layer(scale_rule),
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": generalised(others, converted),
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "softmax_quant_spec": None,
    }


def _add_to_quark(found: dict[str, Any], scale_rule: str, converted: list[str], others: list[str]) -> None:
    found["exclude"] = _without(found.get("exclude") or [], converted, others)
    layers = {glob: _quark_layer(scale_rule) for glob in generalised(converted, others)}
    found["layer_quant_config"] = {**layers, **(found.get("layer_quant_config") or {})}


def _group(scale_rule: str, converted: list[str], others: list[str]) -> dict[str, Any]:
    del scale_rule  # has no place there
    targets = [
        "re:" + ".*".join(map(re.escape, glob.split("*"))) + "$" if "*" in glob else glob
        for glob in generalised(converted, others)
    ]
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
    }
    return {
        "format": "mxfp4-pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": weights,
    }


def _new_compressed_tensors(scale_rule: str, converted: list[str], others: list[str]) -> dict[str, Any]:
    return {
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": _group(scale_rule, converted, others)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _add_to_compressed_tensors(
    found: dict[str, Any], scale_rule: str, converted: list[str], others: list[str]
) -> None:
    found["ignore"] = _without(found.get("ignore") or [], converted, others)
    groups = dict(found.get("config_groups") or {})
    top = found.get("format")
    for group in groups.values():  # a top-level format may cease to be everyone's
        group["format"] = group.get("format") or top
    group = _group(scale_rule, converted, others)
    name = next(f"group_{i}" for i in range(len(groups) + 1) if f"group_{i}" not in groups)
    found["config_groups"] = {name: group, **groups}  # the first group that means a module holds
    if top not in (None, group["format"]):
        found["format"] = "mixed-precision"


def _without(patterns: list[str], converted: list[str], others: list[str]) -> list[str]:
    """A list of exclusions that no longer means the converted modules, and still means the others that it did."""
    kept, freed = [], []
    for pattern in patterns:
        means = Patterns([pattern])
        if any(means.match(module) for module in converted):
            freed += [module for module in others if means.match(module)]
        else:
            kept.append(pattern)
    return kept + [glob for glob in generalised(dict.fromkeys(freed), converted) if glob not in kept]
