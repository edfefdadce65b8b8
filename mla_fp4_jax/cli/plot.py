"""The demo's figure: error and memory, side by side. The only place that needs Matplotlib, and imports it."""

from __future__ import annotations

from pathlib import Path

from mla_fp4_jax.cli.text import CliError, human_bytes, percent

OURS, THEIRS, NEUTRAL = "#1b7f5c", "#c4572e", "#8a8f98"
INK, FAINT = "#22262b", "#6b7280"


def check_plot(path: Path) -> None:
    """Raise CliError unless a figure could be written there."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise CliError("--plot needs matplotlib; pip install 'mla_fp4_jax[plot]'") from None
    if path.suffix.lower() != ".png":
        raise CliError(f"--plot must name a .png file; got {path}")
    if not path.parent.is_dir():
        raise CliError(f"--plot: there is no directory {path.parent}")
    if path.is_dir():
        raise CliError(f"--plot: {path} is a directory")
    del FigureCanvasAgg


def draw_plot(path: Path, errors: dict[str, float], held: dict[str, int], dtype: str) -> None:
    """Write the figure.

    Args:
        path: of the PNG.
        errors: relative RMS by name, ours first; may be empty.
        held: bytes of kv_b_proj by name, ours last.
        dtype: the compute dtype, for a label.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(11, 3.4), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.15))
    error_axes, memory_axes = figure.subplots(1, 2)
    names = list(errors)
    colours = [OURS if i == 0 else THEIRS for i in range(len(names))]
    _bars(
        error_axes,
        "Error of the layer's output against float64",
        f"relative RMS of decoded tokens; ours as run in {dtype}, engines' formats alone",
        [(name, errors[name], percent(errors[name])) for name in names],
        colours,
    )
    names = list(held)
    colours = [OURS if i == len(names) - 1 else THEIRS if i else NEUTRAL for i in range(len(names))]
    _bars(
        memory_axes,
        "Memory of kv_b_proj",
        "one layer, all that prefill and decode keep",
        [(name, held[name], human_bytes(held[name])) for name in names],
        colours,
    )
    figure.savefig(path)


def _bars(axes, title: str, subtitle: str, rows: list[tuple[str, float, str]], colours: list[str]) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=24)
    axes.text(0, 1.04, subtitle, transform=axes.transAxes, fontsize=8.5, color=FAINT)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(FAINT)
    axes.set_xticks([])
    if not rows:
        axes.set_yticks([])
        axes.text(0.02, 0.5, "not computed", transform=axes.transAxes, color=FAINT)
        return
    values = [value for _, value, _ in rows]
    axes.barh(range(len(rows)), values, color=colours, height=0.58)
    axes.set_yticks(range(len(rows)), [name.replace(", ", ",\n") for name, _, _ in rows], fontsize=9.5, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.26)
    for i, (_, value, label) in enumerate(rows):
        axes.text(value + max(values) * 0.015, i, label, va="center", fontsize=10, color=INK)
