"""mla_decode at DeepSeek-V3's shapes, paged cache: FlashMLA on the same GPU first, then every implementation.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m bench.attention --out bench/results/FILE.json

"kernel_us" is the median over calls of the sum of a call's kernels as CUPTI has it, the merging of splits included,
and "kernels" those sums by kernel. Caches larger than the L2 cache make every call cold, smaller ones do not.
FlashMLA (bench/flashmla.py) runs where torch and its wheel can be imported, while the kernels here are compiled; no
two things are timed at once. The file is written again after every row.

Nothing is timed before it has passed its gate: the relative error of the 2-norm against a float64 reference, of two
sequences and eight heads of each, is at most GATE. With u = 2^-8, bf16's unit roundoff, a result strays by

    rounding P to bf16: each p by at most u of itself. Values are drawn independently of p, so a sum's square and its
        error's are both sums of squares: at most u in the norm.
    rounding the output: uniform within half an ulp, whose root mean square is u / sqrt(3) of a mantissa of 1, less
        of a greater one. It does not depend on the first: in the norm the two make u sqrt(1 + 1/3).
    float32: scores reach some 16 in L + R sums, each off by at most 2^-23 of it and at random: sqrt(L + R) 2^-19,
        under 2^-14; sums over splits by less. 2^-11 is more than all of it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bench import environment
from bench.step_timing import measure_ceilings
from bench.timing import kernels_us
from mla_fp4_jax.cache import PagedLatentCache
from mla_fp4_jax.ops import implementations, mla_decode

Shape = tuple[int, int, int]
L, R = 512, 64
SCALE = 192**-0.5
CALLS = 12
GATE = 2**-8 * (1 + 1 / 3) ** 0.5 + 2**-11
SHAPES: tuple[Shape, ...] = (  # heads, sequences, keys: what matters most first
    *((128, batch, keys) for keys in (4096, 16384) for batch in (32, 64, 128)),
    *((16, batch, 4096) for batch in (32, 64, 128)),
    (128, 1, 65536),
    *((64, batch, 4096) for batch in (32, 64, 128)),  # Kimi-K2
    *((16, batch, 16384) for batch in (32, 64, 128)),
    (16, 1, 65536),
    *((128, batch, keys) for keys in (4096, 16384) for batch in (1, 8)),
)
IMPORTANT = 13  # of SHAPES come first; then these with further dtypes of the cache, and these of XLA's
OTHER_CACHES = (*((16, batch, 4096) for batch in (32, 64, 128)), (128, 32, 4096), (128, 64, 4096))
XLA_FIRST = ((128, 32, 4096), (16, 32, 4096))
_ONE_LOWERS = threading.Lock()
WIDTHS = (("cache", 14), ("heads", 6), ("batch", 5), ("keys", 7))  # of the printed table
NAMES = ("mosaic_gpu", "triton", "xla")


def operands(shape: Shape, page: int, dtype: str) -> tuple[jax.Array, PagedLatentCache, jax.Array]:
    """Random queries and a full cache whose pages lie in random order."""
    heads, batch, keys = shape
    of_q, of_pages, of_table = jax.random.split(jax.random.key(batch + keys, impl="rbg"), 3)
    number = batch * keys // page
    pages = jax.random.normal(of_pages, (number, page, L + R), jnp.bfloat16).astype(dtype)
    table = jax.random.permutation(of_table, number).astype(jnp.int32).reshape(batch, -1)
    cache = PagedLatentCache(pages, table, jnp.full((batch,), keys, jnp.int32), L)
    q = jax.random.normal(of_q, (batch, 1, heads, L + R), jnp.bfloat16) * 2
    return q, cache, jnp.full((batch, 1), keys, jnp.int32)


def sample(q: jax.Array, cache: PagedLatentCache) -> tuple[jax.Array, jax.Array]:
    """Eight heads' queries and all keys of the first and the last sequence, for `reference`."""
    ends = jnp.array([0, q.shape[0] - 1])
    keys = cache.pages[cache.page_table[ends]].astype(jnp.float32)
    return q[ends, 0][:, some_heads(q)].astype(jnp.float32), keys.reshape(2, -1, L + R)


def made(shape: Shape, page: int, dtype: str):
    """The operands and their sample."""
    args = operands(shape, page, dtype)
    return args, sample(*args[:2])


def attention(q: jax.Array, cache: PagedLatentCache, visible: jax.Array, *, name: str) -> jax.Array:
    """The call that is timed."""
    return mla_decode(q, cache, visible, scale=SCALE, implementation=name)


def reference(q: jax.Array, keys: jax.Array) -> np.ndarray:
    """The exact output of a sample, float64 [2, 8, L]."""
    queries, entries = np.asarray(q, np.float64), np.asarray(keys, np.float64)
    scores = queries @ entries.transpose(0, 2, 1) * SCALE
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p @ entries[..., :L] / p.sum(-1, keepdims=True)


def relative_error(out: jax.Array, exact: np.ndarray) -> float:
    """Of the 2-norm of what `reference` has."""
    got = np.asarray(out[np.array([0, out.shape[0] - 1]), 0].astype(jnp.float32), np.float64)[:, some_heads(out)]
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def some_heads(x: jax.Array) -> np.ndarray:
    """Eight of them."""
    return np.linspace(0, x.shape[2] - 1, 8).astype(int)


def measure(compiled, shape: Shape, args: tuple, exact: np.ndarray, dtype: str) -> dict[str, object]:
    """The figures of a row, gate first."""
    error = relative_error(compiled(*args), exact)
    if not error <= GATE:
        raise RuntimeError(f"relative error {error:.2e}, more than {GATE:.2e}; not timed.")
    calls = kernels_us(compiled, args, CALLS)[1:]
    low, median, high = statistics.quantiles([sum(us for _, us in call) for call in calls], n=4)
    parts: dict[str, float] = {}
    for call in calls:
        for name, us in call:
            parts[name[:40]] = parts.get(name[:40], 0.0) + us / len(calls)
    heads, batch, keys = shape
    flops = 2 * batch * heads * keys * (2 * L + R)
    moved = batch * keys * (L + R) * jnp.dtype(dtype).itemsize + batch * heads * (2 * L + R) * 2
    largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
    return {
        "kernel_us": round(median, 2),
        "kernel_iqr_us": round(high - low, 2),
        "kernels": {name: round(us, 2) for name, us in largest},
        "tflops": round(flops / median / 1e6, 1),
        "tb_per_s": round(moved / median / 1e6, 3),
        "relative_error": error,
    }


def plan(names: Sequence[str], shapes: Sequence[Shape], caches: Sequence[str]) -> list[tuple[list[str], str, Shape]]:
    """Which implementations, cache and shape follow each other: what matters most first."""
    kernels, plain = ([name for name in names if (name == implementations.XLA) == is_xla] for is_xla in (False, True))
    first = [*itertools.product([kernels], caches[:1], shapes[:IMPORTANT])]
    first += itertools.product([kernels], caches[1:], [shape for shape in OTHER_CACHES if shape in shapes])
    first += itertools.product([plain], caches[:1], [shape for shape in XLA_FIRST if shape in shapes])
    for group in (kernels, plain):
        first += [row for row in itertools.product([group], caches, shapes) if row not in first]
    return [row for row in first if row[0]]


def compile_all(wanted, page: int, pool: ThreadPoolExecutor) -> dict[tuple[str, str, Shape], Future]:
    """Programs that are being compiled, by name, dtype of the cache and shape, in the order given."""
    programs = {}
    for name, dtype, shape in wanted:
        make = functools.partial(made if name == "made" else operands, shape, page, dtype)
        function, args = make, ()
        if name != "made":
            function, args = functools.partial(attention, name=name), jax.eval_shape(make)
        lower = functools.partial(jax.jit(function).lower, *args)
        # Lowering is Python: several at once would only make the first ones late.
        programs[name, dtype, shape] = pool.submit(lower_and_compile, lower)
    return programs


def lower_and_compile(lower) -> jax.stages.Compiled:
    """What a call lowers to, compiled: one lowers at a time."""
    with _ONE_LOWERS:
        lowered = lower()
    return lowered.compile()


def start_flashmla(shapes) -> subprocess.Popen | None:
    """A process that times FlashMLA, or None where it cannot."""
    command = [sys.executable, "-m", "bench.flashmla", *("x".join(map(str, shape)) for shape in shapes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def flashmla_rows(process: subprocess.Popen, seconds: float) -> list[dict[str, object]]:
    """What it printed, and why it stopped early if it did."""
    late = False
    try:
        printed, complaint = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.kill()
        printed, complaint = process.communicate()
        late = True
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    if late or process.returncode:
        rows.append({"name": "flashmla", "error": "out of time" if late else complaint.strip().splitlines()[-1:]})
    return rows


def main() -> None:
    """Run the table, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so long")
    parser.add_argument("--page", type=int, default=64, help="page size")
    parser.add_argument("--cache", default="bfloat16", help="dtypes of the cache, separated by commas")
    parser.add_argument("--names", default=",".join(NAMES), help="implementations, separated by commas")
    parser.add_argument("--shapes", help="heads x sequences x keys, as 128x32x4096,16x64x16384")
    parser.add_argument("--no-flashmla", action="store_true", help="leave FlashMLA out")
    args = parser.parse_args()
    start = time.monotonic()
    shapes: Sequence[Shape] = SHAPES
    if args.shapes:
        numbers = [map(int, text.split("x")) for text in args.shapes.split(",")]
        shapes = [(heads, batch, keys) for heads, batch, keys in numbers]
    names = args.names.split(",")

    def left() -> float:
        return args.seconds - (time.monotonic() - start)

    rows: list[dict[str, object]] = []
    what = {"environment": environment.describe(args.commit), "ceilings": measure_ceilings(), "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def add(*new: dict[str, object]) -> None:
        for row in new:
            rows.append(row)
            print(round(time.monotonic() - start, 1), row, flush=True)
        args.out.write_text(json.dumps(what, indent=1) + "\n")

    add(*({"name": name, "error": why} for name in names if (why := implementations.why_not(name))))
    names = [name for name in names if implementations.why_not(name) is None]
    rows_to_come = plan(names, shapes, args.cache.split(","))
    flashmla = None if args.no_flashmla else start_flashmla(shapes)
    with ThreadPoolExecutor(12) as pool:
        # XLA's products are tuned by timing them: they are compiled when it is their turn, alone.
        early = [
            (name, dtype, shape)
            for group, dtype, shape in rows_to_come
            for name in ("made", *group)
            if name != implementations.XLA
        ]
        programs = compile_all(dict.fromkeys(early), args.page, pool)
        if flashmla is not None:
            add(*flashmla_rows(flashmla, left() / 2))
        for group, dtype, shape in rows_to_come:
            where = {**dict(zip(("heads", "batch", "keys"), shape, strict=True)), "page": args.page, "cache": dtype}
            if left() < 0:
                add(*({"name": name, **where, "error": "out of time"} for name in group))
                continue
            call, few = programs["made", dtype, shape].result()()
            exact = reference(*few)
            for name in group:
                if (name, dtype, shape) not in programs:
                    programs |= compile_all([(name, dtype, shape)], args.page, pool)
                try:
                    row = measure(programs[name, dtype, shape].result(), shape, call, exact, dtype)
                except Exception as error:  # one failure must not hide the other rows
                    row = {"error": f"{type(error).__name__}: {error}"[:500]}
                add({"name": name, **where, **row})
        for program in programs.values():
            program.cancel()
    print(f"{'':12}{'cache':>14}{'heads':>6}{'B':>5}{'S':>7}{'us':>9}{'TFLOP/s':>9}{'TB/s':>7}")
    for row in rows:
        place = "".join(f"{row.get(key, ''):>{width}}" for key, width in WIDTHS)
        if "error" in row:
            print(f"{row['name']:12}{place}  {row['error']}")
        else:
            rates = f"{row.get('tflops', ''):>9}{row.get('tb_per_s', ''):>7}"
            print(f"{row['name']:12}{place}{row['kernel_us']:>9}{rates}")


if __name__ == "__main__":
    main()
