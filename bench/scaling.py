"""A DeepSeek-V3 attention layer's decode step on many GPUs against one of the same host.

    python -m bench.scaling --out bench/results/FILE.json [--devices N] [--seconds S] [--rows ROWS] [--plot FILE.png]

Heads over all devices (TP) and contexts over all (CP) at the same sequences and keys as one device; sequences over
all (DP) at as many sequences a device. A "layer" is one of a stack of a few that feed each other, each with weights
and cache of its own, donated and fed back, so that no two steps find their operands in the L2 cache; its time is the
wall time of a loop of calls, each of which decodes several tokens (--tokens), since what a call costs the host grows
with the devices and the arrays. Nothing is timed whose output is not that of one device, and that of XLA in float32.
Rows are written as they come, the most important first; nothing new is begun after --seconds. --small is for CPU
devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from bench import environment
from bench.roofline import DEEPSEEK_V3, Layout, find_gpu, share
from bench.scaling_rows import ROWS, SMALL_ROWS, parse_rows
from bench.stack import (
    ROOM,
    WARM_CALLS,
    compiled_step,
    find_sharding,
    make_stack,
    make_state,
    one_layer,
    time_steps,
    warmed,
)
from mla_fp4_jax import LatentCache, MLAConfig, mla_decode

SMALL = MLAConfig(
    hidden_size=256,
    num_attention_heads=16,
    q_lora_rank=64,
    kv_lora_rank=128,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
)
# Relative rms. One device in bfloat16 against float32: README's bound of a layer. Many against one: both round alike
# but for k addends of 2^-9 each and as many roundings of their sum, together 2^-9 sqrt(2k), 2^-7 at k = 8; a layer
# then passes on what it gets, so that the bound is twice that, times the root of the layers.
FLOAT32_BOUND = 0.015
LAYER_BOUND = 2.0**-6
TOKENS = 4  # of a call
CACHE_BYTES = 20e9  # of all caches on one device
STACK_LAYERS, STACK_TOKENS, STACK_KEYS, STACK_SEQUENCES = 61, 64, 4096, 16


@dataclasses.dataclass
class Run:
    """What is being measured, and where it goes."""

    args: argparse.Namespace
    config: MLAConfig
    devices: int
    deadline: float
    result: dict
    single: dict[tuple[int, int], float | None] = dataclasses.field(default_factory=dict)
    outputs: dict[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict)

    def add(self, kind: str, where: dict, measure: Callable[[], dict]) -> None:
        """A row, an error in place of its numbers; on disk at once."""
        row = {"kind": kind, **where}
        if time.monotonic() > self.deadline:
            row["error"] = "out of time"
        else:
            start = time.monotonic()
            try:
                row |= measure()
            except Exception as error:  # one failure must not hide the other rows
                row["error"] = f"{type(error).__name__}: {error}"[:500]
            row["took_s"] = round(time.monotonic() - start, 1)
        self.result["rows"].append(row)
        self.write()
        print(json.dumps(row), flush=True)

    def write(self) -> None:
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        self.args.out.write_text(json.dumps(self.result, indent=1) + "\n")


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """rms of the difference over rms of the reference, float64; NaN and infinity pass through."""
    difference = value.astype(np.float64) - reference.astype(np.float64)
    return float(np.sqrt(np.mean(difference**2) / np.mean(reference.astype(np.float64) ** 2)))


def layers_for(run: Run, sequences: int, keys: int) -> int:
    """Of the stack that is timed: what one device has memory for."""
    each = sequences * (keys + ROOM) * run.config.cache_dim * 2
    return max(1, min(2 if run.args.small else 4, int(CACHE_BYTES // each)))


def gate_single(run: Run, packed: bool) -> dict:
    """One device, with the kernels that will be timed, against XLA in float32."""
    keys = 64 if run.args.small else 1024
    stack = make_stack(run.config, Layout(), 1, packed, run.args.implementation, run.args.attention)
    state = make_state(stack, 4, keys)
    h, (entries,) = state.h, state.entries
    cache = LatentCache(entries, state.length, run.config.kv_lora_rank)
    wide = jax.jit(
        lambda w, h, c: mla_decode(
            w, h, c, run.config, dtype=jnp.float32, implementation="xla", attention_implementation="xla"
        )[0]
    )
    here = jax.jit(
        lambda w, h, c: mla_decode(
            w,
            h,
            c,
            run.config,
            implementation=run.args.implementation,
            attention_implementation=run.args.attention,
            sharding=stack.sharding,
        )[0]
    )
    plain = one_layer(run.config, packed)
    single = jax.devices()[0]
    whole = LatentCache(
        jax.device_put(entries, single).astype(jnp.float32), jnp.full((4,), keys, jnp.int32), cache.kv_lora_rank
    )
    reference = np.asarray(wide(plain, jax.device_put(h, single).astype(jnp.float32), whole))
    error = relative(np.asarray(here(stack.weights[0], h, cache).astype(jnp.float32)), reference)
    if not error <= FLOAT32_BOUND:
        raise RuntimeError(f"one device is {error:.2e} from float32, more than {FLOAT32_BOUND}; nothing is timed.")
    return {"relative_error": error}


def all_reduce(run: Run, sequences: int) -> dict:
    """The all-reduce after o_proj alone, in a chain."""
    sharding, calls = find_sharding(Layout(run.devices)), 16

    def chain(y):
        for _ in range(calls):
            y = jax.lax.psum(y, "heads") * jnp.asarray(1 / run.devices, y.dtype)
        return y

    mapped = jax.shard_map(chain, mesh=sharding.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    step = jax.jit(mapped, donate_argnums=0)
    y = step(jnp.ones((sequences, 1, run.config.hidden_size), jnp.bfloat16))
    if not bool(jnp.all(y == 1)):
        raise RuntimeError("the all-reduce of ones is not their mean; not timed.")
    for _ in range(WARM_CALLS):
        y = step(y)
    y.block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            y = step(y)
        y.block_until_ready()
        seconds.append((time.perf_counter() - start) / (10 * calls))
    return {"us": round(1e6 * float(np.median(seconds)), 2), "bytes": sequences * run.config.hidden_size * 2}


def timed(run: Run, layout: Layout, sequences: int, keys: int, reference: np.ndarray | None) -> tuple[float, dict]:
    """Microseconds of a layer, gate first; and what goes with it."""
    layers = layers_for(run, sequences if layout.batch == 1 else sequences // layout.batch, keys)
    stack = make_stack(run.config, layout, layers, run.args.packed, run.args.implementation, run.args.attention)
    tokens = run.args.tokens
    step, found = compiled_step(stack, tokens, unroll=not run.args.small), {}
    state = step(stack.weights, make_state(stack, sequences, keys))
    got = np.asarray(state.h.astype(jnp.float32))
    if not np.isfinite(got).all():
        raise RuntimeError("the output is not finite; not timed.")
    if reference is None:
        run.outputs[sequences, keys] = got
    else:
        expected = np.tile(reference, (layout.batch, 1, 1))
        found["difference_from_one_device"] = error = relative(got, expected)
        found["bitwise_as_one_device"] = bool(np.array_equal(got, expected))
        bound = LAYER_BOUND * np.sqrt(layers * tokens)
        if not error <= bound:
            raise RuntimeError(f"it is {error:.2e} from one device, more than {bound:.1e}; not timed.")
    steps, repeats = (2, 3) if run.args.small else (max(1, 16 // tokens), 5)
    seconds, spread = time_steps(step, stack, state, tokens=tokens, steps=steps, repeats=repeats)
    again = np.asarray(step(stack.weights, make_state(stack, sequences, keys)).h.astype(jnp.float32))
    if not np.array_equal(again, got):
        raise RuntimeError("after many calls, arrays elsewhere give another result; its time counts for nothing.")
    found |= {
        "us": round(1e6 * seconds / layers / tokens, 2),
        "spread_us": round(1e6 * spread / layers / tokens, 2),
        "layers_in_stack": layers,
    }
    return 1e6 * seconds / layers / tokens, found


def on_one(run: Run, sequences: int, keys: int) -> float:
    """The same on the first device alone, once."""
    if (sequences, keys) not in run.single:
        run.single[sequences, keys] = None

        def measure() -> dict:
            run.single[sequences, keys], found = timed(run, Layout(), sequences, keys, None)
            return found | floor(run, Layout(), sequences, keys, run.single[sequences, keys])

        run.add("one", {"sequences": sequences, "keys": keys}, measure)
    value = run.single[sequences, keys]
    if value is None:
        raise RuntimeError("one device has no time to compare with.")
    return value


def floor(run: Run, layout: Layout, sequences: int, keys: int, us: float | None) -> dict:
    """The roofline beside a time, where the GPU is known."""
    gpu = find_gpu(jax.devices()[0].device_kind)
    if gpu is None or us is None:
        return {}
    part = share(run.config, layout, sequences, keys)
    formats, default = {"kv_b_proj": "fp4"}, "fp4" if run.args.packed else "bf16"
    least = 1e6 * (part.projections_s(gpu, formats, default) + part.attention_s(gpu))
    bytes_only = 1e6 * (part.weight_bytes(formats, default) + part.cache_bytes) / gpu.memory_rate
    return {"floor_us": round(least, 2), "byte_floor_us": round(bytes_only, 2), "over_floor": round(us / least, 2)}


def reduction_us(run: Run, sequences: int) -> float | None:
    """The measured all-reduce of so many sequences, or the nearest."""
    rows = [row for row in run.result["rows"] if row["kind"] == "all-reduce" and "us" in row]
    return min(rows, key=lambda row: abs(row["sequences"] - sequences))["us"] if rows else None


def scaled(run: Run, kind: str, sequences: int, keys: int) -> dict:
    """One row of TP, DP or CP over all devices; sequences are those of one device in DP, else all."""
    n = run.devices
    one = on_one(run, sequences, keys)
    layout = {"TP": Layout(heads=n), "DP": Layout(batch=n), "CP": Layout(context=n)}[kind]
    total = sequences * n if kind == "DP" else sequences
    us, found = timed(run, layout, total, keys, run.outputs[sequences, keys])
    ideal = one if kind == "DP" else one / n
    found |= {"one_us": round(one, 2), "speedup": round(one / us * (n if kind == "DP" else 1), 3)}
    found |= {"percent_of_ideal": round(100 * ideal / us, 1)}
    found |= floor(run, layout, total, keys, us)
    reduction = None if kind == "DP" else reduction_us(run, total)
    if reduction is not None:
        found |= {"all_reduce_us": reduction, "all_reduce_share": round(reduction / us, 3)}
        if "floor_us" in found:
            found["over_floor_and_all_reduce"] = round(us / (found["floor_us"] + reduction), 2)
            found["over_byte_floor_and_all_reduce"] = round(us / (found["byte_floor_us"] + reduction), 2)
    return found


def whole_stack(run: Run, layout: Layout) -> dict:
    """Every layer of the model, packed, decoding tokens; two of them first, against one device."""
    gate_single(run, packed=True)
    few = [
        make_stack(run.config, at, 2, True, run.args.implementation, run.args.attention) for at in (Layout(), layout)
    ]
    alone, spread = (compiled_step(stack)(stack.weights, make_state(stack, 4, 64)).h for stack in few)
    error = relative(np.asarray(spread.astype(jnp.float32)), np.asarray(alone.astype(jnp.float32)))
    if not error <= LAYER_BOUND * np.sqrt(2):
        raise RuntimeError(
            f"two packed layers are {error:.2e} from one device, more than {LAYER_BOUND:.1e}; not timed."
        )
    del few, alone, spread
    layers, tokens = (3, 8) if run.args.small else (run.args.layers, STACK_TOKENS)
    tokens -= tokens % run.args.tokens
    keys, sequences = (64, 4) if run.args.small else (STACK_KEYS, STACK_SEQUENCES)
    stack = make_stack(run.config, layout, layers, True, run.args.implementation, run.args.attention)
    state = make_state(stack, sequences, keys)
    weights_held, caches_held = held(stack.weights), held(state.entries)
    step = compiled_step(stack, run.args.tokens)
    start = time.perf_counter()
    state = step(stack.weights, state)
    jax.block_until_ready(state.h)
    first = time.perf_counter() - start
    state = warmed(step, stack, state, tokens=run.args.tokens)
    jax.block_until_ready(state.h)
    start = time.perf_counter()
    for _ in range(tokens // run.args.tokens):
        state = step(stack.weights, state)
    jax.block_until_ready(state.h)
    seconds = time.perf_counter() - start
    if not np.isfinite(np.asarray(state.h.astype(jnp.float32))).all():
        raise RuntimeError("the output is not finite; its time counts for nothing.")
    stats = [device.memory_stats() or {} for device in jax.devices()[: layout.devices]]
    return {
        "difference_of_two_layers_from_one_device": error,
        "layers": layers,
        "tokens": tokens,
        "sequences": sequences,
        "keys": keys,
        "ms_per_token": round(1e3 * seconds / tokens, 3),
        "us_per_layer": round(1e6 * seconds / tokens / layers, 2),
        "first_step_s": round(first, 1),
        "weight_bytes_per_device": weights_held,
        "cache_bytes_per_device": caches_held,
        "in_use_bytes": [s.get("bytes_in_use") for s in stats],
        "peak_bytes": [s.get("peak_bytes_in_use") for s in stats],
    }


def held(tree) -> int:
    """Bytes on the first device; a float4 element takes half of one."""
    bits = 0
    for leaf in jax.tree.leaves(tree):
        bits += (4 if leaf.dtype == jnp.float4_e2m1fn else 8 * leaf.dtype.itemsize) * leaf.addressable_shards[
            0
        ].data.size
    return bits // 8


def main() -> None:
    """Measure, most important first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--devices", type=int, help="how many of those there are (default all)")
    parser.add_argument("--seconds", type=float, default=480, help="begin nothing new after so long (default 480)")
    parser.add_argument(
        "--layers", type=int, default=STACK_LAYERS, help=f"of the whole stack (default {STACK_LAYERS})"
    )
    parser.add_argument("--rows", help="which, as TP:16x4096,CP:8x131072,stack: sequences x keys (default all)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"that a call decodes, 1 .. 8 (default {TOKENS})")
    parser.add_argument("--packed", action="store_true", help="MXFP4 linears too, not kv_b_proj alone")
    parser.add_argument("--implementation", help="of the FP4 products; see fp4_bmm")
    parser.add_argument("--attention", help="of the attention over the cache; see mla_decode")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for CPU devices")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    devices = args.devices or len(jax.devices())
    if not 2 <= devices <= len(jax.devices()):
        raise SystemExit(f"bench.scaling: --devices must be 2 .. {len(jax.devices())}; got {devices}.")
    if not 1 <= args.tokens <= 8:
        raise SystemExit(
            f"bench.scaling: --tokens must be 1 .. 8, for which the caches have room; got {args.tokens}."
        )
    options = {key: value for key, value in vars(args).items() if key not in ("out", "plot", "commit")}
    result = {"environment": environment.describe(args.commit), "options": options, "devices": devices, "rows": []}
    deadline = time.monotonic() + args.seconds
    run = Run(args, SMALL if args.small else DEEPSEEK_V3, devices, deadline, result)
    run.add("gate", {}, lambda: gate_single(run, args.packed))
    if "error" in result["rows"][0]:
        raise SystemExit(f"bench.scaling: {result['rows'][0]['error']}")
    for sequences in (1, 16) if args.small else (1, 16, 64, 128):
        run.add("all-reduce", {"sequences": sequences}, lambda s=sequences: all_reduce(run, s))
    rows = parse_rows(args.rows) if args.rows else SMALL_ROWS if args.small else ROWS
    for kind, sequences, keys in rows:
        if kind == "stack":
            layout = Layout(heads=devices)
            run.add("stack", {"layout": str(layout)}, lambda layout=layout: whole_stack(run, layout))
            continue
        where = {"sequences": sequences, "keys": keys}
        run.add(kind, where, lambda k=kind, s=sequences, n=keys: scaled(run, k, s, n))
    show(result)
    if args.plot is not None:
        from bench.scaling_plot import draw

        draw(result, args.plot)


def show(result: dict) -> None:
    """The table."""
    names = ("us", "one_us", "speedup", "percent_of_ideal", "all_reduce_share", "over_byte_floor_and_all_reduce")
    print(f"{'':4}{'B':>5}{'S':>8}" + "".join(f"{name[:16]:>18}" for name in names))
    for row in result["rows"]:
        if row["kind"] in ("TP", "DP", "CP"):
            numbers = row.get("error") or "".join(f"{row.get(name, ''):>18}" for name in names)
            print(f"{row['kind']:4}{row['sequences']:>5}{row['keys']:>8}{numbers}")


if __name__ == "__main__":
    main()
