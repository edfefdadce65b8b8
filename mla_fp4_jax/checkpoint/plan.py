"""What loading layers would do, decided from headers alone: which tensors make which weight, and how."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Sharding
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.dense import DTYPES as DENSE_DTYPES
from mla_fp4_jax.checkpoint.dense import READER as DENSE
from mla_fp4_jax.checkpoint.directory import HF_QUANT_CONFIG_FILE, Checkpoint
from mla_fp4_jax.checkpoint.names import BIASES, LayerNames, is_activation_scale, module_and_suffix, tensors_of
from mla_fp4_jax.checkpoint.placement import CodeBuffers, Placement
from mla_fp4_jax.checkpoint.quantization import (
    NOTHING,
    QuantizationConfig,
    find_quantization_config,
    read_quantization,
)
from mla_fp4_jax.checkpoint.readers import find_reader
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.config.hugging_face import HFModel, read_hf_config
from mla_fp4_jax.errors import CheckpointError
from mla_fp4_jax.weights import MLAWeights, weight_shapes

MOST_NAMES_SHOWN = 12
NIBBLE_ORDERS = ("linear", "gguf")
FindSharding = Callable[[str, tuple[int, ...]], Sharding | None]


@dataclasses.dataclass(frozen=True)
class PlannedWeight:
    """One weight of the layer: where it is and who reads it.

    Attributes:
        field: its name in MLAWeights.
        shape: its shape there.
        stored: its tensors.
        reader: of their format.
    """

    field: str
    shape: tuple[int, ...]
    stored: StoredWeight
    reader: Reader

    @property
    def format(self) -> str:
        """For reports: the dtype of a dense weight, else the format's name."""
        if self.reader is DENSE:
            return next(iter(self.stored.tensors.values())).dtype
        return self.reader.name

    @property
    def nbytes(self) -> int:
        """Bytes in the checkpoint."""
        return sum(entry.nbytes for entry in self.stored.tensors.values())


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """A layer that is known to load, but for the values in it.

    Attributes:
        checkpoint: the files.
        config: the layer's sizes.
        layer: its number.
        prefix: what its tensors' names begin with.
        weights: all that it needs.
        unused: tensors under the prefix that are left out: scales of activations and caches, an indexer's.
        notes: what a reader of the result should know: where it differs from the model.
    """

    checkpoint: Checkpoint
    config: MLAConfig
    layer: int
    prefix: str
    weights: tuple[PlannedWeight, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(weight.nbytes for weight in self.weights)

    def read(
        self,
        dtype: DTypeLike,
        *,
        sharding: FindSharding = lambda field, shape: None,
        buffers: CodeBuffers | None = None,
    ) -> MLAWeights:
        """Every weight on its device: dense ones in `dtype`, FP4 ones as the checkpoint's own bytes.

        Args:
            dtype: of dense weights.
            sharding: of a field with this shape; None for the default device.
            buffers: shared by the layers of a load.

        Raises:
            CheckpointError: a value that is not finite, or a file that changed meanwhile.
            ValueError: a sharding that does not fit.
        """
        buffers = CodeBuffers() if buffers is None else buffers
        values: dict[str, Any] = {}
        for planned in self.weights:
            placement = Placement(planned.shape, sharding(planned.field, planned.shape), buffers)
            values[planned.field] = planned.reader.read(planned.stored, dtype, placement)
        jax.block_until_ready(values)  # the files must last until their bytes are on the device
        self.checkpoint.check_unchanged()
        return MLAWeights(**values)


@dataclasses.dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint with its configs read and its layers found.

    Attributes:
        checkpoint: the files.
        model: what config.json says of the attention.
        quantization: what it says of the formats.
        names: the layers' tensors.
        gguf_nibbles: the caller says that packed codes lie in GGUF's order.
    """

    checkpoint: Checkpoint
    model: HFModel
    quantization: QuantizationConfig
    names: LayerNames
    gguf_nibbles: bool = False

    def stored(self, field: str, below: dict[str, str]) -> StoredWeight | None:
        """A field's tensors; None where there are none."""
        shape = _stored_shape(field, weight_shapes(self.model.config)[field])
        module, suffix = module_and_suffix(field)
        tensors = tensors_of(module, below)
        if suffix == "bias":
            tensors = {"weight": tensors["bias"]} if "bias" in tensors else {}
        else:
            tensors = {s: n for s, n in tensors.items() if s != "bias" and not is_activation_scale(f"{module}.{s}")}
        if not tensors:
            return None
        suffix, name = next(iter(tensors.items()))
        spelled = name.removesuffix(".bias" if field in BIASES else f".{suffix}")  # DeepSeek's own name, perhaps
        return StoredWeight(
            spelled,
            shape,
            {s: self.checkpoint.entry(name) for s, name in tensors.items()},
            self.checkpoint,
            self.quantization.declared(spelled) if len(shape) == 2 else NOTHING,
            self.gguf_nibbles,
        )


def open_checkpoint(path: str | os.PathLike[str], nibble_order: str = "linear") -> OpenCheckpoint:
    """Read a checkpoint's configs and sort its names; opens no shard that an index lists.

    Raises:
        CheckpointError: files or configs that are wrong.
        ValueError: an unknown nibble_order.
    """
    if nibble_order not in NIBBLE_ORDERS:
        raise ValueError(
            f"load_mla_layer: nibble_order must be one of {NIBBLE_ORDERS}; got {nibble_order!r}. 'linear' is usual."
        )
    checkpoint = Checkpoint(path)
    model = read_hf_config(checkpoint.config, str(checkpoint.config_path))
    hf_quant_config = checkpoint.hf_quant_config
    try:
        quantization = read_quantization(checkpoint.config, hf_quant_config)
    except CheckpointError as error:
        in_config = hf_quant_config is None or find_quantization_config(checkpoint.config) is not None
        where = checkpoint.config_path if in_config else checkpoint.root / HF_QUANT_CONFIG_FILE
        raise CheckpointError(f"{where}: {error}") from None
    names = LayerNames(checkpoint, model.attentions_per_layer)
    return OpenCheckpoint(checkpoint, model, quantization, names, nibble_order == "gguf")


def plan_mla_layer(
    path: str | os.PathLike[str], layer: int, *, prefix: str | None = None, nibble_order: str = "linear"
) -> LayerPlan:
    """Find a layer's tensors and check all that headers and config can tell; see load_mla_layer."""
    check_layer("load_mla_layer", layer)
    return plan_layer(open_checkpoint(path, nibble_order), layer, prefix)


def plan_mla_layers(
    path: str | os.PathLike[str],
    layers: Sequence[int] | None = None,
    *,
    prefix: str | None = None,
    nibble_order: str = "linear",
) -> list[LayerPlan]:
    """Plans of several layers; None for all that config.json counts, or else all there are. See load_mla_layers."""
    for layer in layers or ():
        check_layer("load_mla_layers", layer)
    opened = open_checkpoint(path, nibble_order)
    if layers is None:
        count = opened.model.num_layers
        layers = opened.names.layers if count is None else range(count)
    return [plan_layer(opened, layer, prefix) for layer in layers]


def check_layer(where: str, layer: object) -> None:
    """Raise TypeError or ValueError unless this is a layer's number."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"{where}: layer must be an integer; got {layer!r}.")
    if layer < 0:
        raise ValueError(f"{where}: layer must be >= 0; got {layer}. Layers count from 0.")


def plan_layer(opened: OpenCheckpoint, layer: int, prefix: str | None = None) -> LayerPlan:
    """A layer's plan from a checkpoint that is open."""
    checkpoint, config = opened.checkpoint, opened.model.config
    prefix, below = opened.names.find(layer, prefix)
    unused = {rest for rest in below if is_activation_scale(rest)}
    notes = []
    indexer = {rest for rest in below if rest.startswith("indexer.")}
    if opened.model.index_topk is not None:
        notes.append(
            f"the model attends to {opened.model.index_topk} tokens that an indexer picks, this layer to all: the "
            f"same up to {opened.model.index_topk} tokens"
        )
        unused |= indexer
    if opened.quantization.activations:
        notes.append("activations and caches, which the config would quantise too, stay in the compute dtype")

    planned = tuple(_plan_weight(opened, prefix, field, below) for field in weight_shapes(config))
    used = {entry.name for weight in planned for entry in weight.stored.tensors.values()}
    left = sorted(name for rest, name in below.items() if rest not in unused and name not in used)
    extra = [f"{name} {checkpoint.entry(name)}" for name in left] + checkpoint.unindexed(prefix)
    if extra:
        raise CheckpointError(
            f"{checkpoint.root}: tensors that this layer does not use: {_listed(extra)}. Check "
            "config.json: q_lora_rank decides between q_proj and q_a_proj, attention_bias allows biases."
        )
    left_out = tuple(below[rest] for rest in sorted(unused))
    return LayerPlan(checkpoint, config, layer, prefix, planned, left_out, tuple(notes))


def _stored_shape(field: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # A checkpoint has kv_b_proj's heads and rows in one axis.
    return (shape[0] * shape[1], shape[2]) if field == "kv_b_proj" else shape


def _plan_weight(opened: OpenCheckpoint, prefix: str, field: str, below: dict[str, str]) -> PlannedWeight:
    shape = weight_shapes(opened.model.config)[field]
    stored = opened.stored(field, below)
    if stored is None:
        module, suffix = module_and_suffix(field)
        raise CheckpointError(
            f"{opened.checkpoint.root}: tensor {prefix}{module}.{suffix} {list(_stored_shape(field, shape))} is "
            f"missing; the layer has {_listed(sorted(below))}."
        )
    reader = find_reader(stored)
    if len(stored.shape) == 1 and reader is not DENSE:
        first = next(iter(stored.tensors))
        raise stored.error(first, f"must be one of {', '.join(DENSE_DTYPES)}; got {stored.tensors[first]}.")
    reader.check(stored)
    return PlannedWeight(field, shape, stored, reader)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES_SHOWN])
    return shown + (f" and {len(names) - MOST_NAMES_SHOWN} more" if len(names) > MOST_NAMES_SHOWN else "")
