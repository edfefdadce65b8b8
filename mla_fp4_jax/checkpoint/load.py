"""Loading a layer from a checkpoint."""

from __future__ import annotations

import logging
import os

import jax.numpy as jnp
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.plan import LayerPlan, plan_mla_layer
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.mla import MLAAttention

logger = logging.getLogger(__name__)


def load_mla_layer(
    path: str | os.PathLike[str],
    layer: int,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    prefix: str | None = None,
) -> MLAAttention:
    """Load one attention layer of a Hugging Face safetensors checkpoint.

    Each projection's format is decided by its own tensors: bf16, fp16 or fp32, or MXFP4 (`weight` U8 and
    `weight_scale` U8, as AMD Quark writes). Nothing is quantised or requantised: an MXFP4 weight is the
    checkpoint's own bytes. All that can be checked without the weights' values is checked before any is read;
    no code in the checkpoint is run and no network is used.

    Args:
        path: a directory with config.json and model.safetensors, or shards and their index; or one such file
            with config.json beside it.
        layer: its number, >= 0.
        dtype: dense weights are cast to it; the compute dtype and that of caches.
        implementation: of the FP4 products; see fp4_bmm.
        prefix: where the layer's tensors are, should it not be found: "model.layers.{layer}.self_attn".

    Returns:
        The layer, on the default device.

    Raises:
        CheckpointError: a file that is missing, malformed or changing; a tensor that is missing, extra,
            misshaped, not finite or in a format that is not read. It names file and tensor.
        TypeError, ValueError: a layer or dtype that is none.
    """
    return load_planned(plan_mla_layer(path, layer, prefix=prefix), dtype, implementation)


def load_planned(plan: LayerPlan, dtype: DTypeLike, implementation: str | None) -> MLAAttention:
    """Load what plan_mla_layer found; see load_mla_layer."""
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating) or jnp.dtype(dtype).itemsize not in (2, 4):
        raise TypeError(f"load_mla_layer: dtype must be bfloat16, float16 or float32; got {jnp.dtype(dtype)}.")
    if plan.unused:
        logger.info("left out, activations and caches are not quantised here: %s", ", ".join(plan.unused))
    weights = order_for_device(plan.read(dtype), plan.config, implementation)
    return MLAAttention(plan.config, weights=weights, dtype=dtype, implementation=implementation)
