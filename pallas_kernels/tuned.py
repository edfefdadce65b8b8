"""Configurations that were measured: one JSON table per device, keyed by every static input of a kernel.

A table is a file tuned_tables/<device>.json, made by `python -m bench.tune` and never by a running program:

    {"environment": {...}, "<kernel>": [{"problem": {...}, "config": {...}, "kernel_us": 3.65, "default_us": 3.71}]}

"problem" holds all fields of the kernel's Problem. What no table knows is left to the kernel's own heuristics.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from importlib.resources import files
from typing import Any

_Key = tuple[tuple[str, object], ...]


def table_name(device_kind: str) -> str:
    """The file name of a device's table, such as "nvidia_h100_80gb_hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def tuned_config(kernel: str, device_kind: str, problem: Any) -> dict[str, Any] | None:
    """The fields of the configuration measured to be fastest, or None where nobody measured.

    Args:
        kernel: its name in the tables, such as "fp4_bmm_mosaic_gpu".
        device_kind: as JAX names the device.
        problem: the kernel's static inputs, a dataclass.
    """
    return _table(device_kind).get((kernel, _key(dataclasses.asdict(problem))))


@functools.cache
def _table(device_kind: str) -> dict[tuple[str, _Key], dict[str, Any]]:
    path = files("pallas_kernels") / "tuned_tables" / table_name(device_kind)
    if not path.is_file():
        return {}
    kernels = json.loads(path.read_text())
    return {
        (kernel, _key(row["problem"])): row["config"]
        for kernel, rows in kernels.items()
        if kernel != "environment"
        for row in rows
    }


def _key(problem: dict[str, object]) -> _Key:
    return tuple(sorted(problem.items()))
