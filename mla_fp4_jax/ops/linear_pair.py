"""fp4_linear_pair: two linear maps of the same x in one kernel, where there is one."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla_fp4_jax.einsum import einsum_rounded
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.dense import fp4_dense
from mla_fp4_jax.ops.implementations import MOSAIC
from pallas_kernels import fp4_linear_mosaic_gpu as mosaic
from pallas_kernels.fragments import BLOCK, FragmentOrder


def fp4_linear_pair(
    x: Float[Array, "*batch C"], first: FP4Array, second: FP4Array, *, implementation: str | None = None
) -> Float[Array, "*batch N_all"] | None:
    """[x @ first.T | x @ second.T] in one kernel that reads both weights where they are, or None if none can.

    Few tokens leave a small linear waiting for itself; two that share x wait together. Not differentiable.

    Args:
        x: any leading axes.
        first: [N, C].
        second: [N2, C].
        implementation: see fp4_linear, whose numerics these are, with the contraction split by both shapes together.
    """
    if _why_not(x, first, second, implementation) is not None:
        return None
    flat = x.reshape(-1, x.shape[-1])
    if implementation == MOSAIC:
        y = _run(flat, first, second)
    else:
        # Decided for the device that is traced for; a program lowered for another one falls back.
        y = jax.lax.platform_dependent(flat, first, second, cuda=_run, default=_plain)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _run(x: Array, first: FP4Array, second: FP4Array) -> Array:
    return mosaic.fp4_linear_mosaic_gpu(
        x, first.packed, first.scales, (second.packed, second.scales), out_dtype=x.dtype
    )


def _plain(x: Array, first: FP4Array, second: FP4Array) -> Array:
    product = functools.partial(einsum_rounded, "mc,nc->mn", x, dtype=x.dtype)
    return jnp.concatenate([product(fp4_dense(w, x.dtype)) for w in (first, second)], axis=-1)


def _why_not(x: Array, first: FP4Array, second: FP4Array, implementation: str | None) -> str | None:
    """Why the kernel cannot take these operands here, or None."""
    if implementation not in (None, MOSAIC):
        return f"it is {MOSAIC}'s."
    reason = implementations.why_not(MOSAIC)
    if reason is not None:
        return reason
    if first.order != FragmentOrder(0) or second.order != FragmentOrder(0):
        return "both must be in fragment order without key rows."
    if x.dtype != jnp.bfloat16:
        return f"x must be bfloat16; got {x.dtype}."
    tokens = math.prod(x.shape[:-1])
    if not 0 < tokens <= mosaic.MOST_TOKENS:
        return f"it is for 1 .. {mosaic.MOST_TOKENS} tokens; got {tokens}."
    if first.shape[0] % (2 * BLOCK) or second.shape[0] % BLOCK:
        return f"outputs must be multiples of {2 * BLOCK} and {BLOCK}; got {first.shape[0]} and {second.shape[0]}."
    return mosaic.unsupported((tokens, x.shape[-1]), (first.shape[0] + second.shape[0], x.shape[-1]))
