"""Runs the tests marked gpu and puts their outcome on record.

    python -m bench.gpu_tests --out bench/results/FILE.json [pytest's arguments, tests by default]

XLA's autotuning is off: it takes most of the time and changes no kernel of ours.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from bench import environment


def outcomes(junit: Path) -> dict[str, object]:
    """Counts by outcome, what failed, and why what was skipped was skipped."""
    counts: dict[str, int] = collections.Counter()
    failed, skipped = [], collections.Counter()
    for case in ElementTree.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = next((tag for tag in ("failure", "error", "skipped") if tag in kinds), "passed")
        counts[kind] += 1
        if kind in ("failure", "error"):
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        if kind == "skipped":
            skipped[case.find("skipped").get("message", "")] += 1  # pyright: ignore[reportOptionalMemberAccess]
    return {"counts": dict(counts), "failed": failed, "skipped": dict(skipped)}


def main() -> None:
    """Run pytest in a process of its own and write what came of it; exits as pytest does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--processes", type=int, default=8, help="that share the GPU")
    args, rest = parser.parse_known_args()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", str(args.processes), "-p", "no:benchmark"]
    settings = {
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.8 / args.processes:.3f}",
    }
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command += [*(rest or ["tests"]), f"--junitxml={junit}"]
        done = subprocess.run(command, env={**os.environ, **settings})
        result = {"outcome": done.returncode, **(outcomes(junit) if junit.exists() else {})}
    shown = [part for part in command if not part.startswith("--junitxml")]
    record = {"environment": environment.describe(args.commit), "command": ["python", *shown[1:]]}
    args.out.write_text(json.dumps({**record, "settings": settings, **result}, indent=1) + "\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
