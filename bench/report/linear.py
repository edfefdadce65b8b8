"""fp4_linear beside XLA's bf16 product."""

from __future__ import annotations

from bench import linear
from bench.report.markdown import row, rule


def section(result: dict) -> str:
    """By shape and tokens: kernel times, their ratio, and how near FP4 comes to reading its bytes; then prefill."""
    lines = [
        "FP4 linears (`fp4_linear`, `mosaic_gpu`, its own choice of tiles): kernel time of FP4 / of XLA bf16 in us",
        "by tokens M, cold weights; below, how many times faster FP4 is (**bold** where it is slower), and how near",
        'it comes to the time that reading the packed bytes once takes ("touch").',
        "",
        *rule("K -> N", *(f"M = {m}" for m in linear.TOKENS)),
    ]
    found = {(r["shape"], r["tokens"], r["name"]): r["kernel_us"] for r in result["kernel"]}
    for shape, ceiling in result["ceilings"].items():
        outputs, inputs, _ = linear.SHAPES[shape]
        times, ratios = [], []
        for m in linear.TOKENS:
            own, dense = (found.get((shape, m, name)) for name in ("mosaic_gpu", "xla bf16"))
            if own is None or dense is None:
                times.append("-")
                ratios.append("-")
                continue
            ratio = f"{dense / own:.2f}x"
            times.append(f"{own:.1f} / {dense:.1f}")
            ratios.append(f"{ratio if dense >= own else f'**{ratio}**'}, {100 * ceiling['touch_us'] / own:.0f} %")
        lines += [row(f"{inputs} -> {outputs}", *times), row(f"touch {ceiling['touch_us']:.1f} us", *ratios)]
    return "\n".join(lines + prefill(result["prefill"]))


def prefill(rows: list[dict]) -> list[str]:
    """kv_b_proj of a prompt, from the pack and from a weight kept in bf16."""
    if not rows:
        return []
    lines = [
        "",
        "kv_b_proj in prefill (512 -> 32768, T tokens) from the pack that decoding uses, which is decoded to memory",
        "for the call, beside a weight that is kept in bf16; both products by XLA: kernel time in us.",
        "",
        *rule("T", "FP4", "bf16", "FP4 / bf16"),
    ]
    found = {(r["tokens"], r["name"]): r["kernel_us"] for r in rows}
    for tokens in linear.PREFILL:
        own, dense = (found.get((tokens, name)) for name in ("mosaic_gpu", "xla bf16"))
        if own is not None and dense is not None:
            lines.append(row(tokens, f"{own:.1f}", f"{dense:.1f}", f"{own / dense:.2f}"))
    return lines
