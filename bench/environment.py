"""What a measurement was made with: commit, versions, device, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import jax

_PEERS = ("torch", "triton", "tokenspeed-flashmla", "nvidia-cudnn-cu13", "nvidia-cublas")
_DISTRIBUTIONS = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", *_PEERS)


def describe(commit: str | None = None) -> dict[str, object]:
    """Everything a reader needs to tell two results apart.

    Args:
        commit: None to ask git, which a copy of the tree without its history cannot answer.
    """
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git_commit() if commit is None else commit,
        "device": device.device_kind,
        "devices": len(jax.devices()),
        "python": platform.python_version(),
        "versions": {name: version for name in _DISTRIBUTIONS if (version := _version(name))},
        "driver": _driver(),
        **({"xla_flags": flags} if (flags := os.environ.get("XLA_FLAGS")) else {}),
    }


def gpus() -> list[str]:
    """Names of this host's NVIDIA GPUs, as JAX has them too, without taking any of their memory."""
    return _output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])


def _git_commit() -> str | None:
    return next(iter(_output(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"])), None)


def _driver() -> str | None:
    return next(iter(_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])), None)


def _output(command: list[str]) -> list[str]:
    """Lines, none if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
