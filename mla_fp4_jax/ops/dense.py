"""fp4_dense: packed weights as a dense matrix, for a library's matmul to use once."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops import implementations
from pallas_kernels.fp4_dequantize_mosaic_gpu import fp4_dequantize_mosaic_gpu, unsupported


def fp4_dense(w: FP4Array, dtype: DTypeLike) -> Float[Array, "*rows C"]:
    """FP4Array.dequantize, by a kernel that reads MXFP4 in fragment order (bfloat16, a Hopper GPU).

    The values are the same bit for bit. The kernel writes the matrix in one pass; XLA alone makes several, since it
    has to put fragments into rows first.
    """
    if w.order is None or w.format != "mxfp4" or w.ndim not in (2, 3) or jnp.dtype(dtype) != jnp.bfloat16:
        return w.dequantize(dtype)
    if implementations.why_not(implementations.MOSAIC) or unsupported(w.shape):
        return w.dequantize(dtype)
    # Decided for the device that is traced for; a program lowered for another one falls back.
    return jax.lax.platform_dependent(w, cuda=_kernel, default=functools.partial(FP4Array.dequantize, dtype=dtype))


def _kernel(w: FP4Array) -> Array:
    assert w.order is not None
    three = (1, *w.shape) if w.ndim == 2 else w.shape
    packed, scales = w.packed.reshape(*three[:2], -1), w.scales.reshape(*three[:2], -1)
    return fp4_dequantize_mosaic_gpu(packed, scales, w.order).reshape(w.shape)
