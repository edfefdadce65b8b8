"""Everything about Pallas that changes with the JAX version or the device: the one file that imports its back ends.

Pallas's Triton back end is deprecated since jax 0.11.0 and will leave JAX; it is still there, and still the only
one that also serves Ampere and ROCm, in 0.12. Hence `jax<0.13` in pyproject.toml, one file to change when it goes,
and an XLA implementation of every kernel, which is what remains without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

__all__ = [
    "Gpu",
    "abstract_gpu",
    "pl",
    "pltriton",
    "shared_memory_limit",
    "target_gpu",
    "triton_why_not",
]

# Most shared memory one block may ask for, in bytes, by compute capability: CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability" (maximum per thread block).
_SHARED_MEMORY = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_SHARED_MEMORY_OTHER = 99
_SHARED_MEMORY_ROCM = 64  # local data share of a CDNA workgroup

# Kinds a device description names without saying its capability.
_CAPABILITY_BY_KIND = {
    "A100": (8, 0), "A10": (8, 6), "RTX A6000": (8, 6), "L40": (8, 9), "L4": (8, 9), "RTX 4090": (8, 9),
    "GH200": (9, 0), "H100": (9, 0), "H200": (9, 0), "H800": (9, 0), "H20": (9, 0),
    "B200": (10, 0), "GB200": (10, 0), "B300": (10, 3), "GB300": (10, 3), "T4": (7, 5), "V100": (7, 0),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU that code is traced for.

    Attributes:
        platform: "cuda" or "rocm".
        kind: its name, as "NVIDIA H100 80GB HBM3" or "gfx942".
        capability: CUDA compute capability (major, minor); None where unknown, and for ROCm.
    """

    platform: str
    kind: str
    capability: tuple[int, int] | None


def target_gpu() -> Gpu | None:
    """The GPU that a function traced now would run on, or None.

    It is the abstract device of the current mesh (see abstract_gpu), else this process's first GPU. The first
    call initialises JAX's backends, so nothing may call this at import.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None and device.platform in ("cuda", "rocm", "gpu"):
        real = _process_gpu()
        if real is not None and real.kind == device.device_kind:
            return real
        if device.platform == "rocm" or device.device_kind.startswith("gfx"):
            return Gpu("rocm", device.device_kind, None)
        return Gpu("cuda", device.device_kind, _capability_of_kind(device.device_kind))
    return _process_gpu()


def shared_memory_limit(gpu: Gpu | None) -> int:
    """Bytes of shared memory that one block may use; that of an H100 where the GPU is unknown."""
    if gpu is None:
        return _SHARED_MEMORY[9, 0] * 1024
    if gpu.platform == "rocm":
        return _SHARED_MEMORY_ROCM * 1024
    return _SHARED_MEMORY.get(gpu.capability or (0, 0), _SHARED_MEMORY_OTHER) * 1024


@contextlib.contextmanager
def abstract_gpu(kind: str = "NVIDIA H100 80GB HBM3", platform: str = "cuda") -> Iterator[None]:
    """Trace and lower inside this for a GPU that need not be there.

    Lowering for `lowering_platforms=("cuda",)` on a host without a GPU needs it from jax 0.11 on; it also tells
    target_gpu what the code is for. `platform` is "cuda" or "rocm", whose kinds are names such as "gfx942".
    """
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def _process_gpu() -> Gpu | None:
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError:
        return None
    capability = str(getattr(devices[0], "compute_capability", ""))
    if capability.startswith("gfx"):
        return Gpu("rocm", capability, None)
    parts = capability.split(".")
    known = len(parts) == 2 and all(part.isdigit() for part in parts)
    return Gpu("cuda", devices[0].device_kind, (int(parts[0]), int(parts[1])) if known else None)


def _capability_of_kind(kind: str) -> tuple[int, int] | None:
    matches = [name for name in _CAPABILITY_BY_KIND if name in kind]
    return _CAPABILITY_BY_KIND[max(matches, key=len)] if matches else None


def triton_why_not(gpu: Gpu | None) -> str | None:
    """Why Pallas's Triton back end cannot run on a GPU (None: there is none), or None if it can."""
    if gpu is None:
        return "it needs a GPU; this process has none."
    if gpu.platform == "cuda" and gpu.capability is not None and gpu.capability < (8, 0):
        return f"it needs compute capability 8.0 (bfloat16 tensor cores); {gpu.kind} has {gpu.capability}."
    return None


def mosaic_why_not(gpu: Gpu | None) -> str | None:
    """Why Pallas's Mosaic GPU cannot run Hopper kernels on a GPU (None: there is none), or None if it can."""
    if gpu is None:
        return "it needs a GPU; this process has none."
    if gpu.platform != "cuda" or gpu.capability is None or gpu.capability[0] != 9:
        return f"it needs a Hopper GPU (compute capability 9.0, for wgmma); this is {gpu.kind}."
    if jax.__version_info__ < (0, 11):
        return f"it needs jax 0.11 or newer; this is {jax.__version__}."
    return None
