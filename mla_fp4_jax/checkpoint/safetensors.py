"""Our own safetensors reader: no pickle, no code, nothing trusted, tensors as views of the mapped file.

Format: 8 bytes little-endian header length N, N bytes JSON, then the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mla_fp4_jax.checkpoint.dtypes import NUMPY
from mla_fp4_jax.checkpoint.header import TensorEntry, parse_header
from mla_fp4_jax.checkpoint.strict_json import MAX_JSON_BYTES, quoted
from mla_fp4_jax.errors import CheckpointError

LENGTH_BYTES = 8


class SafetensorsFile:
    """An open safetensors file whose header has been checked in full.

    Attributes:
        path: the file.
        entries: its tensors by name.
        metadata: the header's `__metadata__`.
    """

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]

    def __init__(self, path: str | os.PathLike[str]):
        """Map a file and check its header.

        Raises:
            CheckpointError: it cannot be read, or is not a valid safetensors file.
        """
        self.path = Path(path)
        descriptor = open_regular(self.path)
        try:
            info = os.fstat(descriptor)
            self._signature = _signature(info)
            length = self._header_length(os.pread(descriptor, LENGTH_BYTES, 0), info.st_size)
            raw = os.pread(descriptor, length, LENGTH_BYTES)
            if len(raw) != length:
                raise self._changed()
            self._data_begin = LENGTH_BYTES + length
            data_bytes = info.st_size - self._data_begin
            self.entries, self.metadata = parse_header(raw, data_bytes, str(self.path))
            self._map = mmap.mmap(descriptor, info.st_size, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read ({error.strerror}).") from error
        except ValueError as error:
            if isinstance(error, CheckpointError):
                raise
            raise self._changed() from error  # mmap's words for a file that shrank under it
        finally:
            os.close(descriptor)

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the file, in file order of bytes; nothing is copied.

        Args:
            name: one of `entries`.

        Returns:
            The tensor in its own dtype (ml_dtypes' where NumPy has none). F4 comes as packed uint8
            [..., C/2], the element with the even index in the low nibble.

        Raises:
            CheckpointError: no such tensor, a dtype NumPy cannot hold, or the file has changed since it was
                opened.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: has no tensor {quoted(name)}.")
        # A mapped file that has been cut short kills the process when read: look first.
        self.check_unchanged()
        if entry.dtype == "F4":
            dtype, shape = np.dtype(np.uint8), (*entry.shape[:-1], entry.shape[-1] // 2)
        elif entry.dtype in NUMPY:
            dtype, shape = NUMPY[entry.dtype], entry.shape
        else:
            raise CheckpointError(f"{self.path}: tensor {quoted(name)} is {entry}; {entry.dtype} is not read.")
        if entry.nbytes == 0:
            return np.zeros(shape, dtype)
        flat = np.frombuffer(self._map, np.uint8, count=entry.nbytes, offset=self._data_begin + entry.begin)
        return flat.view(dtype).reshape(shape)

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """A tensor's bytes as they are, at most `size` at a time, read rather than mapped: for copying them."""
        entry = self.entries[name]
        self.check_unchanged()
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._data_begin + entry.begin)
            left = entry.nbytes
            while left:
                chunk = file.read(min(size, left))
                if not chunk:
                    raise self._changed()
                left -= len(chunk)
                yield chunk
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file is no longer the one that was opened."""
        try:
            unchanged = _signature(os.stat(self.path)) == self._signature
        except OSError:
            unchanged = False
        if not unchanged:
            raise self._changed()

    def _header_length(self, raw: bytes, file_bytes: int) -> int:
        length = int.from_bytes(raw, "little")
        if len(raw) < LENGTH_BYTES or length == 0 or length > file_bytes - LENGTH_BYTES:
            raise CheckpointError(
                f"{self.path}: the header must lie within the file; got {length} bytes in a file of "
                f"{file_bytes}. It is cut short, or not safetensors."
            )
        if length > MAX_JSON_BYTES:
            raise CheckpointError(f"{self.path}: the header must be at most {MAX_JSON_BYTES} bytes; got {length}.")
        return length

    def _changed(self) -> CheckpointError:
        return CheckpointError(f"{self.path}: changed while it was read. Load it again once it is complete.")


def open_regular(path: Path) -> int:
    """Open a regular file for reading; pipes and devices, which could block for ever, are refused.

    Raises:
        CheckpointError: no such file, no permission, not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"{path}: cannot be read ({reason}).") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: must be a regular file.")
    return descriptor


def _signature(info: os.stat_result) -> tuple[int, int, int, int]:
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
