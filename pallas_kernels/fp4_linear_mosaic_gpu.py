"""The FP4 linear map in Pallas Mosaic GPU, for Hopper: checks, choice of tiles, launch."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.fp4_linear_tiles import (
    Config,
    Problem,
    check_config,
    clusters,
    shared_memory_bytes,
)
from pallas_kernels.fp4_linear_wgmma import program
from pallas_kernels.fragments import BLOCK

_INT32_BYTES = 2**31


# Jitted, so that a program of many equal calls lowers one.
@functools.partial(jax.jit, static_argnames=("config",))
def fp4_linear_mosaic_gpu(
    x: Float[Array, "M K"],
    codes: UInt8[Array, "N half"],
    scales: UInt8[Array, "N groups"],
    *,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    batch = x.shape[0]
    problem = Problem(batch, codes.shape[0], 2 * codes.shape[1])
    if batch == 0:
        return jnp.zeros((0, problem.outputs), jnp.bfloat16)
    check_config(problem, config)
    from pallas_kernels.mosaic import mosaic_kernel  # names that jax before 0.11 lacks

    return mosaic_kernel(
        functools.partial(program, problem, config),
        out_shape=jax.ShapeDtypeStruct((batch, problem.outputs), jnp.bfloat16),
        grid=clusters(problem, config),
        warpgroups=config.warpgroups,
        shared_memory_bytes=shared_memory_bytes(config),
        cluster=config.split,
    )(x, codes, scales)
