"""A stored result says where it came from."""

from __future__ import annotations

import json
import re
import subprocess

import jax
import pytest

from bench import environment as module


def test_the_environment_of_a_measurement():
    found = json.loads(json.dumps(module.environment()))
    assert found["versions"]["jax"] == jax.__version__ and found["device"] == jax.devices()[0].device_kind
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["date"])


def test_the_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module.environment()["commit"] is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except OSError:
        pytest.skip("there is no git")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    clean = module.environment()["commit"]
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    (tmp_path / "new").touch()
    assert module.environment()["commit"] == clean + "+"
