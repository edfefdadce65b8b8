"""`mla-fp4 info`: versions, devices, and which implementations can run here, with reasons."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import jax

from mla_fp4_jax.cli.text import table
from mla_fp4_jax.ops import implementations

DISTRIBUTIONS = ("mla-fp4-jax", "jax", "jaxlib", "jax-cuda13-plugin", "flax", "ml_dtypes", "numpy")


def run_info(args: argparse.Namespace) -> None:
    """Print it."""
    del args
    print("Versions")
    rows = [("python", platform.python_version())]
    rows += [(name, version) for name in DISTRIBUTIONS if (version := _version(name))]
    print(table(rows))
    print("\nDevices")
    print(table(_devices()))
    print("\nImplementations of the FP4 products, in order of preference")
    rows = [
        (name, "can run" if why is None else f"cannot: {why}") for name, why in implementations.available().items()
    ]
    print(table(rows))


def chosen_implementation(asked: str | None) -> tuple[str, str]:
    """The implementation that a layer will use, and why in parentheses, for a report.

    Raises:
        NotImplementedError: the one asked for cannot run here.
    """
    reasons = implementations.available()
    if asked is not None:
        if reasons.get(asked) is not None:
            raise NotImplementedError(f"--implementation {asked} cannot run here: {reasons[asked]}")
        return asked, " (asked for)"
    name = next(name for name, why in reasons.items() if why is None)
    skipped = [f"{other}: {why}" for other, why in reasons.items() if why is not None]
    return name, f" ({'; '.join(skipped)})" if skipped else ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str, str]]:
    """Name, kind and notes of each device."""
    rows = []
    for device in jax.devices():
        capability = getattr(device, "compute_capability", None)
        memory = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
        notes = [f"compute capability {capability}"] if capability else []
        notes += [f"{memory / 2**30:.1f} GiB"] if memory else []
        rows.append((str(device), device.device_kind, ", ".join(notes)))
    return rows
