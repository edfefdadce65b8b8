"""Makes a device's table of tuned configurations (pallas_kernels/tuned.py) by measuring them.

    python -m bench.tune --table pallas_kernels/tuned_tables

Starting from the default, one field after the other takes the value that is fastest. Every configuration must give
exact results before it is timed; only by more than noise does one beat the default. Those that do not compile are
skipped. A run that was broken off goes on where it stopped: problems in the table are skipped. Nothing else tunes,
ever.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable
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
MOST_TOKEN_TILES = 16  # of a CTA: the program grows with them
NOISE = 0.02  # of a time; less is no gain


# Fields that are tried one after the other, each with the best of those before; tokens of a CTA stay about the same.
CHANGES: tuple[tuple[str, tuple], ...] = (
    ("tokens", (8, 16, 32, 64)),
    ("warpgroups", (1, 2, 4)),
    ("tiles", (1, 2, 4)),
    ("token_tiles", (1, 2, 4, 8)),
    ("slots", (1, 2, 3, 4, 8)),
    ("accumulators", (1, 2)),
    ("evict_first", ("", "x", "out")),
    ("delay", (0, 1, 2, 4, 8)),
)


def neighbours(problem: Problem, config: Config, field: str, values: tuple) -> list[Config]:
    """Configurations that differ in one field, and in what has to follow it."""
    found = []
    for value in values:
        changed = dataclasses.replace(config, **{field: value})
        if field == "tokens":
            changed = dataclasses.replace(changed, token_tiles=-(-config.tokens * config.token_tiles // value))
        tiles = -(-problem.batch // changed.tokens)
        if field != "slots":
            all_slots = config.slots == config.token_tiles
            changed = dataclasses.replace(
                changed, slots=changed.token_tiles if all_slots else min(config.slots, changed.token_tiles)
            )
        try:
            check_config(problem, changed)
        except ValueError:
            continue
        sensible = (
            changed.token_tiles <= min(tiles, MOST_TOKEN_TILES)
            and changed.tokens <= 2 * max(problem.batch, 8)
            and changed.accumulators <= changed.tiles * changed.token_tiles
            and changed.delay <= (problem.contraction // BLOCK if changed.slots > 1 else 0)
        )
        if changed != config and sensible:
            found.append(changed)
    return found


def product(shape: Shape, op: str, config: Config, x: jax.Array, w: FP4Array) -> jax.Array:
    contract, rows, x_columns = _operands(shape, op)
    return fp4_bmm(x, w, contract, rows=rows, x_columns=x_columns, implementation=MOSAIC, config=config)


def problem(setting: Setting, op: str, batch: int) -> Problem:
    """As fp4_bmm has it: the whole query for k_up, whose rope columns are skipped in place."""
    w = setting.weights[MOSAIC][0]
    assert w.order is not None
    return problem_of(setting.normals[op][:batch], w.packed, w.scales, w.order, _operands(setting.shape, op)[0], 0)


def tune(setting: Setting, op: str, batch: int) -> dict[str, object]:
    """One row of the table: the fastest configuration found, the default where none beats it by more than noise."""
    static, weights = problem(setting, op, batch), setting.weights[MOSAIC]
    integers, normals = setting.integers[op][:batch], setting.normals[op][:batch]
    exact = setting.exact.in_fragment_order(setting.shape.P)

    def attempt(config: Config) -> tuple[Callable, Callable] | None:
        call = functools.partial(product, setting.shape, op, config)
        try:
            return call, in_place(call, (normals, weights[0]))
        except (jax.errors.JaxRuntimeError, ValueError):
            return None

    def time_of(config: Config, both: tuple[Callable, Callable]) -> float:
        call, run = both
        y = run(empty_out(call, (integers, exact)), (integers, exact))
        if not np.array_equal(np.asarray(y), setting.references[op][:batch]):
            raise RuntimeError(f"{op}, B = {batch}: {config} gives wrong results.")
        return kernel_us(call, [(normals, w) for w in weights], run)[0]

    times: dict[Config, float] = {}
    default = best = default_config(static)
    with ThreadPoolExecutor() as threads:
        for field, values in (("", ()), *CHANGES):
            tried = neighbours(static, best, field, values) if field else [default]
            new = [config for config in tried if config not in times]
            for config, both in zip(new, threads.map(attempt, new), strict=True):
                if both is not None:
                    times[config] = time_of(config, both)
            best = min(times, key=lambda config: times[config])
        for config in {default, best}:  # once more: the least of many times is a lucky one
            again = attempt(config)
            assert again is not None
            times[config] = time_of(config, again)
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
    path.parent.mkdir(parents=True, exist_ok=True)
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
