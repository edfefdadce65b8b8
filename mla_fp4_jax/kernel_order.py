"""Putting a layer's packed weights into the order that this device's kernels want, once, when it is loaded."""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array, to_fragment_order
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.sharding import MLASharding
from mla_fp4_jax.weights import MLAWeights
from pallas_kernels import fp4_linear_mosaic_gpu
from pallas_kernels.fragments import BLOCK, FragmentOrder

LINEARS = ("kv_a_proj_with_mqa", "q_proj", "q_a_proj", "q_b_proj", "o_proj")


def order_for_device(
    weights: MLAWeights,
    config: MLAConfig,
    implementation: str | None = None,
    sharding: MLASharding | None = None,
) -> MLAWeights:
    """Weights with kv_b_proj and the FP4 linears in fragment order, if the Mosaic GPU kernels can run here.

    The same bytes in another order, still one copy: `weights.kv_b_proj.to_packed()` gives the checkpoint's back.
    Weights they cannot hold (other sizes, NVFP4, a scale above 2) stay as they are and take another implementation.

    Args:
        weights: concrete arrays; within a trace, where scales cannot be looked at, they stay as they are.
        config: gives P, where a head's key rows end.
        implementation: the one the layer will use; only None and "mosaic_gpu" want this order.
        sharding: where the weights are. The order is one within each head, or each 64 rows of a linear, so a device
            puts its own in it. A linear that is split otherwise, as o_proj is along its columns, stays as it is.
    """
    if implementation not in (None, implementations.MOSAIC) or implementations.why_not(implementations.MOSAIC):
        return weights
    changed = {"kv_b_proj": _ordered(weights.kv_b_proj, config.qk_nope_head_dim, "kv_b_proj", sharding)}
    for name in LINEARS:
        w = getattr(weights, name)
        if isinstance(w, FP4Array) and fp4_linear_mosaic_gpu.unsupported((1, w.shape[1]), w.shape) is None:
            if sharding is None or _cuts_no_block(w, name, sharding):
                changed[name] = _ordered(w, 0, name, sharding)
    return dataclasses.replace(weights, **changed)


def _cuts_no_block(w: FP4Array, name: str, sharding: MLASharding) -> bool:
    spec = sharding.weight_spec(name)
    if spec == PartitionSpec():
        return True
    return len(spec) == 1 and w.shape[0] // sharding.size("heads") % BLOCK == 0


def _ordered(w: jax.Array | FP4Array, key_rows: int, name: str, sharding: MLASharding | None) -> jax.Array | FP4Array:
    if not isinstance(w, FP4Array) or isinstance(w.scales, Tracer) or w.fragment_order_why_not(key_rows) is not None:
        return w
    if sharding is None:
        return w.in_fragment_order(key_rows)
    spec = sharding.weight_spec(name)
    local = functools.partial(to_fragment_order, order=FragmentOrder(key_rows))
    return jax.jit(jax.shard_map(local, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False))(w)
