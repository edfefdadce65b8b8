"""What a measurement depends on: commit, versions, device, date. Every stored result holds it."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch", "triton")


def environment() -> dict:
    """The commit ("+" after it: with changes that are in no commit), versions, devices, driver and UTC date."""
    import jax

    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in DISTRIBUTIONS if (version := _version(name))},
        "device": devices[0].device_kind,
        "devices": len(devices),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None,
    }


def _commit() -> str | None:
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return commit + ("+" if _output("git", "-C", str(ROOT), "status", "--porcelain") else "") if commit else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
