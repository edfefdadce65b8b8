"""k_up_proj and v_up_proj at DeepSeek-V3's shapes: every implementation against the floor, cold weights.

    python -m bench.matmul --out bench/results/FILE.json

Nothing is timed before it has passed its gate: results equal, bit for bit, to an exact reference. "kernel" is CUPTI's
time, "call" the wall time per call of a chain of k_up and v_up calls in one jitted, donated loop (bench/timing.py).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import environment
from bench.ceilings import touch
from bench.timing import kernel_us, loop_us
from mla_fp4_jax import FP4Array, fp4_bmm

H, P, V, L, R = 128, 128, 128, 512, 64
BATCHES = (1, 8, 16, 32, 64, 128, 256, 512)
OPS = ("k_up", "v_up")
PACKS = 24  # of 8.9 MB: 214 MB, four times the L2 cache
DENSE_PACKS = 7  # of 33.5 MB
TOUCH_LOADS = 17  # 4.46 MB are then 128 CTAs


def product(op: str, x: jax.Array, w: FP4Array, implementation: str) -> jax.Array:
    """As a layer calls it: the whole query for k_up, whose rope columns are skipped in place."""
    if op == "k_up":
        return fp4_bmm(x, w, "rows", rows=(0, P), x_columns=(0, P), implementation=implementation)
    return fp4_bmm(x, w, "columns", rows=(P, V), implementation=implementation)


def dense_product(op: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's own matmul on a bf16 weight [H, P+V, L]."""
    if op == "k_up":
        return jnp.einsum("bhp,hpl->bhl", x[..., :P], w[:, :P])
    return jnp.einsum("bhl,hvl->bhv", x, w[:, P:])


class Setting:
    """Weights of every kind, random bytes under scales of trained weights' size, and one exact set for the gate."""

    def __init__(self):
        rng = np.random.default_rng(0)

        def pack(low: int, high: int) -> FP4Array:
            packed = rng.integers(0, 256, (H, P + V, L // 2), np.uint8)
            return FP4Array.from_packed(packed, rng.integers(low, high, (H, P + V, L // 32), np.uint8))

        self.exact = pack(126, 129)
        self.rows = [pack(114, 124) for _ in range(PACKS)]
        self.fragments = [w.in_fragment_order(P) for w in self.rows]
        self.dense = [w.dequantize(jnp.bfloat16) for w in self.rows[:DENSE_PACKS]]
        self.rng = rng

    def x(self, op: str, batch: int, *, exact: bool = False) -> jax.Array:
        """Integers -2 .. 2, or normal numbers."""
        shape = (batch, H, P + R if op == "k_up" else L)
        x = self.rng.integers(-2, 3, shape) if exact else self.rng.standard_normal(shape)
        return jnp.asarray(x, jnp.bfloat16)


def contenders(setting: Setting) -> dict[str, tuple[Callable, list, Callable]]:
    """Name -> (op, x, w) -> y, the weights to rotate through, and how the exact weight is given to it."""
    return {
        "mosaic_gpu": (
            functools.partial(product, implementation="mosaic_gpu"),
            setting.fragments,
            lambda w: w.in_fragment_order(P),
        ),
        "triton": (functools.partial(product, implementation="triton"), setting.rows, lambda w: w),
        "xla bf16": (dense_product, setting.dense, lambda w: w.dequantize(jnp.bfloat16)),
        "xla dequantise": (functools.partial(product, implementation="xla"), setting.rows, lambda w: w),
    }


def gate(op: str, call: Callable, x: jax.Array, w: FP4Array, exact) -> None:
    """Raise RuntimeError unless the product of integers is exact."""
    with jax.default_matmul_precision("highest"):
        reference = dense_product(op, x.astype(jnp.float32), w.dequantize(jnp.float32))
    wrong = int(jnp.sum(call(x, exact) != reference.astype(jnp.bfloat16)))
    if wrong:
        raise RuntimeError(f"{op}: {wrong} of {reference.size} results are wrong; not timed.")


def floor_bytes(batch: int) -> int:
    """Bytes one product must move: codes, scales, x in, result out."""
    return H * P * L // 2 + H * P * L // 32 + batch * H * (P + L) * 2


def measure(setting: Setting, name: str, op: str, batch: int) -> dict[str, object]:
    """One row of the table, gate first."""
    call, weights, prepare = contenders(setting)[name]
    jitted = jax.jit(functools.partial(call, op))
    gate(op, jitted, setting.x(op, batch, exact=True), setting.exact, prepare(setting.exact))
    x = setting.x(op, batch)
    median, spread = kernel_us(jitted, [(x, w) for w in weights])
    return {
        "name": name,
        "op": op,
        "batch": batch,
        "kernel_us": round(median, 3),
        "kernel_iqr_us": round(spread, 3),
        "floor_bytes": floor_bytes(batch),
    }


def measure_loop(setting: Setting, name: str, batch: int) -> dict[str, object]:
    """A chain of k_up and v_up over all weights, state [B, H, P] donated and fed back."""
    call, weights, _ = contenders(setting)[name]
    call = jax.jit(call, static_argnums=0)  # lowered once for all weights

    def step(q, weights):
        for w in weights:
            q = call("v_up", call("k_up", q, w), w)
        return q

    state = jnp.asarray(setting.rng.standard_normal((batch, H, P)), jnp.bfloat16)
    return {"name": name, "batch": batch, "call_us": round(loop_us(step, state, weights, 2 * len(weights)), 3)}


def main() -> None:
    """Run the table, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so long")
    args = parser.parse_args()
    start = time.monotonic()
    setting = Setting()
    rows: list[dict[str, object]] = []
    loops: list[dict[str, object]] = []
    ceiling = {}
    # As many bytes as one product's codes and scales.
    flat = [w.packed.reshape(-1)[: H * P * (L // 2 + L // 32)] + 0 for w in setting.rows]
    ceiling["touch_us"], _ = kernel_us(jax.jit(functools.partial(touch, loads=TOUCH_LOADS)), [(a,) for a in flat])
    ceiling["touch_bytes"] = flat[0].size
    plan = [(name, op, batch) for batch in BATCHES for op in OPS for name in ("mosaic_gpu", "xla bf16")]
    plan += [("triton", op, batch) for batch in (1, 16, 64, 256) for op in OPS]
    plan += [("xla dequantise", op, batch) for batch in (1, 64) for op in OPS]
    skipped = []
    plan += [(name, None, batch) for batch in BATCHES for name in ("mosaic_gpu", "xla bf16")]
    for name, op, batch in tqdm(plan, desc="matmul"):
        if time.monotonic() - start > args.seconds:
            skipped.append([name, op, batch])
        elif op is None:
            loops.append(measure_loop(setting, name, batch))
        else:
            rows.append(measure(setting, name, op, batch))
        result = {**environment.describe(args.commit), "ceilings": ceiling, "kernel": rows, "call": loops}
        args.out.write_text(json.dumps({**result, "not_run": skipped}, indent=1) + "\n")
    print_table(rows, loops, ceiling)


def print_table(rows: list[dict], loops: list[dict], ceiling: dict) -> None:
    """Kernel times by batch, then calls."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    print(f"touching {ceiling['touch_bytes'] / 1e6:.2f} MB once: {ceiling['touch_us']:.2f} us")
    print("kernel, us (k_up / v_up)  " + "".join(f"{name:>18}" for name in names))
    for batch in BATCHES:
        cells = []
        for name in names:
            times = {row["op"]: row["kernel_us"] for row in rows if (row["name"], row["batch"]) == (name, batch)}
            cells.append(" / ".join(f"{times[op]:.2f}" for op in OPS) if len(times) == len(OPS) else "-")
        calls = " ".join(f"{row['name']} {row['call_us']:.2f}" for row in loops if row["batch"] == batch)
        print(f"B = {batch:<22}" + "".join(f"{cell:>18}" for cell in cells) + f"    call: {calls}")


if __name__ == "__main__":
    main()
