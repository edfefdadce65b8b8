"""python -m bench: its commands are the benchmarks' own, and their files are those that the report reads."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from bench.__main__ import COMMANDS, commands

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_module_with_such_options(name):
    ending, command = COMMANDS[name]
    module, *words = command.split()
    source = inspect.getsource(importlib.import_module(module))
    for option in (*re.findall("--[a-z-]+", " ".join(words)), "--out"):
        assert f'"{option}"' in source, f"{module} has no {option}"
    assert ending in report.SECTIONS or name == "tests"


def test_an_h200s_results_go_beside_an_h100s():
    (on_one,), (on_other,) = (
        commands(["layer"], kind, "2030-01-02") for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    )
    assert on_one[-1].endswith("bench/results/2030-01-02_step.json")
    assert on_other[-1].endswith("bench/results/2030-01-02_step_h200.json")


def test_without_a_gpu_it_says_so_and_can_still_be_read():
    run = [sys.executable, "-m", "bench"]
    dry = subprocess.run([*run, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "bench.step --memory" in dry and dry.rstrip().endswith("-m bench.report")
    if not dry.count("bench.scaling"):  # one GPU or none
        done = subprocess.run([*run, "--only", "layer"], cwd=ROOT, capture_output=True, text=True, env={"PATH": ""})
        assert done.returncode and "it needs an NVIDIA GPU" in done.stderr
