"""Our safetensors reader and writer: every dtype, the documented bytes, files of others, atomic writes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mla_fp4_jax import CheckpointError
from mla_fp4_jax.checkpoint import SafetensorsFile, write_safetensors
from mla_fp4_jax.checkpoint.dtypes import BITS, NUMPY

DATA = Path(__file__).parent / "data"


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5), (4, 0, 2)])
def test_every_dtype_survives_writing_and_reading(tmp_path, rng, name, shape):
    dtype = NUMPY[name]
    raw = rng.integers(0, 2 if name == "BOOL" else 256, (*shape, dtype.itemsize), np.uint8)
    array = raw.reshape(-1).view(dtype).reshape(shape)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": array}, {"made": "here"})
    opened = SafetensorsFile(path)
    assert same_bytes(opened.read("x"), array)
    assert opened.entries["x"].dtype == name
    assert opened.metadata == {"made": "here"}


def test_f4_is_two_to_a_byte_with_the_even_index_low(tmp_path):
    values = np.array([[0.5, 1.0, -6.0, 0.0], [1.5, 2.0, 3.0, 4.0]], ml_dtypes.float4_e2m1fn)
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": values})
    opened = SafetensorsFile(path)
    # Codes 1, 2, 15, 0 and 3, 4, 5, 6; the header's shape counts elements.
    assert opened.read("x").tolist() == [[0x21, 0x0F], [0x43, 0x65]]
    assert (opened.entries["x"].dtype, opened.entries["x"].shape) == ("F4", (2, 4))


def test_the_bytes_are_the_documented_format(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"b": np.array([7], np.uint8), "a": np.array([[1.5, -2.0]], np.float32)}, {"k": "v"})
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length]) == {
        "__metadata__": {"k": "v"},
        "a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [8, 9]},
    }
    assert raw[8 + length :] == struct.pack("<ff", 1.5, -2.0) + b"\x07"


def test_a_file_written_by_hand_is_read(tmp_path):
    # Unaligned on purpose: a header of odd length, then a byte before the bf16 tensor.
    header = (
        b'{"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"h":{"data_offsets":[1,5],"dtype":"BF16","shape":[2]},"__metadata__":{}}   '
    )
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\xff" + b"\x80\x3f\x00\xc0")
    opened = SafetensorsFile(path)
    assert opened.read("h").astype(np.float32).tolist() == [1.0, -2.0]
    assert opened.read("u").tolist() == [255]


@pytest.mark.parametrize("path", sorted(DATA.glob("*/*/model.safetensors")), ids=lambda path: path.parent.name)
def test_files_of_other_writers_are_read(path):
    opened = SafetensorsFile(path)
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert set(opened.entries) == set(header) - {"__metadata__"}
    for name in opened.entries:
        begin, end = header[name]["data_offsets"]
        assert opened.read(name).tobytes() == raw[8 + length + begin : 8 + length + end]


def test_the_safetensors_package_agrees(tmp_path, rng):
    numpy_api = pytest.importorskip("safetensors.numpy")
    arrays = {
        f"{name}.{i}": rng.integers(0, 2, (i, 3)).astype(NUMPY[name])
        for i, name in enumerate(["F32", "I64", "U8", "F16", "BOOL", "I32"])
    }
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, arrays, {"a": "b"})
    numpy_api.save_file(arrays, theirs, {"a": "b"})
    loaded, opened = numpy_api.load_file(ours), SafetensorsFile(theirs)
    for name, array in arrays.items():
        assert same_bytes(loaded[name], array)
        assert same_bytes(opened.read(name), array)


def test_reading_copies_nothing_and_gives_no_way_to_write(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.arange(8.0)})
    opened = SafetensorsFile(path)
    first, second = opened.read("x"), opened.read("x")
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    del opened
    assert first.tolist() == list(range(8))


def test_jax_arrays_are_written(tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    path = tmp_path / "a.safetensors"
    codes = jnp.asarray([[1, 2, 3, 4]], jnp.uint8)
    write_safetensors(path, {"h": jnp.ones((2, 2), jnp.bfloat16), "u": codes})
    assert SafetensorsFile(path).read("u").tolist() == [[1, 2, 3, 4]]
    assert SafetensorsFile(path).read("h").dtype == ml_dtypes.bfloat16


def test_a_non_contiguous_array_is_written_in_logical_order(tmp_path, rng):
    array = rng.standard_normal((6, 4)).astype(np.float32).T[::2]
    write_safetensors(tmp_path / "a.safetensors", {"x": array})
    assert SafetensorsFile(tmp_path / "a.safetensors").read("x").tolist() == array.tolist()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.zeros(3)})
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"x": np.ones(3)})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_replacing_a_file_leaves_open_readers_on_the_old_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.zeros(3)})
    opened = SafetensorsFile(path)
    view = opened.read("x")
    write_safetensors(path, {"x": np.ones(3)})
    assert view.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(CheckpointError, match="changed while it was read"):
        opened.read("x")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "match"),
    [
        ({"x": np.array(["text"])}, None, TypeError, "x must have a dtype of safetensors"),
        ({"x": np.zeros(3, np.complex128)}, None, TypeError, "complex128"),
        ({"x": np.zeros(3, ml_dtypes.float4_e2m1fn)}, None, ValueError, "even last axis"),
        ({"__metadata__": np.zeros(3)}, None, ValueError, "reserved"),
        ({"x": np.zeros(3)}, {"k": 1}, ValueError, "strings"),
    ],
)
def test_what_the_format_cannot_hold_is_not_written(tmp_path, tensors, metadata, error, match):
    with pytest.raises(error, match=match):
        write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.bad_input
def test_six_bit_tensors_are_listed_but_not_read(tmp_path):
    header = b'{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0")
    opened = SafetensorsFile(path)
    assert opened.entries["x"].nbytes == 3
    with pytest.raises(CheckpointError, match=r"'x' is F6_E2M3 \[4\]; F6_E2M3 is not read"):
        opened.read("x")
    with pytest.raises(CheckpointError, match="no tensor 'y'"):
        opened.read("y")


def test_every_dtype_of_the_format_is_known():
    # Each is read as a NumPy dtype of its width, but for the sub-byte ones.
    assert all(NUMPY[name].itemsize * 8 == bits for name, bits in BITS.items() if bits >= 8)
