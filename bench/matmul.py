"""k_up_proj and v_up_proj: every implementation against the floor and its peers, on cold weights.

    python -m bench.matmul --out bench/results/FILE.json

Nothing is timed before it has passed its gate: results equal, bit for bit, to an exact reference. "kernel" is CUPTI's
time, "call" the wall time per call of a chain of k_up and v_up calls in one jitted, donated loop (bench/timing.py),
which goes over all weights often enough for the GPU, not its host, to take the time.
Peers in torch run first, in a process of their own (bench/matmul_peers.py). Rows are in order of importance; a batch
of them is compiled by several threads, then timed while nothing else runs. `--only` takes one part of the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import environment
from bench.ceilings import touch
from bench.step_timing import measure_ceilings
from bench.timing import empty_out, in_place, kernel_us, loop_us
from mla_fp4_jax import FP4Array, fp4_bmm

BATCHES = (1, 8, 16, 32, 64, 128, 256, 512)
OPS = ("k_up", "v_up")
ROTATED_BYTES, MOST_PACKS = 210e6, 192  # four times the L2 cache; of the smallest packs, twice
MOSAIC, TRITON, DENSE, DEQUANTISE, SCALED_DOT = (
    "mosaic_gpu",
    "triton",
    "xla bf16",
    "xla dequantise",
    "lax.scaled_dot e4m3",
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer's kv_b_proj, and the rope columns that follow q_nope in the query."""

    H: int
    P: int
    V: int
    L: int
    R: int = 64

    def __str__(self) -> str:
        return f"H{self.H}-P{self.P}-V{self.V}-L{self.L}"

    @property
    def packed_bytes(self) -> int:
        """Codes and scales of the whole pack."""
        return self.H * (self.P + self.V) * (self.L // 2 + self.L // 32)

    def floor_bytes(self, op: str, batch: int) -> int:
        """Bytes one product must move: its codes and scales, x in, result out."""
        rows = self.P if op == "k_up" else self.V
        return self.H * rows * (self.L // 2 + self.L // 32) + batch * self.H * (rows + self.L) * 2


DEEPSEEK_V3 = Shape(128, 128, 128, 512)
OTHER_SHAPES = (
    Shape(64, 192, 256, 512),  # GLM
    Shape(8, 128, 128, 512),
    Shape(16, 128, 128, 512),
    Shape(20, 128, 128, 512),
    Shape(64, 128, 128, 512),
    Shape(32, 128, 128, 256),  # L of Mistral's form
)
OTHER_BATCHES = ((1, 16, 64, 512), (8, 32, 128, 256))  # the first of every shape before the second
V3, OTHERS = "deepseek-v3", "other-shapes"  # parts of the table
COMPILED_AT_ONCE = 32  # rows
# Over the weights in one call, which costs its host some 0.4 ms: as long as one round with one token takes.
CHAIN_ROUNDS = 3
_THREADS = 8  # that compile; XLA's own products, whose tuning runs on the GPU, have one


def product(shape: Shape, implementation: str, op: str, x: jax.Array, w: FP4Array) -> jax.Array:
    """As a layer calls it: the whole query for k_up, whose rope columns are skipped in place."""
    if op == "k_up":
        return fp4_bmm(x, w, "rows", rows=(0, shape.P), x_columns=(0, shape.P), implementation=implementation)
    return fp4_bmm(x, w, "columns", rows=(shape.P, shape.V), implementation=implementation)


def dense_product(shape: Shape, op: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's own matmul on a bf16 weight [H, P+V, L]."""
    if op == "k_up":
        return jnp.einsum("bhp,hpl->bhl", x[..., : shape.P], w[:, : shape.P])
    return jnp.einsum("bhl,hvl->bhv", x, w[:, shape.P :])


def scaled_dot_product(shape: Shape, op: str, x: jax.Array, w: FP4Array) -> jax.Array:
    """XLA's block-scaled product with e4m3 activations. Of v_up only: k_up's scales lie along its result."""
    assert op == "v_up"
    x = x.astype(jnp.float8_e4m3fn).swapaxes(0, 1)
    rows = slice(shape.P, shape.P + shape.V)
    return jax.lax.scaled_dot(
        x,
        w.codes[:, rows],
        lhs_scale=jnp.ones((*x.shape[:2], shape.L // 32), jnp.float8_e8m0fnu),
        rhs_scale=jax.lax.bitcast_convert_type(w.scales[:, rows], jnp.float8_e8m0fnu),
        dimension_numbers=(((2,), (2,)), ((0,), (0,))),
        preferred_element_type=jnp.bfloat16,
    ).swapaxes(0, 1)


_XLA_CALLS = {DENSE: dense_product, SCALED_DOT: scaled_dot_product}


Row = tuple[Shape, str, str | None, int]  # shape, implementation, op or None for the loop, batch


class Setting:
    """One shape's operands: weights to rotate through under scales of trained size, and exact ones for the gate."""

    def __init__(self, shape: Shape):
        self.shape = shape
        keys = iter(jax.random.split(jax.random.key(0), 4096))

        @functools.partial(jax.jit, static_argnums=(1, 2))
        def pack(key, low: int, high: int) -> FP4Array:
            codes, scales = jax.random.split(key)
            rows = (shape.H, shape.P + shape.V)
            return FP4Array.from_packed(
                jax.random.bits(codes, (*rows, shape.L // 2), jnp.uint8),
                jax.random.randint(scales, (*rows, shape.L // 32), low, high).astype(jnp.uint8),
            )

        def x(op: str, draw: Callable) -> jax.Array:
            width = shape.P + shape.R if op == "k_up" else shape.L
            return draw(next(keys), (BATCHES[-1], shape.H, width)).astype(jnp.bfloat16)

        self.exact = pack(next(keys), 126, 129)
        packs = min(-(-int(ROTATED_BYTES) // shape.packed_bytes), MOST_PACKS)
        self.rows = [pack(next(keys), 114, 124) for _ in range(packs)]
        dense = jax.jit(functools.partial(FP4Array.dequantize, dtype=jnp.bfloat16))
        self.weights = {
            TRITON: self.rows,
            MOSAIC: [w.in_fragment_order(shape.P) for w in self.rows],
            DENSE: [dense(w) for w in self.rows[: -(-len(self.rows) // 3)]],
        }
        self.prepare = {MOSAIC: lambda w: w.in_fragment_order(shape.P), DENSE: dense}
        self.integers = {op: x(op, lambda key, shape: jax.random.randint(key, shape, -2, 3)) for op in OPS}
        self.normals = {op: x(op, jax.random.normal) for op in OPS}
        self.references = {op: self._reference(op) for op in OPS}

    def _reference(self, op: str) -> np.ndarray:
        """Of the largest batch, by NumPy: sums of small integers over 4, which float32 holds exactly."""
        P = self.shape.P
        x = np.asarray(self.integers[op].astype(jnp.float32)).swapaxes(0, 1)
        w = np.asarray(self.exact.dequantize(jnp.float32))
        y = x[..., :P] @ w[:, :P] if op == "k_up" else x @ w[:, P:].swapaxes(1, 2)
        return y.swapaxes(0, 1).astype(jnp.bfloat16)

    def call(self, name: str) -> Callable:
        """(op, x, w) -> y, jitted, so that a chain of calls lowers it once."""
        if name in _XLA_CALLS:
            run = functools.partial(_XLA_CALLS[name], self.shape)
        else:
            run = functools.partial(product, self.shape, "xla" if name == DEQUANTISE else name)
        return jax.jit(lambda op, x, w: run(op, x, w), static_argnums=0)

    def compile(self, name: str, op: str | None, batch: int) -> Callable:
        """What measure (of a loop, measure_loop, where op is None) runs; it runs nothing itself."""
        call, weights = self.call(name), self.weights.get(name, self.rows)
        if op is not None:
            return in_place(functools.partial(call, op), (self.normals[op][:batch], weights[0]))

        def step(q, weights):
            for w in weights * CHAIN_ROUNDS:
                q = call("v_up", call("k_up", q, w), w)
            return q

        state = jax.ShapeDtypeStruct((batch, self.shape.H, self.shape.P), jnp.bfloat16)
        return jax.jit(step, donate_argnums=0).lower(state, weights).compile()

    def measure(self, name: str, op: str, batch: int, run: Callable) -> dict[str, object]:
        """One row of the table, gate first; RuntimeError unless the product of integers is exact."""
        call = functools.partial(self.call(name), op)
        exact = self.integers[op][:batch], self.prepare.get(name, lambda w: w)(self.exact)
        want = self.references[op][:batch]
        wrong = int(np.sum(np.asarray(run(empty_out(call, exact), exact)) != want))
        if wrong:
            raise RuntimeError(f"{wrong} of {want.size} results are wrong; not timed.")
        x = self.normals[op][:batch]
        median, spread = kernel_us(call, [(x, w) for w in self.weights.get(name, self.rows)], run)
        floor = self.shape.floor_bytes(op, batch)
        return {
            "kernel_us": round(median, 3),
            "kernel_iqr_us": round(spread, 3),
            "floor_bytes": floor,
            "tb_per_s": round(floor / median / 1e6, 3),
        }

    def measure_loop(self, name: str, batch: int, run: Callable) -> dict[str, object]:
        """A chain of k_up and v_up over all weights, state [B, H, P] donated and fed back; needs P = V."""
        weights = self.weights.get(name, self.rows)
        state = self.normals["k_up"][:batch, :, : self.shape.P] + 0
        return loop_us(run, state, weights, 2 * len(weights) * CHAIN_ROUNDS)


def compile_all(setting: Setting, rows: list[Row]) -> list[Callable | Exception]:
    """Setting.compile of every row, or what kept it from being compiled."""

    def attempt(row: Row) -> Callable | Exception:
        try:
            return setting.compile(*row[1:])
        except Exception as error:  # of one row: the others go on
            return error

    with ThreadPoolExecutor(_THREADS) as threads, ThreadPoolExecutor(1) as thread:
        futures = [(threads if row[1] in (MOSAIC, TRITON) else thread).submit(attempt, row) for row in rows]
        return [future.result() for future in futures]


def measured(setting: Setting, name: str, op: str | None, batch: int, run: Callable | Exception) -> dict[str, object]:
    """What a row of the table says beside its names: times, or why there are none."""
    if isinstance(run, Exception):
        return {"error": str(run)[:300]}
    try:
        if op is None:
            return setting.measure_loop(name, batch, run)
        return setting.measure(name, op, batch, run)
    except Exception as error:  # of one row: the others go on
        return {"error": str(error)[:300]}


def plan(parts: tuple[str, ...] = (V3, OTHERS), shapes: tuple[str, ...] = ()) -> list[Row]:
    """Rows of some parts of the table, of some of the shapes if any are named, most important first."""
    rows: list[Row] = []
    rows += [(DEEPSEEK_V3, name, op, batch) for batch in BATCHES for op in OPS for name in (MOSAIC, DENSE)]
    rows += [(DEEPSEEK_V3, name, None, batch) for batch in BATCHES for name in (MOSAIC, DENSE)]
    rows += [(DEEPSEEK_V3, TRITON, op, batch) for batch in (1, 16, 64, 256) for op in OPS]
    rows += [(DEEPSEEK_V3, DEQUANTISE, op, batch) for batch in (1, 64) for op in OPS]
    rows += [(DEEPSEEK_V3, SCALED_DOT, "v_up", batch) for batch in (1, 64)]
    if V3 not in parts:
        rows.clear()
    for batches, shape in itertools.product(OTHER_BATCHES, OTHER_SHAPES) if OTHERS in parts else ():
        rows += [(shape, name, op, batch) for batch in batches for op in OPS for name in (MOSAIC, DENSE)]
    return [row for row in rows if not shapes or str(row[0]) in shapes]


def batches_of_rows(rows: list[Row]) -> Iterator[list[Row]]:
    """Consecutive rows of one shape, at most COMPILED_AT_ONCE."""
    for _, same in itertools.groupby(rows, key=lambda row: row[0]):
        same = list(same)
        yield from (same[i : i + COMPILED_AT_ONCE] for i in range(0, len(same), COMPILED_AT_ONCE))


def ceilings(setting: Setting) -> dict[str, float]:
    """A kernel that reads as many bytes as one product's codes and scales, and writes nothing; a gigabyte's rates."""
    size = setting.shape.packed_bytes // 2
    flat = [w.packed.reshape(-1)[:size] + 0 for w in setting.rows]
    touch_us, _ = kernel_us(jax.jit(functools.partial(touch, loads=17)), [(a,) for a in flat])  # then 128 CTAs
    return {"touch_us": round(touch_us, 3), "touch_bytes": size, **measure_ceilings()}


def peers(seconds: float) -> list[dict[str, object]]:
    """Rows of bench.matmul_peers, or what kept it from running."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "triton")):
        return [{"error": "torch or triton is not installed"}]
    command = [sys.executable, "-m", "bench.matmul_peers", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows: list[dict[str, object]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [*rows, {"error": done.stderr[-2000:]}] if done.returncode else rows


def main() -> None:
    """Run the table, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=900, help="start nothing new after so long")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers in torch out")
    parser.add_argument("--only", choices=(V3, OTHERS), help="one part of the table")
    names = [str(shape) for shape in (DEEPSEEK_V3, *OTHER_SHAPES)]
    parser.add_argument("--shapes", nargs="+", choices=names, default=[], help="of that part; all if left out")
    args = parser.parse_args()
    start = time.monotonic()
    parts = (V3, OTHERS) if args.only is None else (args.only,)
    rows = [] if args.no_peers or V3 not in parts else peers(args.seconds / 2)
    setting = Setting(DEEPSEEK_V3)
    ceiling, described = ceilings(setting), environment.describe(args.commit)
    todo = plan(parts, tuple(args.shapes))
    progress = tqdm(total=len(todo), desc="matmul", mininterval=5)
    for some in batches_of_rows(todo):
        runs: list[Callable | Exception] = [RuntimeError("out of time")] * len(some)
        if time.monotonic() - start < args.seconds:
            shape = some[0][0]
            setting = setting if setting.shape == shape else Setting(shape)
            runs = compile_all(setting, some)
        for (shape, name, op, batch), run in zip(some, runs, strict=True):
            row = {"shape": str(shape), "name": name, "op": op or "both", "batch": batch}
            run = RuntimeError("out of time") if time.monotonic() - start > args.seconds else run
            rows.append(row | measured(setting, name, op, batch, run))
            progress.update()
            args.out.write_text(json.dumps({**described, "ceilings": ceiling, "rows": rows}, indent=1) + "\n")
    print(table({"ceilings": ceiling, "rows": rows}))


def table(result: dict) -> str:
    """Kernel times of DeepSeek-V3's shape by batch (k_up / v_up), then calls, then the other shapes."""
    ceiling, rows = result["ceilings"], [row for row in result["rows"] if "kernel_us" in row or "call_us" in row]
    lines = [f"touching {ceiling['touch_bytes'] / 1e6:.2f} MB once: {ceiling['touch_us']:.2f} us"]
    for shape in dict.fromkeys(row.get("shape", str(DEEPSEEK_V3)) for row in rows):
        here = [row for row in rows if row.get("shape", str(DEEPSEEK_V3)) == shape]
        for key in ("kernel_us", "call_us"):
            names = list(dict.fromkeys(row["name"] for row in here if key in row))
            if not names:
                continue
            lines.append(f"{shape}, {key}: k_up / v_up" + "".join(f"  | {name}" for name in names))
            for batch in BATCHES:
                cells = [_cell(here, key, name, batch) for name in names]
                if any(cells):
                    lines.append(f"{batch:>5} " + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _cell(rows: list[dict], key: str, name: str, batch: int) -> str:
    times = {row["op"]: row[key] for row in rows if (row["name"], row["batch"]) == (name, batch) and key in row}
    return " / ".join(f"{times[op]:.2f}" for op in (*OPS, "both") if op in times)


if __name__ == "__main__":
    main()
