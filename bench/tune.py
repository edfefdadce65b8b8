"""Makes a device's table of tuned configurations (pallas_kernels/tuned.py) by measuring them.

    python -m bench.tune --table pallas_kernels/tuned_tables

Every candidate must give exact results before it is timed, and beat the default by more than noise to be in the
table. A run that was broken off goes on where it stopped: problems in the table are skipped. Candidates that do not
compile are skipped too. Nothing else tunes, ever.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from bench import environment
from bench.matmul import BATCHES, DEEPSEEK_V3, MOSAIC, OPS, OTHER_SHAPES, Setting, Shape
from bench.timing import empty_out, in_place, kernel_us
from mla_fp4_jax import FP4Array, fp4_bmm
from pallas_kernels.fp4_bmm_mosaic_gpu import NAME, default_config, problem_of
from pallas_kernels.fp4_bmm_tiles import Config, Problem, check_config
from pallas_kernels.fragments import BLOCK
from pallas_kernels.tuned import table_name

SHAPES = (DEEPSEEK_V3, *OTHER_SHAPES)
FINALISTS = 3  # timed twice, as is the default
NOISE = 0.02  # of a time; less is no gain


def candidates(problem: Problem) -> Iterator[Config]:
    """The default first, then what lies around it and fits."""
    default = default_config(problem)
    yield default
    seen = {default}
    for changes in (
        {"warpgroups": 2},
        {"warpgroups": 1},
        {"tiles": 2, "accumulators": 2},
        {"tiles": 1, "accumulators": 1},
        {"tokens": 16},
        {"tokens": 32},
        {"tokens": 64},
        {"token_tiles": 2, "slots": 2},
        {"token_tiles": 4, "slots": 4},
        {"token_tiles": 4, "slots": 2, "tiles": 1},
        {"accumulators": 2},
        {"delay": 1},
        {"delay": 0},
        {"delay": problem.contraction // BLOCK},
    ):
        config = dataclasses.replace(default, **changes)
        needed = -(-problem.batch // config.tokens)
        try:
            check_config(problem, config)
        except ValueError:
            continue
        if config not in seen and config.tokens < 2 * max(problem.batch, 8) and config.token_tiles <= needed:
            seen.add(config)
            yield config


def product(shape: Shape, op: str, config: Config, x: jax.Array, w: FP4Array) -> jax.Array:
    contract, rows, x_columns = _operands(shape, op)
    return fp4_bmm(x, w, contract, rows=rows, x_columns=x_columns, implementation=MOSAIC, config=config)


def problem(setting: Setting, op: str, batch: int) -> Problem:
    """As fp4_bmm has it: the whole query for k_up, whose rope columns are skipped in place."""
    w = setting.weights[MOSAIC][0]
    assert w.order is not None
    return problem_of(setting.normals[op][:batch], w.packed, w.scales, w.order, _operands(setting.shape, op)[0], 0)


def tune(setting: Setting, op: str, batch: int) -> dict[str, object]:
    """One row of the table: the fastest exact candidate, or the default where none is faster by more than noise."""
    static, weights = problem(setting, op, batch), setting.weights[MOSAIC]
    integers, normals = setting.integers[op][:batch], setting.normals[op][:batch]
    exact = setting.exact.in_fragment_order(setting.shape.P)

    def attempt(config: Config) -> tuple[Callable, Callable] | None:
        call = functools.partial(product, setting.shape, op, config)
        try:
            return call, in_place(call, (normals, weights[0]))
        except (jax.errors.JaxRuntimeError, ValueError):
            return None

    tried = list(candidates(static))
    with ThreadPoolExecutor() as threads:
        compiled = dict(zip(tried, threads.map(attempt, tried), strict=True))

    def time_of(config: Config) -> float:
        assert (both := compiled[config]) is not None
        return kernel_us(both[0], [(normals, w) for w in weights], both[1])[0]

    times: dict[Config, float] = {}
    for config, both in compiled.items():
        if both is None:
            continue
        y = both[1](empty_out(both[0], (integers, exact)), (integers, exact))
        if not np.array_equal(np.asarray(y), setting.references[op][:batch]):
            raise RuntimeError(f"{op}, B = {batch}: {config} gives wrong results.")
        times[config] = time_of(config)
    default = tried[0]
    fastest = sorted(times, key=lambda config: times[config])[:FINALISTS]
    for config in dict.fromkeys([default, *fastest]):
        times[config] = statistics.mean((times[config], time_of(config)))
    best = min(fastest, key=lambda config: times[config])
    if times[best] > (1 - NOISE) * times[default]:
        best = default
    return {
        "problem": dataclasses.asdict(static),
        "config": dataclasses.asdict(best),
        "kernel_us": round(times[best], 3),
        "default_us": round(times[default], 3),
        "candidates": len(times),
    }


def _operands(shape: Shape, op: str) -> tuple[str, tuple[int, int], tuple[int, int] | None]:
    """contract, rows and x_columns of fp4_bmm."""
    return ("rows", (0, shape.P), (0, shape.P)) if op == "k_up" else ("columns", (shape.P, shape.V), None)


def main() -> None:
    """Fill the table, saving after every problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=900, help="start nothing new after so long")
    args = parser.parse_args()
    start = time.monotonic()
    path = args.table / table_name(jax.devices()[0].device_kind)
    table = json.loads(path.read_text()) if path.exists() else {}
    table["environment"] = environment.describe(args.commit)
    rows = table.setdefault(NAME, [])
    known = {Problem(**row["problem"]) for row in rows}
    progress = tqdm(total=len(SHAPES) * len(BATCHES) * len(OPS), desc="tune", mininterval=5)
    for shape in SHAPES:
        if time.monotonic() - start > args.seconds:
            break
        setting = Setting(shape)
        for batch, op in itertools.product(BATCHES, OPS):
            progress.update()
            if problem(setting, op, batch) in known or time.monotonic() - start > args.seconds:
                continue
            row = tune(setting, op, batch)
            rows.append(row)
            path.write_text(json.dumps(table, indent=1) + "\n")
            print(shape, op, batch, row["kernel_us"], "default", row["default_us"], row["config"], flush=True)


if __name__ == "__main__":
    main()
