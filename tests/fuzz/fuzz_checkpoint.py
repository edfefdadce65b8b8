"""Coverage-guided fuzzing of everything that reads a checkpoint: whatever the bytes, a result or a CheckpointError.

    pip install atheris          (3.0 on Python 3.11)
    python tests/fuzz/fuzz_checkpoint.py tests/fuzz/corpus -max_total_time=600 -max_len=4096 -timeout=20

An input's first byte chooses what the rest stands for (TARGETS); test_fuzz_corpus.py replays the corpus without
atheris. New inputs that libFuzzer adds to the corpus are worth keeping while they are small.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

try:
    import atheris
except ImportError:
    atheris = None


PARTS = {
    "mla_fp4_jax": ("CheckpointError", "MLAConfig"),
    "mla_fp4_jax.checkpoint": ("SafetensorsFile",),
    "mla_fp4_jax.checkpoint.inspection": ("inspect_checkpoint",),
    "mla_fp4_jax.checkpoint.patterns": ("Patterns",),
    "mla_fp4_jax.checkpoint.plan": ("open_checkpoint", "plan_layer"),
    "mla_fp4_jax.checkpoint.quantization": ("read_quantization",),
    "mla_fp4_jax.checkpoint.strict_json": ("parse_object",),
}


def _import():
    """The library, imported where atheris can instrument it."""
    modules = {module: importlib.import_module(module) for module in PARTS}
    return {name: getattr(modules[module], name) for module, names in PARTS.items() for name in names}


if atheris is not None and __name__ == "__main__":
    with atheris.instrument_imports(include=["mla_fp4_jax"]):
        lib = _import()
else:
    lib = _import()

from checkpoints import CONFIG, layer_tensors, write_checkpoint  # noqa: E402

SMALL = CONFIG | {"hidden_size": 32, "num_attention_heads": 1, "q_lora_rank": None, "kv_lora_rank": 32}
SMALL |= {"qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 32}


class Fuzzed:
    """A directory whose files the inputs replace in turn."""

    def __init__(self):
        import numpy as np

        self.root = Path(tempfile.mkdtemp(prefix="fuzz_checkpoint"))
        rng = np.random.default_rng(0)
        self.good = write_checkpoint(self.root / "good", layer_tensors(rng))
        self.spoilt = self.root / "spoilt"

    def fresh(self) -> Path:
        shutil.rmtree(self.spoilt, ignore_errors=True)
        self.spoilt.mkdir()
        return self.spoilt

    def header(self, data: bytes) -> None:
        """A whole safetensors file."""
        path = self.fresh() / "a.safetensors"
        path.write_bytes(data)
        opened = lib["SafetensorsFile"](path)
        for name, entry in opened.entries.items():
            if not entry.dtype.startswith("F6"):
                assert opened.read(name).nbytes == entry.nbytes
        assert sum(entry.nbytes for entry in opened.entries.values()) < len(data)

    def layer(self, data: bytes) -> None:
        """A safetensors file beside a good config, read to the last value."""
        root = self.fresh()
        (root / "model.safetensors").write_bytes(data)
        (root / "config.json").write_text(json.dumps(SMALL))
        self.read(root)

    def config(self, data: bytes) -> None:
        """A config.json beside good tensors."""
        root = self.fresh()
        (root / "model.safetensors").symlink_to("../good/model.safetensors")
        shutil.copyfile(self.good / "model.safetensors", root / "model-1.safetensors")
        (root / "model.safetensors").unlink()
        (root / "config.json").write_bytes(data)
        self.read(root)

    def quantization(self, data: bytes) -> None:
        """A quantization_config, asked about modules."""
        value = lib["parse_object"](data, "fuzz", constants=True)
        said = lib["read_quantization"]({"quantization_config": value}, None)
        for module in ("model.layers.0.self_attn.kv_b_proj", "lm_head", ""):
            said.declared(module)

    def hf_config(self, data: bytes) -> None:
        """The sizes and rotary settings in a config."""
        lib["MLAConfig"].from_hf(lib["parse_object"](data, "fuzz", constants=True))

    def index(self, data: bytes) -> None:
        """An index of shards."""
        root = self.fresh()
        (root / "model.safetensors.index.json").write_bytes(data)
        shutil.copyfile(self.good / "model.safetensors", root / "model-1.safetensors")
        (root / "config.json").write_text(json.dumps(CONFIG))
        self.read(root)

    def pattern(self, data: bytes) -> None:
        """Patterns, a line each, matched with names."""
        texts = data.decode("utf-8", "replace").split("\n")
        patterns = lib["Patterns"](texts)
        for name in ("model.layers.0.self_attn.kv_b_proj", "a" * 400, ""):
            patterns.match(name)

    def read(self, root: Path) -> None:
        lib["inspect_checkpoint"](root)
        opened = lib["open_checkpoint"](root)
        for layer in opened.names.layers[:2]:
            for weight in lib["plan_layer"](opened, layer).weights:
                if len(weight.stored.shape) == 2:
                    rows = weight.reader.rows(weight.stored, slice(None))
                    assert rows.shape == weight.stored.shape


TARGETS = ("header", "layer", "config", "quantization", "hf_config", "index", "pattern")
_fuzzed: Fuzzed | None = None


def run_one(data: bytes) -> str:
    """Run one input; anything but a result or a CheckpointError escapes."""
    global _fuzzed
    _fuzzed = _fuzzed or Fuzzed()
    if not data:
        return "empty"
    try:
        getattr(_fuzzed, TARGETS[data[0] % len(TARGETS)])(data[1:])
    except lib["CheckpointError"] as error:
        assert len(str(error)) < 20000
        return "refused"
    return "read"


def write_corpus() -> None:
    """Seeds: one good input for each target and producer."""
    import numpy as np
    from producers import PRODUCERS

    from mla_fp4_jax.checkpoint import write_safetensors

    rng = np.random.default_rng(0)

    def seed(target: str, name: str, data: bytes) -> None:
        (HERE / "corpus" / f"{target}_{name}").write_bytes(bytes([TARGETS.index(target)]) + data)

    path = HERE / "corpus" / "seed"
    write_safetensors(path, {"a": np.arange(6, dtype=np.float32), "b": np.zeros((2, 2), np.uint8)}, {"k": "v"})
    seed("header", "small", path.read_bytes())
    prefix = "model.layers.0.self_attn."
    common = {
        f"{prefix}q_proj.weight": np.ones((4, 32), np.float16),
        f"{prefix}kv_a_proj_with_mqa.weight": np.ones((34, 32), np.uint8).view("u1"),
        f"{prefix}kv_a_layernorm.weight": np.ones(32, np.float32),
        f"{prefix}o_proj.weight": np.zeros((32, 32), np.float16),
    }
    common[f"{prefix}kv_a_proj_with_mqa.weight"] = np.ones((34, 32), np.float16)
    for producer, (make, quantization) in PRODUCERS.items():
        name = producer.replace(" ", "_").replace(",", "").replace("[", "").replace("]", "")
        parts, _, metadata = make(rng, 34, 32)
        tensors = {f"{prefix}kv_b_proj.{suffix}": np.asarray(part) for suffix, part in parts.items()}
        write_safetensors(path, common | tensors, {f"{prefix}kv_b_proj.{k}": v for k, v in metadata.items()})
        if producer in ("quark mxfp4", "compressed-tensors nvfp4", "torchao mxfp4", "deepseek fp8", "mxfp8"):
            seed("layer", name, path.read_bytes())
        if quantization is not None:
            seed("quantization", name, json.dumps(quantization).encode())
    path.unlink()
    seed("config", "small", json.dumps(CONFIG | {"quantization_config": {"quant_method": "quark"}}).encode())
    for family, about in json.loads((HERE.parent / "data" / "families.json").read_text()).items():
        seed("hf_config", family, json.dumps(about["config"]).encode())
    seed(
        "index",
        "small",
        b'{"metadata":{},"weight_map":{"model.layers.0.self_attn.o_proj.weight":"model-1.safetensors"}}',
    )
    seed("pattern", "mixed", rb"re:.*\.(q|kv)_[ab]_proj$" + b"\n*self_attn*\nlm_head\nre:a{2,4}[^a-c]+?x|^y$")


if __name__ == "__main__":
    if "--write-corpus" in sys.argv:
        write_corpus()
    elif atheris is None:
        raise SystemExit("atheris is not installed: pip install atheris")
    else:
        atheris.Setup(sys.argv, lambda data: run_one(data))
        atheris.Fuzz()
