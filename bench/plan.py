"""Planning numbers for DeepSeek-V3/R1 and Kimi-K2: memory a GPU and the predicted time of a step's attention part.

    python -m bench.plan [--measured bench/results/SCALING.json ..] [--gpu NAME] [--out FILE.md]

A layer's step is predicted as  a * projections + b * attention + c + all-reduce.  Projections and attention are their
rooflines (bench/roofline.py), the all-reduce is latency + bytes 2 (k - 1) / k / rate. Results of bench.scaling give
a, b, c, latency and rate by least squares of relative errors, and the page shows what the prediction is off by: for
every measured point the error of a fit that did not see it, and measured stacks of layers beside layers times their
prediction. Without one a = b = 1, c = 0 and the rates are the datasheet's: a floor.
Results must be of equal hosts and of equal XLA options, which decide whether an all-reduce is part of the CUDA graph
and so what it takes. Points that spread over more than half of their time are left out.
Groups that share heads or contexts stay within a host of eight GPUs, joined by NVLink; sequences alone go beyond it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.calibration import PLANNED, Model, calibrate, missing
from bench.roofline import GPUS, LAYERS, MODELS, WEIGHT_BYTES, Gpu, find_gpu, layouts, share

FLEETS = (8, 72, 512)
WORKLOADS = ((1024, 4096), (64, 131072))  # sequences in all, cached tokens each
SHOWN = 5  # layouts of each fleet and workload


def plan(model: Model) -> list[dict]:
    """Every model, fleet, workload and layout."""
    rows = []
    for name, c in MODELS.items():
        for gpus in FLEETS:
            for sequences, keys in WORKLOADS:
                for layout in layouts(gpus, c):
                    each = -(-sequences // layout.batch)
                    total = each * layout.batch  # the fullest device decides
                    part = share(c, layout, total, keys)
                    held = {f: LAYERS * part.weight_bytes({}, f) / 1e9 for f in WEIGHT_BYTES}
                    cache = LAYERS * part.cache_bytes / 1e9
                    step = {f: 1e3 * LAYERS * model.layer(c, layout, total, keys, {}, f) for f in PLANNED}
                    reduction = 1e3 * LAYERS * model.reduction(part.exchanged, part.group)
                    rows.append(
                        {
                            "model": name,
                            "gpus": gpus,
                            "sequences": sequences,
                            "keys": keys,
                            "layout": str(layout),
                            "sequences_per_group": each,
                            "weights_gb": {f: round(value, 2) for f, value in held.items()},
                            "cache_gb": round(cache, 1),
                            "fits": (held["fp4"] + cache) * 1e9 <= model.gpu.memory,
                            "step_ms": {f: round(value, 2) for f, value in step.items()},
                            "all_reduce_share": round(reduction / step["fp4"], 3),
                        }
                    )
    return rows


def page(model: Model, rows: list[dict], calibration: list[str]) -> str:
    """Markdown."""
    lines = [
        "# Planning numbers for the attention layers",
        "",
        "Made by `python -m bench.plan`. Only attention: experts and embeddings are not counted, in memory or time.",
        f"GPU: {model.gpu.name}, {model.gpu.memory / 1e9:.0f} GB. {LAYERS} layers, bfloat16 caches. Of each fleet "
        f"and workload the {SHOWN} fastest layouts that fit, or all if none does.",
        "",
        *(calibration or ["Not calibrated: datasheet rates, no overhead, no latency. Real steps take longer."]),
    ]
    fp4, bf16 = (f"{f}, not calibrated" if f in missing(model) else f for f in PLANNED)
    header = (
        f"| layout | B a group | weights GB bf16 / fp8 / fp4 | cache GB | ms a step, {fp4} ({bf16}) | all-reduce |"
    )
    groups = dict.fromkeys((row["model"], row["gpus"], row["sequences"], row["keys"]) for row in rows)
    for name, gpus, sequences, keys in groups:
        mine = [row for row in rows if (row["model"], row["gpus"]) == (name, gpus)]
        mine = [row for row in mine if (row["sequences"], row["keys"]) == (sequences, keys)]
        mine.sort(key=lambda row: row["step_ms"]["fp4"])
        fitting = [row for row in mine if row["fits"]]
        lines += ["", f"## {name}, {gpus} GPUs, {sequences} sequences of {keys} tokens", ""]
        lines += [header, "|---" * 6 + "|"]
        for row in fitting[:SHOWN] or mine:
            held, step = row["weights_gb"], row["step_ms"]
            layout = row["layout"] if row["fits"] else f"{row['layout']} (does not fit)"
            lines.append(
                f"| {layout} | {row['sequences_per_group']} | {held['bf16']} / {held['fp8']} / {held['fp4']} | "
                f"{row['cache_gb']} | {step['fp4']} ({step['bf16']}) | {100 * row['all_reduce_share']:.0f} % |"
            )
    return "\n".join(lines) + "\n"


def choose_gpu(measured: dict[str, dict], asked: str | None) -> Gpu:
    """That of the measured files, else the one asked for, else H100.

    Raises:
        SystemExit: the files are of a GPU without a datasheet here, or of another than asked for.
    """
    if not measured:
        return GPUS[asked or "H100"]
    device = next(iter(measured.values()))["environment"]["device"]
    gpu = find_gpu(device)
    if gpu is None:
        raise SystemExit(
            f"bench.plan: --measured must be of one of {list(GPUS)}, whose datasheets are known; got {device!r}."
        )
    if asked not in (None, gpu.name):
        raise SystemExit(
            f"bench.plan: --gpu must be the one of --measured, {gpu.name}; got {asked}. Leave --gpu out, or give "
            f"files measured on {asked}."
        )
    return gpu


def main() -> None:
    """Print the page, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="SCALING.json")
    parser.add_argument("--gpu", choices=GPUS, help="default: that of --measured; H100 without")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args()
    measured = {path.as_posix(): json.loads(path.read_text()) for path in args.measured}
    gpu = choose_gpu(measured, args.gpu)
    model, calibration = calibrate(measured, gpu) if measured else (Model(gpu), [])
    text = page(model, plan(model), calibration)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
