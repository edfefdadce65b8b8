"""One decode step of a DeepSeek-V3 attention layer: its stages, its floor, and the best compositions of peers.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m bench.step --out bench/results/FILE.json --seconds 600

Compositions: "fp4" has every projection in MXFP4; "fp4 kv_b" only kv_b_proj, the others in bfloat16; "xla bf16" is
bench.step_layer's plain layer, absorbed einsums on a contiguous cache; "torch" (bench/step_torch.py) is cuBLAS, bmm
and FlashMLA in a CUDA graph. The first two are mla_decode on a cache of pages (64) in random order.

A step runs through 16 layers, or fewer where their caches are large, of their own weights and caches: more than the
L2 cache holds, so that every one is cold as in a whole model, and enough for what a call costs the host to pass under
their kernels, as it does in a whole model. Lengths and the page table are arrays that all layers share, as in an
engine. "loop" is the wall time a layer of a jitted step whose hidden state and caches are donated and fed back;
"kernel" the sum of a layer's kernels as CUPTI has it, listed up to the first layer's o_proj and summed by stage over
all. Every step writes its token to the same slot. Floors are bytes and operations over this GPU's own read bandwidth
and matmul rate, as measured here, stage by stage. "memory" is what the compiled step holds a layer, and its scratch;
of all layers with --memory.

Nothing is timed before its own output agrees with float32 layers on the dequantised weights: 1.5 % relative error.
One shape at a time, the most telling first; rows are written as they come.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from bench import environment
from bench.step_layer import dense_layer, fp4_layer, plain_step, v3_config
from bench.step_memory import measure_memory
from bench.step_peer import TorchPeer
from bench.step_stages import by_stage, floors, stages_of_kernels
from bench.step_timing import held, kernels, loop_us, measure_ceilings, total
from mla_fp4_jax import MLAConfig, MLAWeights, mla_decode
from mla_fp4_jax.cache import PagedLatentCache
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.norm import rms_norm

FP4, FP4_KV_B, DENSE = "fp4", "fp4 kv_b", "xla bf16"
NAMES = (FP4, FP4_KV_B, DENSE)
PAGE = 64
GATE = 0.015  # of bfloat16 layers, design.md
EPS = 1e-12  # of the norms between layers
SHAPES = (  # heads, sequences, keys; the most telling first
    *((128, batch, 4096) for batch in (1, 32, 128, 8, 64)),
    *((128, batch, 16_384) for batch in (32, 1, 128)),
    *((128, batch, 1024) for batch in (1, 8, 32)),
    *((16, batch, 4096) for batch in (32, 1, 128)),
    *((128, batch, 16_384) for batch in (8, 64)),
    *((128, batch, 1024) for batch in (64, 128)),
    *((16, batch, 4096) for batch in (8, 64)),
    *((16, batch, keys) for keys in (1024, 16_384) for batch in (1, 32, 128, 8, 64)),
)
MOST_LAYERS = 16
CACHE_BYTES = 10e9  # of all layers; where MOST_LAYERS take more, fewer do
EVERY = 3  # shapes that all compositions are measured at; FP4 kv_b alone lies between the others
Shape = tuple[int, int, int]


class Setting:
    """The layers of one head count, in every composition, on the device."""

    def __init__(self, heads: int, *, small: bool):
        self.config = v3_config(heads, small=small)
        self.least = 2 if small else 4 if heads == 128 else 8  # 400 or 160 MB in FP4: L2 cannot keep them
        most = 2 if small else MOST_LAYERS
        packed = [order_for_device(fp4_layer(self.config, np.int32(i)), self.config) for i in range(most)]
        dense = [dense_layer(layer) for layer in packed]
        mixed = [dataclasses.replace(d, kv_b_proj=p.kv_b_proj) for d, p in zip(dense, packed, strict=True)]
        self.weights: dict[str, list[MLAWeights]] = {FP4: packed, FP4_KV_B: mixed, DENSE: dense}
        self.exact: dict[tuple[int, int], Any] = {}  # by layers and keys, compiled: exact_step

    def layers(self, shape: Shape) -> int:
        """That a step of this shape runs through."""
        _, batch, keys = shape
        fitting = int(CACHE_BYTES / (2 * batch * keys * self.config.cache_dim))
        return max(self.least, min(len(self.weights[FP4]), fitting))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Given:
    """What a step reads and leaves as it is: the layers, the pages of every sequence, tokens that each holds."""

    weights: list[MLAWeights]
    table: Int[Array, "B M"]
    length: Int[Array, "B"]


def layer_step(name: str, config: MLAConfig, weights: MLAWeights, x, pages, table, length):
    """One layer: (y, pages); for plain XLA the pages of a sequence follow each other and are taken for one array."""
    if name == DENSE:
        entries = pages.reshape(x.shape[0], -1, config.cache_dim)
        y, entries = plain_step(weights, x, entries, length[0], config)
        return y, entries.reshape(pages.shape)
    y, cache = mla_decode(weights, x, PagedLatentCache(pages, table, length, config.kv_lora_rank), config)
    assert isinstance(cache, PagedLatentCache)
    return y, cache.pages


def whole_step(name: str, config: MLAConfig, state, given: Given):
    """The hidden state through all layers, each after its norm, as in a model."""
    # Jitted, so that all layers are traced, lowered and their kernels compiled once.
    one = jax.jit(functools.partial(layer_step, name, config))
    ones = jnp.ones((config.hidden_size,), jnp.bfloat16)
    x, caches = state
    written = []
    for layer, pages in zip(given.weights, caches, strict=True):
        y, pages = one(layer, rms_norm(x, ones, EPS), pages, given.table, given.length)
        x = x + y
        written.append(pages)
    return rms_norm(x, ones, EPS), written


@jax.jit
def ends_of(x, caches, table):
    """The first and the last sequence's hidden state and, layer by layer, entries."""
    ends = np.array([0, -1])
    return x[ends], [pages[table[ends]].reshape(2, -1, pages.shape[-1]) for pages in caches]


def exact_step(config: MLAConfig, weights: list[MLAWeights], x, caches):
    """The float32 hidden state of two sequences, whose entries come one after the other."""
    x, ones = x.astype(jnp.float32), jnp.ones((config.hidden_size,), jnp.float32)
    for layer, entries in zip(weights, caches, strict=True):
        length = jnp.int32(entries.shape[1] - 1)
        x = x + plain_step(layer, rms_norm(x, ones, EPS), entries.astype(jnp.float32), length, config)[0]
    return rms_norm(x, ones, EPS)


def relative_error(y, exact) -> float:
    """Of the hidden state after all layers."""
    exact = np.asarray(exact, np.float64)
    difference = np.asarray(y[np.array([0, -1])].astype(jnp.float32), np.float64) - exact
    return float(np.sqrt((difference**2).mean() / (exact**2).mean()))


@functools.partial(jax.jit, static_argnums=0)
def random_normal(shape: tuple[int, ...], seed) -> jax.Array:
    """bfloat16."""
    return jax.random.normal(jax.random.key(seed, impl="rbg"), shape, jnp.bfloat16)


def inputs(setting: Setting, name: str, shape: Shape):
    """The state of a step and what it is given: full caches, whose last slot the new token takes."""
    _, batch, keys = shape
    config, number = setting.config, batch * keys // PAGE
    order = np.arange(number) if name == DENSE else np.random.default_rng(0).permutation(number)
    table, length = jnp.asarray(order.reshape(batch, -1), jnp.int32), jnp.full((batch,), keys - 1, jnp.int32)
    # Small, so that a hidden state is what the layers add to it, and its error theirs.
    x = random_normal((batch, 1, config.hidden_size), np.int32(batch)) * jnp.bfloat16(2.0**-14)
    layers = setting.layers(shape)
    caches = [random_normal((number, PAGE, config.cache_dim), np.int32(i)) for i in range(layers)]
    return (x, caches), Given(setting.weights[name][:layers], table, length)


class Programs:
    """What one shape needs, compiled: one after the other where XLA tries library kernels on the GPU meanwhile."""

    def __init__(self, setting: Setting, shape: Shape, names: Sequence[str]):
        self.seconds: dict[str, float] = {}
        untuned: Any = {} if jax.default_backend() == "cpu" else {"xla_gpu_autotune_level": 0}

        def compiled(key: str, function, *args, options: Any = None, **jit_options):
            start = time.monotonic()
            done = jax.jit(function, **jit_options).lower(*args).compile(compiler_options=options)
            self.seconds[key] = round(time.monotonic() - start, 1)
            return done

        def compiled_step(name: str, options: Any = None):
            state, given = jax.eval_shape(lambda: inputs(setting, name, shape))
            step = functools.partial(whole_step, name, setting.config)
            return compiled(name, step, state, given, options=options, donate_argnums=0)

        def compiled_exact():
            (x, caches), given = jax.eval_shape(lambda: inputs(setting, DENSE, shape))
            ends = jax.eval_shape(ends_of, x, caches, given.table)
            exact = functools.partial(exact_step, setting.config)
            return compiled("exact", exact, given.weights, *ends, options=untuned)

        with ThreadPoolExecutor(2) as pool:  # these have no library product, or no time to lose on it
            known = (setting.layers(shape), shape[2])
            exact = None if known in setting.exact else pool.submit(compiled_exact)
            fp4 = pool.submit(compiled_step, FP4, untuned) if FP4 in names else None
            self.steps = {name: compiled_step(name) for name in names if name != FP4}
            if fp4 is not None:
                self.steps[FP4] = fp4.result()
            if exact is not None:
                setting.exact[known] = exact.result()


def measure(name: str, setting: Setting, shape: Shape, programs: Programs) -> dict[str, Any]:
    """A composition's times and memory, gate first."""
    step, layers, start = programs.steps[name], setting.layers(shape), time.monotonic()
    (x, caches), given = inputs(setting, name, shape)
    want = setting.exact[layers, shape[2]](setting.weights[DENSE][:layers], *ends_of(x, caches, given.table))
    state = step((x, caches), given)
    error = relative_error(state[0], want)
    if not error <= GATE:
        raise RuntimeError(f"relative error {error:.2e}, more than {GATE}; not timed.")
    size: Any = step.memory_analysis()
    row: dict[str, Any] = {"relative_error": round(error, 5), "layers": layers, "compile_s": programs.seconds[name]}
    memory = {"weights": held(given.weights) // layers, "cache": held(caches) // layers}
    row["memory"] = memory | {"scratch": size.temp_size_in_bytes}
    if jax.default_backend() == "cpu":  # proves the bench, measures nothing
        return row | {"loop_us": loop_us(step, state, given, 2, 1, 0)[0] / layers}
    us, spread, state = loop_us(step, state, given)
    row |= {"loop_us": round(us / layers, 2), "spread_us": round(spread / layers, 2)}
    seen, state = kernels(step, state, given)
    row |= {"kernel_us": round(total(seen) / layers, 2), "launches": len(seen) / layers}
    text = step.as_text() or ""
    row["stages"] = by_stage(seen, text, layers)
    stages = stages_of_kernels(seen, text)
    first = stages.index("o_proj") + 1 if "o_proj" in stages else len(stages)
    row["kernels"] = [[*kernel, stage] for kernel, stage in zip(seen[:first], stages[:first], strict=True)]
    return row | {"measure_s": round(time.monotonic() - start, 1)}


def write(path: Path, what: dict[str, Any]) -> None:
    """At once, for those who read it meanwhile."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(what, indent=1) + "\n")
    part.replace(path)


def main() -> None:
    """Most telling shapes first; what time does not allow is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so long")
    parser.add_argument("--shapes", help="heads x sequences x keys, as 128x32x4096,16x64x16384")
    parser.add_argument("--names", help=f"compositions, separated by commas (default all, {FP4_KV_B} at some shapes)")
    parser.add_argument("--ceilings", metavar="TB/S,TFLOP/S", help="as measured before; default: measure them")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out")
    parser.add_argument("--memory", action="store_true", help="that of all 61 layers too (bench/step_memory.py)")
    parser.add_argument("--small", action="store_true", help="tiny layers, to prove the bench on a CPU")
    args = parser.parse_args()
    start = time.monotonic()
    shapes: list[Shape] = [(2, 2, 128)] if args.small else list(SHAPES)
    if args.shapes:
        shapes = [(h, b, s) for h, b, s in (map(int, text.split("x")) for text in args.shapes.split(","))]
    rows, skipped, waiting = [], [], []
    torch = None if args.no_torch or args.small else TorchPeer()  # imports itself while this process compiles
    known = [float(value) for value in (args.ceilings or "").split(",") if value]
    what: dict[str, Any] = {"environment": environment.describe(args.commit), "rows": rows, "not_run": skipped}
    if args.memory:  # first, so that the process's peak is that of this
        try:
            what["memory"] = measure_memory(small=args.small)
        except Exception as error:
            what["memory"] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(f"{time.monotonic() - start:5.1f} s", what["memory"], flush=True)
    ceilings = {"tb_per_s": known[0], "tflops": known[1]} if known else measure_ceilings()
    what["ceilings"] = ceilings
    print(f"{time.monotonic() - start:5.1f} s", ceilings, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        shown = {key: value for key, value in row.items() if key not in ("kernels", "floors")}
        print(f"{time.monotonic() - start:5.1f} s", shown, flush=True)
        write(args.out, what)

    def add_torch(torch: TorchPeer) -> None:
        while waiting:
            shape = waiting.pop(0)
            add({"name": "torch"} | dict(zip(("heads", "batch", "keys"), shape, strict=True)) | torch.measure(shape))

    settings: dict[int, Setting] = {}
    for number, shape in enumerate(shapes):
        names = args.names.split(",") if args.names else NAMES if number < EVERY else (FP4, DENSE)
        if time.monotonic() - start > args.seconds:
            skipped.append(shape)
            continue
        where = dict(zip(("heads", "batch", "keys"), shape, strict=True))
        try:
            if shape[0] not in settings:
                settings[shape[0]] = Setting(shape[0], small=args.small)
                print(f"{time.monotonic() - start:5.1f} s layers of {shape[0]} heads", flush=True)
            setting = settings[shape[0]]
            programs = Programs(setting, shape, names)
        except Exception as error:  # one failure must not hide the other rows
            add(where | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
            continue
        for name in names:
            row = where | {"name": name}
            try:
                row |= measure(name, setting, shape, programs)
                bound = floors(setting.config, setting.weights[name][0], shape, ceilings)
                row |= {"floor_us": round(sum(stage["us"] for stage in bound.values()), 2), "floors": bound}
            except Exception as error:
                row |= {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            add(row)
        if torch is not None:
            waiting.append(shape)
            if torch.is_ready():
                add_torch(torch)
    if torch is not None:
        add_torch(torch)
        torch.close()
    write(args.out, what)
    if skipped:
        print("not run:", skipped)


if __name__ == "__main__":
    main()
