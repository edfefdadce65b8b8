"""`mla-fp4 demo`: load a layer, prefill, decode, and say what it took and how exact it was."""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from mla_fp4_jax.checkpoint.load import load_planned
from mla_fp4_jax.cli import accuracy, memory, processes
from mla_fp4_jax.cli.decoding import Run, run_layer
from mla_fp4_jax.cli.info import check_implementation, recorded_choices
from mla_fp4_jax.cli.plot import check_plot, draw_plot
from mla_fp4_jax.cli.source import Source, find_source
from mla_fp4_jax.cli.text import bar, human_bytes, human_seconds, percent, table
from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.mla import MLAAttention
from mla_fp4_jax.sharding import LOGICAL, MLASharding

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def run_demo(args: argparse.Namespace) -> None:
    """Run the demo; see the command's help for its arguments."""
    with processes.joined(args):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    if args.plot is not None:
        check_plot(args.plot)  # before minutes of work, not after
    check_implementation(args.implementation)
    source = find_source(args)
    sharding = processes.find_sharding(args)
    start = time.perf_counter()
    layer = load_planned(source.plan, DTYPES[args.dtype], args.implementation, sharding=sharding)
    _print_layer(source, time.perf_counter() - start)
    held = memory.kv_b_memory(layer.config, layer.weights.kv_b_proj)
    _print_memory(held)
    if sharding is not None:
        print(f"  on each device, all weights: {human_bytes(memory.bytes_on_a_device(layer.weights))}")

    x = np.asarray(jnp.asarray(source.x, layer.dtype), np.float32)
    _print_device(args, sharding)
    with recorded_choices() as choices:
        run = run_layer(layer, x, source.prompt, args.page_size)
    _print_run(run)
    for choice in choices:
        print(f"  FP4 products by {choice}")

    found = None
    reason = accuracy.why_not(layer, x.shape[1])
    if jax.process_index():
        return
    if reason is None:
        if sharding is not None:  # once more, whole: what float64 is computed from
            layer = load_planned(source.plan, DTYPES[args.dtype], args.implementation)
        found = accuracy.measure(layer, x, run.decoded, source.prompt)
        _print_accuracy(found, layer, source)
    else:
        print(f"\nError against float64: not computed; {reason}.")
    if args.plot is not None:
        draw_plot(args.plot, {} if found is None else found.errors, held, args.dtype)
        print(f"\nDrawn: {args.plot}")


def _print_layer(source: Source, seconds: float) -> None:
    plan = source.plan
    print(f"Layer {plan.prefix.rstrip('.')} of {source.title}")
    print(f"  {_sizes(plan.config)}; loaded in {human_seconds(seconds)}\n")
    rows = [("weight", "shape", "in the checkpoint", "bytes")]
    for weight in plan.weights:
        shape = " x ".join(map(str, weight.stored.shape))
        rows.append((weight.field, shape, weight.format, human_bytes(weight.nbytes)))
    print(table(rows, right=(3,)))
    if plan.unused:
        print(f"  left out (scales of activations and caches): {', '.join(plan.unused)}")


def _sizes(c: MLAConfig) -> str:
    return (
        f"hidden {c.hidden_size}, {c.num_attention_heads} heads, q_lora {c.q_lora_rank or 'none'}, kv_lora "
        f"{c.kv_lora_rank}, head dims {c.qk_nope_head_dim} + {c.qk_rope_head_dim} / {c.v_head_dim}"
    )


def _print_memory(held: dict[str, int]) -> None:
    print("\nMemory of kv_b_proj, prefill and decode together")
    largest = max(held.values())
    print(table([(name, human_bytes(n), bar(n / largest)) for name, n in held.items()], right=(1,)))


def _print_device(args: argparse.Namespace, sharding: MLASharding | None) -> None:
    device = jax.devices()[0]
    kind = device.device_kind
    if sharding is not None:
        split = ", ".join(f"{logical} over {sharding.size(logical)}" for logical in LOGICAL)
        kind = f"{jax.device_count()} x {kind} in {jax.process_count()} processes ({split})"
    cache = "contiguous cache" if args.page_size is None else f"cache in pages of {args.page_size}"
    print(f"\nOn {kind if device.platform in kind else f'{kind} ({device.platform})'}, in {args.dtype}, {cache}")


def _print_run(run: Run) -> None:
    batch, steps = run.decoded.shape[:2]
    median, fastest = human_seconds(run.median_step), human_seconds(min(run.step_seconds))
    rows = [
        (
            f"prefill {batch} x {run.prefill.shape[1]} tokens",
            human_seconds(run.prefill_seconds),
            f"compiled in {human_seconds(run.compile_prefill)}",
        ),
        (
            f"decode {batch} x {steps} tokens",
            f"{median} per step",
            f"median; fastest {fastest}; compiled once, in {human_seconds(run.compile_step)}",
        ),
    ]
    print(table(rows))


def _print_accuracy(found: accuracy.Accuracy, layer: MLAAttention, source: Source) -> None:
    compared = f"{found.sequences} x {found.steps} decoded tokens"
    print(f"\nError of the output against a float64 oracle (relative RMS, {compared})")
    largest = max(found.errors.values())
    notes = {accuracy.HERE: f"as run, in {layer.dtype.name}"}
    rows = [
        (name, percent(error), bar(error / largest), notes.get(name, "in exact arithmetic"))
        for name, error in found.errors.items()
    ]
    print(table(rows, right=(1,)))
    if found.w_k_error is None:
        print("  kv_b_proj is not MXFP4 here, or engines cannot lay it out: nothing to compare with.")
    else:
        print(
            f"  Requantising moved W_K by {percent(found.w_k_error)}; W4A4 also quantises q_nope and the "
            "attended latent.\n  Only these formats' own errors are counted for the engines. One pack has none: "
            "what is left\n  is the rounding of the arithmetic."
        )
    if source.recorded is not None:
        after = source.recorded[:, source.prompt :]
        exact = found.oracle[: len(after), : after.shape[1]]
        if exact.size:
            worst = np.abs(exact - after).max()
            print(f"  The oracle is within {worst:.0e} of what transformers recorded for these weights.")
