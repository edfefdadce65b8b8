"""Loading layers from a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike
from tqdm import tqdm

from mla_fp4_jax.checkpoint.placement import CodeBuffers, default_device
from mla_fp4_jax.checkpoint.plan import FindSharding, LayerPlan, plan_mla_layer, plan_mla_layers
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.mla import MLAAttention
from mla_fp4_jax.sharding import MLASharding

logger = logging.getLogger(__name__)
# Most of the time goes into the kernel's finding and clearing pages, which threads do side by side.
MOST_THREADS = 4


def load_mla_layer(
    path: str | os.PathLike[str],
    layer: int,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    prefix: str | None = None,
    nibble_order: str = "linear",
    sharding: MLASharding | Sharding | FindSharding | None = None,
) -> MLAAttention:
    """Load one attention layer of a Hugging Face safetensors checkpoint.

    Each projection's format is decided by its own tensors: bf16, fp16 or fp32; FP8 with scales per block, row or
    tensor; MXFP4 (AMD Quark, compressed-tensors, AutoRound, ModelOpt, torchao) or NVFP4 (the same). Nothing is
    quantised or requantised: an FP4 weight is the checkpoint's own bytes, an FP8 one becomes dense, q * scale in
    float32 rounded once to `dtype`. All that can be checked without the weights' values is checked before any is
    read; no code in the checkpoint is run and no network is used.

    Args:
        path: a directory with config.json and model.safetensors, or shards and their index; or one such file
            with config.json beside it.
        layer: its number, >= 0; in LongCat, which has two attentions to a layer, that of the attention.
        dtype: dense weights are cast to it; the compute dtype and that of caches.
        implementation: of the FP4 products; see fp4_bmm.
        prefix: where the layer's tensors are, should it not be found: "model.layers.{layer}.self_attn".
        nibble_order: of packed codes; "gguf" where they lie as in GGUF's blocks, which nothing in a file tells.
        sharding: an MLASharding, which the layer then has: its heads, sequences and contexts over a mesh, a device's
            part read by its own process only. Or where weights go and no more: one for all, or a function of a
            weight's name and shape in MLAWeights. None for the default device.

    Returns:
        The layer.

    Raises:
        CheckpointError: a file that is missing, malformed or changing; a tensor that is missing, extra,
            misshaped, not finite or in a format that is not read. It names file and tensor.
        TypeError, ValueError: a layer, dtype, nibble_order or sharding that is none.
    """
    plan = plan_mla_layer(path, layer, prefix=prefix, nibble_order=nibble_order)
    return load_planned(plan, dtype, implementation, sharding=sharding)


def load_mla_layers(
    path: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
    *,
    sharding: MLASharding | Sharding | FindSharding | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    prefix: str | None = None,
    nibble_order: str = "linear",
    progress: bool | None = None,
) -> list[MLAAttention]:
    """Load the attention layers of a checkpoint, tensor by tensor from the mapped files, straight to their devices.

    Every layer is checked before a byte of any weight is read. Up to four threads load a layer each, one thread all
    with a sharding; beside the result, host memory holds one weight for each of them.

    Args:
        layers: their numbers; None for all of the model's, layers of multi-token prediction left out.
        progress: a progress bar on standard error; None for one where that is a terminal.
        path, sharding, dtype, implementation, prefix, nibble_order: as for load_mla_layer.

    Returns:
        The layers in the order asked for.

    Raises:
        CheckpointError, TypeError, ValueError: as load_mla_layer; nothing is then loaded.
    """
    _check_dtype(dtype)
    plans = plan_mla_layers(path, layers, prefix=prefix, nibble_order=nibble_order)
    buffers, total, device = CodeBuffers(), sum(plan.nbytes for plan in plans), default_device()
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="loading", disable=None if progress is None else not progress
    )

    def load(plan: LayerPlan) -> MLAAttention:
        with jax.default_device(device):  # which a thread does not inherit
            return load_planned(plan, dtype, implementation, sharding=sharding, buffers=buffers)

    # With a sharding, looking at a layer's scales runs on all devices together, which must meet them in one order.
    threads = 1 if sharding is not None else max(1, min(MOST_THREADS, os.cpu_count() or 1, len(plans)))
    loaded: list[MLAAttention] = []
    with bar, ThreadPoolExecutor(threads) as pool:
        for plan, layer in zip(plans, pool.map(load, plans), strict=True):
            loaded.append(layer)
            bar.update(plan.nbytes)
    return loaded


def load_planned(
    plan: LayerPlan,
    dtype: DTypeLike,
    implementation: str | None,
    *,
    sharding: MLASharding | Sharding | FindSharding | None = None,
    buffers: CodeBuffers | None = None,
) -> MLAAttention:
    """Load what plan_mla_layer found; see load_mla_layer, and LayerPlan.read for `buffers`."""
    _check_dtype(dtype)
    if plan.unused:
        logger.info("left out: %s", ", ".join(plan.unused))
    for note in plan.notes:
        logger.info("%s: %s", plan.prefix.rstrip("."), note)
    rules = sharding if isinstance(sharding, MLASharding) else None
    if rules is not None:
        groups = {"mxfp4": 32, "nvfp4": 16}
        packed = {w.field: groups[w.reader.format] for w in plan.weights if w.reader.packed}
        rules.check(plan.config, packed)

    def find(field: str, shape: tuple[int, ...]) -> Sharding | None:
        if isinstance(sharding, MLASharding):
            return sharding.weight(field)
        return sharding(field, shape) if callable(sharding) else sharding

    weights = plan.read(dtype, sharding=find, buffers=buffers)
    if sharding is None or rules is not None:
        weights = order_for_device(weights, plan.config, implementation, rules)
    return MLAAttention(plan.config, weights=weights, dtype=dtype, implementation=implementation, sharding=rules)


def _check_dtype(dtype: DTypeLike) -> None:
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating) or jnp.dtype(dtype).itemsize not in (2, 4):
        raise TypeError(f"load_mla_layer: dtype must be bfloat16, float16 or float32; got {jnp.dtype(dtype)}.")
