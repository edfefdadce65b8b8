"""Writing safetensors: whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mla_fp4_jax.checkpoint.dtypes import BITS, FLOAT4, NAMES
from mla_fp4_jax.checkpoint.header import METADATA_KEY
from mla_fp4_jax.checkpoint.safetensors import LENGTH_BYTES

HEADER_ALIGNMENT = 8
CHUNK_BYTES = 16 << 20


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
    target = Path(path)
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    # Widest first, so that every tensor is aligned to its own width whatever lies before it.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header = _header(arrays, order, metadata)
    # Beside the target, so that the final rename stays within one file system; the mode obeys the umask.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
            for name in order:
                _write_bytes(file, arrays[name])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _header(arrays: Mapping[str, np.ndarray], order: list[str], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {}
    if metadata is not None:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("write_safetensors: metadata must map strings to strings. Convert the values.")
        header[METADATA_KEY] = dict(metadata)
    position = 0
    for name in order:
        array = arrays[name]
        if name == METADATA_KEY or not isinstance(name, str):
            raise ValueError(f"write_safetensors: a tensor's name must be a string; got {name!r}, which is reserved.")
        if array.dtype not in NAMES:
            raise TypeError(f"write_safetensors: {name} must have a dtype of safetensors; got {array.dtype}.")
        if array.dtype == FLOAT4 and (array.ndim == 0 or array.shape[-1] % 2):
            raise ValueError(f"write_safetensors: {name} must have an even last axis for F4; got {array.shape}.")
        dtype = NAMES[array.dtype]
        end = position + array.size * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % HEADER_ALIGNMENT)


def _write_bytes(file: Any, array: np.ndarray) -> None:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    step = CHUNK_BYTES
    for start in range(0, flat.size, step):
        chunk = flat[start : start + step]
        if array.dtype == FLOAT4:
            chunk = (chunk[0::2] & 15) | (chunk[1::2] << 4)
        file.write(np.ascontiguousarray(chunk).data)
