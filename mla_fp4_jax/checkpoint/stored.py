"""One weight as a checkpoint stores it, and what a reader of a format is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.directory import Checkpoint
from mla_fp4_jax.checkpoint.header import TensorEntry
from mla_fp4_jax.checkpoint.placement import Placement
from mla_fp4_jax.checkpoint.quantization import NOTHING, Declared
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
        declared: what the checkpoint's config says of the module.
        gguf_nibbles: the caller says that packed codes lie in GGUF's order.
    """

    name: str
    shape: tuple[int, ...]
    tensors: Mapping[str, TensorEntry]
    source: Checkpoint
    declared: Declared = NOTHING
    gguf_nibbles: bool = False

    def has(self, **dtypes: tuple[str, ...]) -> bool:
        """Whether the tensors are exactly those named, each of one of the dtypes given for it."""
        return set(self.tensors) == set(dtypes) and all(
            self.tensors[suffix].dtype in allowed for suffix, allowed in dtypes.items()
        )

    def first(self, *suffixes: str) -> str:
        """The first of some suffixes that is there."""
        return next(suffix for suffix in suffixes if suffix in self.tensors)

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

    def read_scalar(self, suffix: str, *, divides: bool = False) -> np.float32:
        """A float32 scale of the whole weight.

        Raises:
            CheckpointError: it is negative or not finite, or a divisor without a finite reciprocal.
        """
        value = np.float32(self.read(suffix).astype(np.float32).reshape(-1)[0])
        with np.errstate(divide="ignore", over="ignore"):
            if not np.isfinite(value) or value < 0 or (divides and not np.isfinite(np.float32(1) / value)):
                raise self.error(suffix, f"must be finite and {'above' if divides else '>='} 0; got {value}.")
        return value


@dataclasses.dataclass(frozen=True)
class Reader:
    """A weight format. A new one is a file with one of these, and a line in readers.py.

    Attributes:
        name: for reports, "MXFP4".
        format: as quantization.Declared has it: "dense", "fp8", "mxfp4" or "nvfp4".
        recognises: whether a weight is in this format, by presence and dtype of its tensors alone.
        check: raises CheckpointError where their shapes are not as they must be; reads headers only.
        read: the weight, placed: dense in the dtype given, packed ones as they are.
        rows: some rows' values as float32, on the host; reads no others. Of linears only.
        packed_rows: some rows' codes [..., in/2], low nibble first, and e8m0 bytes; None where GGUF's nibble order
            cannot be.
    """

    name: str
    format: str
    recognises: Callable[[StoredWeight], bool]
    check: Callable[[StoredWeight], None]
    read: Callable[[StoredWeight, DTypeLike, Placement], Weight]
    rows: Callable[[StoredWeight, slice], np.ndarray]
    packed_rows: Callable[[StoredWeight, slice], tuple[np.ndarray, np.ndarray]] | None = None

    @property
    def packed(self) -> bool:
        """Whether weights stay packed FP4."""
        return self.format in ("mxfp4", "nvfp4")
