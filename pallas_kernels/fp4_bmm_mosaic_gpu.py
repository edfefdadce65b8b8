"""The batched matmul on packed FP4 weights in Pallas Mosaic GPU, for Hopper: checks, choice of tiles, launch."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import fp4_bmm_rope
from pallas_kernels.backend import target_gpu
from pallas_kernels.fp4_bmm_rope import Rope
from pallas_kernels.fp4_bmm_tiles import Config, Problem, check_config, grid, shared_memory_bytes, slot_bytes
from pallas_kernels.fp4_bmm_wgmma import program
from pallas_kernels.fragments import BLOCK, GROUP, FragmentOrder
from pallas_kernels.tuned import tuned_config

NAME = "fp4_bmm_mosaic_gpu"  # in the tuned tables

_VECTOR = 8  # bfloat16 in the 16 bytes that cp.async and the stores move
_INT32_BYTES = 2**31
_SMS = 132
_ALL_AT_ONCE = 7 * _SMS  # CTAs of one warpgroup with the 66 to 72 registers a thread that 16 tokens or NVFP4 take
_MANY = 512  # 64-output tiles of all heads
_SM_BYTES = 224 * 1024  # of shared memory, for two CTAs
_L2_BYTES = 50 * 10**6


# Jitted, so that a program of many equal calls lowers one.
@functools.partial(jax.jit, static_argnames=("order", "contract", "rows", "x_columns", "config", "rope"))
def fp4_bmm_mosaic_gpu(
    x: Float[Array, "B H X"],
    codes: UInt8[Array, "H N half"],
    scales: UInt8[Array, "H N groups"],
    order: FragmentOrder,
    global_scale: Float[Array, ""] | None = None,
    cos_sin: tuple[Float[Array, "B half_R"], Float[Array, "B half_R"]] | None = None,
    *,
    contract: str,
    rows: tuple[int, int],
    x_columns: tuple[int, int],
    config: Config | None = None,
    rope: Rope | None = None,
) -> Float[Array, "B H out"]:
    """out[b, h] = x[b, h, x0 :] times the head's key rows ("rows": over them) or its others ("columns": over C).

    Args:
        x: bfloat16.
        codes: packed bytes in fragment order.
        scales: scale bytes likewise, e8m0 up to 128 where they are C / 32 a row, e4m3 from 0 to 448 where C / 16.
        order: where the key rows end.
        global_scale: float32, of NVFP4 alone; None for 1. It multiplies the accumulator.
        cos_sin: float32, with rope.
        contract: "rows" or "columns".
        rows: (first, number): exactly the key rows for "rows", exactly the others for "columns".
        x_columns: (first, number) of x's columns to use.
        config: None for best_config, with rope for default_config.
        rope: x's columns after those, rotated, become the output's last; see fp4_bmm_rope.

    Returns:
        bfloat16.

    Raises:
        NotImplementedError: see unsupported.
        ValueError: the config does not fit.
    """
    reason = unsupported(x, codes, order, contract=contract, rows=rows, x_columns=x_columns, rope=rope)
    if reason is not None:
        raise NotImplementedError(f"fp4_bmm_mosaic_gpu: {reason}")
    batch, heads, _ = x.shape
    problem = problem_of(x, codes, scales, order, contract, x_columns[0])
    width = problem.outputs + (0 if rope is None else rope.columns)
    if batch == 0:
        return jnp.zeros((0, heads, width), jnp.bfloat16)
    if config is None:  # the tables are of products alone, and rotating as well asks for more CTAs
        config = best_config(problem) if rope is None else default_config(problem)
    check_config(problem, config)
    more = list(cos_sin or ())
    if problem.group != GROUP:
        more.insert(0, jnp.ones(1, jnp.float32) if global_scale is None else global_scale.reshape(1))
    from pallas_kernels.mosaic import mosaic_kernel  # names that jax before 0.11 lacks

    return mosaic_kernel(
        functools.partial(program, problem, config, rope),
        out_shape=jax.ShapeDtypeStruct((batch, heads, width), jnp.bfloat16),
        grid=grid(problem, config),
        warpgroups=config.warpgroups,
        shared_memory_bytes=shared_memory_bytes(problem, config),
        optional=len(more),
    )(x, codes, scales, *more)


def unsupported(
    x,
    codes,
    order: FragmentOrder,
    *,
    contract: str,
    rows: tuple[int, int],
    x_columns: tuple[int, int],
    rope: Rope | None = None,
) -> str | None:
    """Why this kernel cannot take these operands (arrays or anything with shape and dtype), or None."""
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16; got {jnp.dtype(x.dtype).name}."
    split, total = order.key_rows, codes.shape[1]
    whole = (0, split) if contract == "rows" else (split, total - split)
    if tuple(rows) != whole:
        return f"rows must be {whole}, as the fragment order has them; got {tuple(rows)}."
    if x.shape[2] % _VECTOR or x_columns[0] % _VECTOR:
        return f"x's width and first column must be multiples of {_VECTOR}; got {x.shape[2]} and {x_columns[0]}."
    outputs = 2 * codes.shape[2] if contract == "rows" else whole[1]
    if rope is not None:
        if sum(x_columns) + rope.columns > x.shape[2]:
            return f"x must hold {rope.columns} columns to rotate after those multiplied; got {x.shape[2]} in all."
        reason = fp4_bmm_rope.unsupported(rope)
        if reason is not None:
            return reason
        outputs += rope.columns
    if whole[1] == 0:
        return "there are no such rows."
    for name, size in (("x", math.prod(x.shape)), ("the output", math.prod(x.shape[:2]) * outputs)):
        if 2 * size >= _INT32_BYTES:
            return f"{name} must be smaller than 2^31 bytes (offsets are 32 bits); got {2 * size}. Split the batch."
    if 2 * codes.shape[2] > 512 and contract == "columns" or whole[1] > 256 and contract == "rows":
        return "the contraction is too long for a thread's registers: at most 512 columns or 256 rows."
    return None


def problem_of(x, codes, scales, order: FragmentOrder, contract: str, first_x: int) -> Problem:
    """The static side of a call; arrays may be anything with a shape."""
    heads, total, half = codes.shape
    columns, split = 2 * half, order.key_rows
    transposed = contract == "rows"
    return Problem(
        transposed=transposed,
        batch=x.shape[0],
        heads=heads,
        outputs=columns if transposed else total - split,
        contraction=split if transposed else columns,
        x_width=x.shape[2],
        first_x=first_x,
        head_code_bytes=total * half,
        first_code_byte=0 if transposed else split * half,
        head_scale_bytes=total * scales.shape[2],
        first_scale_byte=0 if transposed else split * scales.shape[2],
        group=columns // scales.shape[2],
    )


def best_config(problem: Problem) -> Config:
    """What bench.tune measured for this problem on the device that is traced for, else default_config."""
    gpu = target_gpu()
    fields = None if gpu is None else tuned_config(NAME, gpu.kind, problem)
    return default_config(problem) if fields is None else Config(**fields)


def default_config(problem: Problem) -> Config:
    """Tiles for a problem, from measurements on an H100 (bench/matmul.py, bench/tune.py).

    No choice changes a bit of the result, so it may follow the batch. Few tokens: small CTAs, several to an SM, so
    that one's arithmetic runs under another's loads. Many: weights decoded once for up to eight tiles of 64 tokens.
    """
    batch, tiles = problem.batch, problem.outputs // BLOCK
    tokens, blocks_of_weights = _round_up(batch, 8), problem.heads * tiles
    if batch <= 32:
        least = _MANY if batch > 16 else _ALL_AT_ONCE
        alone = batch <= 8 and problem.group == GROUP  # these take 64 registers, and eight fit
        pairs = problem.transposed and blocks_of_weights > least and not alone
        per_warpgroup = _largest_divisor(tiles, 2) if pairs else 1
        return Config(tokens, 1, per_warpgroup, accumulators=per_warpgroup)
    many = problem.transposed and blocks_of_weights > _MANY
    per_warpgroup = _largest_divisor(tiles, 2) if many else 1
    if batch <= 64 and problem.transposed and blocks_of_weights >= _MANY:
        return Config(32, 1, per_warpgroup, 2, 2, accumulators=per_warpgroup)
    for one in (32, min(tokens, 64)):
        config = Config(one, 1, 1)
        if not many and grid(problem, config) <= (2.5 if problem.transposed else 2) * _SMS:
            return config
    warpgroups = _largest_divisor(tiles // per_warpgroup, 4 if many and batch > 256 else 2)
    resident = 2 if problem.transposed and warpgroups <= 2 else 1  # CTAs of an SM
    token_tiles = 1
    while token_tiles < 8 and grid(problem, Config(64, warpgroups, per_warpgroup, token_tiles)) > resident * _SMS:
        token_tiles *= 2
    return _with_slots(problem, Config(64, warpgroups, per_warpgroup, min(token_tiles, -(-batch // 64))))


def _with_slots(problem: Problem, config: Config) -> Config:
    """How much of x is asked for at once, and what the L2 cache keeps; for many tokens."""
    x_bytes, out_bytes = (2 * problem.batch * problem.heads * n for n in (problem.contraction, problem.outputs))
    if problem.transposed:
        # x was just written and is small; results, four times as large, would drive it out.
        config = dataclasses.replace(config, evict_first="out" if out_bytes >= _L2_BYTES // 3 else "")
        room = _SM_BYTES // 2 if config.warpgroups <= 2 else _SM_BYTES
        most = (room - shared_memory_bytes(problem, config)) // slot_bytes(problem, config) + config.slots
        slots = config.token_tiles if config.tiles > 1 else min(most, config.token_tiles)
        return dataclasses.replace(config, slots=slots)
    slots = min(2, config.token_tiles)
    delay = 0 if slots == 1 else min(4 if config.token_tiles == 2 else 2, problem.contraction // BLOCK)
    evict_first = "x" if x_bytes + out_bytes > _L2_BYTES else ""  # read once: the results may stay
    return dataclasses.replace(config, slots=slots, delay=delay, evict_first=evict_first)


def _largest_divisor(number: int, limit: int) -> int:
    """The largest power of two that divides number and is at most limit; at least 1."""
    divisor = 1
    while 2 * divisor <= limit and number % (2 * divisor) == 0:
        divisor *= 2
    return divisor


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
