"""A whole decode step of a DeepSeek-V3 attention layer: compositions, stages, memory."""

from __future__ import annotations

from pathlib import Path

from bench.report.markdown import row, rule
from bench.step_stages import STAGES

FP4, FP4_KV_B, DENSE, TORCH = "fp4", "fp4 kv_b", "xla bf16", "torch"
Shape = tuple[int, int, int]  # H, S, B


def section(result: dict, pictures: bool = True) -> str:
    """Every shape's times and ratios, then the stages of the FP4 step."""
    found = times(result)
    lines = [
        "One decode step of a DeepSeek-V3 attention layer, with the norm before it and the residual sum; cold",
        "weights, bfloat16 cache of S tokens a sequence, us a layer. JAX: wall time of a jitted, donated loop over a",
        "stack of layers; torch (cuBLAS bf16, bmm, FlashMLA): of a CUDA graph, with norms, rotation and cache write",
        f"by plain torch operations (engines fuse them; {torch_launches(result)} launches a layer).",
        '"Floor": bytes and operations of the FP4 step at this GPU\'s measured rates, stage by stage.',
        "",
        *rule(
            "H", "S", "B", "FP4", "FP4 kv_b", "XLA bf16", "torch", "XLA / FP4", "torch / FP4", "floor", "FP4 / floor"
        ),
    ]
    for shape in shapes(result):
        at = {name: found.get((name, *shape)) for name in (FP4, FP4_KV_B, DENSE, TORCH)}
        floor = row_of(result, FP4, shape).get("floor_us")
        ratios = (ratio(at[DENSE], at[FP4]), ratio(at[TORCH], at[FP4]))
        cells = (number(us) for us in at.values())
        lines.append(row(*shape, *cells, *ratios, number(floor), ratio(at[FP4], floor)))
    lines += stages(result)
    lines += memory(result)
    if pictures:
        lines += [
            "",
            "![stages](bench/results/step_stages.svg) ![time against context](bench/results/step_context.svg)",
        ]
    return "\n".join(lines)


def stages(result: dict) -> list[str]:
    """Kernel time by stage beside the stage's floor."""
    here = [shape for shape in shapes(result) if shape[:2] == (128, 4096) and "stages" in row_of(result, FP4, shape)]
    if not here:
        return []
    lines = [
        "",
        "Kernel time of the FP4 step's stages / their floors, H = 128, S = 4096; the rest of the wall time is gaps.",
        "",
        *rule("B", *STAGES, "kernels", "sum", "wall"),
    ]
    for shape in here:
        r = row_of(result, FP4, shape)
        cells = []
        for stage in STAGES:
            us, floor = r["stages"].get(stage, {}).get("us"), r["floors"].get(stage, {}).get("us")
            cells.append("-" if us is None else f"{us:.1f}" + (f" / {floor:.1f}" if floor is not None else ""))
        lines.append(row(shape[2], *cells, f"{r['launches']:.1f}", number(r["kernel_us"]), number(r["loop_us"])))
    return lines


def torch_launches(result: dict) -> str:
    """Of a layer, the fewest and the most."""
    found = [r["launches"] for r in result["rows"] if r.get("name") == TORCH and "launches" in r]
    return f"{min(found):.0f} to {max(found):.0f}" if found else "some 40"


def memory(result: dict) -> list[str]:
    """The live-buffer statistics of 61 layers, where they were measured."""
    held = result.get("memory")
    if not held or "error" in held:
        return []
    lines = ["", MEMORY_TEXT, "", *rule("", "MB", "MB a layer")]
    for name, size in held["steps"]:
        lines.append(row(name, f"{size / 1e6:.1f}", f"{size / 1e6 / held['layers']:.2f}"))
    return lines


MEMORY_TEXT = (
    "Device memory of a stack of layers by the allocator's own count, each line what came on top of those before:"
)


def times(result: dict) -> dict[tuple[str, int, int, int], float]:
    """(name, H, S, B) -> microseconds a layer."""
    rows = [r for r in result["rows"] if "loop_us" in r or "graph_us" in r]
    return {(r["name"], r["heads"], r["keys"], r["batch"]): r.get("loop_us", r.get("graph_us")) for r in rows}


def shapes(result: dict) -> list[Shape]:
    """All that were timed, many heads first."""
    return sorted({key[1:] for key in times(result)}, key=lambda shape: (-shape[0], *shape[1:]))


def row_of(result: dict, name: str, shape: Shape) -> dict:
    """A composition's row, {} where there is none."""
    matches = (r for r in result["rows"] if (r.get("name"), r["heads"], r["keys"], r["batch"]) == (name, *shape))
    return next((r for r in matches if "loop_us" in r or "graph_us" in r), {})


def number(us: float | None) -> str:
    return "-" if us is None else f"{us:.1f}"


def ratio(a: float | None, b: float | None) -> str:
    return "-" if not a or not b else f"{a / b:.2f}"


def plot_stages(result: dict, path: Path) -> None:
    """Stacked stages by batch at H = 128, S = 4096, beside their floors and torch."""
    here = [shape for shape in shapes(result) if shape[:2] == (128, 4096) and "stages" in row_of(result, FP4, shape)]
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(9, 4.5))
    colours = plt.get_cmap("tab10")
    for i, shape in enumerate(here):
        r = row_of(result, FP4, shape)
        for offset, parts in ((-0.2, r["stages"]), (0.2, r["floors"])):
            bottom = 0.0
            for j, stage in enumerate(STAGES):
                us = parts.get(stage, {}).get("us", 0.0)
                style = {"color": colours(j), "alpha": 1 if offset < 0 else 0.45}
                axis.bar(i + offset, us, 0.36, bottom=bottom, label=stage if i == 0 and offset < 0 else None, **style)
                bottom += us
        for name, marker in ((FP4, "kx"), (DENSE, "k^"), (TORCH, "ko")):
            us = times(result).get((name, *shape))
            if us is not None:
                axis.plot(i, us, marker, markersize=5, label=f"{name}, wall" if i == 0 else None)
    axis.set_xticks(range(len(here)), [f"B = {shape[2]}" for shape in here])
    axis.set(ylabel="us a layer", title="FP4 decode step: kernels by stage, and floors (pale); H = 128, S = 4096")
    axis.legend(fontsize=7, ncols=2)
    _save(figure, path)


def plot_context(result: dict, path: Path) -> None:
    """Time against context, one panel for each batch that has several contexts, H = 128."""
    found = times(result)
    batches = sorted({shape[2] for shape in shapes(result) if shape[0] == 128})
    several = [b for b in batches if len({s for _, h, s, n in found if (h, n) == (128, b)}) > 1] or batches[:1]
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(several), figsize=(3.2 * len(several), 3.6), squeeze=False)
    for axis, batch in zip(axes[0], several, strict=True):
        for name in (FP4, FP4_KV_B, DENSE, TORCH):
            points = sorted((s, us) for (n, h, s, b), us in found.items() if (n, h, b) == (name, 128, batch))
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        here = (row_of(result, FP4, shape) for shape in shapes(result) if (shape[0], shape[2]) == (128, batch))
        floors = sorted((r["keys"], r["floor_us"]) for r in here if "floor_us" in r)
        if floors:
            axis.plot(*zip(*floors, strict=True), "k:", label="floor")
        axis.set(title=f"B = {batch}", xlabel="S", xscale="log", yscale="log")
    axes[0][0].set_ylabel("us a layer, H = 128")
    axes[0][0].legend(fontsize=7)
    _save(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "bench.report"  # the same picture gives the same file
    return plt


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
