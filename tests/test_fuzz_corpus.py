"""The fuzzer's corpus, replayed: every input is read or refused, quickly."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "fuzz"))

from fuzz_checkpoint import TARGETS, run_one  # noqa: E402

CORPUS = sorted((HERE / "fuzz" / "corpus").iterdir())


@pytest.mark.bad_input
def test_every_input_of_the_corpus_is_read_or_refused():
    results = {}
    for path in CORPUS:
        start = time.perf_counter()
        results[path.name] = run_one(path.read_bytes())
        assert time.perf_counter() - start < 5, path.name
    # The seeds are good inputs: the harness would be blind if they were refused.
    refused = [name for name, result in results.items() if "_" in name and result == "refused"]
    assert refused == [name for name in refused if name.startswith("index_")], refused
    assert {name.split("_")[0] for name in results if "_" in name} >= {target.split("_")[0] for target in TARGETS}
