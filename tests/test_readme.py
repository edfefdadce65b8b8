"""The README says what is so: its examples run, its commands are CI's, what it names exists."""

from __future__ import annotations

import contextlib
import functools
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import mla_fp4_jax
from mla_fp4_jax import FP4Array, fp4_bmm
from mla_fp4_jax.cli import main
from mla_fp4_jax.ops import implementations
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


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_examples_run_in_order():
    examples = blocks("python")
    assert len(examples) == 2
    namespace: dict = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    assert namespace["y"].shape == (2, 1, 256) and namespace["v"].shape == (2, 8, 64)
    assert namespace["k"].shape == (2, 8, 128)


def test_the_example_is_short():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 20


def test_the_test_command_is_the_one_ci_runs():
    _, test = (block.strip() for block in blocks("sh"))
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "pytest" in test and "\n" not in test


def test_the_run_command_is_the_installed_script():
    run, _ = (block.strip() for block in blocks("sh"))
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
    options = set(re.findall(r" (--[a-z-]+)", section("Example") + README.split("## Example")[0]))
    assert options and all(option in shown for option in options)


def test_the_jax_range_is_pyprojects():
    (required,) = (item for item in PYPROJECT["project"]["dependencies"] if item.startswith("jax>"))
    assert f"`{required}`" in section("JAX versions")


def test_dimensions_have_their_config_fields():
    for line in section("Dimensions").splitlines():
        for field in re.findall(r"^\| \w \| `(\w+)`", line):
            assert field in mla_fp4_jax.MLAConfig.__dataclass_fields__


def supported(implementation: str, dtype) -> bool:
    """Whether a call in both orientations and formats is traced for the current device without an objection."""

    def call(x, codes, scales, global_scale, contract):
        for format, scale, groups in (("mxfp4", None, 4), ("nvfp4", global_scale, 8)):
            w = FP4Array(codes, scales[..., :groups], scale, format)
            fp4_bmm(x, w, contract, implementation=implementation)

    shape = jax.ShapeDtypeStruct
    operands = shape((2, 128, 128), jnp.float4_e2m1fn), shape((2, 128, 8), jnp.uint8), shape((), jnp.float32)
    try:
        for contract in ("rows", "columns"):
            jax.eval_shape(functools.partial(call, contract=contract), shape((3, 2, 128), dtype), *operands)
    except NotImplementedError:
        return False
    return True


def cell(implementation: str, devices: list[tuple[str, str]]) -> str:
    found = set()
    for target in [abstract_gpu(*device) for device in devices] or [contextlib.nullcontext()]:
        with target:
            dtypes = (jnp.bfloat16, jnp.float16, jnp.float32)
            names = [jnp.dtype(dtype).name for dtype in dtypes if supported(implementation, dtype)]
        found.add(", ".join(names) or "no")
    (text,) = found  # the devices of one column agree
    return text


def test_the_support_matrix_is_what_the_code_offers():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("the CPU column is found on a host without a GPU")
    header = ["implementation", *DEVICES]
    rows = [header, ["---"] * len(header)]
    for name in implementations.PREFERENCE:
        rows.append([f"`{name}`", *(cell(name, devices) for devices in DEVICES.values())])
    expected = "\n".join("| " + " | ".join(row) + " |" for row in rows).replace(" --- ", "---")
    shown = README.split("<!-- support matrix: checked by tests/test_readme.py -->\n")[1]
    assert shown.split("\n<!-- end of support matrix -->")[0] == expected


def test_benchmarks_without_results_have_no_numbers():
    results = list((ROOT / "bench" / "results").glob("*.json"))
    assert results or not re.search(r"\d", section("Benchmarks"))
