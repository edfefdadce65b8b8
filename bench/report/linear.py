"""fp4_linear beside XLA's bf16 product."""

from __future__ import annotations

from bench.report.markdown import row, rule


def section(result: dict) -> str:
    """The fastest configuration tried, beside XLA's bf16 product."""
    fp4: dict[tuple[str, int], float] = {}
    bf16: dict[tuple[str, int], float] = {}
    for r in result["rows"]:
        times = bf16 if "name" in r else fp4
        key = (r["shape"], r["tokens"])
        times[key] = min(r["kernel_us"], times[key]) if key in times else r["kernel_us"]
    tokens = sorted({m for _, m in fp4})
    lines = [
        "FP4 linears (`fp4_linear`, `mosaic_gpu`) / XLA bf16, kernel time in us by tokens M, cold weights: the",
        'fastest configuration of a sweep, not always the default. "Touch" reads the packed bytes once, and no more.',
        "",
        *rule("K -> N", "touch", *(f"M = {m}" for m in tokens)),
    ]
    for shape, touch_us in result["touch_us"].items():
        cells = [
            f"{fp4[shape, m]:.1f} / " + (f"{bf16[shape, m]:.1f}" if (shape, m) in bf16 else "-")
            if (shape, m) in fp4
            else "-"
            for m in tokens
        ]
        lines.append(row(shape, touch_us, *cells))
    return "\n".join(lines)
