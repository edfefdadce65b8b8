"""Prefill attention: the kernel, then the whole route from cached latents."""

from __future__ import annotations

from bench.report.markdown import row, rule


def section(result: dict) -> str:
    """Attention of a prompt on expanded keys and values, and with their expansion."""
    timed = [r for r in result["rows"] if "us" in r]
    lines = [
        "Prefill attention of one prompt, 128 heads of 192 / 128, causal, keys and values expanded: kernel time.",
        "",
        *rule("T", "kernel", "us", "TFLOP/s"),
        *(row(r["tokens"], r["name"], r["us"], r["tflops"]) for r in timed if r["kind"] == "kernel"),
    ]
    routes = [r for r in timed if r["kind"] == "route"]
    if routes:
        lines += [
            "",
            "The same from the latent cache, kv_b_proj's expansion and the merging of parts included (T new tokens",
            "after a context that is cached): time of all kernels.",
            "",
            *rule("T", "context", "capacity", "implementation", "us", "TFLOP/s"),
            *(row(r["tokens"], r["context"], r["capacity"], r["name"], r["us"], r["tflops"]) for r in routes),
        ]
    return "\n".join(lines)
