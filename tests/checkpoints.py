"""Small synthetic checkpoints for tests, as Hugging Face and AMD Quark lay them out."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from mla_fp4_jax.checkpoint import write_safetensors

DATA = Path(__file__).parent / "data"
PREFIX = "model.layers.0.self_attn."
# All sizes differ, so that no two axes can be confused; 64 latent columns are two MXFP4 groups.
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 96,
    "num_attention_heads": 3,
    "q_lora_rank": 40,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "num_hidden_layers": 1,
    "rope_theta": 10000.0,
}


def mxfp4_tensors(rng: np.random.Generator, name: str, rows: int, columns: int) -> dict[str, np.ndarray]:
    """A Quark MXFP4 weight of random bytes."""
    return {
        f"{name}.weight": rng.integers(0, 256, (rows, columns // 2), np.uint8),
        f"{name}.weight_scale": rng.integers(118, 128, (rows, columns // 32), np.uint8),
    }


def layer_tensors(
    rng: np.random.Generator, *, prefix: str = PREFIX, kv_b: str = "mxfp4", dtype=ml_dtypes.bfloat16
) -> dict[str, np.ndarray]:
    """One layer's tensors under CONFIG's sizes."""

    def dense(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.1).astype(dtype)

    tensors = {
        "q_a_proj.weight": dense(40, 96),
        "q_a_layernorm.weight": dense(40),
        "q_b_proj.weight": dense(3 * 24, 40),
        "kv_a_proj_with_mqa.weight": dense(72, 96),
        "kv_a_layernorm.weight": dense(64),
        "o_proj.weight": dense(96, 3 * 32),
    }
    rows = 3 * 48
    tensors |= mxfp4_tensors(rng, "kv_b_proj", rows, 64) if kv_b == "mxfp4" else {"kv_b_proj.weight": dense(rows, 64)}
    return {f"{prefix}{name}": array for name, array in tensors.items()}


def write_checkpoint(
    root: Path, tensors: dict[str, np.ndarray], config: dict | None = None, metadata: dict[str, str] | None = None
) -> Path:
    """A directory with one file."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    write_safetensors(root / "model.safetensors", tensors, metadata)
    return root


def write_shards(
    root: Path,
    tensors: dict[str, np.ndarray],
    shards: int = 3,
    config: dict | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """The same in shards, with an index."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        write_safetensors(root / file, part, metadata)
        weight_map |= dict.fromkeys(part, file)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return root


def raw_file(header: bytes | dict, data: bytes = b"") -> bytes:
    """The bytes of a safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
