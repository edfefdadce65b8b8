"""What bench.scaling measured, as the coefficients of bench.plan's prediction, and how far off it is.

A layer's step is predicted as  a * projections + b * attention + c + all-reduce.  Projections and attention are their
rooflines (bench/roofline.py), the all-reduce is latency + bytes 2 (k - 1) / k / rate; least squares of relative
errors give a, b, c, latency and rate.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from bench.roofline import HOST, MODELS, Gpu, Layout, share
from mla_fp4_jax import MLAConfig

KINDS = ("one", "TP", "DP", "CP")
PLANNED = ("fp4", "bf16")  # formats of the weights that have times on the page
MEASURED_MODEL, MEASURED_FORMATS = "DeepSeek-V3/R1", {"kv_b_proj": "fp4"}  # bench.scaling's
DEFAULTS = "XLA's defaults"
SPREAD = 0.5  # of its time: a point that spreads over more is not calibrated with


@dataclasses.dataclass(frozen=True)
class Model:
    """Coefficients of the prediction, in seconds and bytes/s.

    Attributes:
        projections, attention: what their rooflines are multiplied by.
        overhead: a layer.
        latency, rate: of an all-reduce.
        devices: of the host that they were measured on; 0 where they were not.
        formats: of the weights of the measured layers.
    """

    gpu: Gpu
    projections: float = 1.0
    attention: float = 1.0
    overhead: float = 0.0
    latency: float = 0.0
    rate: float = 0.0
    devices: int = 0
    formats: tuple[str, ...] = ()

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
    """A measured layer: its weights' format, its roofline terms and its time, seconds."""

    name: str
    weights: str
    terms: tuple[float, float, float]  # projections, attention, all-reduce
    seconds: float


def fit_reduction(rows: list[dict], devices: int, limit: float) -> tuple[float, float]:
    """Latency and rate of all-reduces by size; a rate of 0 where sizes show none, or one beyond the limit."""
    measured = [(row["bytes"] * 2 * (devices - 1) / devices, row["us"] * 1e-6) for row in rows]
    if not measured:
        return 0.0, 0.0
    weight = np.array([1 / seconds for _, seconds in measured])
    a = np.array([[1.0, size] for size, _ in measured]) * weight[:, None]
    latency, slope = np.linalg.lstsq(a, np.ones(len(measured)), rcond=None)[0]
    if len(measured) < 2 or slope <= 1 / limit:
        return float(np.median([seconds for _, seconds in measured])), 0.0
    return max(float(latency), 0.0), 1 / float(slope)


def fit_layer(points: list[Point]) -> tuple[float, float, float]:
    """a, b, c >= 0 with the least squares of relative errors; one that would be negative is left out."""
    terms = np.array([[*p.terms[:2], 1.0] for p in points])
    rest = np.array([p.seconds - p.terms[2] for p in points])
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


def read_rows(result: dict) -> tuple[list[dict], int]:
    """The rows of layers to calibrate with, and how many are left out for their spread."""
    timed = [row for row in result["rows"] if row["kind"] in KINDS and "us" in row]
    kept = [row for row in timed if row.get("spread_us", 0) <= SPREAD * row["us"]]
    return kept, len(timed) - len(kept)


def read_points(result: dict, model: Model) -> list[Point]:
    """The layers of a scaling result; their all-reduces take what the model says."""
    weights, n, points = "fp4" if result["options"]["packed"] else "bf16", result["devices"], []
    axes = {"one": Layout(), "TP": Layout(heads=n), "DP": Layout(batch=n), "CP": Layout(context=n)}
    for row in read_rows(result)[0]:
        layout = axes[row["kind"]]
        part = share(MODELS[MEASURED_MODEL], layout, row["sequences"] * layout.batch, row["keys"])
        name = f"{weights} {row['kind']:3} B {row['sequences']:4} S {row['keys']:6}"
        bounds = part.projections_s(model.gpu, MEASURED_FORMATS, weights), part.attention_s(model.gpu)
        terms = *bounds, model.reduction(part.exchanged, part.group)
        points.append(Point(name, weights, terms, row["us"] * 1e-6))
    return points


def predicted(point: Point, coefficients: tuple[float, float, float]) -> float:
    """Seconds."""
    a, b, c = coefficients
    return a * point.terms[0] + b * point.terms[1] + c + point.terms[2]


def xla_options(result: dict) -> tuple[str, ...]:
    """Those a result was taken with, but for the autotune level, which leaves all-reduces where they are."""
    flags = result["environment"].get("xla_flags", "").split()
    return tuple(sorted(flag for flag in flags if not flag.startswith("--xla_gpu_autotune_level=")))


def refuse_mixed(measured: dict[str, dict]) -> None:
    """Results by file name must belong together.

    Raises:
        SystemExit: they are of tiny sizes, of different hosts or of different XLA options.
    """
    for name, result in measured.items():
        if result["options"].get("small"):
            raise SystemExit(f"bench.plan: --measured must be of full-size layers; {name} was made with --small.")
    hosts = {(result["devices"], result["environment"]["device"]) for result in measured.values()}
    if len(hosts) > 1:
        raise SystemExit(f"bench.plan: --measured must be of equal hosts; got {sorted(hosts)}.")
    options = {name: " ".join(xla_options(result)) or DEFAULTS for name, result in measured.items()}
    if len(set(options.values())) > 1:
        given = "; ".join(f"{name}: {flags}" for name, flags in options.items())
        raise SystemExit(
            "bench.plan: --measured must be of equal XLA options (the autotune level aside), which decide what an "
            f"all-reduce takes; got {given}. Calibrate with the files of one set of options alone."
        )


def calibrate(measured: dict[str, dict], gpu: Gpu) -> tuple[Model, list[str]]:
    """The model that scaling results by file name give, and the lines that say what it is worth.

    Raises:
        SystemExit: results that do not belong together, or with fewer than four different layers.
    """
    refuse_mixed(measured)
    results = list(measured.values())
    rows = [row for each in results for row in each["rows"] if row["kind"] == "all-reduce" and "us" in row]
    devices = results[0]["devices"]
    latency, rate = fit_reduction(rows, devices, gpu.link_rate)
    model = Model(gpu, latency=latency, rate=rate, devices=devices)
    points = [point for each in results for point in read_points(each, model)]
    if (different := len({point.terms for point in points})) < 4:
        raise SystemExit(
            f"bench.plan: --measured must have times of at least 4 different layers; got {different} with a spread "
            f"of at most {100 * SPREAD:.0f} %. Give more files, or measure more rows with bench.scaling."
        )
    a, b, c = fit_layer(points)
    formats = tuple(dict.fromkeys(point.weights for point in points))
    model = dataclasses.replace(model, projections=a, attention=b, overhead=c, formats=formats)
    summary, table = check_points(points)
    lines = [
        f"Calibrated on {devices} x {results[0]['environment']['device']}: projections x {a:.2f}, attention x "
        f"{b:.2f}, {c * 1e6:.1f} us a layer; all-reduce {latency * 1e6:.1f} us"
        + (
            f" + bytes at {rate / 1e9:.0f} GB/s." if rate else "; its sizes show no rate, so the datasheet's is used."
        ),
        summary,
        *describe_limits(model),
        *describe_inputs(measured),
        "",
        *table,
        *check_stacks(results, model),
    ]
    return model, lines


def check_points(points: list[Point]) -> tuple[str, list[str]]:
    """Every point beside a fit without it and without those of equal terms: the errors of each format, the table."""
    table = ["| measured point | us | predicted without it | error |", "|---|---|---|---|"]
    errors: dict[str, list[float]] = {}
    for point in points:
        without = predicted(point, fit_layer([p for p in points if p.terms != point.terms]))
        errors.setdefault(point.weights, []).append(abs(without / point.seconds - 1))
        table.append(compared(point.name, point.seconds, without))
    parts = [
        f"{weights} ({len(found)} points) median {100 * np.median(found):.0f} %, largest {100 * max(found):.0f} %"
        for weights, found in errors.items()
    ]
    return f"Error of a prediction that did not see the point: {'; '.join(parts)}.", table


def check_stacks(results: list[dict], model: Model) -> list[str]:
    """Measured stacks, all in MXFP4, beside layers times the predicted layer: rows of the table, or that none is."""
    lines = []
    for row in (row for each in results for row in each["rows"]):
        if row["kind"] == "stack" and "ms_per_token" in row:
            layout = Layout(*(int(part[2:]) for part in row["layout"].split()))
            where = row["sequences"], row["keys"], MEASURED_FORMATS, "fp4"
            seconds = row["layers"] * model.layer(MODELS[MEASURED_MODEL], layout, *where)
            name = f"fp4 stack of {row['layers']} layers, {layout}, B {row['sequences']} S {row['keys']} (not fitted)"
            lines.append(compared(name, 1e-3 * row["ms_per_token"], seconds))
    return lines or ["", "No input has the time of a whole stack of layers to compare with."]


def compared(name: str, seconds: float, prediction: float) -> str:
    """A row of the table of measured points."""
    error = 100 * (prediction / seconds - 1)
    return f"| {name} | {seconds * 1e6:.1f} | {prediction * 1e6:.1f} | {error:+.0f} % |"


def describe_limits(model: Model) -> list[str]:
    """What the page shows that was not measured."""
    lines = [f"No input has {f} weights: times with them are not calibrated." for f in missing(model)]
    groups = [str(size) for size in (4, 8) if model.devices < size <= HOST]
    others = " and ".join(name for name in MODELS if name != MEASURED_MODEL)
    if groups:
        lines.append(
            f"TP x CP groups of {' and '.join(groups)} GPUs are extrapolated from measurements on {model.devices}."
        )
    return [*lines, f"Every measured layer is one of {MEASURED_MODEL}: times of {others} are carried over."]


def missing(model: Model) -> list[str]:
    """Formats on the page that a calibrated model has no measurement of."""
    return [f for f in PLANNED if model.formats and f not in model.formats]


def describe_inputs(measured: dict[str, dict]) -> list[str]:
    """Where the calibration comes from, a line a file."""
    options = " ".join(xla_options(next(iter(measured.values()))))
    lines = [
        f"Inputs, with {f'`{options}`' if options else DEFAULTS}; points that spread over more than "
        f"{100 * SPREAD:.0f} % of their time are left out:",
        "",
    ]
    for name, result in measured.items():
        known, (kept, left_out) = result["environment"], read_rows(result)
        commit, tokens = known.get("commit") or "unknown", result["options"].get("tokens", 1)
        weights = "all weights fp4" if result["options"]["packed"] else "kv_b_proj fp4, other weights bf16"
        lines.append(
            f"- `{name}`: {result['devices']} x {known['device']}, commit `{commit[:7]}`, {weights}, tokens a call: "
            f"{tokens}; {len(kept)} points used, {left_out} left out. {result.get('note', '')}".rstrip()
        )
    return lines
