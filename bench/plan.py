"""Planning numbers for DeepSeek-V3/R1 and Kimi-K2: memory a GPU and the predicted time of a step's attention part.

    python -m bench.plan [--measured bench/results/SCALING.json ..] [--gpu H100] [--out FILE.md]

A layer's step is predicted as  a * projections + b * attention + c + all-reduce.  Projections and attention are their
rooflines (bench/roofline.py), the all-reduce is latency + bytes 2 (k - 1) / k / rate. Results of bench.scaling give
a, b, c, latency and rate by least squares of relative errors, and the page shows what the prediction is off by: for
every measured point the error of a fit that did not see it. Without one a = b = 1, c = 0 and the rates are the
datasheet's: a floor.
Groups that share heads or contexts stay within a host of eight GPUs, joined by NVLink; sequences alone go beyond it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from bench.roofline import DEEPSEEK_V3, GPUS, KIMI_K2, LAYERS, WEIGHT_BYTES, Gpu, Layout, find_gpu, share
from mla_fp4_jax import MLAConfig

MODELS = {"DeepSeek-V3/R1": DEEPSEEK_V3, "Kimi-K2": KIMI_K2}
FLEETS = (8, 72, 512)
WORKLOADS = ((1024, 4096), (64, 131072))  # sequences in all, cached tokens each
HOST = 8
SHOWN = 5  # layouts of each fleet and workload
KINDS = ("one", "TP", "DP", "CP")


@dataclasses.dataclass(frozen=True)
class Model:
    """Coefficients of the prediction, in seconds and bytes/s.

    Attributes:
        projections, attention: what their rooflines are multiplied by.
        overhead: a layer.
        latency, rate: of an all-reduce.
    """

    gpu: Gpu
    projections: float = 1.0
    attention: float = 1.0
    overhead: float = 0.0
    latency: float = 0.0
    rate: float = 0.0

    def reduction(self, exchanged: int, group: int) -> float:
        """Seconds of an all-reduce."""
        if group == 1:
            return 0.0
        return self.latency + exchanged * 2 * (group - 1) / group / (self.rate or self.gpu.link_rate)

    def layer(self, c: MLAConfig, layout: Layout, sequences: int, keys: int, formats: dict, default: str) -> float:
        """Seconds of one layer's step."""
        part = share(c, layout, sequences, keys)
        bound = self.projections * part.projections_s(self.gpu, formats, default)
        bound += self.attention * part.attention_s(self.gpu)
        return bound + self.overhead + self.reduction(part.exchanged, part.group)


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured layer: its roofline terms and its time, seconds."""

    name: str
    projections: float
    attention: float
    reduction: float
    seconds: float


def fit_reduction(rows: list[dict], devices: int) -> tuple[float, float]:
    """Latency and rate of all-reduces by size; a rate of 0 where sizes do not show one."""
    measured = [(row["bytes"] * 2 * (devices - 1) / devices, row["us"] * 1e-6) for row in rows]
    if not measured:
        return 0.0, 0.0
    weight = np.array([1 / seconds for _, seconds in measured])
    a = np.array([[1.0, size] for size, _ in measured]) * weight[:, None]
    latency, slope = np.linalg.lstsq(a, np.ones(len(measured)), rcond=None)[0]
    if len(measured) < 2 or slope <= 0:
        return float(np.median([seconds for _, seconds in measured])), 0.0
    return max(float(latency), 0.0), 1 / float(slope)


def fit_layer(points: list[Point]) -> tuple[float, float, float]:
    """a, b, c >= 0 with the least squares of relative errors; one that would be negative is left out."""
    terms = np.array([[p.projections, p.attention, 1.0] for p in points])
    rest = np.array([p.seconds - p.reduction for p in points])
    weight = np.array([1 / p.seconds for p in points])
    kept = [0, 1, 2]
    while True:
        found, *_ = np.linalg.lstsq(terms[:, kept] * weight[:, None], rest * weight, rcond=None)
        if (found >= 0).all():
            break
        kept.pop(int(np.argmin(found)))
    full = np.zeros(3)
    full[kept] = found
    return float(full[0]), float(full[1]), float(full[2])


def read_points(result: dict, gpu: Gpu, reduction: Model) -> list[Point]:
    """The rows of a scaling result that have a time."""
    formats, default = {"kv_b_proj": "fp4"}, "fp4" if result["options"]["packed"] else "bf16"
    n, points = result["devices"], []
    layouts = {"one": Layout(), "TP": Layout(heads=n), "DP": Layout(batch=n), "CP": Layout(context=n)}
    for row in result["rows"]:
        if row["kind"] in KINDS and "us" in row:
            layout, total = layouts[row["kind"]], row["sequences"] * (n if row["kind"] == "DP" else 1)
            part = share(DEEPSEEK_V3, layout, total, row["keys"])
            name = f"{default} {row['kind']:3} B {row['sequences']:4} S {row['keys']:6}"
            terms = part.projections_s(gpu, formats, default), part.attention_s(gpu)
            points.append(Point(name, *terms, reduction.reduction(part.exchanged, part.group), row["us"] * 1e-6))
    return points


def predicted(point: Point, coefficients: tuple[float, float, float]) -> float:
    """Seconds."""
    a, b, c = coefficients
    return a * point.projections + b * point.attention + c + point.reduction


def calibrate(results: list[dict], gpu: Gpu) -> tuple[Model, list[str]]:
    """The model that scaling results of one host give, and the lines that say how far off it is.

    Raises:
        SystemExit: results of tiny sizes or of different hosts, or with fewer than four times.
    """
    if any(result["options"].get("small") for result in results):
        raise SystemExit("bench.plan: --measured must be of full-size layers; one was made with --small.")
    hosts = {(result["devices"], result["environment"]["device"]) for result in results}
    if len(hosts) > 1:
        raise SystemExit(f"bench.plan: --measured must be of equal hosts; got {sorted(hosts)}.")
    result = results[0]
    rows = [row for each in results for row in each["rows"] if row["kind"] == "all-reduce" and "us" in row]
    latency, rate = fit_reduction(rows, result["devices"])
    fitted = Model(gpu, latency=latency, rate=rate)
    points = [point for each in results for point in read_points(each, gpu, fitted)]
    if len(points) < 4:
        raise SystemExit(f"bench.plan: --measured must have at least 4 times of layers; it has {len(points)}.")
    lines, errors = ["| measured point | us | predicted without it | error |", "|---|---|---|---|"], []
    for i, point in enumerate(points):
        without = predicted(point, fit_layer(points[:i] + points[i + 1 :]))
        errors.append(without / point.seconds - 1)
        lines.append(
            f"| {point.name} | {point.seconds * 1e6:.1f} | {without * 1e6:.1f} | {100 * errors[-1]:+.0f} % |"
        )
    a, b, c = fit_layer(points)
    model = Model(gpu, a, b, c, latency, rate)
    spread = f"median {100 * np.median(np.abs(errors)):.0f} %, largest {100 * np.max(np.abs(errors)):.0f} %"
    lines = [
        f"Calibrated on {result['devices']} x {result['environment']['device']}: projections x {a:.2f}, attention x "
        f"{b:.2f}, {c * 1e6:.1f} us a layer; all-reduce {latency * 1e6:.1f} us"
        + (
            f" + bytes at {rate / 1e9:.0f} GB/s." if rate else "; its sizes show no rate, so the datasheet's is used."
        ),
        f"Error of a prediction that did not see the point: {spread}.",
        "",
        *lines,
    ]
    return model, lines


def layouts(gpus: int, c: MLAConfig) -> list[Layout]:
    """All with groups within a host."""
    powers = (1, 2, 4, 8)
    return [
        Layout(heads, gpus // (heads * context), context)
        for heads in powers
        for context in powers
        if heads * context <= HOST and gpus % (heads * context) == 0 and c.num_attention_heads % heads == 0
    ]


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
                    step = {f: 1e3 * LAYERS * model.layer(c, layout, total, keys, {}, f) for f in ("bf16", "fp4")}
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
    header = "| layout | B a group | weights GB bf16 / fp8 / fp4 | cache GB | ms a step, fp4 (bf16) | all-reduce |"
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


def main() -> None:
    """Print the page, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, nargs="+", metavar="SCALING.json")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args()
    model, calibration = Model(GPUS[args.gpu]), []
    if args.measured is not None:
        results = [json.loads(path.read_text()) for path in args.measured]
        device = results[0]["environment"]["device"]
        measured_on = find_gpu(device)
        if measured_on is None:
            raise SystemExit(f"bench.plan: no datasheet of {device!r}; known: {list(GPUS)}.")
        model, calibration = calibrate(results, measured_on)
        model = dataclasses.replace(model, gpu=GPUS[args.gpu])
    text = page(model, plan(model), calibration)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
