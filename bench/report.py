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

from bench import matmul

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- benchmarks: written by python -m bench.report -->\n", "<!-- end of benchmarks -->\n"
# Ending of a result's name -> the section's text made of it.
SECTIONS: dict[str, Callable[[dict], str]] = {}


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
    """Where figures come from: device, date, versions, file."""
    described = result.get("environment", result)
    versions = ", ".join(f"{name} {described['versions'][name]}" for name in ("jax", "torch", "triton"))
    return (
        f"{described['device']}, {described['date'][:10]}, {versions}; commit `{described['commit'][:7]}`, "
        f"`bench/results/{path.name}`." + (f"\n{result['note']}" if "note" in result else "")
    )


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


@section("mla_decode")
def mla_decode_section(result: dict) -> str:
    """The latent decode attention, and what it is of FlashMLA's time."""
    rows = [r for r in result["rows"] if "kernel_us" in r and r.get("cache", "bfloat16") == "bfloat16"]
    found = {(r["name"], r["heads"], r["batch"], r["keys"]): r for r in rows}
    lines = [
        "Decode attention on a paged (64) bfloat16 latent cache, L+R = 576: kernels' time in us, merging of splits",
        "included, with FlashMLA in the same run.",
        "",
        *rule("H", "B", "S", "`mosaic_gpu`", "FlashMLA", "ratio", "TB/s", "TFLOP/s", "`triton`", "XLA"),
    ]
    for heads, batch, keys in sorted({key[1:] for key in found}, key=lambda key: (-key[0], key[2], key[1])):
        own, flash, portable, xla = (
            found.get((name, heads, batch, keys)) for name in ("mosaic_gpu", "flashmla", "triton", "xla")
        )
        ratio = f"{own['kernel_us'] / flash['kernel_us']:.2f}" if own and flash else "-"
        cells = [f"{r['kernel_us']:.1f}" if r else "-" for r in (own, flash, portable, xla)]
        rates = (own["tb_per_s"], own["tflops"]) if own else ("-", "-")
        lines.append(row(heads, batch, keys, cells[0], cells[1], ratio, *rates, *cells[2:]))
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
        if path is not None:
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
