"""What this machine gives for new memory: the part of a first load that no loader can avoid.

    python -m bench.new_memory --out bench/results/FILE.json

A gigabyte of one source in memory is copied into memory just asked for, by size of its pages, and into memory that
is already there; or one byte of each new page is written. One thread, the best of three. New memory is quick only
while the guest holds the pages; see bench/results/README_loading.md.
"""

from __future__ import annotations

import argparse
import json
import mmap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench import environment

BYTES = 1 << 30
POPULATE = 0x8000  # MAP_POPULATE, which the mmap module does not name


def new(*, flags: int = 0, advice: int | None = None) -> np.ndarray:
    """Anonymous memory of its own."""
    memory = mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
    if advice is not None:
        memory.madvise(advice)
    return np.frombuffer(memory, np.uint8)


def best_gb_per_s(function: Callable[[], object], repeats: int = 3) -> float:
    """Of a gigabyte; what a call returns is freed before the next."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        kept = function()
        seconds.append(time.perf_counter() - start)
        del kept
    return round(BYTES / min(seconds) / 1e9, 2)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    source = np.random.default_rng(0).integers(0, 256, BYTES, np.uint8)
    there = source.copy()

    def copy(**how) -> np.ndarray:
        target = new(**how)
        np.copyto(target, source)
        return target

    def touch() -> np.ndarray:
        target = new()
        target[:: mmap.PAGESIZE] = 0
        return target

    rates = {
        "copy into memory that is there": best_gb_per_s(lambda: np.copyto(there, source)),
        "copy into NumPy's new array": best_gb_per_s(source.copy),
        "copy into new pages of 2 MB": best_gb_per_s(lambda: copy(advice=mmap.MADV_HUGEPAGE)),
        "copy into new pages of 4 KB": best_gb_per_s(copy),
        "copy into new pages, populated at once": best_gb_per_s(lambda: copy(flags=POPULATE)),
        "a byte of every new page of 4 KB": best_gb_per_s(touch),
    }
    result = {"environment": environment.describe(), "bytes": BYTES, "gb_per_s": rates}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
