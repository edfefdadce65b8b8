"""Writing safetensors and small text files: whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mla_fp4_jax.checkpoint.dtypes import BITS, FLOAT4, NAMES
from mla_fp4_jax.checkpoint.header import METADATA_KEY
from mla_fp4_jax.checkpoint.safetensors import LENGTH_BYTES

HEADER_ALIGNMENT = 8
CHUNK_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A tensor to be written, whose bytes are made only then.

    Attributes:
        name: its key.
        dtype: as safetensors spells it.
        shape: logical; F4 counts elements.
        chunks: its bytes, in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[bytes | np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=object)) * BITS[self.dtype] // 8


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file that appears complete or not at all.

    Args:
        path: the file; one that exists is replaced in one step, and readers that have it open keep the old.
        tensors: name -> array (NumPy, ml_dtypes or JAX). float4_e2m1fn is stored as F4, two to a byte.
        metadata: strings for the header's `__metadata__`.

    Raises:
        TypeError: a dtype that safetensors cannot hold.
        ValueError: a reserved name, metadata that is not strings, F4 with an odd last axis.
    """
    write_streamed(path, [_streamed(name, np.asarray(value)) for name, value in tensors.items()], metadata)


def write_streamed(
    path: str | os.PathLike[str], tensors: Sequence[Streamed], metadata: Mapping[str, str] | None = None
) -> None:
    """As write_safetensors, for tensors whose bytes come in chunks, so that none need be in memory whole."""
    # Widest first, so that every tensor is aligned to its own width whatever lies before it.
    order = sorted(tensors, key=lambda tensor: (-BITS[tensor.dtype], tensor.name))
    header = _header(order, metadata)
    with atomic_file(path) as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for tensor in order:
            written = sum(file.write(_bytes(chunk)) for chunk in tensor.chunks())
            if written != tensor.nbytes:
                raise ValueError(f"write_streamed: {tensor.name} must have {tensor.nbytes} bytes; got {written}.")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON to a file that appears complete or not at all."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write, which takes its name once it is complete and on the disk; else it vanishes."""
    target = Path(path)
    # Beside the target, so that the final rename stays within one file system; the mode obeys the umask.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _streamed(name: str, array: np.ndarray) -> Streamed:
    if array.dtype not in NAMES:
        raise TypeError(f"write_safetensors: {name} must have a dtype of safetensors; got {array.dtype}.")
    if array.dtype == FLOAT4 and (array.ndim == 0 or array.shape[-1] % 2):
        raise ValueError(f"write_safetensors: {name} must have an even last axis for F4; got {array.shape}.")
    return Streamed(name, NAMES[array.dtype], array.shape, lambda: _chunks(array))


def _header(order: Sequence[Streamed], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {}
    if metadata is not None:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("write_safetensors: metadata must map strings to strings. Convert the values.")
        header[METADATA_KEY] = dict(metadata)
    position = 0
    for tensor in order:
        if tensor.name == METADATA_KEY or not isinstance(tensor.name, str):
            raise ValueError(
                f"write_safetensors: a tensor's name must be a string; got {tensor.name!r}, which is reserved."
            )
        end = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % HEADER_ALIGNMENT)


def _bytes(chunk: bytes | np.ndarray) -> bytes | memoryview:
    return chunk if isinstance(chunk, bytes) else np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CHUNK_BYTES):
        chunk = flat[start : start + CHUNK_BYTES]
        yield np.ascontiguousarray((chunk[0::2] & 15) | (chunk[1::2] << 4)) if array.dtype == FLOAT4 else chunk
