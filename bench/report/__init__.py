"""The README's benchmark section and its plots, written from the results on record.

    python -m bench.report            rewrites README.md between its markers, and bench/results/*.svg
    python -m bench.report --check    fails where the README differs from what would be written

Each table is made of the newest file in bench/results whose name ends as in SECTIONS; none is typed by hand.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from bench import scaling_plot
from bench.report import decode, linear, matmul, prefill, scaling, step
from bench.report.markdown import origin

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- benchmarks: written by python -m bench.report -->\n", "<!-- end of benchmarks -->\n"
# Ending of a result's name -> the section's text made of it, in the README's order.
SECTIONS: dict[str, Callable[[dict], str]] = {
    "fp4_bmm": matmul.section,
    "fp4_bmm_shapes": matmul.shapes_section,
    "fp4_bmm_h200": functools.partial(matmul.section, picture=False),
    "fp4_bmm_shapes_h200": matmul.shapes_section,
    "fp4_linear": linear.section,
    "fp4_linear_h200": linear.section,
    "mla_decode": decode.section,
    "mla_decode_heads": decode.section,
    "mla_decode_h200": decode.section,
    "step": step.section,
    "step_h200": functools.partial(step.section, pictures=False),
    "prefill": prefill.section,
    "scaling": scaling.section,
    "scaling_packed": scaling.section,
    "scaling_graph": scaling.section,
    "scaling_packed_h200": scaling.section,
    "scaling_graph_h200": scaling.section,
}
# A picture's name -> the ending of its result's name, and what draws it.
PLOTS: dict[str, tuple[str, Callable[[dict, Path], None]]] = {
    "fp4_bmm.svg": ("fp4_bmm", matmul.plot),
    "step_stages.svg": ("step", step.plot_stages),
    "step_context.svg": ("step", step.plot_context),
    "scaling.svg": ("scaling", scaling_plot.draw),
}


def newest(ending: str) -> Path | None:
    """The latest result of a kind; names begin with a date."""
    return max(RESULTS.glob(f"*_{ending}.json"), default=None)


def text() -> str:
    """All sections on record."""
    parts = []
    for ending, section in SECTIONS.items():
        path = newest(ending)
        if path is not None:
            result = json.loads(path.read_text())
            parts.append(f"{section(result)}\n\n{origin(result, path)}\n")
    return "\n".join(parts)


def draw() -> None:
    """All pictures of results on record."""
    for name, (ending, plot) in PLOTS.items():
        path = newest(ending)
        if path is not None:
            plot(json.loads(path.read_text()), RESULTS / name)


def rewritten(readme: str) -> str:
    """A README with today's sections between its markers."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + text() + END + rest.split(END)[1]
