"""Imports point one way, and importing does no work."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# design.md, "Layers": each line may import from the lines above it and from its own; a package stands for all of
# its modules. "pallas_kernels" is the floor.
LAYERS = [
    ["errors", "einsum", "formats", "norm"],
    ["config"],
    ["sharding"],
    ["cache", "rope", "scale_search"],
    ["fp4_array"],
    ["quantize"],
    ["kv_b_proj", "attention"],
    ["ops"],
    ["projections"],
    ["weights"],
    ["shard"],
    ["spmd"],
    ["functional", "kernel_order"],
    ["mla"],
    ["checkpoint"],
    ["cli"],
    ["__init__", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
STDLIB = set(sys.stdlib_module_names)
DEPENDENCIES = {
    "pallas_kernels": {"jax", "jaxtyping", "numpy"},
    "mla_fp4_jax": {"flax", "jax", "jaxtyping", "ml_dtypes", "numpy", "pallas_kernels", "tqdm"},
}
# Only there: the [plot] extra, and what changes with the JAX version.
OPTIONAL = {
    "matplotlib": ("mla_fp4_jax/cli/plot.py",),
    "jaxlib": ("pallas_kernels/backend.py", "pallas_kernels/mosaic.py"),
}


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Every module that a file imports, anywhere in it; a `from a import b` counts as a.b where that is a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package"
            assert node.module is not None
            for alias in node.names:
                inner = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                found.append(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def unit(path: Path) -> str:
    """The name in LAYERS that a file of mla_fp4_jax belongs to."""
    return path.relative_to(ROOT / "mla_fp4_jax").with_suffix("").parts[0]


def test_the_reader_of_imports_reads():
    assert "mla_fp4_jax.formats" in imports(ROOT / "mla_fp4_jax" / "fp4_array.py")
    assert "pallas_kernels.fp4_bmm_triton" in imports(ROOT / "mla_fp4_jax" / "ops" / "bmm.py")
    assert len(files("mla_fp4_jax")) > 30 and len(files("pallas_kernels")) > 3


@pytest.mark.parametrize("path", files("mla_fp4_jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_downwards(path):
    own = unit(path)
    assert own in LEVEL, f"{own} is new: say in LAYERS where it belongs"
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "mla_fp4_jax" and rest:
            other = rest[0]
            assert other == own or LEVEL[other] < LEVEL[own], f"{path} imports {name}, which is above or beside it"
        elif package == "mla_fp4_jax":
            assert own in ("cli", "__init__", "__main__"), f"{path} imports the package that it is a part of"


@pytest.mark.parametrize("package", ["pallas_kernels", "mla_fp4_jax"])
def test_nothing_but_the_declared_dependencies(package):
    allowed = DEPENDENCIES[package] | {package} | STDLIB
    for path in files(package):
        for name in imports(path):
            top = name.split(".")[0]
            place = str(path.relative_to(ROOT))
            assert top in allowed or place in OPTIONAL.get(top, ()), f"{place} imports {name}"


def test_tests_and_bench_are_imported_by_neither():
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests", "bench"}
    for path in [*files("mla_fp4_jax"), *files("pallas_kernels")]:
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in helpers or top in STDLIB, f"{path} imports {name}"


def test_one_file_for_each_back_end_knows_pallas():
    for path in [*files("mla_fp4_jax"), *files("pallas_kernels")]:
        if path in (ROOT / "pallas_kernels" / "backend.py", ROOT / "pallas_kernels" / "mosaic.py"):
            assert "jax.experimental.pallas" in path.read_text()
            continue
        for name in imports(path):
            assert not name.startswith(("jax.experimental.pallas", "jax._src")), f"{path} imports {name}"
            assert name != "jax.experimental", f"{path} imports from jax.experimental"


def test_no_private_jax_anywhere():
    for path in [*files("mla_fp4_jax"), *files("pallas_kernels")]:
        assert "jax._src" not in path.read_text(), path


def test_the_oracle_shares_no_code():
    assert set(imports(ROOT / "tests" / "oracle.py")) == {"__future__", "math", "numpy"}


IMPORT_ALL = """
import os, sys, warnings
import jax, flax.nnx
from jax._src import xla_bridge
before = dict(jax.config.values), dict(os.environ), list(sys.path), list(warnings.filters), sys.excepthook
import {modules}
after = dict(jax.config.values), dict(os.environ), list(sys.path), list(warnings.filters), sys.excepthook
names = "jax.config", "os.environ", "sys.path", "warnings.filters", "sys.excepthook"
for name, old, new in zip(names, before, after):
    assert old == new, f"{{name}} changed: {{old}} -> {{new}}"
assert not xla_bridge.backends_are_initialized(), "a backend was initialised"
heavy = {{"torch", "matplotlib", "orbax", "safetensors", "transformers", "pytest", "beartype"}} & set(sys.modules)
assert not heavy - present, heavy
"""


def import_all(modules: list[str]) -> subprocess.CompletedProcess:
    program = IMPORT_ALL.format(modules=", ".join(modules))
    # What JAX and Flax themselves import is not ours to judge.
    program = program.replace("before =", "present = set(sys.modules)\nbefore =", 1)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:mla_fp4_jax", "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def behind_mosaic(path: Path) -> bool:
    """Whether importing a file imports JAX's Mosaic GPU, which sets an environment variable. Only traces may."""
    top = ast.parse(path.read_text()).body
    named = [f"{n.module}.{a.name}" for n in top if isinstance(n, ast.ImportFrom) for a in n.names]
    named += [n.module for n in top if isinstance(n, ast.ImportFrom)]
    if path.stem == "mosaic" or "pallas_kernels.mosaic" in named:
        return True
    inner = {
        ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in named if name.startswith("pallas_kernels")
    }
    return any(behind_mosaic(other) for other in inner if other.exists())


def test_importing_does_no_work_and_says_nothing():
    library = files("mla_fp4_jax")
    assert not any(map(behind_mosaic, library))
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in [*files("pallas_kernels"), *library]
        if path.stem != "__main__" and not behind_mosaic(path)
    ]
    assert "pallas_kernels.fp4_bmm_mosaic_gpu" in modules
    run = import_all(modules)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "" and run.stderr == ""


def test_the_public_names():
    import mla_fp4_jax

    for name in ("MLAAttention", "MLAConfig", "FP4Array", "load_mla_layer", "quantize_mxfp4", "unpack_kv_b_proj"):
        assert callable(getattr(mla_fp4_jax, name))
    assert callable(mla_fp4_jax.fp4_bmm) and isinstance(mla_fp4_jax.__version__, str)
    for package in ("mla_fp4_jax", "pallas_kernels"):
        assert (ROOT / package / "py.typed").exists()
