"""The batched matmul on packed FP4 weights in Pallas Mosaic GPU, for Hopper: checks, choice of tiles, launch."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import fp4_bmm_wgmma as wgmma
from pallas_kernels import fragments
from pallas_kernels.backend import mosaic_kernel
from pallas_kernels.fp4_bmm_wgmma import Config, Problem
from pallas_kernels.fragments import BLOCK, FragmentOrder

_VECTOR = 8  # bfloat16 in the 16 bytes that cp.async and the stores move
_INT32_BYTES = 2**31


def fp4_bmm_mosaic_gpu(
    x: Float[Array, "B H X"],
    codes: UInt8[Array, "H N half"],
    scales: UInt8[Array, "H N groups"],
    order: FragmentOrder,
    *,
    contract: str,
    rows: tuple[int, int],
    x_columns: tuple[int, int],
    config: Config | None = None,
) -> Float[Array, "B H out"]:
    """out[b, h] = x[b, h, x0 :] times the head's key rows ("rows": over them) or its others ("columns": over C).

    Args:
        x: bfloat16.
        codes: packed bytes in fragment order.
        scales: scale bytes likewise, none above 128.
        order: where the key rows end.
        contract: "rows" or "columns".
        rows: (first, number): exactly the key rows for "rows", exactly the others for "columns".
        x_columns: (first, number) of x's columns to use.
        config: None for default_config.

    Returns:
        bfloat16.

    Raises:
        NotImplementedError: see unsupported.
        ValueError: the config does not fit.
    """
    reason = unsupported(x, codes, order, contract=contract, rows=rows, x_columns=x_columns)
    if reason is not None:
        raise NotImplementedError(f"fp4_bmm_mosaic_gpu: {reason}")
    batch, heads, width = x.shape
    problem = _problem(x, codes, scales, order, contract, x_columns[0])
    if batch == 0:
        return jnp.zeros((0, heads, problem.outputs), jnp.bfloat16)
    config = default_config(problem) if config is None else config
    wgmma.check_config(problem, config)
    return mosaic_kernel(
        functools.partial(wgmma.program, problem, config),
        out_shape=jax.ShapeDtypeStruct((batch, heads, problem.outputs), jnp.bfloat16),
        grid=wgmma.grid(problem, config),
        warpgroups=config.warpgroups,
        shared_memory_bytes=wgmma.shared_memory_bytes(problem, config),
    )(x, codes, scales)


def unsupported(
    x, codes, order: FragmentOrder, *, contract: str, rows: tuple[int, int], x_columns: tuple[int, int]
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
    if whole[1] == 0:
        return "there are no such rows."
    for name, size in (("x", math.prod(x.shape)), ("the output", math.prod(x.shape[:2]) * outputs)):
        if 2 * size >= _INT32_BYTES:
            return f"{name} must be smaller than 2^31 bytes (offsets are 32 bits); got {2 * size}. Split the batch."
    if 2 * codes.shape[2] > 512 and contract == "columns" or whole[1] > 256 and contract == "rows":
        return "the contraction is too long for a thread's registers: at most 512 columns or 256 rows."
    return None


def _problem(x, codes, scales, order: FragmentOrder, contract: str, first_x: int) -> Problem:
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
    )


def default_config(problem: Problem) -> Config:
    """Tiles for a problem on an H100. None changes a bit of the result, so the choice may follow the batch."""
    batch, tiles = problem.batch, problem.outputs // BLOCK
    blocks = problem.contraction // BLOCK
    if batch <= 32:
        per_warpgroup = max(1, _largest_divisor(tiles, 8 // blocks))
        while per_warpgroup > 1 and problem.heads * tiles // per_warpgroup < 200:
            per_warpgroup = _largest_divisor(tiles, per_warpgroup // 2)
        return Config(_round_up(batch, 8), 1, per_warpgroup, accumulators=per_warpgroup)
    if problem.transposed:
        warpgroups = _largest_divisor(tiles, 4)
        per_warpgroup = _largest_divisor(tiles // warpgroups, 2)
        if batch <= 64:
            return Config(_round_up(batch, 16), warpgroups, per_warpgroup)
        if batch <= 128:
            token_tiles = -(-batch // 32)
            return Config(32, warpgroups, per_warpgroup, token_tiles, token_tiles)
        token_tiles = min(4, -(-batch // 64))
        return Config(64, warpgroups, per_warpgroup, token_tiles, token_tiles)
    warpgroups = _largest_divisor(tiles, 2)
    if batch <= 64:
        return Config(_round_up(batch, 16), warpgroups, 1)
    if batch <= 128:
        return Config(_round_up(-(-batch // 2), 16), warpgroups, 1, 2, 2, delay=min(4, blocks))
    return Config(64, warpgroups, 1, -(-batch // 64), min(3, -(-batch // 64)), delay=1)


def _largest_divisor(number: int, limit: int) -> int:
    """The largest power of two that divides number and is at most limit; at least 1."""
    divisor = 1
    while 2 * divisor <= limit and number % (2 * divisor) == 0:
        divisor *= 2
    return divisor


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


__all__ = ["Config", "default_config", "fp4_bmm_mosaic_gpu", "fragments", "unsupported"]
