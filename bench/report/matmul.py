"""fp4_bmm as k_up_proj and v_up_proj: tables by batch and shape, and the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pallas_kernels
from bench import matmul
from bench.report.markdown import row, rule
from pallas_kernels.fp4_bmm_mosaic_gpu import NAME
from pallas_kernels.tuned import table_name


def times(rows: list[dict], key: str, shape: str | None = None) -> dict[tuple[str, str, int], float]:
    """(name, op, batch) -> microseconds."""
    here = [r for r in rows if key in r and (shape is None or r.get("shape", shape) == shape)]
    return {(r["name"], r["op"], r["batch"]): r[key] for r in here}


def pair(found: dict, name: str, batch: int) -> str:
    """k_up / v_up; of a peer with several forms ("name, form") the quicker one."""
    cells = []
    for op in (*matmul.OPS, "both"):
        times = [us for (n, o, b), us in found.items() if n.split(",")[0] == name and (o, b) == (op, batch)]
        cells += [f"{min(times):.2f}"] if times else []
    return " / ".join(cells) or "-"


def section(result: dict, picture: bool = True) -> str:
    """DeepSeek-V3's products by batch."""
    shape = str(matmul.DEEPSEEK_V3)
    kernel, call = times(result["rows"], "kernel_us", shape), times(result["rows"], "call_us", shape)
    ceiling = result["ceilings"]
    lines = [
        "k_up_proj / v_up_proj of DeepSeek-V3 (H=128, P=V=128, L=512), bfloat16 in and out, cold weights, in us.",
        f'"Kernel" is CUPTI\'s time. Reading the {ceiling["touch_bytes"] / 1e6:.2f} MB of one packed weight once and '
        f"nothing else takes {ceiling['touch_us']:.2f}; 'of it' is the part of `mosaic_gpu`'s time that this is.",
        "",
        *rule(
            "B", "`mosaic_gpu`", "of it", "`triton`", "XLA bf16", "Triton dot_scaled", "Triton W8A8", "cuBLAS bf16"
        ),
    ]
    names = (matmul.MOSAIC, matmul.TRITON, matmul.DENSE, "triton dot_scaled", "triton w8a8", "cublas bf16")
    for batch in matmul.BATCHES:
        own, *others = (pair(kernel, name, batch) for name in names)
        lines.append(row(batch, own, of_touch(result, kernel, batch), *others))
    lines += [*other_peers(kernel)]
    lines += [
        "",
        '"Call" is what a decode loop pays for one: in JAX the mean of both products in a chain of them in one',
        "jitted, donated loop; in torch the time of a node in a CUDA graph (k_up / v_up).",
        "",
        *rule("B", "`mosaic_gpu`", "XLA bf16", "Triton dot_scaled", "Triton W8A8", "cuBLAS bf16"),
    ]
    names = (matmul.MOSAIC, matmul.DENSE, "triton dot_scaled", "triton w8a8", "cublas bf16")
    lines += [row(batch, *(pair(call, name, batch) for name in names)) for batch in matmul.BATCHES]
    if picture:
        lines += ["", "![kernel time against batch](bench/results/fp4_bmm.svg)"]
    return "\n".join(lines + tuned_lines(result))


def of_touch(result: dict, kernel: dict, batch: int) -> str:
    """k_up / v_up: what touching the packed weight takes, of what mosaic_gpu does."""
    touch_us = result["ceilings"]["touch_us"]
    keys = [(matmul.MOSAIC, op, batch) for op in matmul.OPS]
    return " / ".join(f"{100 * touch_us / kernel[key]:.0f} %" for key in keys if key in kernel) or "-"


def other_peers(kernel: dict) -> list[str]:
    """What was measured at a few batches only."""
    lines = []
    for name in (matmul.DEQUANTISE, matmul.SCALED_DOT):
        here = [
            f"{pair(kernel, name, batch)} at B = {batch}" for batch in sorted({b for n, _, b in kernel if n == name})
        ]
        lines += [f"{name}: {', '.join(here)}."] if here else []
    return ["", "Also, k_up / v_up or v_up alone: " + " ".join(lines)] if lines else []


def tuned_lines(result: dict) -> list[str]:
    """What the device's tuned table, if it is the later one, changed of DeepSeek-V3's products."""
    path = Path(pallas_kernels.__file__).parent / "tuned_tables" / table_name(result["device"])
    table = json.loads(path.read_text()) if path.exists() else {}
    if not table or table["environment"]["date"] <= result["date"]:
        return []
    found = [
        f"{'k_up' if problem['transposed'] else 'v_up'} at B = {problem['batch']} {row['kernel_us']:.2f} instead of "
        f"{row['default_us']:.2f}"
        for row in table[NAME]
        if row["kernel_us"] < row["default_us"] and (problem := row["problem"])["heads"] == matmul.DEEPSEEK_V3.H
    ]
    commit = table["environment"]["commit"]
    return ["", f"Since then `bench.tune` (commit `{commit}`) found quicker tiles, us: {', '.join(found)}."]


def shapes_section(result: dict) -> str:
    """XLA bf16's kernel time over mosaic_gpu's: above 1 FP4 is faster."""
    rows = result["rows"]
    batches = sorted(batch for some in matmul.OTHER_BATCHES for batch in some)
    lines = [
        "Other shapes: kernel time of XLA bf16 over that of `mosaic_gpu`, k_up / v_up; above 1 FP4 is faster.",
        "",
        *rule("shape", *(f"B = {batch}" for batch in batches)),
    ]
    for shape in map(str, matmul.OTHER_SHAPES):
        found = times([r for r in rows if r.get("shape") == shape], "kernel_us")
        cells = []
        for batch in batches:
            keys = [((matmul.DENSE, op, batch), (matmul.MOSAIC, op, batch)) for op in matmul.OPS]
            ratios = [f"{found[dense] / found[own]:.2f}" for dense, own in keys if dense in found and own in found]
            cells.append(" / ".join(ratios) or "-")
        if set(cells) != {"-"}:
            lines.append(row(shape, *cells))
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """Kernel time against batch with the floor; below, what touching the weight takes of FP4's times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = matmul.DEEPSEEK_V3
    kernel = times(result["rows"], "kernel_us", str(shape))
    touch_us = result["ceilings"]["touch_us"]
    rate = result["ceilings"]["touch_bytes"] / touch_us
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, sharey="row")
    for axis, below, op in zip(*axes, matmul.OPS, strict=True):
        floor = [shape.floor_bytes(op, batch) / rate for batch in matmul.BATCHES]
        for name in dict.fromkeys(name for name, _, _ in kernel):
            points = [(batch, kernel[name, op, batch]) for batch in matmul.BATCHES if (name, op, batch) in kernel]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
            if points and (name in (matmul.MOSAIC, matmul.TRITON) or "dot_scaled" in name):  # read the packed bytes
                share = [(batch, 100 * touch_us / us) for batch, us in points]
                below.plot(*zip(*share, strict=True), marker="o", markersize=3, color=axis.lines[-1].get_color())
        axis.plot(matmul.BATCHES, floor, "k:", label="bytes at the touch rate")
        axis.set(title=op, xscale="log", yscale="log")
        below.set(xlabel="B", ylim=(0, 100))
    axes[0][0].set_ylabel("kernel, us")
    axes[1][0].set_ylabel("touching the packed bytes, % of the time")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
