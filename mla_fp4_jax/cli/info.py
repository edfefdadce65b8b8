"""`mla-fp4 info`: versions, devices, and which implementations can run here, with reasons."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import platform
from collections.abc import Iterator

import jax

import mla_fp4_jax
from mla_fp4_jax.cli.text import table
from mla_fp4_jax.ops import implementations

DISTRIBUTIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "ml_dtypes", "numpy")


def run_info(args: argparse.Namespace) -> None:
    """Print it."""
    del args
    print("Versions")
    rows = [("mla_fp4_jax", mla_fp4_jax.__version__), ("python", platform.python_version())]
    rows += [(name, version) for name in DISTRIBUTIONS if (version := _version(name))]
    print(table(rows))
    print("\nDevices")
    print(table(_devices()))
    print("\nImplementations of the FP4 products, in order of preference")
    rows = [
        (name, "can run" if why is None else f"cannot: {why.rstrip('.')}")
        for name, why in implementations.available().items()
    ]
    print(table(rows))


def check_implementation(asked: str | None) -> None:
    """Raise NotImplementedError if the implementation asked for cannot run here."""
    reason = None if asked is None else implementations.why_not(asked)
    if reason is not None:
        raise NotImplementedError(f"--implementation {asked} cannot run here: {reason}")


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[str]]:
    """What the FP4 products choose meanwhile, one line for each implementation and reason."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name == implementations.logger.name and record.getMessage().startswith("fp4_bmm: "):
                found.append(record.getMessage().removeprefix("fp4_bmm: "))

    handler, level = Handler(), implementations.logger.level
    implementations.log_choice.cache_clear()  # it speaks once per process
    implementations.logger.addHandler(handler)
    implementations.logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        implementations.logger.removeHandler(handler)
        implementations.logger.setLevel(level)


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
