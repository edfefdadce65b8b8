"""What loading a layer would do, decided from headers alone: which tensors make which weight, and how."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.dense import DTYPES as DENSE_DTYPES
from mla_fp4_jax.checkpoint.dense import READER as DENSE
from mla_fp4_jax.checkpoint.directory import Checkpoint
from mla_fp4_jax.checkpoint.names import find_prefix, is_activation_scale, module_and_suffix
from mla_fp4_jax.checkpoint.readers import find_reader
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.errors import CheckpointError
from mla_fp4_jax.weights import MLAWeights, weight_shapes

MOST_NAMES_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class PlannedWeight:
    """One weight of the layer: where it is and who reads it.

    Attributes:
        field: its name in MLAWeights.
        stored: its tensors.
        reader: of their format.
    """

    field: str
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
        prefix: what its tensors' names begin with.
        weights: all that it needs.
        unused: tensors under the prefix that are left out: scales of activations and caches.
    """

    checkpoint: Checkpoint
    config: MLAConfig
    prefix: str
    weights: tuple[PlannedWeight, ...]
    unused: tuple[str, ...]

    def read(self, dtype: DTypeLike) -> MLAWeights:
        """Every weight on the default device: dense ones in `dtype`, FP4 ones as the checkpoint's own bytes.

        Raises:
            CheckpointError: a value that is not finite, or a file that changed meanwhile.
        """
        values: dict[str, Any] = {
            planned.field: planned.reader.read(planned.stored, dtype) for planned in self.weights
        }
        rows = weight_shapes(self.config)["kv_b_proj"][:2]
        values["kv_b_proj"] = values["kv_b_proj"].reshape(*rows, self.config.kv_lora_rank)
        jax.block_until_ready(values)  # the files must last until their bytes are on the device
        self.checkpoint.check_unchanged()
        return MLAWeights(**values)


def plan_mla_layer(path: str | os.PathLike[str], layer: int, *, prefix: str | None = None) -> LayerPlan:
    """Find a layer's tensors and check all that headers and config can tell; see load_mla_layer."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"load_mla_layer: layer must be an integer; got {layer!r}.")
    if layer < 0:
        raise ValueError(f"load_mla_layer: layer must be >= 0; got {layer}. Layers count from 0.")
    checkpoint = Checkpoint(path)
    config = MLAConfig.from_hf(checkpoint.config_path)
    prefix = find_prefix(checkpoint, layer, prefix)
    below = {name[len(prefix) :]: name for name in checkpoint.names if name.startswith(prefix)}
    unused = {rest for rest in below if is_activation_scale(rest)}

    planned = tuple(
        _plan_weight(checkpoint, prefix, field, _stored_shape(field, shape), below, unused)
        for field, shape in weight_shapes(config).items()
    )
    used = {entry.name for weight in planned for entry in weight.stored.tensors.values()}
    left = sorted(name for rest, name in below.items() if rest not in unused and name not in used)
    extra = [f"{name} {checkpoint.entry(name)}" for name in left] + checkpoint.unindexed(prefix)
    if extra:
        raise CheckpointError(
            f"{checkpoint.root}: tensors that this layer does not use: {_listed(extra)}. Check "
            "config.json: q_lora_rank decides between q_proj and q_a_proj, attention_bias allows biases."
        )
    return LayerPlan(checkpoint, config, prefix, planned, tuple(below[rest] for rest in sorted(unused)))


def _stored_shape(field: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    # A checkpoint has kv_b_proj's heads and rows in one axis.
    return (shape[0] * shape[1], shape[2]) if field == "kv_b_proj" else shape


def _plan_weight(
    checkpoint: Checkpoint,
    prefix: str,
    field: str,
    shape: tuple[int, ...],
    below: dict[str, str],
    unused: set[str],
) -> PlannedWeight:
    module, suffix = module_and_suffix(field)
    if suffix == "bias":
        names = [f"{module}.bias"] if f"{module}.bias" in below else []
    else:
        names = [rest for rest in below if rest.startswith(f"{module}.") and rest not in unused]
        names = [rest for rest in names if rest != f"{module}.bias"]
    if not names:
        raise CheckpointError(
            f"{checkpoint.root}: tensor {prefix}{module}.{suffix} {list(shape)} is missing; the layer has "
            f"{_listed(sorted(below))}."
        )
    tensors = {rest[len(module) + 1 :]: checkpoint.entry(below[rest]) for rest in names}
    if suffix == "bias":
        tensors = {"weight": tensors["bias"]}
    stored = StoredWeight(f"{prefix}{module}", shape, tensors, checkpoint)
    reader = find_reader(stored)
    if len(shape) == 1 and reader is not DENSE:
        raise stored.error("weight", f"must be one of {', '.join(DENSE_DTYPES)}; got {stored.tensors['weight']}.")
    reader.check(stored)
    return PlannedWeight(field, stored, reader)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMES_SHOWN])
    return shown + (f" and {len(names) - MOST_NAMES_SHOWN} more" if len(names) > MOST_NAMES_SHOWN else "")
