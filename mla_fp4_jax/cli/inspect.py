"""`mla-fp4 inspect`: what a checkpoint's attention weights are, and what loading does to each."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mla_fp4_jax.checkpoint.inspection import NOT_READ, inspect_checkpoint
from mla_fp4_jax.cli.text import human_bytes, table

# Of a weight, all that makes layers alike but for their values.
_SAME = ("field", "format", "shape", "bytes", "declared", "excluded", "load")


def run_inspect(args: argparse.Namespace) -> None:
    """Print it, layers that are alike together, or as JSON."""
    found = inspect_checkpoint(args.path, nibble_order=args.nibble_order)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['path']}: model_type {found['model_type'] or 'not given'}, {_said(found['quant_method'])}")
    if not found["layers"]:
        print("  no attention layer with latent projections")
    for group in _groups(found["layers"]):
        _print_group(group)
    _print_kv_b(found["layers"])


def _said(method: str | None) -> str:
    return "no quantization_config" if method is None else f"quantization_config by {method}"


def _groups(layers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Consecutive layers that are alike."""
    groups: list[list[dict[str, Any]]] = []
    for layer in layers:
        if groups and _key(groups[-1][-1]) == _key(layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _key(layer: dict[str, Any]) -> Any:
    weights = [[weight[key] for key in _SAME] for weight in layer["weights"]]
    return layer["loads"], weights, len(layer["unused"]), layer["notes"]


def _print_group(group: list[dict[str, Any]]) -> None:
    first, last = group[0], group[-1]
    numbers = f"Layer {first['layer']}" if len(group) == 1 else f"Layers {first['layer']} .. {last['layer']}"
    total = sum(weight["bytes"] or 0 for layer in group for weight in layer["weights"])
    print(f"\n{numbers}, {human_bytes(total)}{'' if first['loads'] else ', DOES NOT LOAD'}")
    rows = [("projection", "shape", "format", "bytes", "scales", "config says", "loading")]
    for i, weight in enumerate(first["weights"]):
        alike = [layer["weights"][i] for layer in group]
        shape = " x ".join(map(str, weight["shape"] or "?"))
        size = "?" if weight["bytes"] is None else human_bytes(weight["bytes"])
        rows.append(
            (
                weight["field"],
                shape,
                weight["format"] or "?",
                size,
                _scales([each["scales"] for each in alike]),
                _declared(weight),
                weight["load"],
            )
        )
    print(table(rows, right=(3,)))
    if first["unused"]:
        print(f"  left out: {', '.join(sorted({name.removeprefix(first['prefix']) for name in first['unused']}))}")
    for note in first["notes"]:
        print(f"  note: {note}")
    for problem in dict.fromkeys([first["problem"], *(weight["problem"] for weight in first["weights"])]):
        if problem is not None:
            print(f"  problem: {problem}")


def _print_kv_b(layers: list[dict[str, Any]]) -> None:
    kv_b = [weight for layer in layers for weight in layer["weights"] if weight["field"] == "kv_b_proj"]
    packed = sum(weight["packed"] for weight in kv_b)
    unread = sum(weight["load"] == NOT_READ for weight in kv_b)
    if kv_b:
        rest = f"; in {unread} it is not read" if unread else ""
        if packed + unread < len(kv_b):
            rest += "; loading quantises nothing, mla-fp4 convert makes the rest MXFP4"
        print(f"\nkv_b_proj is FP4 in {packed} of {len(kv_b)} layers{rest}.")


def _declared(weight: dict[str, Any]) -> str:
    return "excluded" if weight["excluded"] else weight["declared"] or "-"


def _scales(found: list[dict[str, Any] | None]) -> str:
    known = [scales for scales in found if scales is not None and "min" in scales]
    if not known:
        return "-"
    whole = [_whole(scales) for scales in known]  # what the scales are themselves scaled by
    low = min(s["min"] * w for s, w in zip(known, whole, strict=True))
    high = max(s["max"] * w for s, w in zip(known, whole, strict=True))
    text = f"2^{low} .. 2^{high}" if known[0]["unit"] == "log2" else f"{low:.3g} .. {high:.3g}"
    bad = sum(scales["nan"] for scales in known)
    return text + (f", {bad} NaN" if bad else "")


def _whole(scales: dict[str, Any]) -> float:
    divisor = scales.get("weight_global_scale")
    if divisor is not None:
        return 1 / divisor if divisor else float("nan")
    return next((scales[key] for key in ("weight_scale_2", "_weight_per_tensor_scale") if key in scales), 1)
