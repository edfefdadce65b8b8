"""`mla-fp4 convert`: a checkpoint's attention to MXFP4, and what that costs in accuracy."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from tqdm import tqdm

from mla_fp4_jax.checkpoint.convert import REPORT_FILE, Conversion, convert_checkpoint, plan_conversion
from mla_fp4_jax.checkpoint.plan import open_checkpoint, plan_layer
from mla_fp4_jax.checkpoint.writer import write_json
from mla_fp4_jax.cli.layer_error import layer_output, outlier_inputs, relative_error
from mla_fp4_jax.cli.text import human_bytes, percent, table


def run_convert(args: argparse.Namespace) -> None:
    """Convert, then compare layers; see the command's help for its arguments."""
    names = ("kv_b", "linears", "scale_rule", "config", "nibble_order")
    options = {name: getattr(args, name) for name in names}
    conversion = plan_conversion(args.source, **options)
    with tqdm(total=conversion.nbytes, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        report = convert_checkpoint(args.source, args.target, progress=bar.update, **options)
    if args.layer_errors and report["converted"]:
        report["layer_errors"] = _layer_errors(conversion, args)
        write_json(args.target / REPORT_FILE, report)
    _print(report, args)


def _layer_errors(conversion: Conversion, args: argparse.Namespace) -> dict[str, float]:
    """Attention's number -> relative RMS error of its output against the source's."""
    converted = open_checkpoint(args.target)
    x = outlier_inputs(conversion.opened.model.config.hidden_size)
    errors = {}
    changed = [plan for plan in conversion.plans if any(w.stored.name in conversion.jobs for w in plan.weights)]
    for plan in tqdm(changed, unit="layer", desc="comparing", disable=None):
        before = layer_output(plan, x)
        errors[str(plan.layer)] = relative_error(layer_output(plan_layer(converted, plan.layer), x), before)
    return errors


def _print(report: dict[str, Any], args: argparse.Namespace) -> None:
    converted = report["converted"]
    print(f"{args.source} -> {args.target}")
    if converted:
        before = sum(error["bytes_before"] for error in converted.values())
        after = sum(error["bytes_after"] for error in converted.values())
        print(
            f"  {len(converted)} weights to MXFP4, scale rule {report['scale_rule']}, {report['config']} names: "
            f"{human_bytes(before)} -> {human_bytes(after)}"
        )
        print("\nRelative RMS error of the weights")
        print(
            table(
                [("projection", "from", "weights", "least", "median", "most"), *_rows(converted)], right=(2, 3, 4, 5)
            )
        )
    if report.get("layer_errors"):
        values = list(report["layer_errors"].values())
        print("\nRelative RMS error of the layers' outputs, synthetic inputs with outlier channels")
        low, middle, high = (percent(float(f(values))) for f in (np.min, np.median, np.max))
        print(f"  {len(values)} layers: least {low}, median {middle}, most {high}")
    if report["kept"]:
        print("\nAsked for, but kept as they are")
        print(table(_reasons(report["kept"])))
    for note in report["notes"]:
        print(f"\nNote: {note}.")
    print(f"\nEvery other tensor has its bytes. All figures: {args.target / REPORT_FILE}")


def _rows(converted: dict[str, Any]) -> list[tuple[str, ...]]:
    kinds: dict[tuple[str, str], list[float]] = {}
    for module, error in converted.items():
        kinds.setdefault((module.rpartition(".")[2], error["from"]), []).append(error["relative_rms_error"])
    return [
        (name, source, str(len(errors)), *(percent(float(f(errors))) for f in (np.min, np.median, np.max)))
        for (name, source), errors in sorted(kinds.items())
    ]


def _reasons(kept: dict[str, str]) -> list[tuple[str, str]]:
    kinds: dict[tuple[str, str], int] = {}
    for module, why in kept.items():
        key = (module.rpartition(".")[2], why)
        kinds[key] = kinds.get(key, 0) + 1
    return [(f"{name} of {number} layers", why) for (name, why), number in sorted(kinds.items())]
