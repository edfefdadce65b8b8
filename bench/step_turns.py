"""Several processes that compile side by side and measure in turns on one GPU."""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Shape = tuple[int, int, int]  # heads, sequences, keys


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Nobody else who takes turns by this file uses the GPU meanwhile; None for nobody else."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def deal(shapes: list[Shape], processes: int) -> list[list[Shape]]:
    """Shapes to processes, each in the order given: the last head count to the last process, the others in turn."""
    heads = list(dict.fromkeys(shape[0] for shape in shapes))
    apart = [shape for shape in shapes if len(heads) > 1 and shape[0] == heads[-1]]
    rest = [shape for shape in shapes if shape not in apart]
    number = processes - bool(apart)
    return [*(rest[i::number] for i in range(number)), *([apart] if apart else [])]


def run_parts(
    parts: list[list[Shape]], options: list[str], lock: Path | None, take: Callable[[list, list], None]
) -> None:
    """Run bench.step for every part and hand over (rows, shapes not run) of all whenever there are more.

    Args:
        parts: shapes of each process.
        options: of all of them.
        lock: the file by which they take turns; None for one of their own.
        take: called with what is on record so far.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        running = []
        for i, part in enumerate(parts):
            shapes = ",".join("x".join(map(str, shape)) for shape in part)
            command = [sys.executable, "-m", "bench.step", "--out", str(root / f"{i}.json"), "--shapes", shapes]
            running.append(subprocess.Popen([*command, "--lock", str(lock or root / "lock"), *options]))
        while True:
            ended = all(process.poll() is not None for process in running)
            found = [json.loads(path.read_text()) for path in sorted(root.glob("*.json"))]
            take([row for each in found for row in each["rows"]], [s for each in found for s in each["not_run"]])
            if ended:
                return
            time.sleep(1)
