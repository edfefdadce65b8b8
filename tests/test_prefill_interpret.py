"""The Mosaic prefill kernel's program without a GPU: right in every case, no deadlock."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import jax
import pytest
from interpret_mla_prefill import CASES

HERE = pathlib.Path(__file__).parent

pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the GPU interpreter needs jax 0.12")


@pytest.fixture(scope="module")
def results() -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "interpret_mla_prefill.py")],
        env={"PYTHONPATH": str(HERE.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_it_is_right(index, results):
    """Probabilities are rounded to bfloat16, 2^-9 relative, before they meet the values, the output once more."""
    result = results[index]
    assert result["empty"]
    assert result["out"] <= 2 * 2.0**-8, result
    assert result["lse"] <= 1e-5, result
