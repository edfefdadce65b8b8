"""The header of a safetensors file: parsed, and checked so that every offset in it can be trusted."""

from __future__ import annotations

import dataclasses
from typing import Any

from mla_fp4_jax.checkpoint.dtypes import BITS
from mla_fp4_jax.checkpoint.strict_json import parse_object, quoted
from mla_fp4_jax.errors import CheckpointError

METADATA_KEY = "__metadata__"
MAX_RANK = 32  # half of what NumPy can hold; weights have 2 or 3 axes
MAX_ELEMENTS = 1 << 60
LONGEST_NAME = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: its key.
        dtype: as safetensors spells it.
        shape: logical; an F4 tensor's last axis counts elements, not bytes.
        begin: its first byte, counted from the end of the header.
        end: the byte after its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def parse_header(raw: bytes, data_bytes: int, file: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors by name, in file order, and the metadata.

    Args:
        raw: the header's bytes.
        data_bytes: bytes between the header and the end of the file.
        file: the file's name, for messages.

    Raises:
        CheckpointError: anything but the format: an unknown dtype, a shape that does not fit its bytes or any
            memory, offsets that overlap, leave a hole or point past the end.
    """
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{file}: the header must begin with '{{'; got {quoted(raw[:8])}. Is it safetensors?")
    parsed = parse_object(raw, f"{file}: the header")
    metadata = _metadata(parsed.pop(METADATA_KEY, None), file)
    for name in parsed:
        check_name(name, f"{file}: the header")
    entries = [_entry(name, value, file) for name, value in parsed.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    position = 0
    for entry in entries:
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise _wrong(file, entry.name, f"begins at byte {entry.begin}, which {what} (expected {position}).")
        position = entry.end
        if position > data_bytes:
            raise _wrong(file, entry.name, f"ends at byte {position} of {data_bytes}: the file is cut short.")
    if position != data_bytes:
        raise CheckpointError(f"{file}: tensors must fill the file; {data_bytes - position} bytes belong to none.")
    return {entry.name: entry for entry in entries}, metadata


def check_name(name: str, where: str) -> None:
    """Raise CheckpointError for a tensor's name that could not be shown as it is: messages and reports hold names."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise CheckpointError(
            f"{where}: a tensor's name must be printable, of at most {LONGEST_NAME} characters; got {quoted(name)}."
        )


def _metadata(value: Any, file: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{file}: {METADATA_KEY} must map strings to strings.")
    return value


def _entry(name: str, value: Any, file: str) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _wrong(file, name, "must be described by exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _wrong(file, name, f"has dtype {quoted(dtype)}; known are {', '.join(BITS)}.")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise _wrong(file, name, f"has shape {quoted(shape)}; it must list at most {MAX_RANK} sizes >= 0.")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(file, name, f"has data_offsets {quoted(offsets)}; they must be [begin, end], 0 <= begin <= end.")
    elements, bound = 1, 1
    for size in shape:
        elements, bound = elements * size, bound * max(size, 1)
        if bound > MAX_ELEMENTS:
            raise _wrong(file, name, f"has shape {quoted(shape)}, too large for any memory.")
    bits, found = elements * BITS[dtype], 8 * (offsets[1] - offsets[0])
    if dtype == "F4" and (not shape or shape[-1] % 2):
        raise _wrong(file, name, f"is F4 {quoted(shape)}; its last axis must be even, two elements to a byte.")
    if bits != found:
        raise _wrong(file, name, f"is {dtype} {quoted(shape)}, {bits / 8:.16g} bytes, but occupies {found // 8}.")
    return TensorEntry(name, dtype, tuple(shape), *offsets)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_ELEMENTS for item in value)


def _wrong(file: str, name: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{file}: tensor {quoted(name)} {problem}")
