"""The latent decode attention beside FlashMLA, by cache dtype."""

from __future__ import annotations

from bench.report.markdown import row, rule

BF16, E4M3 = "bfloat16", "float8_e4m3fn"
OTHERS = (("mosaic_gpu", E4M3), ("triton", BF16), ("triton", E4M3), ("xla", BF16))
COLUMNS = ("`mosaic_gpu` e4m3", "`triton`", "`triton` e4m3", "`xla`")


def section(result: dict) -> str:
    """Its kernels' time, and what that is of FlashMLA's in the same run."""
    found = {
        (r["name"], r.get("cache", BF16), r["heads"], r["batch"], r["keys"]): r
        for r in result["rows"]
        if "kernel_us" in r
    }
    shapes = {key[2:] for key in found if ("mosaic_gpu", BF16, *key[2:]) in found}
    lines = [
        "Decode attention on a paged (64) latent cache, L+R = 576: kernels' time in us, merging of splits included,",
        "with FlashMLA (bfloat16) in the same run; ratio, TB/s and TFLOP/s are those of `mosaic_gpu` in bfloat16.",
        *ceilings(result),
        "",
        *rule("H", "B", "S", "FlashMLA", "`mosaic_gpu`", "ratio", "TB/s", "TFLOP/s", *COLUMNS),
    ]
    for shape in sorted(shapes, key=lambda shape: (-shape[0], shape[2], shape[1])):
        own, flash = found["mosaic_gpu", BF16, *shape], found.get(("flashmla", BF16, *shape))
        ratio = f"{own['kernel_us'] / flash['kernel_us']:.2f}" if flash else "-"
        others = (time(found.get((name, cache, *shape))) for name, cache in OTHERS)
        lines.append(row(*shape, time(flash), time(own), ratio, own["tb_per_s"], own["tflops"], *others))
    return "\n".join(lines)


def ceilings(result: dict) -> list[str]:
    """What the same GPU reads and multiplies, where the run measured it."""
    if "ceilings" not in result:
        return []
    known = result["ceilings"]
    return [f"Reading a gigabyte: {known['tb_per_s']} TB/s; an 8192^3 matmul: {known['tflops']} TFLOP/s."]


def time(r: dict | None) -> str:
    """Of a row, or a dash."""
    return f"{r['kernel_us']:.1f}" if r else "-"
