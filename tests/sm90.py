"""Compiling for an H100 on a machine without a GPU: XLA's CUDA plugin and ptxas do it from a description of one.

Needs the wheels jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc, and JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGET = Path(__file__).parent / "data" / "h100_target_config.txt"
# Dynamic and static shared memory of a block on sm_90: CUDA C++ Programming Guide, technical specifications.
SHARED_MEMORY_LIMIT = 227 * 1024

_WRAPPER = """#!/bin/sh
case "$1" in --version|--input-as-string) exec "{ptxas}" "$@";; esac
"{ptxas}" -v "$@" 2> "{log}.$$"
status=$?
cat "{log}.$$" >> "{log}"
[ $status -eq 0 ] || cat "{log}.$$" >&2
exit $status
"""
# One kernel in the output of ptxas -v.
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>[^']+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)
_LAUNCH = re.compile(r"kCustomKernel.*?\] (?P<name>\S+) grid:.*?shared_memory: (?P<bytes>\d+) bytes")
_MOSAIC_SHARED = re.compile(r"smem_scratch_bytes=(\d+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says of a kernel; bytes of spills and stack are those of one thread."""

    name: str
    registers: int
    spill_bytes: int
    spill_store_bytes: int  # of those
    stack_bytes: int
    static_shared_bytes: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A function compiled for an H100.

    Attributes:
        compiled: JAX's; it cannot be called, but has memory_analysis() and as_text().
        kernels: all that ptxas compiled for it. What was compiled before in this process may not be again.
        dynamic_shared_bytes: of every launch, by the kernel's name; "mosaic" is the most of any Mosaic GPU kernel.
        serialised: ptxas says of a kernel that its wgmma instructions wait for each other.
    """

    compiled: jax.stages.Compiled
    kernels: tuple[Kernel, ...]
    dynamic_shared_bytes: dict[str, int]
    serialised: bool

    @property
    def temp_bytes(self) -> int:
        """Scratch memory on the device: where a dequantised weight would lie."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def hlo(self) -> str:
        """Optimised HLO, without the tables of source lines."""
        return re.sub(r", metadata=\{[^}]*\}", "", self.compiled.as_text())

    def moves_of(self, *dtypes: str) -> list[str]:
        """Instructions that copy or transpose arrays of HLO dtypes such as "u8" and "f4e2m1fn"."""
        kinds = "|".join(dtypes)
        pattern = rf"^.* = (?:\(?)(?:{kinds})\[[^=]*? (?:copy|transpose|copy-start)\(.*$"
        return re.findall(pattern, self.hlo, re.M)


def why_not() -> str | None:
    """Why nothing can be compiled for an H100 here, or None."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "jax-cuda13-plugin is not installed"
    if _cuda_root() is None:
        return "nvidia-cuda-nvcc is not installed"
    try:
        h100_mesh()
    except Exception as error:  # whatever a plugin of another version raises
        return f"the plugin gives no H100 to compile for ({error}); is JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 set?"
    return None


@functools.cache
def h100_mesh(devices: int = 1) -> Mesh:
    """A mesh of H100s that are not there, one axis "x"."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=f"1x1x{devices}"
    )
    return topologies.make_mesh(topology, (devices,), ("x",))


def compile_for_h100(
    function: Callable, *args, mesh: Mesh | None = None, donate_argnums: Sequence[int] = ()
) -> Program:
    """jit and compile a function.

    Args:
        function: of pytrees of arrays.
        args: arrays, or anything with shape and dtype; their leaves are replicated unless they have a sharding on the
            mesh.
        mesh: of h100_mesh; None for one device.
        donate_argnums: see jax.jit.
    """
    mesh = h100_mesh() if mesh is None else mesh
    args = jax.tree.map(functools.partial(_abstract, mesh), args)
    with tempfile.TemporaryDirectory() as folder, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        root, log = Path(folder), Path(folder) / "ptxas.log"
        _wrap_ptxas(root, log)
        options = {
            "xla_gpu_cuda_data_dir": str(root),
            "xla_gpu_enable_libnvptxcompiler": False,
            "xla_gpu_libnvjitlink_mode": "LIB_NV_JIT_LINK_MODE_DISABLED",
            "xla_dump_to": str(root / "dump"),
        }
        with _mosaic_says(root / "mosaic.log"):
            compiled = jax.jit(function, donate_argnums=donate_argnums).lower(*args).compile(compiler_options=options)
        said = [path.read_text() for path in (log, root / "mosaic.log") if path.exists()]
        launches = [path.read_text() for path in (root / "dump").glob("*.thunk_sequence.txt")]
    kernels = tuple(dict.fromkeys(_kernel(match) for text in said for match in _KERNEL.finditer(text)))
    shared = {match["name"]: int(match["bytes"]) for text in launches for match in _LAUNCH.finditer(text)}
    mosaic = [int(number) for text in said for number in _MOSAIC_SHARED.findall(text)]
    serialised = any("wgmma.mma_async instructions are serialized" in text for text in said)
    return Program(compiled, kernels, {**shared, **({"mosaic": max(mosaic)} if mosaic else {})}, serialised)


def _abstract(mesh: Mesh, leaf) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if not (isinstance(sharding, NamedSharding) and sharding.mesh == mesh):
        sharding = NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _cuda_root() -> Path | None:
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    roots = [Path(folder) / "cu13" for folder in folders]
    return next((root for root in roots if (root / "bin" / "ptxas").is_file()), None)


def _wrap_ptxas(root: Path, log: Path) -> None:
    """A folder like CUDA's whose ptxas also writes down what it says with -v."""
    real = _cuda_root()
    assert real is not None
    (root / "nvvm").symlink_to(real / "nvvm")
    wrapper = root / "bin" / "ptxas"
    wrapper.parent.mkdir()
    wrapper.write_text(_WRAPPER.format(ptxas=real / "bin" / "ptxas", log=log))
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)


@contextlib.contextmanager
def _mosaic_says(log: Path) -> Iterator[None]:
    """Write to a file what Mosaic GPU, which runs ptxas itself, prints to standard output, in Python and in C++."""
    names = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES")
    before = {name: os.environ.get(name) for name in names}
    kept = os.dup(1)
    try:
        os.environ |= dict.fromkeys(names, "1")
        with log.open("a") as file, contextlib.redirect_stdout(file):
            os.dup2(file.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _kernel(match: re.Match[str]) -> Kernel:
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    return Kernel(
        match["name"],
        int(match["registers"]),
        int(match["stores"]) + int(match["loads"]),
        int(match["stores"]),
        int(match["stack"]),
        int(shared[1]) if shared else 0,
    )
