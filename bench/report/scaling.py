"""A layer's decode step on many GPUs against one, and a whole stack."""

from __future__ import annotations

from bench.report.markdown import row, rule

KINDS = {"TP": "heads", "DP": "batch", "CP": "context"}


def section(result: dict) -> str:
    """The table of every layout, then the stack."""
    packed = result["options"]["packed"]
    lines = [
        f"A DeepSeek-V3 attention layer's decode step on {result['devices']} GPUs of one host against one of them, "
        + ("every projection in MXFP4," if packed else "kv_b_proj in MXFP4 and the others in bfloat16,"),
        "bfloat16 cache of S tokens: wall time of a layer in a donated loop, us. B: of all, with `batch` of each;",
        "with `heads` every GPU reads the whole cache, so that half the time is out of reach where the cache rules.",
        '"Floor" is the bytes of weights and cache at the datasheet\'s rate, plus the measured all-reduce if any.',
        *in_graph(result),
        "",
        *rule("axis", "B", "S", "one GPU", f"{result['devices']} GPUs", "speedup", "of ideal", "all-reduce", "floor"),
    ]
    timed = [r for r in result["rows"] if r["kind"] in KINDS and "us" in r]
    for r in sorted(timed, key=lambda r: (list(KINDS).index(r["kind"]), r["keys"], r["sequences"])):
        reduction = f"{100 * r['all_reduce_share']:.0f} %" if "all_reduce_share" in r else "-"
        over = over_bytes(r)
        cells = (f"{r['one_us']:.0f}", f"{r['us']:.0f}", f"{r['speedup']:.2f}", f"{r['percent_of_ideal']:.0f} %")
        last = f"{over:.2f} x" if over is not None else "-"
        lines.append(row(f"`{KINDS[r['kind']]}`", r["sequences"], r["keys"], *cells, reduction, last))
    lines += stack(result)
    picture = [] if packed else ["", "![percent of ideal](bench/results/scaling.svg)"]
    return "\n".join([*lines, *picture])


def over_bytes(r: dict) -> float | None:
    """A row's time over that of its bytes and its all-reduce, which `batch` has none of; None where not known."""
    if KINDS[r["kind"]] == "batch" and "byte_floor_us" in r:
        return r["us"] / r["byte_floor_us"]
    return r.get("over_byte_floor_and_all_reduce")


def in_graph(result: dict) -> list[str]:
    """What to say where XLA was told to put collectives into the CUDA graph and to leave it alone between calls."""
    flags = result["environment"].get("xla_flags", "")
    if "+COLLECTIVES" in flags and "SKIP_PROFILED" in flags:
        return ['The all-reduce is part of the CUDA graph (the options are in "Many devices").']
    return []


def stack(result: dict) -> list[str]:
    """What a whole model's attention layers took."""
    lines = []
    for r in result["rows"]:
        if r["kind"] == "stack" and "ms_per_token" in r:
            weights, caches = (r[f"{what}_bytes_per_device"] / 1e9 for what in ("weight", "cache"))
            used = " / ".join(f"{n / 1e9:.2f}" for n in r["in_use_bytes"] if n is not None)
            lines += [
                "",
                f"{r['layers']} layers ({r['layout']}), {r['sequences']} sequences of {r['keys']} cached tokens, "
                f"{r['tokens']} tokens decoded: {r['ms_per_token']} ms a token,",
                f"{r['us_per_layer']} us a layer; on each GPU {weights:.2f} GB of weights, {caches:.2f} GB of cache, "
                f"in use {used or '-'} GB.",
            ]
    return lines
