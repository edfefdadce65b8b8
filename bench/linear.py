"""FP4 linears at DeepSeek-V3's shapes, and kv_b_proj in prefill: against XLA's bf16 matmul, cold weights.

    python -m bench.linear --out bench/results/FILE.json --seconds 300

Nothing is timed before it has passed its gate. A linear's: products of integers equal, bit for bit, to an exact
reference; a chain's: within 1.5 % of that of XLA's products, as bfloat16 layers are; kv_b_proj's in prefill: the
decoded weight equal, bit for bit, to XLA's.
"kernel" is CUPTI's time, "call" the wall time per linear of a layer's three in a row within one jitted, donated loop
(bench/timing.py), the slices between them included. "touch" only reads as many bytes as the packed weight has.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from bench import environment
from bench.ceilings import touch
from bench.timing import in_place, kernel_us, loop_us
from mla_fp4_jax import FP4Array, fp4_linear
from mla_fp4_jax.ops.dense import fp4_dense
from pallas_kernels.fragments import FragmentOrder

# Name -> outputs N, inputs K, and the middle of its scales' bytes: results are then about as large as x.
SHAPES = {"q_a + kv_a": (2112, 7168, 120), "q_b": (24576, 1536, 121), "o": (7168, 16384, 119)}
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512)
PREFILL = (1024, 2048, 4096, 8192, 16384)
H, P, V, L = 128, 128, 128, 512
COLD_BYTES = 230e6  # of weights to rotate through: more than four times the L2 cache
TOUCH_LOADS = 17
PARTS = ("linears", "prefill", "loop")
LAYERS = 4  # of a call's loop: 362 MB
CHAIN_BOUND = 0.015  # relative rms between two bfloat16 chains: README's bound of a bfloat16 layer


def random_pack(seed: int, shape: tuple[int, ...], scale: int, key_rows: int = 0) -> FP4Array:
    """Random bytes, in fragment order as they are: any bytes are a matrix in that order. Scales within 4 binades."""
    packed = jax.random.bits(jax.random.key(2 * seed), (*shape[:-1], shape[-1] // 2), jnp.uint8)
    scales = jax.random.bits(jax.random.key(2 * seed + 1), (*shape[:-1], shape[-1] // 32), jnp.uint8) % 4
    codes = jax.lax.bitcast_convert_type(packed, jnp.float4_e2m1fn).reshape(shape)
    return FP4Array(codes, scales + jnp.uint8(scale - 2), order=FragmentOrder(key_rows))


def dense_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T by XLA's choice of library or kernel."""
    return jnp.einsum("mk,nk->mn", x, w)


def dequantise_product(x: jax.Array, w: FP4Array) -> jax.Array:
    """w decoded to memory by one kernel, then as above: what fp4_linear does with many tokens."""
    return dense_product(x, fp4_dense(w, jnp.bfloat16))


PRODUCTS: dict[str, Callable] = {
    "mosaic_gpu": functools.partial(fp4_linear, implementation="mosaic_gpu"),
    "xla bf16": dense_product,
    "dequantise": dequantise_product,
}


class Setting:
    """One shape's weights: packs, dense ones, and the gate's x and exact answer."""

    def __init__(self, name: str):
        outputs, inputs, scale = SHAPES[name]
        self.packed_bytes = outputs * inputs // 2 + outputs * inputs // 32
        self.packs = [random_pack(i, (outputs, inputs), scale) for i in range(_copies(self.packed_bytes))]
        self.dense = [
            jax.jit(fp4_dense, static_argnums=1)(w, jnp.bfloat16) for w in self.packs[: _copies(2 * outputs * inputs)]
        ]
        self.exact_pack = random_pack(99, (outputs, inputs), 127)
        self.exact_x = jax.random.randint(jax.random.key(1), (TOKENS[-1], inputs), -2, 3).astype(jnp.bfloat16)
        self.x = jax.random.normal(jax.random.key(2), (TOKENS[-1], inputs), jnp.bfloat16)
        wide = self.exact_pack.dequantize(jnp.float32)  # by XLA, not by the kernel that is timed
        exact = functools.partial(jnp.einsum, "mk,nk->mn", precision="highest")
        options: Any = {"xla_gpu_autotune_level": 0}
        x = self.exact_x.astype(jnp.float32)
        self.want = jax.jit(exact).lower(x, wide).compile(compiler_options=options)(x, wide).astype(jnp.bfloat16)

    def compile(self, name: str, tokens: int) -> Callable:
        """For measure; in a thread, but for what XLA tunes by timing it on the device."""
        return in_place(PRODUCTS[name], (self.x[:tokens], (self.dense if name == "xla bf16" else self.packs)[0]))

    def measure(self, name: str, tokens: int, run: Callable) -> dict[str, object]:
        """Gate, then kernel time, of what compile made."""
        weight = fp4_dense(self.exact_pack, jnp.bfloat16) if name == "xla bf16" else self.exact_pack
        got = run(jnp.full_like(self.want[:tokens], jnp.nan), (self.exact_x[:tokens], weight))
        wrong = int(jnp.sum(got != self.want[:tokens]))
        if wrong:
            raise RuntimeError(f"{name}, {tokens} tokens: {wrong} results are wrong; not timed.")
        weights = self.dense if name == "xla bf16" else self.packs
        calls = [(self.x[:tokens], w) for w in weights * max(1, -(-8 // len(weights)))]
        median, spread = kernel_us(PRODUCTS[name], calls, run)
        return {"kernel_us": round(median, 3), "kernel_iqr_us": round(spread, 3)}

    def ceiling(self) -> dict[str, float]:
        """Time to read as many bytes as a pack has, microseconds, and TB/s."""
        unit = 128 * 16 * TOUCH_LOADS
        flat = [jnp.resize(w.packed, (self.packed_bytes // unit * unit,)) for w in self.packs]
        median, _ = kernel_us(jax.jit(functools.partial(touch, loads=TOUCH_LOADS)), [(a,) for a in flat * 2])
        return {
            "touch_us": round(median, 3),
            "bytes": flat[0].size,
            "tb_per_s": round(flat[0].size / median / 1e6, 3),
        }


def _copies(size: int) -> int:
    return max(2, -(-int(COLD_BYTES) // size))


def chain(product: Callable) -> Callable:
    """(x, weights) -> x: a layer's three linears in a row, layer after layer."""
    call, shapes = jax.jit(product), list(SHAPES.values())

    def step(x, weights):
        for q_a, q_b, o in weights:
            x = call(call(call(x, q_a)[:, : shapes[1][1]], q_b)[:, : shapes[2][1]], o)
        wide = x.astype(jnp.float32)  # kept at size 1, lest the loop run into zeros or infinities
        return (wide * jax.lax.rsqrt(jnp.mean(wide * wide) + 1e-30)).astype(x.dtype)

    return step


def measure_loop(name: str, tokens: int) -> dict[str, object]:
    """A chain of four layers, state [M, 7168] donated and fed back; gate first."""
    shapes = list(SHAPES.values())
    packs = [
        [random_pack(10 * layer + i, (n, k), scale) for i, (n, k, scale) in enumerate(shapes)]
        for layer in range(LAYERS)
    ]
    dense = [[jax.jit(fp4_dense, static_argnums=1)(w, jnp.bfloat16) for w in layer] for layer in packs]
    weights = dense if name == "xla bf16" else packs
    state = jax.random.normal(jax.random.key(3), (tokens, shapes[0][1]), jnp.bfloat16)
    got, want = (
        jax.jit(chain(product))(state, w).astype(jnp.float32)
        for product, w in ((PRODUCTS[name], weights), (dense_product, dense))
    )
    error = float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))
    if not error <= CHAIN_BOUND:
        raise RuntimeError(f"{name}, a chain with {tokens} tokens: relative error {error:.2e}; not timed.")
    if name != "xla bf16":
        del dense
    return {"name": name, "tokens": tokens, **loop_us(chain(PRODUCTS[name]), state, weights, 3 * LAYERS)}


def measure_prefill(name: str, tokens: int) -> dict[str, object]:
    """kv_b_proj as one linear [H (P+V), L]; FP4: from the pack that decode uses, decoded for the call."""
    packs = [random_pack(i, (H, P + V, L), 121, key_rows=P) for i in range(4)]

    def product(x, w):
        dense = fp4_dense(w, jnp.bfloat16) if isinstance(w, FP4Array) else w
        return dense_product(x, dense.reshape(-1, L))

    weights = packs
    decoded = [jax.jit(fp4_dense, static_argnums=1)(w, jnp.bfloat16) for w in packs]
    wrong = sum(int(jnp.sum(d != w.dequantize(jnp.bfloat16))) for d, w in zip(decoded, packs, strict=True))
    if wrong:
        raise RuntimeError(f"{name}, prefill of {tokens} tokens: {wrong} decoded weights are wrong; not timed.")
    if name == "xla bf16":
        weights = decoded
    x = jax.random.normal(jax.random.key(4), (tokens, L), jnp.bfloat16)
    median, spread = kernel_us(jax.jit(product), [(x, w) for w in weights])
    return {"name": name, "tokens": tokens, "kernel_us": round(median, 3), "kernel_iqr_us": round(spread, 3)}


def main() -> None:
    """Run the table, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so long")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of the table")
    args = parser.parse_args()
    start = time.monotonic()
    ceilings: dict[str, dict[str, float]] = {}
    rows: list[dict[str, object]] = []
    calls: list[dict[str, object]] = []
    prefill: list[dict[str, object]] = []
    skipped: list[list[object]] = []
    contenders = ("mosaic_gpu", "xla bf16")
    plan: list[tuple] = []
    for shape in SHAPES:
        plan += [("touch", shape, 0)]
        plan += [(name, shape, tokens) for tokens in TOKENS for name in contenders]
        plan += [("dequantise", shape, TOKENS[-1])]
    plan += [(name, "prefill", tokens) for tokens in PREFILL for name in ("mosaic_gpu", "xla bf16")]
    plan += [(name, "loop", tokens) for tokens in (1, 16, 64, 256) for name in contenders]
    plan = [row for row in plan if (row[1] if row[1] in ("prefill", "loop") else "linears") in args.only]
    setting: tuple[str, Setting] | None = None
    pool, compiled = ThreadPoolExecutor(8), {}
    for name, shape, tokens in tqdm(plan, desc="linear"):
        if time.monotonic() - start > args.seconds:
            skipped.append([name, shape, tokens])
        elif shape == "prefill":
            prefill.append(measure_prefill(name, tokens))
        elif shape == "loop":
            calls.append(measure_loop(name, tokens))
        else:
            if setting is None or setting[0] != shape:
                setting = None  # frees the last one's memory first
                setting = (shape, Setting(shape))
                compiled = {m: pool.submit(setting[1].compile, "mosaic_gpu", m) for m in TOKENS}
            if name == "touch":
                ceilings[shape] = setting[1].ceiling()
            else:
                ours = name == "mosaic_gpu"
                run = compiled[tokens].result() if ours else setting[1].compile(name, tokens)
                row = {"name": name, "shape": shape, "tokens": tokens, "packed_bytes": setting[1].packed_bytes}
                rows.append({**row, **setting[1].measure(name, tokens, run)})
        measured = {"ceilings": ceilings, "kernel": rows, "prefill": prefill, "call": calls, "not_run": skipped}
        args.out.write_text(json.dumps({**environment.describe(args.commit), **measured}, indent=1) + "\n")
    pool.shutdown(cancel_futures=True)
    print_table(ceilings, rows, prefill, calls)


def print_table(ceilings: dict, rows: list[dict], prefill: list[dict], calls: list[dict]) -> None:
    """By shape and tokens: kernel times, their ratio, and how near to the touch ceiling FP4 comes."""
    for shape in SHAPES:
        if shape not in ceilings:
            continue
        ceiling = ceilings[shape]
        print(
            f"{shape} {SHAPES[shape][:2]}: touching {ceiling['bytes'] / 1e6:.1f} MB once {ceiling['touch_us']:.2f} us"
        )
        for tokens in TOKENS:
            times = {
                row["name"]: row["kernel_us"] for row in rows if (row["shape"], row["tokens"]) == (shape, tokens)
            }
            if {"mosaic_gpu", "xla bf16"} <= times.keys():
                ours, dense = times["mosaic_gpu"], times["xla bf16"]
                text = f"  M = {tokens:<4} FP4 {ours:8.2f} us  bf16 {dense:8.2f} us  {dense / ours:5.2f}x"
                other = f"  dequantise {times['dequantise']:.2f} us" if "dequantise" in times else ""
                print(f"{text}  {100 * ceiling['touch_us'] / ours:5.1f} % of touching{other}")
    for title, table, key in (("prefill kv_b_proj", prefill, "kernel_us"), ("call", calls, "call_us")):
        for tokens in dict.fromkeys(row["tokens"] for row in table):
            times = {row["name"]: row[key] for row in table if row["tokens"] == tokens}
            print(f"{title}, {tokens} tokens: " + ", ".join(f"{name} {us:.2f} us" for name, us in times.items()))


if __name__ == "__main__":
    main()
