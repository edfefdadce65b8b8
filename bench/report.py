"""The README's benchmark section and its plots, written from the results on record.

    python -m bench.report            rewrites README.md between its markers, and bench/results/*.svg
    python -m bench.report --check    fails where the README differs from what would be written

Each table is made of the newest file in bench/results whose name ends as in SECTIONS; none is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from bench import linear, matmul

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- benchmarks: written by python -m bench.report -->\n", "<!-- end of benchmarks -->\n"
_VERSIONS = ("jax", "torch", "triton")
# Ending of a result's name -> the section's text made of it.
SECTIONS: dict[str, Callable[[dict], str]] = {}
# A kind of result that another, where there is one, makes superfluous.
INSTEAD = {"fp4_linear_sweep": "fp4_linear"}


def section(ending: str):
    """Register a function of one kind of result."""

    def add(function: Callable[[dict], str]) -> Callable[[dict], str]:
        SECTIONS[ending] = function
        return function

    return add


def newest(ending: str) -> Path | None:
    """The latest result of a kind; names begin with a date."""
    return max(RESULTS.glob(f"*{ending}.json"), default=None)


def rule(*columns: str) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def origin(result: dict, path: Path) -> str:
    """Where figures come from: device, date, versions, file, and what was noted of the run."""
    runs = result.get("runs")
    described = runs[-1]["environment"] if isinstance(runs, list) else result.get("environment", result)
    versions = described.get("versions", {"jax": result.get("jax")})
    parts = [described["device"], described["date"][:10], *(f"{n} {versions[n]}" for n in _VERSIONS if n in versions)]
    commit = described.get("commit")
    where = f"commit `{commit[:7]}`, " if commit and not isinstance(runs, list) else ""
    notes = [str(result[key]) for key in ("note", "tests") if key in result]
    return "\n".join([f"{', '.join(parts)}; {where}`bench/results/{path.name}`.", *notes])


def times(rows: list[dict], key: str, shape: str | None = None) -> dict[tuple[str, str, int], float]:
    """(name, op, batch) -> microseconds."""
    here = [r for r in rows if key in r and (shape is None or r.get("shape", shape) == shape)]
    return {(r["name"], r["op"], r["batch"]): r[key] for r in here}


def pair(found: dict, name: str, batch: int) -> str:
    cells = [f"{found[name, op, batch]:.2f}" for op in (*matmul.OPS, "both") if (name, op, batch) in found]
    return " / ".join(cells) or "-"


@section("fp4_bmm")
def fp4_bmm_section(result: dict) -> str:
    """DeepSeek-V3's products by batch, then where FP4 does not win among other shapes."""
    shape = str(matmul.DEEPSEEK_V3)
    kernel, call = times(result["rows"], "kernel_us", shape), times(result["rows"], "call_us", shape)
    ceiling = result["ceilings"]
    lines = [
        "k_up_proj / v_up_proj of DeepSeek-V3 (H=128, P=V=128, L=512), bfloat16 in and out, cold weights, in us.",
        f'"Kernel" is CUPTI\'s time. Reading the {ceiling["touch_bytes"] / 1e6:.2f} MB of one packed weight once and '
        f"nothing else takes {ceiling['touch_us']:.2f}.",
        "",
        *rule("B", "`mosaic_gpu`", "`triton`", "XLA bf16", "Triton dot_scaled", "Triton W8A8", "cuBLAS bf16"),
    ]
    names = (matmul.MOSAIC, matmul.TRITON, matmul.DENSE, "triton dot_scaled", "triton w8a8", "cublas bf16")
    lines += [row(batch, *(pair(kernel, name, batch) for name in names)) for batch in matmul.BATCHES]
    lines += [
        "",
        '"Call" is what a decode loop pays for one: in JAX the mean of both products in a chain of them in one',
        "jitted, donated loop; in torch the time of a node in a CUDA graph (k_up / v_up).",
        "",
        *rule("B", "`mosaic_gpu`", "XLA bf16", "Triton dot_scaled", "Triton W8A8", "cuBLAS bf16"),
    ]
    names = (matmul.MOSAIC, matmul.DENSE, "triton dot_scaled", "triton w8a8", "cublas bf16")
    lines += [row(batch, *(pair(call, name, batch) for name in names)) for batch in matmul.BATCHES]
    lines += other_shapes(result["rows"])
    lines += ["", "![kernel time against batch](bench/results/fp4_bmm.svg)"]
    return "\n".join(lines)


def other_shapes(rows: list[dict]) -> list[str]:
    """XLA bf16's kernel time over mosaic_gpu's: above 1 FP4 is faster."""
    heading = [
        "",
        "Other shapes: kernel time of XLA bf16 over that of `mosaic_gpu`, k_up / v_up; above 1 FP4 is faster.",
        "",
        *rule("shape", *(f"B = {batch}" for batch in matmul.OTHER_BATCHES)),
    ]
    lines = list(heading)
    for shape in map(str, matmul.OTHER_SHAPES):
        found = times([r for r in rows if r.get("shape") == shape], "kernel_us")
        cells = []
        for batch in matmul.OTHER_BATCHES:
            keys = [((matmul.DENSE, op, batch), (matmul.MOSAIC, op, batch)) for op in matmul.OPS]
            ratios = [f"{found[dense] / found[own]:.2f}" for dense, own in keys if dense in found and own in found]
            cells.append(" / ".join(ratios) or "-")
        if set(cells) != {"-"}:
            lines.append(row(shape, *cells))
    return lines if len(lines) > len(heading) else []


@section("fp4_linear")
def fp4_linear_section(result: dict) -> str:
    """By shape and tokens: kernel times, their ratio, and how near FP4 comes to reading its bytes; then prefill."""
    lines = [
        "FP4 linears (`fp4_linear`, `mosaic_gpu`, its own choice of tiles): kernel time of FP4 / of XLA bf16 in us",
        "by tokens M, cold weights; below, how many times faster FP4 is (**bold** where it is slower), and how near",
        'it comes to the time that reading the packed bytes once takes ("touch").',
        "",
        *rule("K -> N", *(f"M = {m}" for m in linear.TOKENS)),
    ]
    found = {(r["shape"], r["tokens"], r["name"]): r["kernel_us"] for r in result["kernel"]}
    for shape, ceiling in result["ceilings"].items():
        outputs, inputs, _ = linear.SHAPES[shape]
        times, ratios = [], []
        for m in linear.TOKENS:
            own, dense = (found.get((shape, m, name)) for name in ("mosaic_gpu", "xla bf16"))
            times.append(f"{own:.1f} / {dense:.1f}" if own and dense else "-")
            if not (own and dense):
                ratios.append("-")
                continue
            ratio = f"{dense / own:.2f}x"
            ratios.append(f"{ratio if dense >= own else f'**{ratio}**'}, {100 * ceiling['touch_us'] / own:.0f} %")
        lines += [row(f"{inputs} -> {outputs}", *times), row(f"touch {ceiling['touch_us']:.1f} us", *ratios)]
    lines += [
        "",
        "kv_b_proj in prefill (512 -> 32768, T tokens) from the pack that decoding uses, which is decoded to memory",
        "for the call, beside a weight that is kept in bf16; both products by XLA: kernel time in us.",
        "",
        *rule("T", "FP4", "bf16", "FP4 / bf16"),
    ]
    prefill = {(r["tokens"], r["name"]): r["kernel_us"] for r in result["prefill"]}
    for tokens in linear.PREFILL:
        if (tokens, "mosaic_gpu") in prefill and (tokens, "xla bf16") in prefill:
            own, dense = prefill[tokens, "mosaic_gpu"], prefill[tokens, "xla bf16"]
            lines.append(row(tokens, f"{own:.1f}", f"{dense:.1f}", f"{own / dense:.2f}"))
    return "\n".join(lines)


@section("fp4_linear_sweep")
def fp4_linear_sweep_section(result: dict) -> str:
    """The fastest configuration tried, beside XLA's bf16 product."""
    fp4: dict[tuple[str, int], float] = {}
    bf16: dict[tuple[str, int], float] = {}
    for r in result["rows"]:
        times = bf16 if "name" in r else fp4
        key = (r["shape"], r["tokens"])
        times[key] = min(r["kernel_us"], times[key]) if key in times else r["kernel_us"]
    tokens = sorted({m for _, m in fp4})
    lines = [
        "FP4 linears (`fp4_linear`, `mosaic_gpu`) / XLA bf16, kernel time in us by tokens M, cold weights: the",
        'fastest configuration of a sweep, not always the default. "Touch" reads the packed bytes once, and no more.',
        "",
        *rule("K -> N", "touch", *(f"M = {m}" for m in tokens)),
    ]
    for shape, touch_us in result["touch_us"].items():
        cells = [
            f"{fp4[shape, m]:.1f} / " + (f"{bf16[shape, m]:.1f}" if (shape, m) in bf16 else "-")
            if (shape, m) in fp4
            else "-"
            for m in tokens
        ]
        lines.append(row(shape, touch_us, *cells))
    return "\n".join(lines)


@section("mla_decode")
def mla_decode_section(result: dict) -> str:
    """The latent decode attention, and what it is of FlashMLA's time in the same run."""
    lines = [
        "Decode attention on a paged (64) bfloat16 latent cache, L+R = 576: kernels' time in us, merging of splits",
        "included, with FlashMLA in the same run.",
    ]
    for run in result.get("runs", [result]):
        rows = [r for r in run["rows"] if "kernel_us" in r and r.get("cache", "bfloat16") == "bfloat16"]
        found = {(r["name"], r["heads"], r["batch"], r["keys"]): r for r in rows}
        shapes = {key[1:] for key in found if key[0] != "flashmla" and ("flashmla", *key[1:]) in found}
        if not shapes:
            continue
        lines += ["", f"Commit `{run['environment']['commit'][:7]}`: {run['what']}.", ""] if "what" in run else [""]
        lines += rule("H", "B", "S", "`mosaic_gpu`", "FlashMLA", "ratio", "TB/s", "TFLOP/s")
        for heads, batch, keys in sorted(shapes, key=lambda key: (-key[0], key[2], key[1])):
            own, flash = (found[name, heads, batch, keys] for name in ("mosaic_gpu", "flashmla"))
            ratio = own["kernel_us"] / flash["kernel_us"]
            both = (f"{r['kernel_us']:.1f}" for r in (own, flash))
            lines.append(row(heads, batch, keys, *both, f"{ratio:.2f}", own["tb_per_s"], own["tflops"]))
    return "\n".join(lines)


@section("prefill")
def prefill_section(result: dict) -> str:
    """Attention of a prompt on expanded keys and values."""
    lines = [
        "Prefill attention of one prompt, 128 heads of 192 / 128, causal, keys and values expanded: kernel time.",
        "",
        *rule("T", "kernel", "us", "TFLOP/s"),
    ]
    for r in result["rows"]:
        if r.get("kind") == "kernel" and "us" in r:
            lines.append(row(r["tokens"], r["name"], r["us"], r["tflops"]))
    return "\n".join(lines)


def plot_fp4_bmm(result: dict, path: Path) -> None:
    """Kernel time against batch, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = matmul.DEEPSEEK_V3
    kernel = times(result["rows"], "kernel_us", str(shape))
    rate = result["ceilings"]["touch_bytes"] / result["ceilings"]["touch_us"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, op in zip(axes, matmul.OPS, strict=True):
        for name in dict.fromkeys(name for name, _, _ in kernel):
            points = [(batch, kernel[name, op, batch]) for batch in matmul.BATCHES if (name, op, batch) in kernel]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        floor = [shape.floor_bytes(op, batch) / rate for batch in matmul.BATCHES]
        axis.plot(matmul.BATCHES, floor, "k:", label="bytes at the touch rate")
        axis.set(title=op, xlabel="B", xscale="log", yscale="log")
    axes[0].set_ylabel("kernel, us")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def text() -> str:
    """All sections on record."""
    parts = []
    for ending, function in SECTIONS.items():
        path = newest(ending)
        if path is not None and newest(INSTEAD.get(ending, "nothing")) is None:
            result = json.loads(path.read_text())
            parts.append(f"{function(result)}\n\n{origin(result, path)}\n")
    return "\n".join(parts)


def rewritten(readme: str) -> str:
    before, rest = readme.split(BEGIN)
    return before + BEGIN + text() + END + rest.split(END)[1]


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README differs")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    new = rewritten(readme.read_text())
    if args.check:
        sys.exit(
            None if new == readme.read_text() else "README.md differs from bench/results: run python -m bench.report."
        )
    readme.write_text(new)
    path = newest("fp4_bmm")
    if path is not None:
        plot_fp4_bmm(json.loads(path.read_text()), RESULTS / "fp4_bmm.svg")


if __name__ == "__main__":
    main()
