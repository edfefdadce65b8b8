"""Hostile and broken files: each gets a CheckpointError, quickly, in little memory, with nothing loaded."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest
from checkpoints import CONFIG, PREFIX, layer_tensors, raw_file, write_checkpoint, write_shards
from hypothesis import given
from hypothesis import strategies as st

from mla_fp4_jax import CheckpointError, MLAAttention, load_mla_layer, load_mla_layers
from mla_fp4_jax.checkpoint import SafetensorsFile, safetensors, write_safetensors
from mla_fp4_jax.checkpoint.header import parse_header
from mla_fp4_jax.checkpoint.inspection import inspect_checkpoint
from mla_fp4_jax.checkpoint.plan import open_checkpoint

pytestmark = pytest.mark.bad_input
INDEX = "model.safetensors.index.json"


def one(dtype="U8", shape=(4,), offsets=(0, 4), **more) -> dict:
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


def two(first, second) -> dict:
    entry = {"dtype": "U8"}
    return {
        name: entry | {"shape": [offsets[1] - offsets[0]], "data_offsets": list(offsets)}
        for name, offsets in (("a", first), ("b", second))
    }


HEADERS = {
    "empty object, data left over": ({}, "4 bytes belong to none"),
    "not an object": (b"[1]", "must begin with"),
    "leading space": (b' {"a":1}', "must begin with"),
    "not JSON": (b'{"x":', "not JSON"),
    "trailing garbage": (b"{}garbage", "not JSON"),
    "not UTF-8": (b'{"\xff":1}', "not UTF-8"),
    "the same key twice": (b'{"x":1,"x":2}', "'x' occurs twice"),
    "the same inner key twice": (
        b'{"x":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        "'dtype' occurs twice",
    ),
    "deep nesting": (b'{"x":' + b'{"y":' * 60000 + b"1" + b"}" * 60001, "nested too deeply|brackets"),
    "deep lists": (b'{"x":' + b"[" * 100000 + b"]" * 100000 + b"}", "brackets"),
    "NaN": (b'{"x":NaN}', "NaN is no JSON number"),
    "integer of 5000 digits": (b'{"x":' + b"9" * 5000 + b"}", "not JSON"),
    "entry is no object": ({"x": 3}, "exactly dtype, shape and data_offsets"),
    "key missing": ({"x": {"dtype": "U8", "shape": [4]}}, "exactly dtype"),
    "unknown key": (one(extra=1), "exactly dtype"),
    "unknown dtype": (one(dtype="F3"), "dtype 'F3'; known are"),
    "NumPy's dtype name": (one(dtype="uint8"), "dtype 'uint8'"),
    "dtype is a list": (one(dtype=["U8"]), "has dtype"),
    "negative size": (one(shape=[-4]), "sizes >= 0"),
    "size is a float": (one(shape=[4.0]), "sizes >= 0"),
    "size is true": (one(shape=[4, True]), "sizes >= 0"),
    "size is a string": (one(shape=["4"]), "sizes >= 0"),
    "shape is a number": ({"x": {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}}, "sizes >= 0"),
    "33 axes": (one(shape=[1] * 32 + [4]), "at most 32"),
    "size beyond 64 bits": (one(shape=[2**64]), "sizes >= 0"),
    "product overflows": (one(shape=[2**32, 2**32]), "too large"),
    "product overflows, then zero": (one(shape=[2**40, 2**40, 0], offsets=[0, 0]), "too large"),
    "shape needs more bytes": (one(shape=[5]), "5 bytes, but occupies 4"),
    "shape needs fewer bytes": (one(shape=[3]), "3 bytes, but occupies 4"),
    "dtype needs more bytes": (one(dtype="F32"), "16 bytes, but occupies 4"),
    "F4, odd last axis": (one(dtype="F4", shape=[2, 3], offsets=[0, 3]), "must be even"),
    "F4 scalar": (one(dtype="F4", shape=[], offsets=[0, 0]), "must be even"),
    "F6 not whole bytes": (one(dtype="F6_E2M3", shape=[5]), "3.75 bytes"),
    "negative offset": (one(offsets=[-4, 0]), "0 <= begin"),
    "offsets the wrong way": (one(offsets=[4, 0]), "0 <= begin"),
    "one offset": (one(offsets=[4]), "data_offsets"),
    "three offsets": (one(offsets=[0, 4, 8]), "data_offsets"),
    "offset is a float": (one(offsets=[0, 4.0]), "data_offsets"),
    "past the end": (one(shape=[5], offsets=[0, 5]), "ends at byte 5 of 4"),
    "far past the end": (one(shape=[2**50], offsets=[0, 2**50]), "cut short"),
    "overlap": (two((0, 3), (2, 4)), "'b' begins at byte 2, which overlaps"),
    "the same bytes twice": (two((0, 4), (0, 4)), "overlaps"),
    "hole": (two((0, 1), (2, 4)), "hole"),
    "hole at the start": (one(shape=[3], offsets=[1, 4]), "hole"),
    "bytes left over": (one(shape=[3], offsets=[0, 3]), "1 bytes belong to none"),
    "a name that forges a line": ({"x\nall is well": one()["x"]}, r"printable.*'x\\nall is well'"),
    "a name that is no text": ({"x\ud800": one()["x"]}, r"printable.*'x\\ud800'"),
    "a name of 2000 characters": ({"x" * 2000: one()["x"]}, "at most 1024 characters"),
    "metadata is a list": ({"__metadata__": [], **one()}, "strings to strings"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, **one()}, "strings to strings"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_header_is_refused(tmp_path, case):
    header, match = HEADERS[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file(header, b"\1\2\3\4"))
    with pytest.raises(CheckpointError, match=match) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x02\0\0",
        struct.pack("<Q", 0),
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", (1 << 64) - 1) + b"{}",
        b"PK\x03\x04" + b"\0" * 60,
        pickle.dumps({"x": 1}) * 4,
    ],
    ids=["empty", "3 bytes", "0", "past the end", "2^63", "2^64-1", "zip", "pickle"],
)
def test_a_bad_header_length_is_refused(tmp_path, raw):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="a.safetensors: the header must lie within the file"):
        SafetensorsFile(path)


def test_a_header_beyond_100_mb_is_refused_unread(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_009)  # sparse: takes no room
    with pytest.raises(CheckpointError, match="at most 100000000 bytes"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":' + b"[],".join([b"["] + [b""] * 700_000) + b"[]]}",
        b"{" + b",".join(b'"%d":{}' % i for i in range(200_000)) + b"}",
        b'{"x":[' + b"0," * 1_000_000 + b"0]}",
        b'{"x":{"dtype":"U8","shape":[' + b"4611686018427387904," * 100_000 + b'1],"data_offsets":[0,4]}}',
        b'{"x":"' + b"a" * 2_000_000 + b'"}',
    ],
    ids=["lists", "objects", "numbers", "a shape of 100000 axes", "a string"],
)
def test_a_json_bomb_costs_little(header):
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        parse_header(header, 4, "f")
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    assert peak < 32 * len(header)  # linear in the text: see strict_json
    assert seconds < 10  # of some 0.3


def test_names_cannot_forge_an_error_message(tmp_path):
    name = "x\n\x1b[31mmla-fp4: all is well\u202e\ud800" + "y" * 5000
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_file({name: 1}))
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert message.isprintable() and message.isascii() and len(message) < 1000


@given(data=st.data())
def test_any_mutation_of_a_valid_file_reads_or_is_refused(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("mutated")
    path = root / "a.safetensors"
    tensors = {"a": np.arange(6, dtype=np.float32), "b": np.arange(4, dtype=np.uint8).reshape(2, 2)}
    write_safetensors(path, tensors, {"k": "v"})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "drop", "swap"])):
            case "set":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[max(at, 1) :]
            case "insert":
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "drop":
                del raw[at : at + data.draw(st.integers(1, 9))]
            case "swap":
                other = data.draw(st.integers(0, len(raw) - 1))
                raw[at], raw[other] = raw[other], raw[at]
        if not raw:
            raw = bytearray(b"\0")
    path.write_bytes(raw)
    try:
        opened = SafetensorsFile(path)
    except CheckpointError:
        return
    # Whatever was accepted is consistent: every tensor reads, within the file.
    assert sum(opened.read(name).nbytes for name in opened.entries) <= len(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["U8", "F4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3))
def test_any_json_as_a_header_is_refused_or_valid(header):
    try:
        entries, _ = parse_header(json.dumps(header).encode(), 4, "f")
    except CheckpointError:
        return
    assert sum(entry.nbytes for entry in entries.values()) == 4


@given(
    dtype=st.sampled_from(["U8", "F4", "BF16", "F64", "F6_E3M2"]),
    shape=st.lists(st.integers(0, 9) | st.sampled_from([2**31, 2**32, 2**60, 2**63]), max_size=4),
    offsets=st.lists(st.integers(-1, 40), min_size=2, max_size=2),
)
def test_an_accepted_entry_fits_its_bytes(dtype, shape, offsets):
    try:
        entries, _ = parse_header(json.dumps(one(dtype, shape, offsets)).encode(), 32, "f")
    except CheckpointError:
        return
    bits = {"U8": 8, "F4": 4, "BF16": 16, "F64": 64, "F6_E3M2": 6}[dtype]
    assert entries["x"].nbytes * 8 == bits * int(np.prod(shape)) == 32 * 8


# Checkpoint directories.


def rewrite_index(root, change) -> None:
    index = json.loads((root / INDEX).read_text())
    change(index)
    (root / INDEX).write_text(json.dumps(index))


def move_all_to(shard):
    def change(index):
        index["weight_map"] = dict.fromkeys(index["weight_map"], shard)

    return change


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "./model-00001-of-00003.safetensors",
        "..",
        "",
        "/etc/passwd",
        "/etc/passwd.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "a\0.safetensors",
        "~/outside.safetensors",
        "https://example.org/a.safetensors",
        "missing.safetensors",
        "a" * 5000 + ".safetensors",
        "pytorch_model.bin",
        7,
        None,
        ["a.safetensors"],
    ],
    ids=str,
)
def test_shard_names_may_not_leave_the_directory(tmp_path, rng, shard):
    root = write_shards(tmp_path / "ckpt", layer_tensors(rng))
    write_safetensors(tmp_path / "outside.safetensors", layer_tensors(rng))
    (root / "sub").mkdir()
    write_safetensors(root / "sub" / "inside.safetensors", layer_tensors(rng))
    rewrite_index(root, move_all_to(shard))
    with pytest.raises(CheckpointError, match="ckpt") as caught:
        load_mla_layer(root, 0)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_link_out_of_the_directory_is_refused(tmp_path, rng):
    root = write_shards(tmp_path / "ckpt", layer_tensors(rng))
    write_safetensors(tmp_path / "outside.safetensors", layer_tensors(rng))
    (root / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    rewrite_index(root, move_all_to("link.safetensors"))
    with pytest.raises(CheckpointError, match="link that leaves the directory"):
        load_mla_layer(root, 0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_linked_main_files_are_held_to_the_same_rule(tmp_path, rng, name):
    root = write_checkpoint(tmp_path / "ckpt", layer_tensors(rng))
    (root / name).rename(tmp_path / name)
    (root / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="link that leaves the directory"):
        load_mla_layer(root, 0)


def test_a_link_within_the_directory_and_a_linked_directory_are_fine(tmp_path, rng):
    root = write_checkpoint(tmp_path / "ckpt", layer_tensors(rng))
    (root / "model.safetensors").rename(root / "real.safetensors")
    (root / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "alias").symlink_to(root)
    assert isinstance(load_mla_layer(tmp_path / "alias", 0), MLAAttention)


def test_the_hub_cache_is_all_links_and_loads(tmp_path, rng):
    repository = tmp_path / "models--org--name"
    root = write_shards(repository / "snapshots" / "0123abcd", layer_tensors(rng))
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(root.iterdir())):
        file.rename(repository / "blobs" / f"{i:040x}")
        file.symlink_to(os.path.join("..", "..", "blobs", f"{i:040x}"))
    assert isinstance(load_mla_layer(root, 0), MLAAttention)


def test_a_loop_of_links_is_refused(tmp_path, rng):
    root = write_checkpoint(tmp_path / "ckpt", layer_tensors(rng))
    (root / "model.safetensors").unlink()
    (root / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_mla_layer(root, 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_does_not_block(tmp_path, rng, name):
    root = write_checkpoint(tmp_path / "ckpt", layer_tensors(rng))
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(CheckpointError, match="must be a regular file"):
        load_mla_layer(root, 0)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "must have a weight_map"),
        (b'{"weight_map":[]}', "must have a weight_map"),
        (b'{"weight_map":{}}', "must have a weight_map"),
        (b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "'a' occurs twice"),
        (b'{"weight_map":' + b"[" * 90000, "brackets"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_bad_index_is_refused(tmp_path, rng, text, match):
    root = write_shards(tmp_path / "ckpt", layer_tensors(rng))
    (root / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=match):
        load_mla_layer(root, 0)


def test_an_index_that_lists_a_tensor_its_shard_lacks(tmp_path, rng):
    root = write_shards(tmp_path / "ckpt", layer_tensors(rng))
    index = json.loads((root / INDEX).read_text())["weight_map"]
    name = f"{PREFIX}o_proj.weight"
    other = next(shard for shard in index.values() if shard != index[name])
    rewrite_index(root, lambda value: value["weight_map"].update({name: other}))
    with pytest.raises(CheckpointError, match=f"{other}: has no tensor '{name}', though the index says so"):
        load_mla_layer(root, 0)


def test_a_shard_with_tensors_that_the_index_does_not_list(tmp_path, rng):
    root = write_shards(tmp_path / "ckpt", layer_tensors(rng) | {f"{PREFIX}q_proj.weight": np.zeros(3)})
    rewrite_index(root, lambda index: index["weight_map"].pop(f"{PREFIX}q_proj.weight"))
    with pytest.raises(CheckpointError, match="q_proj.weight in model-0000"):
        load_mla_layer(root, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["o_proj", "kv_a_layernorm"])
def test_dense_weights_must_be_finite(tmp_path, rng, value, dtype, name):
    import ml_dtypes

    dtype = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    tensors = layer_tensors(rng, dtype=dtype)
    tensors[f"{PREFIX}{name}.weight"].reshape(-1)[-1] = value
    root = write_checkpoint(tmp_path / "ckpt", tensors)
    with pytest.raises(CheckpointError, match=f"{name}.weight must be finite; got NaN or infinity at"):
        load_mla_layer(root, 0)


def test_a_nan_scale_is_refused_with_its_place(tmp_path, rng):
    tensors = layer_tensors(rng)
    tensors[f"{PREFIX}kv_b_proj.weight_scale"][17, 1] = 255
    root = write_checkpoint(tmp_path / "ckpt", tensors)
    with pytest.raises(CheckpointError, match=r"kv_b_proj.weight_scale must not hold 255.*\[17, 1\]"):
        load_mla_layer(root, 0)


def test_every_other_scale_byte_loads(tmp_path, rng):
    tensors = layer_tensors(rng)
    scales = tensors[f"{PREFIX}kv_b_proj.weight_scale"]
    scales.reshape(-1)[:255] = np.arange(255)
    layer = load_mla_layer(write_checkpoint(tmp_path / "ckpt", tensors), 0)
    kept = np.asarray(layer.weights.kv_b_proj.to_packed()[1])
    assert kept.reshape(scales.shape).tolist() == scales.tolist()


CONFIGS = {
    "empty": b"",
    "a list": b"[]",
    "not UTF-8": b"\xff",
    "deep": b"[" * 200_000,
    "no sizes": b"{}",
    "size negative": {"hidden_size": -96},
    "size zero": {"kv_lora_rank": 0},
    "size huge": {"hidden_size": 10**30},
    "size a string": {"num_attention_heads": "3"},
    "size a float": {"v_head_dim": 32.0},
    "size true": {"num_attention_heads": True},
    "size null": {"qk_nope_head_dim": None},
    "size a list": {"hidden_size": [96]},
    "theta NaN": {"rope_theta": float("nan")},
    "theta negative": {"rope_theta": -1.0},
    "theta a string": {"rope_theta": "10000"},
    "rope unknown": {"rope_scaling": {"type": "longrope", "factor": 2.0}},
    "rope a string": {"rope_scaling": "yarn"},
    "yarn factor infinite": {"rope_scaling": {"type": "yarn", "factor": float("inf")}},
    "rope odd": {"qk_rope_head_dim": 7},
    "bias a number": {"attention_bias": 1},
    "model unknown": {"model_type": "llama"},
    "model a list": {"model_type": ["deepseek_v3"]},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_is_refused(tmp_path, rng, case):
    root = write_checkpoint(tmp_path / "ckpt", layer_tensors(rng))
    value = CONFIGS[case]
    raw = value if isinstance(value, bytes) else json.dumps(CONFIG | value).encode()
    (root / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_mla_layer(root, 0)


@given(data=st.data())
def test_any_mutation_of_a_checkpoint_loads_or_is_refused(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("mutated")
    write_shards(root, layer_tensors(np.random.default_rng(0)), shards=2)
    file = data.draw(st.sampled_from(sorted(path.name for path in root.iterdir())))
    raw = bytearray((root / file).read_bytes())
    header = int.from_bytes(raw[:8], "little") + 8 if file.endswith(".safetensors") else len(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (root / file).write_bytes(raw)
    try:
        layer = load_mla_layer(root, 0)
    except CheckpointError as error:
        assert str(root) in str(error) and len(str(error)) < 3000
    else:
        assert layer.weights.kv_b_proj.shape == (3, 48, 64)


def test_a_file_that_changes_while_it_is_loaded(tmp_path, rng, monkeypatch):
    from mla_fp4_jax.checkpoint import plan

    root = write_checkpoint(tmp_path / "ckpt", layer_tensors(rng))
    planned = plan.plan_mla_layer(root, 0)
    with (root / "model.safetensors").open("r+b") as file:
        file.truncate(1000)  # reading the mapped tail would kill the process
    with pytest.raises(CheckpointError, match="changed while it was read"):
        planned.read(np.float32)


def test_loaded_weights_do_not_follow_the_file(tmp_path, rng):
    root = write_checkpoint(tmp_path / "ckpt", layer_tensors(rng))
    layer = load_mla_layer(root, 0)
    before = [np.asarray(value).copy() for value in layer.weights.kv_b_proj.to_packed() if value is not None]
    with (root / "model.safetensors").open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(b"\0" * size)
    after = [np.asarray(value) for value in layer.weights.kv_b_proj.to_packed() if value is not None]
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a, b)


def test_pickles_are_never_opened(tmp_path, rng):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    root = tmp_path / "ckpt"
    root.mkdir()
    (root / "config.json").write_text(json.dumps(CONFIG))
    (root / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="'pytorch_model.bin'. Only safetensors is read"):
        load_mla_layer(root, 0)
    assert not (tmp_path / "exploded").exists()


@given(data=st.data())
def test_any_mutation_of_any_format_loads_or_is_refused(tmp_path_factory, data):
    from producers import PRODUCERS

    producer = data.draw(st.sampled_from(sorted(PRODUCERS)))
    make, quantization = PRODUCERS[producer]
    parts, _, metadata = make(np.random.default_rng(0), 144, 64)
    tensors = layer_tensors(np.random.default_rng(0), kv_b="dense")
    del tensors[f"{PREFIX}kv_b_proj.weight"]
    tensors |= {f"{PREFIX}kv_b_proj.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    root = tmp_path_factory.mktemp("mutated")
    config = CONFIG | {"quantization_config": quantization or {}}
    write_checkpoint(root, tensors, config, {f"{PREFIX}kv_b_proj.{k}": text for k, text in metadata.items()})
    file = root / data.draw(st.sampled_from(["model.safetensors", "model.safetensors", "config.json"]))
    raw = bytearray(file.read_bytes())
    header = int.from_bytes(raw[:8], "little") + 8 if file.suffix == ".safetensors" else len(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        # Half of the changes hit the header or the config, half the values.
        at = data.draw(st.integers(0, header - 1) | st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            raw[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    file.write_bytes(raw)
    try:
        layer = load_mla_layer(root, 0)
    except CheckpointError as error:
        assert str(root) in str(error) and len(str(error)) < 3000
    else:
        assert layer.weights.kv_b_proj.shape == (3, 48, 64)


def test_a_broken_shard_is_parsed_once(tmp_path, rng, monkeypatch):
    """Each of many layers names it; its header may take a second to refuse."""
    tensors = {}
    for i in range(5):
        tensors |= layer_tensors(rng, prefix=f"model.layers.{i}.self_attn.")
    root = write_shards(tmp_path, tensors, shards=1)
    path = next(root.glob("*.safetensors"))
    path.write_bytes(raw_file(b"{nonsense"))
    opened = []
    original = safetensors.parse_header
    monkeypatch.setattr(safetensors, "parse_header", lambda *args: (opened.append(args), original(*args))[1])
    found = inspect_checkpoint(root)["layers"]
    assert len(opened) == 1 and len(found) == 5
    assert all(not layer["loads"] and f"{path}: the header" in layer["problem"] for layer in found)


def test_an_index_of_ever_more_layers_takes_moments(tmp_path, rng):
    root = write_shards(tmp_path, layer_tensors(rng), shards=1)
    index = json.loads((root / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    index["weight_map"] |= {f"model.layers.{i}.self_attn.kv_b_proj.weight": shard for i in range(5000, 200_000)}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    assert len(open_checkpoint(root).names.layers) == 5001  # numbers of 5 digits are no layers
    assert len(load_mla_layers(root)) == 1


@pytest.mark.parametrize(("text", "match"), [('{"quantization": 3}', "must be an object"), ("{", "not JSON")])
def test_a_bad_hf_quant_config_is_named(tmp_path, rng, text, match):
    root = write_checkpoint(tmp_path, layer_tensors(rng))
    (root / "hf_quant_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"hf_quant_config\.json.*{match}"):
        load_mla_layer(root, 0)
