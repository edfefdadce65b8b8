"""One decode step of a DeepSeek-V3 attention layer: its parts, its floor, and the best compositions of peers.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m bench.step --out bench/results/FILE.json --seconds 600

Compositions: "fp4" has every projection in MXFP4; "fp4 kv_b" only kv_b_proj, the others in bfloat16; "xla bf16" is
bench.step_layer's plain layer, absorbed einsums on a contiguous cache; "torch" (bench/step_torch.py) is cuBLAS, bmm
and FlashMLA in a CUDA graph. The first two are mla_decode on a paged cache (64).

A step runs through several layers of their own weights and caches, more than the L2 cache holds, so that every one
is cold as in a whole model. "loop" is the wall time a layer of a jitted step whose hidden state and caches are
donated and fed back; "kernel" the sum of a layer's kernels as CUPTI has it, listed for the first layer. Every step
writes its token to the same slot. Parts are jitted alone and timed by CUPTI. Floors are bytes and operations
over this GPU's own read bandwidth and matmul rate, as measured here, part by part.

Nothing is timed before its output agrees with a float32 layer on the dequantised weights: 1.5 % relative error.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import environment
from bench.step_layer import dense_layer, fp4_layer, plain_step, v3_config
from bench.step_parts import floors, make_cache, measure_parts, paged
from bench.step_timing import kernels, loop_us, measure_ceilings, total
from mla_fp4_jax import MLAConfig, MLAWeights, mla_decode
from mla_fp4_jax.cache import PagedLatentCache
from mla_fp4_jax.functional import rms_norm
from mla_fp4_jax.kernel_order import order_for_device

NAMES = ("fp4", "fp4 kv_b", "xla bf16")
GROUP = 3  # shapes compiled together
GATE = 0.015  # of bfloat16 layers, design.md
SHAPES = (  # heads, sequences, keys; the most telling first
    (128, 1, 4096),
    (128, 32, 4096),
    (128, 8, 4096),
    (128, 128, 4096),
    (128, 64, 4096),
    (16, 32, 4096),
    (16, 1, 4096),
    *((128, batch, 1024) for batch in (1, 32, 128, 8, 64)),
    *((128, batch, 16_384) for batch in (1, 32, 128, 8, 64)),
    *((16, batch, keys) for keys in (4096, 1024, 16_384) for batch in (8, 64, 128)),
    *((16, batch, keys) for keys in (1024, 16_384) for batch in (1, 32)),
)
Shape = tuple[int, int, int]


class Setting:
    """The layers of one head count, in every composition, on the device."""

    def __init__(self, heads: int, *, small: bool):
        self.config = v3_config(heads, small=small)
        self.layers = 2 if heads == 128 else 6  # a layer's 100 or 20 MB in FP4 must not stay in L2
        packed = [fp4_layer(self.config, seed) for seed in range(self.layers)]
        self.weights: dict[str, list[MLAWeights]] = {
            "xla bf16": [dense_layer(layer, kv_b=True) for layer in packed],
            "fp4 kv_b": [order_for_device(dense_layer(layer, kv_b=False), self.config) for layer in packed],
            "fp4": [order_for_device(layer, self.config) for layer in packed],
        }


def layer_step(name: str, config: MLAConfig, weights: MLAWeights, x, entries):
    """One layer on full caches, whose last slot the new token takes: (y, entries)."""
    length = entries.shape[1] - 1
    if name == "xla bf16":
        return plain_step(weights, x, entries, length, config)
    y, cache = mla_decode(weights, x, paged(entries, config, length), config)
    assert isinstance(cache, PagedLatentCache)
    return y, cache.pages.reshape(entries.shape)


def whole_step(name: str, config: MLAConfig, state, weights):
    """The hidden state through all layers, each after its norm, as in a model."""
    x, caches = state
    written = []
    for layer, entries in zip(weights, caches, strict=True):
        normed = rms_norm(x, jnp.ones((x.shape[-1],), x.dtype), 1e-6)
        y, entries = layer_step(name, config, layer, normed, entries)
        x = x + y
        written.append(entries)
    return rms_norm(x, jnp.ones((x.shape[-1],), x.dtype), 1e-6), written


def exact_layer(config: MLAConfig, weights: MLAWeights, x, entries):
    """The float32 layer's output for the first and the last sequence."""
    wide = [part[np.array([0, -1])].astype(jnp.float32) for part in (x, entries)]
    return plain_step(weights, *wide, entries.shape[1] - 1, config)[0]


def relative_error(y, exact) -> float:
    """Of a layer's output."""
    exact = np.asarray(exact, np.float64)
    difference = np.asarray(y[np.array([0, -1])].astype(jnp.float32), np.float64) - exact
    return float(np.sqrt((difference**2).mean() / (exact**2).mean()))


def measure(name: str, setting: Setting, shape: Shape, compiled, layer, exact) -> dict[str, Any]:
    """A composition's row, gate first: its compiled step, one layer of it, and the float32 layer."""
    heads, batch, keys = shape
    config = setting.config
    x = jax.random.normal(jax.random.key(batch, impl="rbg"), (batch, 1, config.hidden_size), jnp.bfloat16)
    caches = [make_cache(config, batch, keys, layer) for layer in range(setting.layers)]
    error = relative_error(
        layer(setting.weights[name][0], x, caches[0])[0], exact(setting.weights["xla bf16"][0], x, caches[0])
    )
    if not error <= GATE:
        raise RuntimeError(f"relative error {error:.2e}, more than {GATE}; not timed.")
    state, weights, row = (x, caches), setting.weights[name], {"relative_error": error}
    if jax.default_backend() == "cpu":  # proves the bench, measures nothing
        return row | {"loop_us": loop_us(compiled, state, weights, 2) / setting.layers}
    seen, state = kernels(compiled, state, weights)
    row |= {"kernel_us": round(total(seen) / setting.layers, 2), "launches": len(seen) / setting.layers}
    row["loop_us"] = round(loop_us(compiled, state, weights) / setting.layers, 2)
    return row | {"kernels": seen[: round(len(seen) / setting.layers)]}


def abstract_state(config: MLAConfig, shape: Shape, layers: int):
    """The state of a step, as shapes."""
    _, batch, keys = shape
    entries = jax.ShapeDtypeStruct((batch, keys, config.cache_dim), jnp.bfloat16)
    return jax.ShapeDtypeStruct((batch, 1, config.hidden_size), jnp.bfloat16), [entries] * layers


def compile_group(setting: Setting, shapes: list[Shape], names: list[str]) -> dict[tuple[Shape, str], tuple]:
    """By shape and name the futures of the step, its layer and the float32 layer, all of them done."""
    config, programs = setting.config, {}
    with ThreadPoolExecutor(12) as pool:

        def submit(function, *args, **options):
            return pool.submit(lambda: jax.jit(function, **options).lower(*args).compile())

        for shape in shapes:
            x, caches = abstract_state(config, shape, setting.layers)
            dense = setting.weights["xla bf16"][0]
            exact = submit(functools.partial(exact_layer, config), dense, x, caches[0])
            for name in names:
                weights = setting.weights[name]
                step = submit(functools.partial(whole_step, name, config), (x, caches), weights, donate_argnums=0)
                layer = submit(functools.partial(layer_step, name, config), weights[0], x, caches[0])
                programs[shape, name] = (step, layer, exact)
    return programs  # compiling beside a measurement would disturb it


def torch_rows(shapes, seconds: float) -> list[dict[str, Any]]:
    """The rows of bench/step_torch.py, or one that says why there are none."""
    command = [sys.executable, "-m", "bench.step_torch", *("x".join(map(str, shape)) for shape in shapes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1))
        printed, complaint = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        printed, complaint = (late.stdout or b"").decode(), "out of time"
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    return rows + ([{"name": "torch", "error": complaint.strip().splitlines()[-1]}] if complaint else [])


def main() -> None:
    """Most telling shapes first; what time does not allow is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so long")
    parser.add_argument("--shapes", help="heads x sequences x keys, as 128x32x4096,16x64x16384")
    parser.add_argument("--names", default=",".join(NAMES), help="compositions, separated by commas")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")
    parser.add_argument("--small", action="store_true", help="tiny layers, to prove the bench on a CPU")
    args = parser.parse_args()
    start = time.monotonic()
    shapes: list[Shape] = [(2, 2, 128)] if args.small else list(SHAPES)
    if args.shapes:
        shapes = [(h, b, s) for h, b, s in (map(int, text.split("x")) for text in args.shapes.split(","))]
    names, rows, skipped = args.names.split(","), [], []
    ceilings = measure_ceilings()
    what = {"environment": environment.describe(args.commit), "ceilings": ceilings, "rows": rows, "not_run": skipped}
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def add(*new: dict[str, Any]) -> None:
        for row in new:
            rows.append(row)
            shown = {key: value for key, value in row.items() if key not in ("kernels", "floors")}
            print(f"{time.monotonic() - start:5.1f} s", shown, flush=True)
        args.out.write_text(json.dumps(what, indent=1) + "\n")

    def late() -> bool:
        return time.monotonic() - start > args.seconds

    print(ceilings, flush=True)
    if not args.no_torch and not args.small:
        add(*torch_rows(shapes[:8], args.seconds / 3))
    for heads in dict.fromkeys(shape[0] for shape in shapes):
        mine = [shape for shape in shapes if shape[0] == heads]
        setting = None if late() else Setting(heads, small=args.small)
        for first in range(0, len(mine), GROUP):
            group = mine[first : first + GROUP]
            if setting is None or late():
                skipped += [[name, shape] for shape in group for name in names]
                continue
            for (shape, name), programs in compile_group(setting, group, names).items():
                row = dict(zip(("heads", "batch", "keys"), shape, strict=True)) | {"name": name}
                if late():
                    skipped.append([name, shape])
                    continue
                try:
                    bound = floors(setting.config, setting.weights[name][0], shape, ceilings)
                    row |= measure(name, setting, shape, *(program.result() for program in programs))
                    row |= {"floor_us": round(sum(part["us"] for part in bound.values()), 2), "floors": bound}
                    if name == "fp4" and jax.default_backend() != "cpu":
                        row["parts"] = measure_parts(setting.config, setting.weights[name][0], shape)
                except Exception as error:  # one failure must not hide the other rows
                    row |= {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                add(row)
    add()
    if skipped:
        print("not run:", skipped)


if __name__ == "__main__":
    main()
