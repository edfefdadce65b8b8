"""Tables in Markdown, and where figures come from."""

from __future__ import annotations

from pathlib import Path

_VERSIONS = ("jax", "torch", "triton")


def rule(*columns: str) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def origin(result: dict, path: Path) -> str:
    """Where figures come from: device, date, versions, file, and what was noted of the run."""
    runs = result.get("runs")
    described = runs[-1]["environment"] if isinstance(runs, list) else result.get("environment", result)
    versions = described.get("versions", {"jax": result.get("jax")})
    parts = [described["device"], described["date"][:10], *(f"{n} {versions[n]}" for n in _VERSIONS if n in versions)]
    commit = described.get("commit")
    where = f"commit `{commit[:7]}`, " if commit and not isinstance(runs, list) else ""
    notes = [str(result[key]) for key in ("note", "tests") if key in result]
    return "\n".join([f"{', '.join(parts)}; {where}`bench/results/{path.name}`.", *notes])
