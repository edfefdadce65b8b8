"""The README says what is so: its examples run, its commands are CI's, what it names exists."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from kernel_checks import GROUP, Case, prepare, run

import mla_fp4_jax
from bench import report
from mla_fp4_jax import FP4Array
from mla_fp4_jax.cli import main
from mla_fp4_jax.ops.implementations import PREFERENCE
from pallas_kernels.backend import abstract_gpu

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Column of the support matrix -> the devices it speaks for, (kind, platform).
DEVICES = {
    "CPU": [],
    "NVIDIA before sm_80": [("Tesla V100-SXM2-16GB", "cuda"), ("Tesla T4", "cuda")],
    "NVIDIA sm_80, sm_89": [("NVIDIA A100-SXM4-80GB", "cuda"), ("NVIDIA L4", "cuda")],
    "NVIDIA sm_90": [("NVIDIA H100 80GB HBM3", "cuda"), ("NVIDIA H200", "cuda")],
    "NVIDIA sm_100": [("NVIDIA B200", "cuda")],
    "AMD gfx942": [("gfx942", "rocm")],
}
# Its rows are checked where jax has what it needs; README's text says so.
NEEDS_JAX = {"mosaic_gpu": (0, 11)}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_examples_run_in_order():
    examples = blocks("python")
    assert len(examples) == 3
    namespace: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["y"].shape == (2, 1, 256) and namespace["v"].shape == (2, 8, 64)
    assert namespace["k"].shape == (2, 8, 128)


def test_the_example_is_short():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 20


def test_the_test_command_is_the_one_ci_runs():
    _, test, _ = (block.strip() for block in blocks("sh"))
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "pytest" in test and "\n" not in test


def test_the_run_command_is_the_installed_script():
    run, _, _ = (block.strip() for block in blocks("sh"))
    assert run.endswith("/mla-fp4 demo") and "\n" not in run
    assert PYPROJECT["project"]["scripts"] == {"mla-fp4": f"{main.__module__}:{main.__name__}"}


def test_files_that_are_named_exist():
    code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    tops = {path.name for path in ROOT.iterdir()}
    named = [name for name in code if re.fullmatch(r"[\w.]+(/[\w.]+)*/?", name) and name.split("/")[0] in tops]
    assert "tests/oracle.py" in named
    assert [name for name in (*named, *filter(None, links)) if not (ROOT / name).exists()] == []


def test_public_names_are_those_exported():
    listed = re.findall(r"`(\w+)`", section("What is public").split(";")[0])
    exported = [name for name, value in vars(mla_fp4_jax).items() if re.match(r"[A-Za-z]", name) and callable(value)]
    assert sorted(listed) == sorted([*exported, "mla_fp4_jax"])


def test_methods_that_are_named_exist():
    for owner, name in re.findall(r"`(FP4Array|MLAConfig|MLAAttention)\.(\w+)", README):
        assert hasattr(getattr(mla_fp4_jax, owner), name), f"{owner}.{name}"


def test_options_and_extras_that_are_named_exist(capsys):
    for extra in re.findall(r"'\.\[(\w+)\]'", README):
        assert extra in PYPROJECT["project"]["optional-dependencies"]
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    shown = capsys.readouterr().out
    options = set(
        re.findall(
            r" (--(?!xla_)[a-z-]+)", section("Example") + section("Many devices") + README.split("## Example")[0]
        )
    )
    assert options and all(option in shown for option in options)


def test_the_jax_range_is_pyprojects():
    (required,) = (item for item in PYPROJECT["project"]["dependencies"] if item.startswith("jax>"))
    assert f"`{required}`" in section("JAX versions")


def test_dimensions_have_their_config_fields():
    for line in section("Dimensions").splitlines():
        for field in re.findall(r"^\| \w \| `(\w+)`", line):
            assert field in mla_fp4_jax.MLAConfig.__dataclass_fields__


def supported(implementation: str, dtype, format: str) -> bool:
    """Whether both of a layer's products are traced for the current device without an objection."""
    case = Case(3, 2, 64, 64, 128, jnp.dtype(dtype).name, format)
    scales = jnp.full((2, 128, 128 // GROUP[format]), 120, jnp.uint8)
    w = FP4Array.from_packed(jnp.zeros((2, 128, 64), jnp.uint8), scales, format=format)
    try:
        w = prepare(w, implementation, case.P)
        for contract, columns in (("rows", case.P), ("columns", case.L)):
            x = jax.ShapeDtypeStruct((case.B, case.H, columns), dtype)
            jax.eval_shape(functools.partial(run, implementation, case, contract), x, w)
    except NotImplementedError:
        return False
    return True


def cell(implementation: str, devices: list[tuple[str, str]]) -> str:
    found = set()
    for target in [abstract_gpu(*device) for device in devices] or [contextlib.nullcontext()]:
        with target:
            dtypes = (jnp.bfloat16, jnp.float16, jnp.float32)
            names = [jnp.dtype(dtype).name for dtype in dtypes if supported(implementation, dtype, "mxfp4")]
        found.add(", ".join(names) or "no")
    (text,) = found  # the devices of one column agree
    return text


def formats(implementation: str) -> str:
    with abstract_gpu(*DEVICES["NVIDIA sm_90"][0]):
        return ", ".join(name.upper() for name in GROUP if supported(implementation, jnp.bfloat16, name))


def test_the_support_matrix_is_what_the_code_offers():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("the CPU column is found on a host without a GPU")
    table = README.split("<!-- support matrix: checked by tests/test_readme.py -->\n")[1]
    header, _, *lines = [line.strip("| ").split(" | ") for line in table.split("\n<!-- end")[0].splitlines()]
    assert header == ["implementation", "weights", *DEVICES]
    rows = {line[0].strip("`"): line[1:] for line in lines}
    assert [name for name in rows if name in PREFERENCE] == list(PREFERENCE) and set(rows) <= {
        "mosaic_gpu",
        *PREFERENCE,
    }
    for name in PREFERENCE:
        if jax.__version_info__ >= NEEDS_JAX.get(name, (0,)):
            expected = [formats(name), *(cell(name, devices) for devices in DEVICES.values())]
            assert rows[name] == expected, f"| `{name}` | {' | '.join(expected)} |"


def test_the_benchmark_tables_are_those_of_the_results_on_record():
    assert report.rewritten(README) == README, "run python -m bench.report"
    typed = section("Benchmarks").split(report.BEGIN)[0]
    assert not re.search(r"\d[.]\d", typed)


def test_the_commands_of_benchmarks_exist():
    for name in re.findall(r"`python -m bench\.(\w+)", section("Benchmarks")):
        assert importlib.util.find_spec(f"bench.{name}") is not None, name
