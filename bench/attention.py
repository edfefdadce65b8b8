"""mla_decode at DeepSeek-V3's shapes, bf16 paged cache: every implementation, and FlashMLA on the same GPU.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m bench.attention --out bench/results/FILE.json

Nothing is timed before it has passed its gate: against a float64 reference, an error of at most 1.25 times that of
XLA's attention on the same operands. "kernel" is the sum of a call's kernels as CUPTI has it, the merging of splits
included; caches larger than the L2 cache make every call cold, smaller ones do not. FlashMLA (bench/flashmla.py)
runs after that, where torch and its wheel can be imported.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import environment
from bench.timing import kernel_us
from mla_fp4_jax.cache import PagedLatentCache
from mla_fp4_jax.ops import implementations, mla_decode

L, R = 512, 64
SCALE = 192**-0.5
CALLS = 12
SHAPES = (  # heads, sequences, keys
    *((128, batch, keys) for keys in (4096, 16384) for batch in (1, 8, 32, 64, 128)),
    *((16, batch, keys) for keys in (4096, 16384) for batch in (32, 64, 128)),
    (128, 1, 65536),
    (16, 1, 65536),
)
NAMES = ("mosaic_gpu", "triton", "xla")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def operands(heads: int, batch: int, keys: int, page: int) -> tuple[jax.Array, PagedLatentCache, jax.Array]:
    """Random queries and a full cache whose pages lie in random order."""
    of_q, of_pages, of_table = jax.random.split(jax.random.key(batch + keys, impl="rbg"), 3)
    number = batch * keys // page
    pages = jax.random.normal(of_pages, (number, page, L + R), jnp.bfloat16)
    table = jax.random.permutation(of_table, number).astype(jnp.int32).reshape(batch, -1)
    cache = PagedLatentCache(pages, table, jnp.full((batch,), keys, jnp.int32), L)
    q = jax.random.normal(of_q, (batch, 1, heads, L + R), jnp.bfloat16) * 2
    return q, cache, jnp.full((batch, 1), keys, jnp.int32)


def attention(q: jax.Array, cache: PagedLatentCache, visible: jax.Array, *, name: str) -> jax.Array:
    """The call that is timed."""
    return mla_decode(q, cache, visible, scale=SCALE, implementation=name)


def relative_error(out: jax.Array, q: jax.Array, cache: PagedLatentCache) -> float:
    """Of the first and the last sequence, eight heads each, against float64."""
    difference = reference = 0.0
    heads = np.linspace(0, q.shape[2] - 1, 8).astype(int)
    for b in {0, q.shape[0] - 1}:
        keys = np.asarray(cache.pages[cache.page_table[b]].astype(jnp.float32), np.float64).reshape(-1, L + R)
        scores = np.asarray(q[b, 0, heads].astype(jnp.float32), np.float64) @ keys.T * SCALE
        p = np.exp(scores - scores.max(-1, keepdims=True))
        exact = p @ keys[:, :L] / p.sum(-1, keepdims=True)
        got = np.asarray(out[b, 0, heads].astype(jnp.float32), np.float64)
        difference += np.sum((got - exact) ** 2)
        reference += np.sum(exact**2)
    return float(np.sqrt(difference / reference))


def measure(name: str, heads: int, batch: int, keys: int, page: int) -> dict[str, object]:
    """One row of the table, gate first."""
    q, cache, visible = operands(heads, batch, keys, page)
    call = jax.jit(functools.partial(attention, name=name))
    error = relative_error(call(q, cache, visible), q, cache)
    two = jnp.array([0, batch - 1])
    plain = PagedLatentCache(cache.pages, cache.page_table[two], cache.length[two], L)
    xla = jax.jit(functools.partial(attention, name="xla"))
    allowed = 1.25 * relative_error(xla(q[two], plain, visible[two]), q[two], plain)
    if not error <= allowed:
        raise RuntimeError(f"{name}: relative error {error:.2e}, more than {allowed:.2e}; not timed.")
    median, spread = kernel_us(call, [(q, cache, visible)] * CALLS)
    flops = 2 * batch * heads * keys * (2 * L + R)
    moved = batch * keys * (L + R) * 2 + batch * heads * (2 * L + R) * 2
    return {
        "name": name,
        "heads": heads,
        "batch": batch,
        "keys": keys,
        "page": page,
        "kernel_us": round(median, 2),
        "kernel_iqr_us": round(spread, 2),
        "tflops": round(flops / median / 1e6, 1),
        "tb_per_s": round(moved / median / 1e6, 3),
        "relative_error": error,
    }


def flashmla(shapes, seconds: float) -> list[dict[str, object]]:
    """FlashMLA's rows, or one that says why there are none."""
    command = [sys.executable, "-m", "bench.flashmla", *("x".join(map(str, shape)) for shape in shapes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        return [{"name": "flashmla", "error": "out of time"}]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        rows.append({"name": "flashmla", "error": done.stderr.strip().splitlines()[-1:]})
    return rows


def main() -> None:
    """Run the table, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so long")
    parser.add_argument("--page", type=int, default=64, help="page size")
    parser.add_argument("--names", default=",".join(NAMES), help="implementations, separated by commas")
    parser.add_argument("--shapes", help="heads x sequences x keys, as 128x32x4096,16x64x16384")
    args = parser.parse_args()
    start = time.monotonic()
    shapes = SHAPES
    if args.shapes:
        shapes = tuple(tuple(map(int, text.split("x"))) for text in args.shapes.split(","))
    rows: list[dict[str, object]] = []
    for heads, batch, keys in shapes:
        for name in args.names.split(","):
            where = {"name": name, "heads": heads, "batch": batch, "keys": keys}
            reason = implementations.why_not(name)
            if time.monotonic() - start > args.seconds:
                reason = "out of time"
            if reason is not None:
                rows.append(where | {"error": reason})
                continue
            try:
                rows.append(measure(name, heads, batch, keys, args.page))
            except Exception as error:  # one failure must not hide the other rows
                rows.append(where | {"error": str(error)[:500]})
            print(rows[-1], flush=True)
    rows += flashmla(shapes, args.seconds - (time.monotonic() - start))
    result = {"environment": environment.describe(args.commit), "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':12}{'heads':>6}{'B':>5}{'S':>7}{'us':>9}{'TFLOP/s':>9}{'TB/s':>7}")
    for row in rows:
        where = "".join(f"{row.get(key, ''):>{width}}" for key, width in (("heads", 6), ("batch", 5), ("keys", 7)))
        if "error" in row:
            print(f"{row['name']:12}{where}  {row['error']}")
        else:
            rates = f"{row.get('tflops', ''):>9}{row.get('tb_per_s', ''):>7}"
            print(f"{row['name']:12}{where}{row['kernel_us']:>9}{rates}")


if __name__ == "__main__":
    main()
