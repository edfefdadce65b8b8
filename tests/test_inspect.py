"""`mla-fp4 inspect`: what it says of good layers, of foreign ones and of broken ones."""

from __future__ import annotations

import json

import numpy as np
import oracle
import pytest
from checkpoints import CONFIG, DATA, PREFIX, layer_tensors, write_checkpoint
from producers import PRODUCERS

from mla_fp4_jax import CheckpointError, load_mla_layer
from mla_fp4_jax.checkpoint.inspection import inspect_checkpoint
from mla_fp4_jax.cli import main

QUARK = DATA / "quark" / "mxfp4_kvb_only"
SNAPSHOT = """\
{path}: model_type deepseek_v3, quantization_config by quark

Layer 0, 596.4 KiB
  projection          shape       format      bytes  scales       config says  loading
  q_a_proj            96 x 256    BF16     48.0 KiB  -            excluded     kept exact
  q_a_layernorm       96          BF16        192 B  -            -            kept exact
  q_b_proj            768 x 96    BF16    144.0 KiB  -            excluded     kept exact
  kv_a_proj_with_mqa  160 x 256   BF16     80.0 KiB  -            excluded     kept exact
  kv_a_layernorm      128         BF16        256 B  -            -            kept exact
  kv_b_proj           1024 x 128  MXFP4    68.0 KiB  2^-6 .. 2^1  mxfp4        kept packed, its own bytes
  o_proj              256 x 512   BF16    256.0 KiB  -            excluded     kept exact

kv_b_proj is FP4 in 1 of 1 layers.
"""


# What the README promises, whatever the checkpoint.
LAYER = {"layer", "prefix", "loads", "problem", "weights", "unused", "notes"}
WEIGHT = set("field module format shape bytes declared excluded load exact packed scales problem".split())


def test_the_printed_table(capsys):
    assert main(["inspect", str(QUARK)]) == 0
    assert capsys.readouterr().out == SNAPSHOT.format(path=QUARK)


def test_the_json(capsys):
    assert main(["inspect", str(QUARK), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == inspect_checkpoint(QUARK)
    assert (found["model_type"], found["quant_method"], len(found["layers"])) == ("deepseek_v3", "quark", 1)
    kv_b = next(w for w in found["layers"][0]["weights"] if w["field"] == "kv_b_proj")
    assert kv_b == {
        "field": "kv_b_proj",
        "module": "model.layers.0.self_attn.kv_b_proj",
        "format": "MXFP4",
        "shape": [1024, 128],
        "bytes": 1024 * 128 * 17 // 32,
        "declared": "mxfp4",
        "excluded": False,
        "load": "kept packed, its own bytes",
        "exact": True,
        "packed": True,
        "scales": {"dtype": "U8", "count": 4096, "unit": "log2", "nan": 0, "min": -6, "median": -4.0, "max": 1},
        "problem": None,
    }


@pytest.mark.parametrize("producer", PRODUCERS)
def test_every_format_is_named_and_its_scales_counted(tmp_path, rng, producer):
    make, quantization = PRODUCERS[producer]
    parts, _, metadata = make(rng, 144, 64)
    tensors = layer_tensors(rng, kv_b="dense")
    del tensors[f"{PREFIX}kv_b_proj.weight"]
    tensors |= {f"{PREFIX}kv_b_proj.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    config = CONFIG | ({} if quantization is None else {"quantization_config": quantization})
    root = write_checkpoint(
        tmp_path, tensors, config, {f"{PREFIX}kv_b_proj.{key}": text for key, text in metadata.items()}
    )
    (layer,) = inspect_checkpoint(root)["layers"]
    assert layer["loads"] and layer["problem"] is None
    kv_b = next(w for w in layer["weights"] if w["field"] == "kv_b_proj")
    wanted = "NVFP4" if "nvfp4" in producer else "FP8" if "fp8" in producer else "MXFP4"
    assert kv_b["format"] == wanted
    assert kv_b["packed"] == kv_b["exact"] == (wanted != "FP8")
    assert kv_b["declared"] in (None, wanted.lower())
    scales = kv_b["scales"]
    assert scales["nan"] == 0 and scales["min"] <= scales["median"] <= scales["max"]
    if wanted == "MXFP4":
        assert scales["count"] >= 288 and -9 <= scales["min"] and scales["max"] <= 0
    json.dumps(layer)


@pytest.mark.parametrize("name", ["o_proj.weight", "kv_b_proj.weight_scale", "q_a_layernorm.weight"])
def test_a_layer_that_does_not_load_is_described_all_the_same(tmp_path, rng, capsys, name):
    tensors = layer_tensors(rng) | layer_tensors(rng, prefix="model.layers.1.self_attn.")
    del tensors[f"model.layers.1.self_attn.{name}"]
    root = write_checkpoint(tmp_path, tensors)
    found = inspect_checkpoint(root)["layers"]
    assert [layer["loads"] for layer in found] == [True, False]
    assert name.split(".")[0] in found[1]["problem"]
    assert all(set(layer) == LAYER and all(set(w) == WEIGHT for w in layer["weights"]) for layer in found)
    assert main(["inspect", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "DOES NOT LOAD" in printed and f"problem: {found[1]['problem']}" in printed
    assert "o_proj" in printed.partition("Layer 1")[2]


def test_nan_scales_are_counted_not_raised(tmp_path, rng, capsys):
    tensors = layer_tensors(rng)
    tensors[f"{PREFIX}kv_b_proj.weight_scale"][3:5, 1] = 255
    assert main(["inspect", str(write_checkpoint(tmp_path, tensors))]) == 0
    printed = capsys.readouterr().out
    assert ", 2 NaN" in printed and "DOES NOT LOAD" in printed and "2 of its 288 scales are NaN" in printed


@pytest.mark.parametrize(
    ("producer", "suffix", "value"),
    [
        ("quark nvfp4", "weight_scale_2", np.float32("nan")),
        ("compressed-tensors nvfp4", "weight_global_scale", np.zeros(1, np.float32)),
        ("deepseek fp8", "weight_scale_inv", np.full((2, 1), -1, np.float32)),
    ],
)
def test_scales_that_loading_refuses_are_a_problem(tmp_path, rng, producer, suffix, value):
    parts, _, _ = PRODUCERS[producer][0](rng, 144, 64)
    tensors = layer_tensors(rng, kv_b="dense")
    del tensors[f"{PREFIX}kv_b_proj.weight"]
    tensors |= {f"{PREFIX}kv_b_proj.{s}": np.asarray(part) for s, part in (parts | {suffix: value}).items()}
    root = write_checkpoint(tmp_path, tensors)
    (layer,) = inspect_checkpoint(root)["layers"]
    assert not layer["loads"] and f"kv_b_proj.{suffix} must be finite" in layer["problem"]
    with pytest.raises(CheckpointError, match=f"kv_b_proj.{suffix} must be finite"):
        load_mla_layer(root, 0)


@pytest.mark.parametrize("producer", ["quark nvfp4", "compressed-tensors nvfp4"])
def test_printed_scales_are_those_that_multiply_codes(tmp_path, rng, capsys, producer):
    parts, _, _ = PRODUCERS[producer][0](rng, 144, 64)
    tensors = layer_tensors(rng, kv_b="dense")
    del tensors[f"{PREFIX}kv_b_proj.weight"]
    tensors |= {f"{PREFIX}kv_b_proj.{s}": np.asarray(part) for s, part in parts.items()}
    assert main(["inspect", str(write_checkpoint(tmp_path, tensors))]) == 0
    scales = oracle.e4m3(parts["weight_scale"].view(np.uint8))
    scales = scales * float(parts.get("weight_scale_2", 1)) / float(parts.get("weight_global_scale", [1])[0])
    assert f"  {scales.min():.3g} .. {scales.max():.3g}  " in capsys.readouterr().out


def test_alike_layers_are_printed_together(tmp_path, rng, capsys):
    tensors = {}
    for i in range(5):
        tensors |= layer_tensors(rng, prefix=f"model.layers.{i}.self_attn.", kv_b="dense" if i == 2 else "mxfp4")
    assert main(["inspect", str(write_checkpoint(tmp_path, tensors))]) == 0
    printed = capsys.readouterr().out
    assert [line.split(",")[0] for line in printed.splitlines() if line.startswith("Layer")] == [
        "Layers 0 .. 1",
        "Layer 2",
        "Layers 3 .. 4",
    ]
    assert "kv_b_proj is FP4 in 4 of 5 layers; loading quantises nothing, mla-fp4 convert makes the rest" in printed


def test_no_latent_attention_is_said(tmp_path, capsys):
    root = write_checkpoint(tmp_path, {"model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4), np.float32)})
    assert main(["inspect", str(root)]) == 0
    assert "no attention layer with latent projections" in capsys.readouterr().out


def test_every_problem_of_a_layer_is_printed(tmp_path, rng, capsys):
    """A tensor that is missing, and a kv_b_proj that is not what the config calls it."""
    tensors = layer_tensors(rng)
    del tensors[f"{PREFIX}q_a_proj.weight"]
    root = write_checkpoint(tmp_path, tensors, CONFIG | {"quantization_config": {"quant_method": "fp8"}})
    assert main(["inspect", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "q_a_proj.weight [40, 96] is missing" in printed and "is MXFP4 by its tensors, but" in printed
    assert printed.endswith("kv_b_proj is FP4 in 0 of 1 layers; in 1 it is not read.\n")
