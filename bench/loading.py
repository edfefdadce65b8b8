"""How fast load_mla_layers loads a DeepSeek-V3-shaped checkpoint of packed weights, all of it in the page cache.

    python -m bench.loading [--layers 61] [--directory DIR] [--json FILE]

Writes the checkpoint to DIR (100 MB a layer; removed afterwards), reads it once, loads it in a fresh process for each
run, and beside it times a plain copy of the same bytes into new memory: what the operating system allows.
"""

from __future__ import annotations

import argparse
import json
import mmap
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
SHAPES = {
    "q_a_proj": (1536, 7168),
    "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, 7168),
    "kv_b_proj": (32768, 512),
    "o_proj": (7168, 16384),
}
LOAD = """
import sys, time
from mla_fp4_jax import load_mla_layers
times = []
for _ in range(int(sys.argv[2])):
    start = time.perf_counter()
    layers = load_mla_layers(sys.argv[1], progress=False)
    times.append(time.perf_counter() - start)
    del layers
import jax
print(jax.__version__, *times)
"""


def write_model(root: Path, layers: int) -> int:
    """The checkpoint, in MXFP4 of random bytes, a shard a layer; returns its bytes."""
    from mla_fp4_jax.checkpoint import write_safetensors

    rng = np.random.default_rng(0)
    random = {
        module: (rng.integers(0, 256, (n, c // 2), np.uint8), rng.integers(110, 130, (n, c // 32), np.uint8))
        for module, (n, c) in SHAPES.items()
    }
    weight_map = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}.self_attn."
        tensors = {f"{prefix}{m}.weight": codes for m, (codes, _) in random.items()}
        tensors |= {f"{prefix}{m}.weight_scale": scales for m, (_, scales) in random.items()}
        tensors |= {f"{prefix}{n}_a_layernorm.weight": np.ones(d, np.float32) for n, d in (("q", 1536), ("kv", 512))}
        file = f"model-{layer:05d}.safetensors"
        write_safetensors(root / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    (root / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in root.glob("*.safetensors"))


def copy_plainly(root: Path) -> float:
    """Seconds to copy the files into new memory, page by page as malloc gets it."""
    start, kept = time.perf_counter(), []
    for path in sorted(root.glob("*.safetensors")):
        source = np.memmap(path, np.uint8, "r")
        target = mmap.mmap(-1, source.size)
        np.frombuffer(target, np.uint8)[:] = source
        kept.append(target)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="mla_loading", dir=args.directory))
    try:
        size = write_model(root, args.layers)
        for path in root.glob("*.safetensors"):
            path.read_bytes()
        plain = copy_plainly(root)
        command = [sys.executable, "-c", LOAD, str(root), str(args.runs)]
        version, *times = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    finally:
        shutil.rmtree(root)
    rates = [size / float(seconds) / 1e9 for seconds in times]
    result = {
        "layers": args.layers,
        "bytes": size,
        "jax": version,
        "cpu": platform.processor() or platform.machine(),
        "load_GB_per_s": [round(rate, 2) for rate in rates],
        "plain_copy_GB_per_s": round(size / plain / 1e9, 2),
    }
    print(json.dumps(result, indent=2))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
