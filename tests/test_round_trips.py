"""What convert writes, read by its formats' own producers: the same values, bit for bit.

Skipped without the packages, which are not among the project's. To run it:

    python -m venv /tmp/producers
    /tmp/producers/bin/pip install torch==2.13.0
    /tmp/producers/bin/pip install transformers compressed-tensors amd-quark safetensors accelerate pytest
    /tmp/producers/bin/pip install -e .
    /tmp/producers/bin/python -m pytest -W ignore tests/test_round_trips.py

Run on 2026-11-25 with torch 2.13.0+cpu, transformers 5.24.0, compressed-tensors 0.20.0, amd-quark 0.13 and
safetensors 0.8.0 on Python 3.11: 8 passed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
from checkpoints import DATA

from mla_fp4_jax.checkpoint import SafetensorsFile, write_safetensors

MODULES = ("kv_b_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
PREFIX = "model.layers.0.self_attn."

# In a process of its own, so that these packages and JAX do not share one.
CONVERT = """
import sys
from mla_fp4_jax.checkpoint.convert import convert_checkpoint
convert_checkpoint(*sys.argv[1:3], linears=sys.argv[3], config=sys.argv[4])
"""


def converted(root: Path, linears: str, method: str) -> Path:
    """The tiny DeepSeek-V3's first, dense layer with zeros for what is no attention, converted."""
    source = root / "source"
    source.mkdir()
    config = json.loads((DATA / "hf_mla" / "ckpt_v3_q96" / "config.json").read_text()) | {"num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    opened = SafetensorsFile(DATA / "hf_mla" / "ckpt_v3_q96" / "model.safetensors")
    tensors = {name: opened.read(name) for name in opened.entries}
    hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    others = {"model.embed_tokens": (words, hidden), "lm_head": (words, hidden), "model.norm": (hidden,)}
    others |= {f"model.layers.0.{n}_layernorm": (hidden,) for n in ("input", "post_attention")}
    others |= {f"model.layers.0.mlp.{n}_proj": (inner, hidden) for n in ("gate", "up")}
    others |= {"model.layers.0.mlp.down_proj": (hidden, inner)}
    tensors |= {f"{module}.weight": np.zeros(shape, ml_dtypes.bfloat16) for module, shape in others.items()}
    write_safetensors(source / "model.safetensors", tensors, {"format": "pt"})
    command = [sys.executable, "-c", CONVERT, str(source), str(root / "out"), linears, method]
    subprocess.run(command, check=True, cwd=DATA.parents[1])
    return root / "out"


def expected(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    """By the oracle, from the bytes as another package loaded them."""
    codes = next(
        tensors.get(f"{PREFIX}{module}.{s}")
        for s in ("weight_packed", "weight")
        if f"{PREFIX}{module}.{s}" in tensors
    )
    if f"{PREFIX}{module}.weight_scale" not in tensors:
        return codes
    return oracle.dequantize(oracle.unpack(codes), oracle.e8m0(tensors[f"{PREFIX}{module}.weight_scale"]))


def load_with_torch(root: Path) -> dict[str, np.ndarray]:
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = load_file(root / "model.safetensors")
    return {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}


@pytest.mark.parametrize("method", ["quark", "compressed-tensors"])
@pytest.mark.parametrize("linears", ["keep", "mxfp4"])
def test_safetensors_torch_loads_what_convert_writes(tmp_path, linears, method):
    pytest.importorskip("torch")
    root = converted(tmp_path, linears, method)
    tensors = load_with_torch(root)
    opened = SafetensorsFile(root / "model.safetensors")
    assert set(tensors) == set(opened.entries)
    for name, array in tensors.items():
        mine = opened.read(name)
        assert np.array_equal(array, mine.astype(np.float32) if array.dtype == np.float32 else mine)


@pytest.mark.parametrize("linears", ["keep", "mxfp4"])
def test_compressed_tensors_decodes_the_same_values(tmp_path, linears):
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    root = converted(tmp_path, linears, "compressed-tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        root,
        dtype=torch.bfloat16,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    )
    tensors = load_with_torch(root)
    for module in MODULES:
        weight = model.get_submodule(f"{PREFIX}{module}").weight.detach().float().numpy()
        assert np.array_equal(weight, expected(tensors, module)), module
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


@pytest.mark.parametrize("linears", ["keep", "mxfp4"])
def test_quark_decodes_the_same_values(tmp_path, linears):
    torch = pytest.importorskip("torch")
    pytest.importorskip("quark")
    transformers = pytest.importorskip("transformers")
    root = converted(tmp_path, linears, "quark")
    model = transformers.AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16)
    tensors = load_with_torch(root)
    for name in MODULES:
        module = model.get_submodule(f"{PREFIX}{name}")
        # Quark's linear decodes within forward: the unit matrix brings its weight out.
        unit = torch.eye(expected(tensors, name).shape[1], dtype=torch.bfloat16)
        with torch.no_grad():
            weight = module(unit).float().numpy().T
        assert np.array_equal(weight, expected(tensors, name)), name
