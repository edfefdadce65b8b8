"""Conversion: equals quantising by hand, keeps every other byte, goes on where it stopped, uses little memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checkpoints import CONFIG, DATA, PREFIX, layer_tensors, write_checkpoint, write_shards
from producers import PRODUCERS

from mla_fp4_jax import CheckpointError, FP4Array, load_mla_layer, load_mla_layers, quantize_mxfp4
from mla_fp4_jax.checkpoint import SafetensorsFile, convert
from mla_fp4_jax.checkpoint.convert import convert_checkpoint
from mla_fp4_jax.cli import main
from mla_fp4_jax.cli.layer_error import outlier_inputs

KV_B = f"{PREFIX}kv_b_proj"
LINEARS = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")  # q_b_proj has 40 columns


def tiny(rng, layers=2):
    """A bf16 checkpoint with tensors of other parts of a model."""
    tensors = {
        "model.embed_tokens.weight": rng.standard_normal((7, 96)),
        "lm_head.weight": np.ones((7, 96), np.float32),
    }
    for i in range(layers):
        tensors |= layer_tensors(rng, prefix=f"model.layers.{i}.self_attn.", kv_b="dense")
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = rng.standard_normal((96, 96)).astype(np.float16)
        tensors[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] = rng.standard_normal(5).astype(np.float32)
    return tensors


def all_tensors(root):
    return {
        name: file.read(name)
        for file in map(SafetensorsFile, sorted(root.glob("*.safetensors")))
        for name in file.entries
    }


def error_by_hand(values: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> float:
    wide = oracle.dequantize(oracle.unpack(packed), oracle.e8m0(scales))
    return float(np.sqrt(np.mean((wide - values) ** 2) / np.mean(values.astype(np.float64) ** 2)))


@pytest.mark.parametrize("rule", convert.RULES)
@pytest.mark.parametrize("method", ["quark", "compressed-tensors"])
def test_converting_a_real_checkpoint_is_quantising_by_hand(tmp_path, rule, method):
    source = DATA / "hf_mla" / "ckpt_v3_q96"
    report = convert_checkpoint(source, tmp_path / "out", scale_rule=rule, config=method)
    before, after = all_tensors(source), all_tensors(tmp_path / "out")
    values = before.pop(f"{KV_B}.weight")
    packed, scales = map(np.asarray, quantize_mxfp4(jnp.asarray(values), scale_rule=rule).to_packed())
    names = {"quark": "weight", "compressed-tensors": "weight_packed"}
    assert np.array_equal(after.pop(f"{KV_B}.{names[method]}"), packed)
    assert np.array_equal(after.pop(f"{KV_B}.weight_scale"), scales)
    assert {n: a.tobytes() for n, a in after.items()} == {n: a.tobytes() for n, a in before.items()}
    found = report["converted"][KV_B]
    assert found["relative_rms_error"] == pytest.approx(
        error_by_hand(values.astype(np.float32), packed, scales), rel=1e-6
    )
    assert (found["from"], found["bytes_before"], found["bytes_after"]) == (
        "BF16",
        2 * 1024 * 128,
        1024 * 128 * 17 // 32,
    )
    layer = load_mla_layer(tmp_path / "out", 0)
    assert np.array_equal(np.asarray(layer.weights.kv_b_proj.to_packed()[0]).reshape(packed.shape), packed)


@pytest.mark.parametrize("write", [write_checkpoint, write_shards])
def test_every_other_tensor_keeps_its_bytes_dtype_and_shard(tmp_path, rng, write):
    tensors = tiny(rng)
    source = write(tmp_path / "in", tensors)
    (source / "tokenizer.json").write_text('{"a": 1}')
    (source / "pytorch_model.bin").write_bytes(b"never opened")
    (source / ".hidden").write_text("")
    report = convert_checkpoint(source, tmp_path / "out", linears="mxfp4")
    after = all_tensors(tmp_path / "out")
    modules = [f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("kv_b_proj", *LINEARS)]
    assert sorted(report["converted"]) == sorted(modules)
    assert {m.rsplit(".", 1)[1] for m in report["kept"]} == {"q_b_proj"}
    assert "groups of 32 do not divide its 40 columns" in next(iter(report["kept"].values()))
    for name, array in tensors.items():
        if name.removesuffix(".weight") not in modules:
            assert after[name].dtype == array.dtype and after[name].tobytes() == array.tobytes()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"a": 1}'
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {p.name for p in source.iterdir()} - {"pytorch_model.bin", ".hidden"} | {"mla_fp4_report.json"}
    if write is write_shards:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(after)
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in after.values())
    for before, now in zip(load_mla_layers(source, [0, 1]), load_mla_layers(tmp_path / "out", [0, 1]), strict=True):
        assert isinstance(now.weights.o_proj, FP4Array) and not isinstance(before.weights.o_proj, FP4Array)
        assert np.array_equal(np.asarray(before.weights.q_b_proj), np.asarray(now.weights.q_b_proj))


@pytest.mark.parametrize("producer", [name for name in PRODUCERS if "fp8" not in name])
def test_what_is_fp4_already_passes_through(tmp_path, rng, producer):
    make, quantization = PRODUCERS[producer]
    parts, _, metadata = make(rng, 144, 64)
    tensors = layer_tensors(rng, kv_b="dense")
    del tensors[f"{KV_B}.weight"]
    tensors |= {f"{KV_B}.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    config = CONFIG | ({} if quantization is None else {"quantization_config": quantization})
    source = write_checkpoint(tmp_path / "in", tensors, config, {f"{KV_B}.{k}": v for k, v in metadata.items()})
    report = convert_checkpoint(source, tmp_path / "out")
    assert report["converted"] == {} and " already" in report["kept"][KV_B]
    before, after = (
        SafetensorsFile(source / "model.safetensors"),
        SafetensorsFile(tmp_path / "out" / "model.safetensors"),
    )
    assert set(before.entries) == set(after.entries)
    assert all(before.read(n).tobytes() == after.read(n).tobytes() for n in before.entries)
    assert after.metadata == (before.metadata or {"format": "pt"})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    # With other linears converted it still does, and all of it loads.
    convert_checkpoint(source, tmp_path / "more", linears="mxfp4")
    again = SafetensorsFile(tmp_path / "more" / "model.safetensors")
    assert all(again.read(f"{KV_B}.{s}").tobytes() == before.read(f"{KV_B}.{s}").tobytes() for s in parts)
    weights = load_mla_layer(tmp_path / "more", 0).weights
    assert weights.o_proj.format == "mxfp4" and weights.kv_b_proj.format == (
        "nvfp4" if "nvfp4" in producer else "mxfp4"
    )


@pytest.mark.parametrize("producer", [name for name in PRODUCERS if "fp8" in name])
def test_fp8_is_quantised_from_its_exact_values(tmp_path, rng, producer):
    make, quantization = PRODUCERS[producer]
    parts, expected, _ = make(rng, 144, 64)
    tensors = layer_tensors(rng, kv_b="dense")
    del tensors[f"{KV_B}.weight"]
    tensors |= {f"{KV_B}.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((4, 4), np.uint8)  # something that stays quantised
    config = CONFIG | ({} if quantization is None else {"quantization_config": quantization})
    source = write_shards(tmp_path / "in", tensors, config=config)
    convert_checkpoint(source, tmp_path / "out")
    weight = load_mla_layer(tmp_path / "out", 0).weights.kv_b_proj
    by_hand = quantize_mxfp4(jnp.asarray(expected))
    assert np.array_equal(np.asarray(weight.dequantize()).reshape(144, 64), np.asarray(by_hand.dequantize()))
    assert not any("scale_inv" in name for name in all_tensors(tmp_path / "out"))


def test_an_interrupted_conversion_goes_on_where_it_stopped(tmp_path, rng, monkeypatch):
    source = write_shards(tmp_path / "in", tiny(rng), shards=4)
    convert_checkpoint(source, tmp_path / "whole")
    original, written = convert.write_streamed, []

    def stops(path, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        original(path, *args)

    monkeypatch.setattr(convert, "write_streamed", stops)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(CheckpointError):
        load_mla_layer(tmp_path / "out", 0)
    (tmp_path / "out" / ".model-00003.0123456789abcdef.tmp").write_bytes(b"half a shard")
    again = []
    monkeypatch.setattr(
        convert, "write_streamed", lambda path, *args: (again.append(path.name), original(path, *args))
    )
    convert_checkpoint(source, tmp_path / "out")
    assert len(again) == 2 and not set(again) & set(written)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.bad_input
def test_an_interrupted_conversion_is_not_mixed_with_another(tmp_path, rng, monkeypatch):
    source = write_shards(tmp_path / "in", tiny(rng))
    monkeypatch.setattr(convert, "_copy_other_files", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="holds another conversion, unfinished"):
        convert_checkpoint(source, tmp_path / "out", scale_rule="floor")
    path = next(source.glob("*.safetensors"))
    os.utime(path, ns=(0, 0))
    with pytest.raises(CheckpointError, match="holds another conversion, unfinished"):
        convert_checkpoint(source, tmp_path / "out")
    (tmp_path / "out" / ".mla_fp4_convert.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        convert_checkpoint(source, tmp_path / "out")


@pytest.mark.bad_input
def test_a_target_that_holds_something_is_left_alone(tmp_path, rng):
    source = write_checkpoint(tmp_path / "in", tiny(rng))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(CheckpointError, match="must be another directory"):
        convert_checkpoint(source, source)
    convert_checkpoint(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="must be empty"):
        convert_checkpoint(source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kv_b": "nvfp4"}, "kv_b must be one of"),
        ({"linears": "int4"}, "linears must be one of"),
        ({"scale_rule": "round"}, "scale_rule must be one of"),
        ({"config": "gguf"}, "config must be one of"),
    ],
)
def test_options_that_are_none(tmp_path, rng, options, match):
    with pytest.raises(ValueError, match=match):
        convert_checkpoint(write_checkpoint(tmp_path / "in", tiny(rng)), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.bad_input
def test_values_that_are_not_finite_stop_it_and_leave_no_shard(tmp_path, rng):
    tensors = tiny(rng)
    tensors[f"{KV_B}.weight"][100, 3] = np.nan
    source = write_checkpoint(tmp_path / "in", tensors)
    with pytest.raises(CheckpointError, match=r"kv_b_proj\.weight must be finite; got NaN or infinity at \[100, 3\]"):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".mla_fp4_convert.json"]


CONFIGS = {
    "none": (None, True),
    "quark that excludes attention": (
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0"}},
            "layer_quant_config": {},
            "exclude": ["*self_attn*", "lm_head"],
        },
        True,
    ),
    "compressed-tensors of another format": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
            "ignore": [r"re:.*self_attn.*", "lm_head"],
        },
        True,
    ),
    "DeepSeek's FP8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]},
        False,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_config_says_what_each_weight_is(tmp_path, rng, case):
    quantization, complete = CONFIGS[case]
    tensors = tiny(rng)
    if quantization is not None:
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((96, 48), np.uint8)
        tensors["model.layers.0.mlp.up_proj.weight_scale"] = np.zeros((96, 3), np.uint8)
    config = CONFIG | {"num_hidden_layers": 2, "quantization_config": quantization}
    source = write_shards(tmp_path / "in", tensors, config=config)
    report = convert_checkpoint(source, tmp_path / "out")
    assert bool(report["notes"]) == (not complete)
    from mla_fp4_jax.checkpoint.quantization import read_quantization

    said = read_quantization(json.loads((tmp_path / "out" / "config.json").read_text()), None)
    for i in range(2):
        kv_b = said.declared(f"model.layers.{i}.self_attn.kv_b_proj")
        assert kv_b.format == "mxfp4" and not kv_b.excluded
        assert said.declared(f"model.layers.{i}.self_attn.o_proj").format in (
            {"none": "dense", "DeepSeek's FP8": "fp8"}.get(case, "dense"),
        )
    assert len(load_mla_layers(tmp_path / "out")) == 2


def test_layers_of_a_language_model_inside_another_are_described_there(tmp_path, rng):
    inner = CONFIG | {
        "model_type": "kimi_k2",
        "quantization_config": {"quant_method": "quark", "exclude": ["lm_head"]},
    }
    tensors = {f"language_model.{name}": array for name, array in tiny(rng, 1).items()}
    source = write_checkpoint(tmp_path / "in", tensors, {"model_type": "kimi_k25", "text_config": inner})
    convert_checkpoint(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(written) == {"model_type", "text_config"}
    assert (
        "language_model.model.layers.*.self_attn.kv_b_proj"
        in written["text_config"]["quantization_config"]["layer_quant_config"]
    )
    assert isinstance(load_mla_layer(tmp_path / "out", 0).weights.kv_b_proj, FP4Array)


MEMORY = """
import resource, sys
from mla_fp4_jax.checkpoint.convert import convert_checkpoint
convert_checkpoint(sys.argv[1], sys.argv[2], linears="mxfp4", scale_rule="mse")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_stays_below_twice_the_largest_tensor_and_a_gibibyte(tmp_path):
    large = 1 << 30
    config = CONFIG | {"hidden_size": 8192, "num_attention_heads": 128, "v_head_dim": 128, "qk_nope_head_dim": 128}
    rng = np.random.default_rng(0)
    block = rng.standard_normal((8192, 128)).astype(np.float16)
    shapes = {
        "q_a_proj": (40, 8192),
        "q_b_proj": (128 * 136, 40),
        "kv_a_proj_with_mqa": (72, 8192),
        "kv_b_proj": (128 * 256, 64),
        "o_proj": (8192, 128 * 128),
    }
    tensors = {f"{PREFIX}{m}.weight": np.resize(block, shape) for m, shape in shapes.items()}
    tensors |= {
        f"{PREFIX}{m}.weight": np.ones(n, np.float16) for m, n in (("q_a_layernorm", 40), ("kv_a_layernorm", 64))
    }
    tensors["model.embed_tokens.weight"] = np.zeros((large // 16384, 8192), np.float16)
    write_checkpoint(tmp_path / "in", tensors, config)
    del tensors
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "in"), str(tmp_path / "out")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < 2 * large + (1 << 30)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 >= peak


def test_inputs_with_outliers_are_what_they_say():
    x = outlier_inputs(7168, tokens=64)
    deviations = np.abs(x).max() / x.std()
    assert 15 < deviations < 60 and x.std() == pytest.approx(1.0, rel=0.1)


SNAPSHOT = """\
{source} -> {target}
  4 weights to MXFP4, scale rule mse, quark names: 57.0 KiB -> 15.1 KiB

Relative RMS error of the weights
  projection          from  weights   least  median    most
  kv_a_proj_with_mqa  BF16        1  {e:>6}  {e:>6}  {e:>6}
  kv_b_proj           BF16        1  {e:>6}  {e:>6}  {e:>6}
  o_proj              BF16        1  {e:>6}  {e:>6}  {e:>6}
  q_a_proj            BF16        1  {e:>6}  {e:>6}  {e:>6}

Relative RMS error of the layers' outputs, synthetic inputs with outlier channels
  1 layers: least {l}, median {l}, most {l}

Asked for, but kept as they are
  q_b_proj of 1 layers  groups of 32 do not divide its 40 columns

Every other tensor has its bytes. All figures: {target}/mla_fp4_report.json
"""


def test_the_command_prints_what_it_did(tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    write_checkpoint(source, layer_tensors(np.random.default_rng(7), kv_b="dense"))
    assert main(["convert", str(source), str(target), "--linears", "mxfp4", "--scale-rule", "mse"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((target / "mla_fp4_report.json").read_text())
    # The figures are the report's; everything else is the snapshot.
    for error in report["converted"].values():
        assert 0.08 < error["relative_rms_error"] < 0.13
    assert list(report["layer_errors"]) == ["0"] and 0 < report["layer_errors"]["0"] < 1
    import re

    blank = re.sub(r" *[0-9.]+ %", " %", printed)
    expected = re.sub(r" *\{e:>6\}| \{l\}", " %", SNAPSHOT).format(source=source, target=target)
    assert blank == expected


@pytest.mark.bad_input
def test_the_command_reports_errors_in_a_line(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("mla-fp4 convert: error: ")
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
