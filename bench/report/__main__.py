"""Write the README's tables and their plots, or check the tables."""

from __future__ import annotations

import argparse
import sys

from bench import report


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(prog="bench.report", description=report.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the README differs")
    args = parser.parse_args()
    readme = report.ROOT / "README.md"
    new = report.rewritten(readme.read_text())
    if args.check:
        differs = new != readme.read_text()
        sys.exit("README.md differs from bench/results: run python -m bench.report." if differs else None)
    readme.write_text(new)
    report.draw()


if __name__ == "__main__":
    main()
