"""The FP4 linear map in Pallas Mosaic GPU, for Hopper: checks, choice of tiles, launch."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels import fp4_linear_tiles as tiling
from pallas_kernels.fp4_bmm_tiles import SHARED_MEMORY_BYTES
from pallas_kernels.fp4_linear_tiles import Config, Problem, check_config
from pallas_kernels.fp4_linear_wgmma import program
from pallas_kernels.fragments import BLOCK

# The kernel decodes its weights again for every 128 tokens or so; with more tokens than these it pays to decode them
# once, to memory, and leave the product to a library. Measured on an H100 (bench/linear.py).
MOST_TOKENS = 512
_MIN_K = 2 * BLOCK
_INT32_BYTES = 2**31
_FEW_TOKENS = 32
_ENOUGH_WARPGROUPS = 256  # that stream weights, on the whole GPU: about two for each of its 132 SMs
_ENOUGH_CTAS = 100


# Jitted, so that a program of many equal calls lowers one.
@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def fp4_linear_mosaic_gpu(
    x: Float[Array, "M K"],
    codes: UInt8[Array, "N half"],
    scales: UInt8[Array, "N groups"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """out[m, n] = sum_k x[m, k] A[n, k], accumulated in float32.

    Args:
        x: bfloat16.
        codes: packed bytes in fragment order, without key rows.
        scales: scale bytes likewise, none above 128.
        out_dtype: bfloat16 or float32.
        config: None for default_config.

    Raises:
        NotImplementedError: see unsupported.
        ValueError: the config does not fit.
    """
    batch, outputs = x.shape[0], codes.shape[0]
    reason = unsupported(x.shape, (outputs, 2 * codes.shape[1]))
    if reason is not None:
        raise NotImplementedError(f"fp4_linear_mosaic_gpu: {reason}")
    if batch == 0:
        return jnp.zeros((0, outputs), out_dtype)
    problem = Problem(batch, outputs, 2 * codes.shape[1], jnp.dtype(out_dtype).itemsize)
    config = default_config(problem) if config is None else config
    check_config(problem, config)
    from pallas_kernels.mosaic import mosaic_kernel  # names that jax before 0.11 lacks

    return mosaic_kernel(
        functools.partial(program, problem, config),
        out_shape=jax.ShapeDtypeStruct((batch, outputs), out_dtype),
        grid=tiling.clusters(problem, config),
        warpgroups=config.warpgroups,
        shared_memory_bytes=tiling.shared_memory_bytes(config),
        cluster=config.split,
    )(x, codes, scales)


def unsupported(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> str | None:
    """Why this kernel cannot multiply x [M, K] by weights [N, K], or None."""
    outputs, contraction = w_shape
    if outputs % BLOCK or contraction % _MIN_K or not outputs * contraction:
        return f"w must be [N, K], N a multiple of {BLOCK} and K of {_MIN_K}; got {list(w_shape)}."
    for name, size in (("x", math.prod(x_shape)), ("the output", x_shape[0] * outputs)):
        if 4 * size >= _INT32_BYTES:
            return f"{name} must have fewer than 2^29 elements (offsets are 32 bits); got {size}. Split the batch."
    return None


def default_split(outputs: int, contraction: int) -> int:
    """Parts of the contraction. It must not follow the batch: it decides the bits of a result."""
    tiles, blocks = outputs // BLOCK, contraction // BLOCK
    split = 1
    while split < 8 and tiles * split < _ENOUGH_WARPGROUPS and blocks % (4 * split) == 0:
        split *= 2
    return split


def default_config(problem: Problem) -> Config:
    """Tiles for a problem, from measurements on an H100 (bench/linear.py).

    But for `split`, no choice changes a bit of the result, so it may follow the batch. Few tokens: as many warpgroups
    in a CTA as leave a CTA for most SMs, since they share x. Many: two tiles to a warpgroup, which halves what a CTA
    reads of x for its products.
    """
    tiles, blocks = problem.outputs // BLOCK, problem.contraction // BLOCK
    split = default_split(problem.outputs, problem.contraction)
    part = blocks // split
    tokens = _round_up(-(-problem.batch // -(-problem.batch // 128)), 8)
    ctas = split * -(-problem.batch // tokens)
    if tokens > _FEW_TOKENS and tiles % 4 == 0 and tiles // 4 * ctas >= _ENOUGH_CTAS // 2:
        warpgroups, per_warpgroup = 2, 2
    else:
        per_warpgroup = 1
        fitting = [number for number in (4, 3, 2, 1) if tiles % number == 0]
        if tokens > 64:
            fitting = [number for number in fitting if number < 4]  # 128 registers a thread are too few
        warpgroups = next((n for n in fitting if tiles // n * ctas >= _ENOUGH_CTAS), fitting[-1])
    few = tokens <= _FEW_TOKENS
    stage_blocks = 4 if few and warpgroups == 4 and part % 4 == 0 else 2
    push = split > 1 and few
    slots = 4 if stage_blocks == 4 else 8

    def config(slots: int) -> Config:
        return Config(split, tokens, warpgroups, per_warpgroup, stage_blocks, slots, push)

    while slots > 3 and (
        tiling.shared_memory_bytes(config(slots)) > SHARED_MEMORY_BYTES or slots > part // stage_blocks + 2
    ):
        slots -= 1
    return config(slots)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
