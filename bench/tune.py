"""Makes a device's table of tuned configurations (pallas_kernels/tuned.py) by measuring them.

    python -m bench.tune --table pallas_kernels/tuned_tables

Every candidate must give exact results before it is timed. A run that was broken off goes on where it stopped:
problems in the table are skipped. Candidates that do not compile are skipped too. Nothing else tunes, ever.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from bench import environment
from bench.matmul import BATCHES, DEEPSEEK_V3, MOSAIC, OPS, Setting
from bench.timing import kernel_us
from mla_fp4_jax import fp4_bmm
from pallas_kernels.fp4_bmm_mosaic_gpu import NAME, default_config, problem_of
from pallas_kernels.fp4_bmm_tiles import Config, Problem, check_config
from pallas_kernels.fragments import BLOCK
from pallas_kernels.tuned import table_name


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


def product(contract: str, rows, x_columns, config: Config, x, w):
    return fp4_bmm(x, w, contract, rows=rows, x_columns=x_columns, implementation=MOSAIC, config=config)


def tune(setting: Setting, op: str, batch: int) -> dict[str, object]:
    """One row of the table: the fastest exact candidate."""
    shape, w = setting.shape, setting.exact.in_fragment_order(setting.shape.P)
    if op == "k_up":
        contract, rows, x_columns = "rows", (0, shape.P), (0, shape.P)
    else:
        contract, rows, x_columns = "columns", (shape.P, shape.V), None
    assert w.order is not None
    x = setting.integers[op][:batch]
    problem = problem_of(x, w.packed, w.scales, w.order, contract, 0)
    times: dict[Config, float] = {}
    for config in candidates(problem):
        call = jax.jit(functools.partial(product, contract, rows, x_columns, config))
        try:
            exact = np.array_equal(np.asarray(call(x, w)), setting.references[op][:batch])
        except (jax.errors.JaxRuntimeError, ValueError):
            continue
        if not exact:
            raise RuntimeError(f"{op}, B = {batch}: {config} gives wrong results.")
        times[config], _ = kernel_us(call, [(setting.normals[op][:batch], each) for each in setting.weights[MOSAIC]])
    best = min(times, key=lambda config: times[config])
    return {
        "problem": dataclasses.asdict(problem),
        "config": dataclasses.asdict(best),
        "kernel_us": round(times[best], 3),
        "default_us": round(times[default_config(problem)], 3),
        "candidates": len(times),
    }


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
    setting = Setting(DEEPSEEK_V3)
    for batch in tqdm(BATCHES, desc="tune", mininterval=5):
        for op in OPS:
            known = {(row["problem"]["transposed"], row["problem"]["batch"]) for row in rows}
            if (op == "k_up", batch) in known or time.monotonic() - start > args.seconds:
                continue
            rows.append(tune(setting, op, batch))
            path.write_text(json.dumps(table, indent=1) + "\n")
            row = rows[-1]
            print(op, batch, row["kernel_us"], "default", row["default_us"], row["config"], flush=True)


if __name__ == "__main__":
    main()
