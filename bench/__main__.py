"""Every measurement of the README's tables, one after the other, and the tables.

    python -m bench                       on one GPU or on several of a host
    python -m bench --only layer linear   some of them
    python -m bench --dry-run             prints the commands

Each is a command of its own (see README, "Benchmarks"), whose result becomes bench/results/DATE_KIND.json; one that
fails leaves its error on the terminal and the others go on. "layer" is bench.step. Last comes bench.report.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import subprocess
import sys
from pathlib import Path

from bench import environment

RESULTS = Path(__file__).parent / "results"
# Name -> the ending of its file's name, which bench.report knows, and the command without --out.
COMMANDS: dict[str, tuple[str, str]] = {
    "matmul": ("fp4_bmm", "bench.matmul --only deepseek-v3"),
    "shapes": ("fp4_bmm_shapes", "bench.matmul --only other-shapes"),
    "linear": ("fp4_linear", "bench.linear"),
    "attention": ("mla_decode", "bench.attention --cache bfloat16,float8_e4m3fn"),
    "prefill": ("prefill", "bench.prefill"),
    "layer": ("step", "bench.step --memory"),
    "scaling": ("scaling", "bench.scaling"),
    "scaling-packed": ("scaling_packed", "bench.scaling --packed"),
    "tests": ("gpu_tests", "bench.gpu_tests"),
}
SEVERAL = ("scaling", "scaling-packed")  # need two GPUs or more


def suffix(device_kind: str) -> str:
    """What the names of a device's files end with: an H100's with nothing."""
    return "_h200" if "H200" in device_kind.split() else ""


def commands(names: list[str], device_kind: str, date: str) -> list[list[str]]:
    """What to run, in order."""
    found = []
    for name in names:
        ending, command = COMMANDS[name]
        out = RESULTS / f"{date}_{ending}{suffix(device_kind)}.json"
        found.append([sys.executable, "-m", *shlex.split(command), "--out", str(out)])
    return found


def main() -> None:
    """Run them all, or print them."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, help="some of them (default all that this host can)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args()
    gpus = environment.gpus()
    if not gpus and not args.dry_run:
        raise SystemExit("bench: it needs an NVIDIA GPU; nvidia-smi names none. --dry-run shows the commands.")
    names = args.only or [name for name in COMMANDS if len(gpus) > 1 or name not in SEVERAL]
    todo = commands(names, gpus[0] if gpus else "", datetime.date.today().isoformat())
    todo.append([sys.executable, "-m", "bench.report"])
    for command in todo:
        print(shlex.join(command), flush=True)
        if not args.dry_run:
            subprocess.run(command, env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, check=False)


if __name__ == "__main__":
    main()
