"""Plain-text tables, bars and units for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

BAR_WIDTH = 32
_EIGHTHS = " ▏▎▍▌▋▊▉"


class CliError(Exception):
    """What a user asked for cannot be done; its text is the whole message."""


def human_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """0.00123 -> "1.23 ms"."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def percent(fraction: float) -> str:
    """Three digits of a fraction as a percentage, or a power of ten where it is tiny."""
    return f"{100 * fraction:.3g} %" if fraction == 0 or fraction >= 1e-4 else f"{100 * fraction:.1e} %"


def bar(fraction: float) -> str:
    """A bar of a fraction of BAR_WIDTH characters; '#' where the terminal knows no blocks."""
    eighths = round(min(max(fraction, 0.0), 1.0) * BAR_WIDTH * 8)
    blocks = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    try:
        blocks.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#" * round(eighths / 8)
    return blocks or ("▏" if fraction > 0 else "")


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows of cells in columns, indented; the columns numbered in `right` end flush."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)
