"""Conversions that are killed, run out of disk, or start from what other tools left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import oracle
import pytest
from checkpoints import CONFIG, PREFIX, layer_tensors, raw_file, write_checkpoint, write_shards
from producers import codes_and_e8m0, nvfp4_multiplied
from test_checkpoint_formats import gguf_order
from test_convert import all_tensors, tiny

from mla_fp4_jax import CheckpointError, load_mla_layer, load_mla_layers
from mla_fp4_jax.checkpoint import convert, write_safetensors, writer
from mla_fp4_jax.checkpoint.convert import convert_checkpoint
from mla_fp4_jax.checkpoint.convert_state import alone_in
from mla_fp4_jax.checkpoint.inspection import inspect_checkpoint
from mla_fp4_jax.cli import main

KV_B = f"{PREFIX}kv_b_proj"

# Writes slowly, so that a signal finds it in the middle of a shard.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are started without
from mla_fp4_jax.checkpoint import convert
original = convert.write_streamed
def slowly(path, tensors, metadata):
    for tensor in tensors:
        chunks = tensor.chunks
        object.__setattr__(tensor, "chunks", lambda chunks=chunks: (time.sleep(0.1) or chunk for chunk in chunks()))
    original(path, tensors, metadata)
convert.write_streamed = slowly
convert.convert_checkpoint(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_conversion_killed_within_a_shard_goes_on(tmp_path, rng, sent):
    source, target = write_shards(tmp_path / "in", tiny(rng), shards=4), tmp_path / "out"
    convert_checkpoint(source, tmp_path / "whole")
    run = subprocess.Popen([sys.executable, "-c", SLOW, str(source), str(target)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (len(list(target.glob("model*"))) == 1 and list(target.glob(".model*.tmp"))):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    run.send_signal(sent)
    assert run.wait(60) != 0
    left = [path.name for path in target.iterdir()]
    assert "config.json" not in left and any(name.endswith(".tmp") for name in left) == (sent == signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in target.glob("model*")}
    convert_checkpoint(source, target)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_a_full_disk_is_said_and_the_rest_follows_later(tmp_path, rng, monkeypatch, capsys):
    source, target, real = write_shards(tmp_path / "in", tiny(rng), shards=4), tmp_path / "out", os.fsync
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(writer.os, "fsync", full)
    assert main(["convert", str(source), str(target)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not list(target.glob(".*.tmp")) and not (target / "config.json").exists()
    monkeypatch.undo()
    assert main(["convert", str(source), str(target)]) == 0
    assert len(load_mla_layers(target, [0, 1])) == 2


@pytest.mark.bad_input
def test_a_target_that_is_a_file_or_the_source_by_another_name(tmp_path, rng):
    source = write_checkpoint(tmp_path / "in", tiny(rng))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file: cannot be written to"):
        convert_checkpoint(source, tmp_path / "file")
    (tmp_path / "alias").symlink_to(source)
    with pytest.raises(CheckpointError, match="must be another directory than the source"):
        convert_checkpoint(source, tmp_path / "alias")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.bad_input
def test_two_conversions_do_not_write_to_one_target(tmp_path, rng):
    source, target = write_checkpoint(tmp_path / "in", tiny(rng)), tmp_path / "out"
    with alone_in(target), pytest.raises(CheckpointError, match="another conversion is writing to it"):
        convert_checkpoint(source, target)
    assert list(target.iterdir()) == []
    convert_checkpoint(source, target)
    assert (target / "config.json").exists()


def test_what_is_not_copied_is_said(tmp_path, rng):
    source = write_checkpoint(tmp_path / "in", tiny(rng))
    (source / "extra.safetensors").write_bytes(raw_file({}))
    (source / "pytorch_model.bin.index.json").write_text("{}")
    (source / "inference").mkdir()
    report = convert_checkpoint(source, tmp_path / "out")
    assert report["notes"] == ["not copied: extra.safetensors, inference, pytorch_model.bin.index.json"]


def with_extra(source, file, name, array):
    """Another tensor in a shard, unknown to the index."""
    tensors = {n: np.array(a) for n, a in all_tensors(source).items()}
    opened = convert.open_checkpoint(source).checkpoint.open(file)
    write_safetensors(source / file, {n: tensors[n] for n in opened.entries} | {name: array})


def test_the_index_decides_which_of_two_copies_holds(tmp_path, rng):
    source = write_shards(tmp_path / "in", tiny(rng))
    before = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(before.values()))
    other = next(shard for shard in reversed(shards) if shard != before["lm_head.weight"])
    with_extra(source, other, "lm_head.weight", np.zeros((7, 96), np.float32))
    with_extra(source, other, "foreign.weight", np.zeros(3, np.float32))
    convert_checkpoint(source, tmp_path / "out")
    after = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert after["lm_head.weight"] == before["lm_head.weight"] and "foreign.weight" not in after
    with_extra(source, next(s for s in shards if s != before[f"{KV_B}.weight"]), f"{KV_B}.weight", np.zeros(3))
    with pytest.raises(CheckpointError, match=rf"does not use: {KV_B}\.weight in"):
        convert_checkpoint(source, tmp_path / "again")


@pytest.mark.parametrize("others", [False, True])
def test_modelopts_own_file_follows(tmp_path, rng, others):
    tensors = tiny(rng)
    if others:
        parts = nvfp4_multiplied(rng, 96, 96)[0]
        tensors |= {f"model.layers.0.mlp.up_proj.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    source = write_checkpoint(tmp_path / "in", tensors, CONFIG | {"num_hidden_layers": 2})
    said = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    report = convert_checkpoint(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    path = tmp_path / "out" / "hf_quant_config.json"
    # It describes the other tensors, if they are quantised; nothing else would. Otherwise it is out of date.
    assert path.exists() == others and ("quantization_config" in config) == (not others)
    if others:
        excluded = json.loads(path.read_text())["quantization"]["exclude_modules"]
        assert excluded == ["lm_head", "model.layers.*.self_attn.kv_b_proj"]
        assert "hf_quant_config.json lists the converted modules as excluded" in report["notes"][0]
    assert [layer.weights.kv_b_proj.format for layer in load_mla_layers(tmp_path / "out")] == ["mxfp4"] * 2


@pytest.mark.parametrize("blocks", [False, True])
def test_ggufs_order_becomes_the_usual_one(tmp_path, rng, blocks, capsys):
    packed, scales, expected = codes_and_e8m0(rng, 144, 64)
    tensors, stored = layer_tensors(rng), gguf_order(packed)
    tensors |= {f"{KV_B}.weight": stored, f"{KV_B}.weight_scale": scales}
    if blocks:
        del tensors[f"{KV_B}.weight_scale"]
        tensors[f"{KV_B}.weight"] = np.concatenate([scales[..., None], stored.reshape(144, 2, 16)], -1).reshape(
            144, 34
        )
    source = write_checkpoint(tmp_path / "in", tensors)
    option = ["--nibble-order", "gguf"]
    assert main(["inspect", str(source), *option]) == 0
    assert "kept packed" in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "out"), "--kv-b", "keep", *option]) == 0
    after = all_tensors(tmp_path / "out")
    assert np.array_equal(after[f"{KV_B}.weight"], packed) and np.array_equal(after[f"{KV_B}.weight_scale"], scales)
    report = json.loads((tmp_path / "out" / "mla_fp4_report.json").read_text())
    assert report["converted"][KV_B]["relative_rms_error"] == 0 and report["nibble_order"] == "gguf"
    weight = load_mla_layer(tmp_path / "out", 0).weights.kv_b_proj
    assert np.array_equal(np.asarray(weight.dequantize()).reshape(144, 64), expected)
    assert np.array_equal(expected, oracle.dequantize(oracle.unpack(packed), oracle.e8m0(scales)))


@pytest.mark.parametrize("method", ["quark", "compressed-tensors"])
def test_a_second_conversion_adds_to_the_first(tmp_path, rng, method):
    tensors = tiny(rng) | {"model.layers.0.mlp.down_proj.weight": np.ones((4, 4), np.uint8)}  # stays quantised
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = CONFIG | {"num_hidden_layers": 2, "quantization_config": quantization}
    source = write_shards(tmp_path / "in", tensors, config=config)
    convert_checkpoint(source, tmp_path / "once", config=method)
    convert_checkpoint(tmp_path / "once", tmp_path / "twice", linears="mxfp4", config=method)
    for layer in inspect_checkpoint(tmp_path / "twice")["layers"]:
        said = {w["field"]: (w["format"], w["declared"]) for w in layer["weights"] if len(w["shape"]) == 2}
        assert said.pop("q_b_proj") == ("BF16", "fp8")  # 40 columns
        assert layer["loads"] and set(said.values()) == {("MXFP4", "mxfp4")}
