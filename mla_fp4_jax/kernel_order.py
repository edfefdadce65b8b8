"""Putting a layer's packed weights into the order that this device's kernels want, once, when it is loaded."""

from __future__ import annotations

import dataclasses

from jax.core import Tracer

from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.weights import MLAWeights


def order_for_device(weights: MLAWeights, config: MLAConfig, implementation: str | None = None) -> MLAWeights:
    """Weights with kv_b_proj in fragment order, if the Mosaic GPU kernels can run here and can hold it.

    The same bytes in another order, still one copy: `weights.kv_b_proj.to_packed()` gives the checkpoint's back.
    Weights they cannot hold (other sizes, NVFP4, a scale above 2) stay as they are and take another implementation.

    Args:
        weights: concrete arrays; within a trace, where scales cannot be looked at, they stay as they are.
        config: gives P, where a head's key rows end.
        implementation: the one the layer will use; only None and "mosaic_gpu" want this order.
    """
    if implementation not in (None, implementations.MOSAIC) or implementations.why_not(implementations.MOSAIC):
        return weights
    kv_b = weights.kv_b_proj
    if not isinstance(kv_b, FP4Array) or isinstance(kv_b.scales, Tracer):
        return weights
    if kv_b.fragment_order_why_not(config.qk_nope_head_dim) is not None:
        return weights
    return dataclasses.replace(weights, kv_b_proj=kv_b.in_fragment_order(config.qk_nope_head_dim))
