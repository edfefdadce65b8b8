"""Putting a layer's packed weights into the order that this device's kernels want, once, when it is loaded."""

from __future__ import annotations

import dataclasses

import jax
from jax.core import Tracer

from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.weights import MLAWeights
from pallas_kernels import fp4_linear_mosaic_gpu

LINEARS = ("kv_a_proj_with_mqa", "q_proj", "q_a_proj", "q_b_proj", "o_proj")


def order_for_device(weights: MLAWeights, config: MLAConfig, implementation: str | None = None) -> MLAWeights:
    """Weights with kv_b_proj and the FP4 linears in fragment order, if the Mosaic GPU kernels can run here.

    The same bytes in another order, still one copy: `weights.kv_b_proj.to_packed()` gives the checkpoint's back.
    Weights they cannot hold (other sizes, NVFP4, a scale above 2) stay as they are and take another implementation.

    Args:
        weights: concrete arrays; within a trace, where scales cannot be looked at, they stay as they are.
        config: gives P, where a head's key rows end.
        implementation: the one the layer will use; only None and "mosaic_gpu" want this order.
    """
    if implementation not in (None, implementations.MOSAIC) or implementations.why_not(implementations.MOSAIC):
        return weights
    changed = {"kv_b_proj": _ordered(weights.kv_b_proj, config.qk_nope_head_dim)}
    for name in LINEARS:
        w = getattr(weights, name)
        if isinstance(w, FP4Array) and fp4_linear_mosaic_gpu.unsupported((1, w.shape[1]), w.shape) is None:
            changed[name] = _ordered(w, 0)
    return dataclasses.replace(weights, **changed)


def _ordered(w: jax.Array | FP4Array, key_rows: int) -> jax.Array | FP4Array:
    if not isinstance(w, FP4Array) or isinstance(w.scales, Tracer) or w.fragment_order_why_not(key_rows) is not None:
        return w
    return w.in_fragment_order(key_rows)
