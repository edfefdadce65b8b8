"""What a checkpoint's attention weights are: format, size, scales, and what loading does to each; nothing raised."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from mla_fp4_jax.checkpoint import torchao
from mla_fp4_jax.checkpoint.names import is_activation_scale, module_and_suffix, tensors_of
from mla_fp4_jax.checkpoint.nvfp4 import DIVIDES
from mla_fp4_jax.checkpoint.plan import OpenCheckpoint, open_checkpoint, plan_layer
from mla_fp4_jax.checkpoint.readers import find_reader
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.errors import CheckpointError
from mla_fp4_jax.weights import weight_shapes

# Suffixes of scales, and of what scales those in turn.
SCALES = ("weight_scale", "weight_scale_inv", "scale", "_weight_scale")
SECOND_SCALES = ("weight_scale_2", "weight_global_scale", "_weight_per_tensor_scale")
EXACT, ROUNDED, DECODED, NOT_READ = (
    "kept packed, its own bytes",
    "rounded to bfloat16; exact in float32",
    "decoded, rounded to the layer's dtype once",
    "not read",
)


def inspect_checkpoint(path: str | os.PathLike[str], *, nibble_order: str = "linear") -> dict[str, Any]:
    """Describe every attention layer of a checkpoint, in values that JSON can hold.

    Args:
        path, nibble_order: as for load_mla_layer.

    Returns:
        {"path", "model_type", "quant_method", "layers": [{"layer", "prefix", "loads", "problem", "weights":
        [{"field", "module", "format", "shape", "bytes", "declared", "excluded", "load", "exact", "packed", "scales",
        "problem"}], "unused", "notes"}]}. "exact" is whether loading in bfloat16 keeps every value; "problem" is the
        error that loading would raise, or None.

    Raises:
        CheckpointError: no checkpoint, or a config that cannot be read. What is wrong with a layer is reported.
    """
    opened = open_checkpoint(path, nibble_order)
    return {
        "path": str(opened.checkpoint.root),
        "model_type": opened.model.model_type,
        "quant_method": opened.quantization.method,
        "layers": [_layer(opened, layer) for layer in opened.names.layers],
    }


def _layer(opened: OpenCheckpoint, layer: int) -> dict[str, Any]:
    about: dict[str, Any] = {"layer": layer, "prefix": None, "loads": False, "problem": None}
    about |= {"weights": [], "unused": [], "notes": []}
    try:
        about["prefix"], below = opened.names.find(layer)
        about["unused"] = [below[rest] for rest in sorted(below) if is_activation_scale(rest)]
        about["weights"] = [_weight(opened, field, below) for field in _fields(opened, below)]
        plan = plan_layer(opened, layer)
    except CheckpointError as error:
        return about | {"problem": str(error)}
    found = [weight["problem"] for weight in about["weights"] if weight["problem"] is not None]
    about |= {"unused": list(plan.unused), "notes": list(plan.notes)}
    return about | {"loads": not found, "problem": found[0] if found else None}


def _fields(opened: OpenCheckpoint, below: dict[str, str]) -> list[str]:
    return [field for field in weight_shapes(opened.model.config) if tensors_of(*module_and_suffix(field)[:1], below)]


def _weight(opened: OpenCheckpoint, field: str, below: dict[str, str]) -> dict[str, Any]:
    about: dict[str, Any] = {"field": field}
    about |= dict.fromkeys(("module", "format", "shape", "bytes", "declared"))
    about |= {"excluded": False, "load": NOT_READ, "exact": False, "packed": False, "scales": None, "problem": None}
    try:
        stored = opened.stored(field, below)
        if stored is None:
            raise CheckpointError(f"{field} is missing.")
        first = next(iter(stored.tensors.values()))
        about |= {
            "module": stored.name,
            "shape": list(stored.shape),
            "bytes": sum(entry.nbytes for entry in stored.tensors.values()),
            "declared": stored.declared.format,
            "excluded": stored.declared.excluded,
        }
        reader = find_reader(stored)
        about["format"] = first.dtype if reader.format == "dense" else reader.name
        reader.check(stored)
        about["load"], about["exact"], about["packed"] = _treatment(reader, first.dtype)
        about["scales"] = _scales(stored)
        _check_scales(stored, reader, about["scales"])
    except CheckpointError as error:
        about["problem"] = str(error)
    return about


def _check_scales(stored: StoredWeight, reader: Reader, scales: dict[str, Any] | None) -> None:
    """Raise what loading would raise of them."""
    if scales is None:
        return
    suffix = stored.first(*SCALES)
    if scales["nan"]:
        raise stored.error(suffix, f"must be finite; {scales['nan']} of its {scales['count']} scales are NaN.")
    if reader.format == "fp8" and scales["unit"] == "value" and scales.get("min", 0) < 0:
        raise stored.error(suffix, f"must be finite and >= 0; got {scales['min']}.")
    for second in SECOND_SCALES:
        if second in stored.tensors:
            stored.read_scalar(second, divides=second == DIVIDES)


def _treatment(reader: Reader, dtype: str) -> tuple[str, bool, bool]:
    if reader.packed:
        return EXACT, True, True
    if reader.format == "dense":
        return ("kept exact", True, False) if dtype == "BF16" else (ROUNDED, False, False)
    return DECODED, False, False


def _scales(stored: StoredWeight) -> dict[str, Any] | None:
    """Least, median and greatest scale as powers of two (e8m0) or values, how many are zero or NaN."""
    suffix = next((suffix for suffix in SCALES if suffix in stored.tensors), None)
    if suffix is None:
        return None
    raw, dtype = stored.read(suffix), stored.tensors[suffix].dtype
    if suffix == torchao.SCALES:  # without the padding of swizzled ones
        raw = torchao.scale_bytes(stored, 16 if dtype == "F8_E4M3" else 32).view(raw.dtype)
    about: dict[str, Any] = {"dtype": dtype, "count": int(raw.size)}
    if dtype in ("U8", "F8_E8M0"):
        wide = raw.view(np.uint8).reshape(-1).astype(np.int64) - 127
        bad = wide == 128
        about["unit"] = "log2"
    else:
        wide = raw.astype(np.float64).reshape(-1)
        bad = ~np.isfinite(wide)
        about["unit"] = "value"
    about["nan"] = int(bad.sum())
    good = wide[~bad]
    if good.size:
        about |= {"min": good.min().item(), "median": float(np.median(good)), "max": good.max().item()}
    for second in SECOND_SCALES:
        if second in stored.tensors:
            value = stored.read(second).astype(np.float64).reshape(-1)
            about[second] = value[0].item() if value.size else None
    return about
