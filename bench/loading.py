"""How fast load_mla_layers loads a DeepSeek-V3-shaped checkpoint of packed weights, all of it in the page cache.

    python -m bench.loading [--layers 61] [--directory DIR] [--json FILE]

Writes the checkpoint to DIR (100 MB a layer; removed afterwards), reads it once, and in a fresh process loads it some
times, each followed by a plain copy of the same bytes into new memory: what the operating system allows just then.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mla_fp4_jax.checkpoint.load import MOST_THREADS

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
from pathlib import Path
import jax
from bench.loading import copy_plainly
from mla_fp4_jax import load_mla_layers
root, runs = sys.argv[1], int(sys.argv[2])
print(jax.__version__)
for _ in range(runs):
    start = time.perf_counter()
    layers = load_mla_layers(root, progress=False)
    loaded = time.perf_counter() - start
    del layers
    print(loaded, copy_plainly(Path(root)))
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
    """Seconds to copy the files into new memory, page by page as malloc gets it, in as many threads as loading."""

    def copy(path: Path) -> mmap.mmap:
        source = np.memmap(path, np.uint8, "r")
        target = mmap.mmap(-1, source.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        np.frombuffer(target, np.uint8)[:] = source
        return target

    start = time.perf_counter()
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        kept = list(pool.map(copy, sorted(root.glob("*.safetensors"))))
    del kept
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
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
        before = os.getloadavg()[0]
        command = [sys.executable, "-c", LOAD, str(root), str(args.runs)]
        version, *times = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    finally:
        shutil.rmtree(root)
    rates = [round(size / float(seconds) / 1e9, 2) for seconds in times]
    result = {
        "layers": args.layers,
        "bytes": size,
        "jax": version,
        "cpu": platform.processor() or platform.machine(),
        "threads": min(MOST_THREADS, os.cpu_count() or 1),
        "load_average": [round(before, 2), round(os.getloadavg()[0], 2)],
        "load_GB_per_s": rates[::2],
        "plain_copy_GB_per_s": rates[1::2],
    }
    print(json.dumps(result, indent=2))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
