"""Putting a layer's packed weights into the order that this device's kernels want, once, when it is loaded."""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding

from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array, to_fragment_order
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.sharding import MLASharding
from mla_fp4_jax.weights import MLAWeights
from pallas_kernels import fp4_linear_mosaic_gpu, fragments
from pallas_kernels.fragments import FragmentOrder

LINEARS = ("kv_a_proj_with_mqa", "q_proj", "q_a_proj", "q_b_proj", "o_proj")


def order_for_device(
    weights: MLAWeights,
    config: MLAConfig,
    implementation: str | None = None,
    sharding: MLASharding | None = None,
) -> MLAWeights:
    """Weights with kv_b_proj in fragment order, if the Mosaic GPU kernels can run here and can hold it.

    The same bytes in another order, still one copy: `weights.kv_b_proj.to_packed()` gives the checkpoint's back.
    Weights they cannot hold (other sizes, a scale above 2) stay as they are and take another implementation, and so
    do linears in NVFP4, for which there is no such kernel.

    Args:
        weights: concrete arrays; within a trace, where scales cannot be looked at, they stay as they are.
        config: gives P, where a head's key rows end.
        implementation: the one the layer will use; only None and "mosaic_gpu" want this order.
        sharding: where the weights are. The order is one within each head, so a device puts its own heads in it.
    """
    if implementation not in (None, implementations.MOSAIC) or implementations.why_not(implementations.MOSAIC):
        return weights
    changed = {"kv_b_proj": _ready(weights.kv_b_proj, "kv_b_proj", config.qk_nope_head_dim, sharding)}
    for field in LINEARS:
        w = getattr(weights, field)
        if not isinstance(w, FP4Array) or w.format != "mxfp4":
            continue
        shape = _on_a_device(w, field, sharding)
        if fp4_linear_mosaic_gpu.unsupported((1, shape[1]), shape) is None:
            changed[field] = _ready(w, field, 0, sharding)
    return dataclasses.replace(weights, **changed)


def _on_a_device(w: FP4Array, field: str, sharding: MLASharding | None) -> tuple[int, ...]:
    if sharding is None:
        return w.shape
    return NamedSharding(sharding.mesh, sharding.weight_spec(field)).shard_shape(w.shape)


def _ready(w: jax.Array | FP4Array, field: str, key_rows: int, sharding: MLASharding | None) -> jax.Array | FP4Array:
    if not isinstance(w, FP4Array) or isinstance(w.scales, Tracer):
        return w
    return ordered(w, field, key_rows, sharding)


def ordered(w: FP4Array, field: str, key_rows: int, sharding: MLASharding | None = None) -> FP4Array:
    """A concrete weight in fragment order, or as it is if that order cannot hold it.

    Args:
        w: of any size and format.
        field: its name in MLAWeights.
        key_rows: see FP4Array.in_fragment_order.
        sharding: where it is. Every device puts its own part in order, so a part's shape has to fit; o_proj, whose
            columns are split, then has an order of as many column parts.
    """
    if sharding is None:
        return w if w.fragment_order_why_not(key_rows) is not None else w.in_fragment_order(key_rows)
    spec, shape = sharding.weight_spec(field), _on_a_device(w, field, sharding)
    one = FragmentOrder(key_rows)
    by_head = (1, *shape) if len(shape) == 2 else shape
    if w.order is not None or w.fragment_order_why_not(key_rows) is not None:
        return w
    if fragments.unsupported(by_head, w.group_size, one) is not None:
        return w
    local = functools.partial(to_fragment_order, order=one)
    run = jax.jit(jax.shard_map(local, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False))
    parts = sharding.size("heads") if field == "o_proj" else 1
    split = dataclasses.replace(w, global_scale=None, global_divisor=None)  # scalars are not split
    moved = run(split)
    return dataclasses.replace(w, codes=moved.codes, scales=moved.scales, order=FragmentOrder(key_rows, parts))
