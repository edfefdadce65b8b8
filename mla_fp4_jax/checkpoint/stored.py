"""One weight as a checkpoint stores it, and what a reader of a format is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.directory import Checkpoint
from mla_fp4_jax.checkpoint.header import TensorEntry
from mla_fp4_jax.errors import CheckpointError
from mla_fp4_jax.weights import Weight


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """The tensors under one module's name, and the shape that the config asks of the weight they make.

    Attributes:
        name: the module, "model.layers.0.self_attn.kv_b_proj".
        shape: the logical shape expected, [out, in] or [features].
        tensors: what there is by suffix: "weight", "weight_scale", ...; biases and activation scales, which
            are no part of the weight, left out.
        source: where their bytes are.
    """

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, TensorEntry]
    source: Checkpoint

    def has(self, **dtypes: tuple[str, ...]) -> bool:
        """Whether the tensors are exactly those named, each of one of the dtypes given for it."""
        return set(self.tensors) == set(dtypes) and all(
            self.tensors[suffix].dtype in allowed for suffix, allowed in dtypes.items()
        )

    def require_shape(self, suffix: str, expected: tuple[int, ...], why: str = "") -> None:
        """Raise CheckpointError unless a tensor has this shape."""
        entry = self.tensors[suffix]
        if entry.shape != expected:
            raise self.error(suffix, f"must be {entry.dtype} {list(expected)}{why}; got {entry}.")

    def error(self, suffix: str, problem: str) -> CheckpointError:
        """An error about one of the tensors, naming it and its file."""
        name = self.tensors[suffix].name
        return CheckpointError(f"{self.source.file_of(name)}: tensor {name} {problem}")

    def read(self, suffix: str) -> np.ndarray:
        """A tensor's bytes, a view of the file."""
        return self.source.read(self.tensors[suffix].name)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A weight format. A new one is a file with one of these, and a line in readers.py.

    Attributes:
        name: for reports, "MXFP4 (Quark)".
        recognises: whether a weight is in this format, by presence and dtype of its tensors alone.
        check: raises CheckpointError where their shapes are not as they must be; reads headers only.
        read: the weight, on the default device: dense in the dtype given, packed ones as they are.
    """

    name: str
    recognises: Callable[[StoredWeight], bool]
    check: Callable[[StoredWeight], None]
    read: Callable[[StoredWeight, DTypeLike], Weight]


def to_device(view: np.ndarray) -> jax.Array:
    """A tensor of the file on the default device.

    On a CPU device_put may make an array of the very memory it is given, mapped file and may_alias=False
    notwithstanding (seen with jax 0.10 and 0.12): a weight that changed with the file, and a crash once that
    is cut short. There, and only there, the bytes are copied first.
    """
    array = jax.device_put(view)
    if next(iter(array.devices())).platform == "cpu":
        return jax.device_put(np.array(view))
    return array
