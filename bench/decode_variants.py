"""Decode kernels as they might be: the Triton kernel's tilings, the Mosaic kernel's split sizes.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m bench.decode_variants --out bench/results/FILE.json

Operands, gate and times are bench.attention's. The file is written again after every row.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from bench import attention, environment
from mla_fp4_jax.ops import mla_decode
from pallas_kernels.mla_decode_combine import combine_splits
from pallas_kernels.mla_decode_triton import Config, mla_decode_triton

MANY, FEW = (128, 64, 4096), (16, 64, 4096)
BF16, E4M3 = "bfloat16", "float8_e4m3fn"
TRANSPOSED = functools.partial(Config, transposed=True)
# Shape, cache, tiling (None: the Mosaic kernel), keys a split: what matters most first.
ROWS = (
    (MANY, BF16, Config(64, 32, 8, 2), 4096),
    (MANY, BF16, Config(64, 64, 8, 2), 4096),
    (MANY, BF16, Config(64, 64, 8, 1), 4096),
    (FEW, BF16, Config(16, 32, 4, 2), 2048),
    (FEW, BF16, TRANSPOSED(16, 64, 4, 2), 2048),
    (FEW, E4M3, Config(16, 32, 4, 2), 2048),
    (FEW, E4M3, TRANSPOSED(16, 64, 8, 1, ahead=True), 2048),
    (FEW, E4M3, Config(16, 32, 8, 2), 2048),
    (MANY, E4M3, Config(64, 32, 8, 2), 4096),
    (MANY, E4M3, Config(64, 64, 8, 1), 4096),
    (MANY, BF16, None, 4096),
    (MANY, BF16, None, 2048),
    ((16, 32, 4096), BF16, None, 1024),
    ((16, 32, 4096), BF16, None, 512),
    (FEW, BF16, Config(16, 32, 4, 2), 1024),
    (FEW, BF16, TRANSPOSED(16, 64, 8, 2), 2048),
    (FEW, BF16, TRANSPOSED(16, 64, 4, 1), 1024),
    (FEW, E4M3, Config(16, 32, 4, 2), 1024),
    (FEW, E4M3, TRANSPOSED(16, 64, 8, 1, ahead=True), 1024),
    (MANY, BF16, Config(64, 32, 8, 3), 4096),
)


def attend(q, cache, visible, *, config: Config | None, split_size: int) -> jax.Array:
    """bench.attention's call, with a tiling and a split size of its own."""
    if config is None:
        return mla_decode(
            q, cache, visible, scale=attention.SCALE, split_size=split_size, implementation="mosaic_gpu"
        )
    batch, _, heads, _ = q.shape
    out, lse = mla_decode_triton(
        q,
        cache.pages,
        cache.page_table,
        visible,
        cache.length,
        kv_lora_rank=attention.L,
        scale=attention.SCALE,
        split_size=split_size,
        config=config,
        capability=(9, 0),
    )
    if out.shape[0] > 1:
        out, _ = combine_splits(out, lse, visible, cache.length, rows=heads, split_size=split_size, out_dtype=q.dtype)
    return out.reshape(batch, 1, heads, attention.L)


def compile_row(shape, dtype, config, split_size):
    call = functools.partial(attend, config=config, split_size=split_size)
    args = jax.eval_shape(functools.partial(attention.operands, shape, 64, dtype))
    return attention.lower_and_compile(functools.partial(jax.jit(call).lower, *args))


def main() -> None:
    """Run the rows, print them, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=120, help="start nothing new after so long")
    args = parser.parse_args()
    start = time.monotonic()
    rows: list[dict[str, object]] = []
    what = {"environment": environment.describe(args.commit), "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(6) as pool:
        programs = [pool.submit(compile_row, *row) for row in ROWS]
        held = None
        for (shape, dtype, config, split_size), program in zip(ROWS, programs, strict=True):
            row = {"heads": shape[0], "batch": shape[1], "keys": shape[2], "cache": dtype, "split_size": split_size}
            row |= {"name": "mosaic_gpu"} if config is None else {"name": "triton", "tiling": str(config)}
            if time.monotonic() - start > args.seconds:
                program.cancel()
                row["error"] = "out of time"
            else:
                try:
                    if held is None or held[0] != (shape, dtype):
                        call, few = jax.jit(functools.partial(attention.made, shape, 64, dtype))()
                        held = (shape, dtype), call, attention.reference(*few)
                    row |= attention.measure(program.result(), shape, held[1], held[2], dtype)
                except Exception as error:  # one failure must not hide the other rows
                    row["error"] = f"{type(error).__name__}: {error}"[:500]
            rows.append(row)
            print(round(time.monotonic() - start, 1), row, flush=True)
            args.out.write_text(json.dumps(what, indent=1) + "\n")


if __name__ == "__main__":
    main()
