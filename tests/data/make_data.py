"""Regenerate this directory's third-party data from ../shared/reference: trimmed, never changed.

    python tests/data/make_data.py [path/to/reference]

Checkpoints keep the bytes of the recorded layer's attention tensors under their own names; recordings keep
the arrays that a test of one layer needs. README.md says where everything came from. NumPy alone is used,
so that no code of the library has touched the data that judges it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
DEMO = REPOSITORY / "mla_fp4_jax" / "demo_data"
LAYER_PREFIX = "model.layers.0.self_attn."  # the layer that every recording of a single layer was made from

CASES = {
    "v3_q96": "v3_q96",
    "v3_q96_yarn": "v3_q96",
    "v3_noq_bias_yarn": "v3_noq_bias_yarn",
    "v2_noq_yarn": "v2_noq_yarn",
}
LAYER_KEYS = (
    "x:bf16",
    "meta.inv_freq",
    "meta.leftpad_mask",
    *(f"fp32_eager.{name}" for name in ("prefill.out", "decode.out", "cache.latent", "cache.k_rot", "leftpad.out")),
    *(f"fp32_eager.{far}.out" for far in ("far4090", "far100000")),
    *(f"fp32_eager.{at}{name}" for at in ("", "far4090.", "far100000.") for name in ("cos", "sin")),
    *(f"fp32_eager.{at}freqs_{part}" for at in ("", "far4090.", "far100000.") for part in ("re", "im")),
    *(f"fp32_eager.prefill.{name}" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj", "q_proj")),
    *(f"fp32_eager.prefill.{name}" for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "attn_probs", "o_proj_in")),
    *(f"bf16_eager.{name}:bf16" for name in ("prefill.out", "decode.out")),
)
OFFICIAL_KEYS = (
    "fp32.naive.prefill",
    "fp32.absorb.decode",
    "fp32.kv_cache",
    "fp32.pe_cache",
    *(f"bf16.absorb.{phase}" for phase in ("prefill", "decode")),
)
QUARK_KEYS = {
    "mxfp4_kvb_only": ("quark.kv_b_proj_dequant", "quark.bf16.prefill", "quark.bf16.decode"),
    "mxfp4_all": tuple(
        f"quark.{name}_dequant" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    ),
}
FULL_KEYS = (
    "x:bf16",
    "fp32.prefill",
    *(f"fp32_mxfp4_even.{name}" for name in ("prefill", "decode", "cache.latent", "cache.k_rot")),
    "kv_b_proj.mxfp4.even.packed_head0",
    "kv_b_proj.mxfp4.even.scale",
)


# Name -> file, recording of its kv_b_proj's values, key there. Quark's NVFP4-like export has no recording.
EXPORTS = {
    "compressed_tensors_mxfp4": (
        "compressed_tensors/mxfp4_kvb/model.safetensors",
        "compressed_tensors/mxfp4_kvb.io.npz",
        "exact_dequant_fp32",
    ),
    "compressed_tensors_nvfp4": (
        "compressed_tensors/nvfp4_kvb/model.safetensors",
        "compressed_tensors/nvfp4_kvb.io.npz",
        "exact_dequant_fp32",
    ),
    "modelopt_nvfp4": ("modelopt/nvfp4_kvb/model.safetensors", "modelopt/nvfp4_kvb.io.npz", "modelopt_dequant_fp32"),
    "quark_nvfp4": ("quark/nvfp4_like_kvb/model.safetensors", None, None),
    "torchao_mxfp4": ("torchao/mxfp4_kv_b.safetensors", "torchao/mxfp4_kv_b.npz", "dequant"),
    "deepseek_fp8": ("fp8_block/model.safetensors", "fp8_block/hf_dequant.npz", "hf_dequant.kv_b_proj:bf16"),
}
EXPORT_ROWS = 128  # of 1024: the first of eight heads, P = V = 64


def read_header(data: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file and its data section."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def trim_checkpoint(source: Path, target: Path) -> None:
    """Copy config.json as it is and the layer's tensors byte for byte."""
    header, data = read_header((source / "model.safetensors").read_bytes())
    out, buffer = {"__metadata__": header["__metadata__"]}, b""
    for name in sorted(name for name in header if name.startswith(LAYER_PREFIX)):
        begin, end = header[name]["data_offsets"]
        out[name] = {**header[name], "data_offsets": [len(buffer), len(buffer) + end - begin]}
        buffer += data[begin:end]
    text = json.dumps(out, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.mkdir(parents=True, exist_ok=True)
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + buffer)
    shutil.copyfile(source / "config.json", target / "config.json")


def trim_npz(source: Path, target: Path, keys: tuple[str, ...], required: bool = True) -> None:
    """Copy the named arrays; float32 that holds bf16 values is kept as bf16 bits, under `:bf16`."""
    kept = {}
    with np.load(source) as arrays:
        for key in keys:
            if key not in arrays:
                if required:
                    raise SystemExit(f"{source} has no {key}")
                continue
            value = arrays[key]
            if value.dtype == np.float32 and value.size and not (value.view(np.uint32) & 0xFFFF).any():
                key, value = f"{key}:bf16", (value.view(np.uint32) >> 16).astype(np.uint16)
            kept[key] = value
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, **kept)


def make_hf_mla(reference: Path) -> None:
    """Tiny layers with inputs and outputs of transformers and of DeepSeek's own model code."""
    source, target = reference / "hf_mla", HERE / "hf_mla"
    for weights in sorted(set(CASES.values())):
        trim_checkpoint(source / f"ckpt_{weights}", target / f"ckpt_{weights}")
    for case in CASES:
        shutil.copyfile(source / f"{case}.config.json", target / f"{case}.config.json")
        trim_npz(source / f"{case}.io.npz", target / f"{case}.io.npz", LAYER_KEYS, required=False)
        official = source / f"{case}.official.npz"
        if official.exists():
            trim_npz(official, target / f"{case}.official.npz", OFFICIAL_KEYS)
    shutil.copyfile(source / "index.json", target / "index.json")


def make_quark(reference: Path) -> None:
    """AMD Quark exports of v3_q96. The one with kv_b_proj alone in MXFP4 ships as the demo's checkpoint."""
    common = ("x:bf16", "fp32_dequant.prefill", "fp32_dequant.decode")
    for name, keys in QUARK_KEYS.items():
        trim_checkpoint(reference / "quark" / name, HERE / "quark" / name)
        trim_npz(reference / "quark" / f"{name}.io.npz", HERE / "quark" / f"{name}.io.npz", common + keys)
    trim_checkpoint(reference / "quark" / "mxfp4_kvb_only", DEMO)
    trim_npz(reference / "quark" / "mxfp4_kvb_only.io.npz", DEMO / "io.npz", common)


def make_exports(reference: Path) -> None:
    """The first head's rows of kv_b_proj from every export, its configs, and the SHA-256 of their recorded values."""
    arrays, described = {}, {}
    module = f"{LAYER_PREFIX}kv_b_proj"
    for name, (file, recorded, key) in EXPORTS.items():
        header, data = read_header((reference / file).read_bytes())
        tensors = {}
        for tensor in sorted(tensor for tensor in header if tensor.startswith(f"{module}.")):
            entry, suffix = header[tensor], tensor.removeprefix(f"{module}.")
            begin, end = entry["data_offsets"]
            raw = np.frombuffer(data[begin:end], np.uint8)
            shape = entry["shape"]
            if len(shape) == 2:  # the first 128 rows; swizzled scales keep those in their first tile
                rows = {1024: EXPORT_ROWS, 256: EXPORT_ROWS // 4, 8: 1}[shape[0]]
                raw, shape = raw[: raw.size * rows // shape[0]], [rows, shape[1]]
            arrays[f"{name}/{suffix}"], tensors[suffix] = raw, [entry["dtype"], shape]
        about = {"tensors": tensors, "metadata": header["__metadata__"]}
        config = (reference / file).parent / "config.json"
        if config.exists():
            about["quantization_config"] = json.loads(config.read_text())["quantization_config"]
        if recorded is not None:
            with np.load(reference / recorded) as values:
                value = values[key]
            if value.dtype == np.uint16:
                value = (value.astype(np.uint32) << 16).view(np.float32)
            about["sha256"] = hashlib.sha256((value[:EXPORT_ROWS] + 0.0).tobytes()).hexdigest()  # -0 as 0
        described[name] = about
    np.savez_compressed(HERE / "exports.npz", **arrays)
    (HERE / "exports.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")


def make_full_layer(reference: Path) -> None:
    """One layer of DeepSeek-V3's real size; its weights come from the recipe in meta.json."""
    source, target = reference / "full_v3_layer", HERE / "full_v3_layer"
    trim_npz(source / "io.npz", target / "io.npz", FULL_KEYS)
    for name in ("meta.json", "config.json"):
        shutil.copyfile(source / name, target / name)


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY.parent / "shared" / "reference"
    for make in (make_hf_mla, make_quark, make_exports, make_full_layer):
        make(root)
