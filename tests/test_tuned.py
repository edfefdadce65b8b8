"""Tables of tuned configurations: found by every static input, valid for their kernel, and nothing where none is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import pallas_kernels
from pallas_kernels import tuned
from pallas_kernels.backend import abstract_gpu
from pallas_kernels.fp4_bmm_mosaic_gpu import NAME, best_config, default_config
from pallas_kernels.fp4_bmm_tiles import Config, Problem, check_config

TABLES = sorted((Path(pallas_kernels.__file__).parent / "tuned_tables").glob("*.json"))
PROBLEM = Problem(True, 3, 8, 512, 128, 192, 0, 65536, 0, 4096, 0)
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A folder of tables in which a device of our own has one row."""
    (tmp_path / "tuned_tables").mkdir()
    row = {"problem": dataclasses.asdict(PROBLEM), "config": dataclasses.asdict(Config(16, 2, 1))}
    text = json.dumps({"environment": {}, NAME: [row]})
    (tmp_path / "tuned_tables" / tuned.table_name(H100)).write_text(text)
    monkeypatch.setattr(tuned, "files", lambda package: tmp_path)
    tuned._table.cache_clear()
    yield
    tuned._table.cache_clear()


def test_a_measured_problem_gets_what_was_measured(table):
    with abstract_gpu(H100):
        assert best_config(PROBLEM) == Config(16, 2, 1) != default_config(PROBLEM)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Problem)])
def test_every_static_input_counts(table, field):
    other = dataclasses.replace(PROBLEM, **{field: not PROBLEM.transposed if field == "transposed" else 64})
    assert tuned.tuned_config(NAME, H100, PROBLEM) is not None
    assert tuned.tuned_config(NAME, H100, other) is None


def test_another_device_or_kernel_has_no_table(table):
    assert tuned.tuned_config(NAME, "NVIDIA H200", PROBLEM) is None
    assert tuned.tuned_config("another", H100, PROBLEM) is None


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_shipped_tables_hold_configurations_that_fit(path):
    rows = json.loads(path.read_text())[NAME]
    assert rows
    for row in rows:
        check_config(Problem(**row["problem"]), Config(**row["config"]))
        assert row["kernel_us"] <= row["default_us"]
