"""Two processes on one machine, through jax.distributed and gloo: the demo, a checkpoint in parts, and failures."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, PREFIX, write_checkpoint

from mla_fp4_jax.cli import main

ROOT = Path(__file__).parents[1]
DEMO = ["-m", "mla_fp4_jax", "demo"]
TASK = [str(ROOT / "tests" / "process_main.py")]
PATIENCE = 150  # seconds, on a machine that does other things too


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(arguments: list[str], devices: int = 1) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "XLA_", "JAX_"))}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each; none outlives the test."""
    try:
        texts = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def member(port: int, process: int, number: int = 2) -> list[str]:
    return ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(number), "--process-id", str(process)]


def test_readmes_command_runs_as_written():
    section = (ROOT / "README.md").read_text().split("\n## Many devices\n")[1]
    (command,) = re.findall(r"^```sh\n(.*?)^```$", section.split("\n## ")[0], re.M | re.S)
    assert ":12345 " in command
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        ["bash", "-c", command.replace(":12345 ", f":{free_port()} ")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.stdout.count("Error of the output against a float64 oracle") == 1, run.stderr
    assert "2 x cpu in 2 processes (heads over 2, batch over 1, context over 1)" in run.stdout


@pytest.mark.parametrize("layout", [("--data-parallel", "2"), ("--context-parallel", "2", "--page-size", "16")])
def test_the_demo_runs_as_two_processes(layout):
    """Four devices, two to a process: the axis that is not named splits heads."""
    port = free_port()
    arguments = ["--steps", "3", "--timeout", "100", *layout]
    first, second = finish([start([*DEMO, *member(port, i), *arguments], devices=2) for i in range(2)])
    assert first[0] == 0 and second[0] == 0, first[2] + second[2]
    assert "4 x cpu in 2 processes" in first[1]
    percent = float(re.search(r"this library +([\d.e-]+) %", first[1])[1])
    assert 0 < percent < 1.5  # README: bfloat16
    # Two threads of gloo may write at once: its words go piece by piece, and nothing else may be left.
    gloo = r"\[Gloo\] Rank|is connected to|peer ranks\. Expected number of connected peer ranks is :|\d+"
    assert re.sub(gloo, "", second[1]).strip() == ""


def poisoned_checkpoints(folder: Path, rng: np.random.Generator) -> list[Path]:
    """Two copies of a layer of 4 heads; copy i is NaN wherever only heads of the other process are."""
    rows = 48 * 4
    whole = {
        "q_a_proj.weight": rng.standard_normal((40, 96)).astype(ml_dtypes.bfloat16),
        "q_a_layernorm.weight": np.ones(40, ml_dtypes.bfloat16),
        "q_b_proj.weight": rng.standard_normal((4 * 24, 40)).astype(np.float32),
        "kv_a_proj_with_mqa.weight": rng.standard_normal((72, 96)).astype(ml_dtypes.bfloat16),
        "kv_a_layernorm.weight": np.ones(64, ml_dtypes.bfloat16),
        "kv_b_proj.weight": rng.integers(0, 256, (rows, 32), np.uint8),
        "kv_b_proj.weight_scale": rng.integers(118, 125, (rows, 2), np.uint8),
        "o_proj.weight": rng.standard_normal((96, 128)).astype(ml_dtypes.float8_e4m3fn),
        "o_proj.weight_scale": np.full((96, 1), 0.1, np.float32),
    }
    made = []
    for i in range(2):
        mine = {name: array.copy() for name, array in whole.items()}
        other = 1 - i
        mine["kv_b_proj.weight_scale"][other * rows // 2 : (other + 1) * rows // 2] = 255
        mine["q_b_proj.weight"][other * 48 : (other + 1) * 48] = np.nan
        mine["o_proj.weight"][:, other * 64 : (other + 1) * 64] = np.nan
        config = CONFIG | {"num_attention_heads": 4}
        made.append(write_checkpoint(folder / f"copy{i}", {PREFIX + n: a for n, a in mine.items()}, config))
    return made


def test_a_process_reads_its_own_part_of_a_checkpoint(tmp_path, rng):
    """MXFP4, dense rows and FP8 columns; NaN anywhere in what is read would be refused."""
    copies = poisoned_checkpoints(tmp_path, rng)
    port = free_port()
    arguments = ["load", str(copies[0]).replace("copy0", "copyID")]
    ends = finish([start([*TASK, str(port), str(i), *arguments]) for i in range(2)])
    assert [end[0] for end in ends] == [0, 0], ends[0][2] + ends[1][2]
    results = [re.search(r"RESULT (\S+) (\S+)", end[1]).groups() for end in ends]
    assert results[0] == results[1] and all(np.isfinite(float(value)) and float(value) > 0 for value in results[0])


@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_dies_the_other_ends_with_an_error(victim):
    """Process 0 coordinates; both ways the survivor ends long before the demo's 400 steps or JAX's timeouts."""
    port = free_port()
    processes = [start([*TASK, str(port), str(i), "demo", str(victim)]) for i in range(2)]
    ends = finish(processes)
    survivor = ends[1 - victim]
    assert ends[victim][0] == 9
    assert survivor[0] not in (0, 9, None), survivor
    # JAX itself ends a process whose coordinator is gone, with its own words; else ours.
    assert "another process has ended" in survivor[2] or "another task died" in survivor[2], survivor[2]


def test_processes_that_disagree_end_with_an_error():
    port = free_port()
    first, second = finish([start([*DEMO, *member(port, i, 2 + i), "--timeout", "20"]) for i in range(2)])
    assert second[0] == 2 and "must be the same in every process; got 3, process 0 says 2" in second[2]
    assert first[0] not in (0, None), first


@pytest.mark.parametrize("numbers", [(3, 3), (3, 2)], ids=["one is missing", "they disagree"])
def test_processes_that_never_all_join_end_with_an_error(numbers):
    port, began = free_port(), time.monotonic()
    ends = finish([start([*DEMO, *member(port, i, number), "--timeout", "6"]) for i, number in enumerate(numbers)])
    for end in ends:
        assert end[0] == 2 and "not all processes have joined" in end[2], end[2]
    assert time.monotonic() - began < PATIENCE


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--coordinator", "127.0.0.1:1"], "must be given together"),
        (["--coordinator", "127.0.0.1:1", "--num-processes", "2", "--process-id", "2"], r"must be 0 \.\. 1"),
        (["--cluster", "--process-id", "0"], "--cluster must come alone"),
        (["--tensor-parallel", "3"], "must be the 8 devices there are; got 3 x 1 x 1"),
        (["--data-parallel", "3"], "got 1 x 3 x 1"),
        (["--context-parallel", "0"], "must be at least 1"),
    ],
)
def test_options_that_do_not_go_together(arguments, match, capsys):
    try:
        status = main(["demo", *arguments])
    except SystemExit as end:
        status = end.code
    assert status == 2 and re.search(match, capsys.readouterr().err)


def test_one_process_spreads_over_its_devices(capsys):
    assert main(["demo", "--steps", "2", "--data-parallel", "2"]) == 0
    assert "8 x cpu in 1 processes (heads over 4, batch over 2, context over 1)" in capsys.readouterr().out
