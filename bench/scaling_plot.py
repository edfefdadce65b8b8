"""The plot of a scaling result: percent of ideal, and what an all-reduce takes of a step."""

from __future__ import annotations

from pathlib import Path


def draw(result: dict, path: Path) -> None:
    """Bars of every row that has a time, with the ideal as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "percent_of_ideal" in row]
    rows.sort(key=lambda row: (row["kind"], row["keys"], row["sequences"]))
    colours = {"TP": "tab:blue", "DP": "tab:green", "CP": "tab:orange"}
    figure, axes = pyplot.subplots(figsize=(max(6, 0.6 * len(rows)), 4), layout="constrained")
    at = range(len(rows))
    axes.bar(at, [row["percent_of_ideal"] for row in rows], color=[colours[row["kind"]] for row in rows])
    shares = [100 * row.get("all_reduce_share", 0) for row in rows]
    axes.bar(at, shares, color="black", width=0.3, label="all-reduce, percent of the step")
    axes.axhline(100, color="black", linewidth=0.8, label="ideal")
    labels = [f"{row['kind']}\nB {row['sequences']}\nS {row['keys'] // 1024}k" for row in rows]
    axes.set_xticks(list(at), labels, fontsize=7)
    axes.set_ylabel("percent of ideal scaling")
    device = result["environment"]["device"]
    axes.set_title(f"Decode step of one attention layer, {result['devices']} x {device} against one", fontsize=9)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
