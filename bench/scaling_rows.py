"""Which points bench.scaling measures, the most telling first."""

from __future__ import annotations

import re

Row = tuple[str, int, int]  # kind, sequences (of one device in DP, else of all), keys

LONG = 131_072
ROWS: list[Row] = [
    ("DP", 64, 4096),
    ("TP", 64, 4096),
    ("CP", 32, LONG),
    ("stack", 0, 0),
    ("TP", 1, 4096),
    ("TP", 16, 4096),
    ("CP", 8, LONG),
    ("CP", 1, LONG),
    ("DP", 16, 4096),
    ("TP", 128, 4096),
    ("TP", 16, 16_384),
    ("CP", 16, LONG),
    ("DP", 16, 16_384),
    ("CP", 64, LONG),
    ("CP", 8, 16_384),
    ("TP", 64, 16_384),
    ("CP", 64, 16_384),
    ("DP", 128, 4096),
]
SMALL_ROWS: list[Row] = [("DP", 4, 32), ("TP", 4, 32), ("CP", 2, 256), ("stack", 0, 0)]


def parse_rows(text: str) -> list[Row]:
    """[("TP", 16, 4096), ("stack", 0, 0)] of "TP:16x4096,stack"; SystemExit for what is no row."""
    rows: list[Row] = []
    for part in text.split(","):
        match = re.fullmatch(r"(stack)|(TP|DP|CP):(\d+)x(\d+)", part)
        if match is None:
            raise SystemExit(f"bench.scaling: --rows must be as TP:16x4096, DP:.., CP:.. or stack; got {part!r}.")
        rows.append(("stack", 0, 0) if match[1] else (match[2], int(match[3]), int(match[4])))
    return rows
