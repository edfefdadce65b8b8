"""The same formats as other releases spell them: names, shapes and configs beside those of producers.py."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import CONFIG, PREFIX, layer_tensors, write_checkpoint
from producers import (
    CT_FP8,
    CT_NV,
    DEEPSEEK,
    E5M2,
    MODELOPT,
    QUARK_MX,
    fp8,
    mxfp4,
    nvfp4_divided,
    nvfp4_multiplied,
    quark,
)

from mla_fp4_jax import CheckpointError, FP4Array, load_mla_layer
from mla_fp4_jax.checkpoint.inspection import inspect_checkpoint

KV_B = f"{PREFIX}kv_b_proj"
ROWS, COLUMNS = 3 * 48, 64


def write(root, parts, quantization):
    tensors = layer_tensors(np.random.default_rng(1), kv_b="dense")
    del tensors[f"{KV_B}.weight"]
    tensors |= {f"{KV_B}.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    return write_checkpoint(root, tensors, CONFIG | {"quantization_config": quantization})


def reshaped(make, suffix, *shape):
    def changed(rng, rows, columns):
        parts, values, metadata = make(rng, rows, columns)
        return parts | {suffix: np.asarray(parts[suffix]).reshape(shape)}, values, metadata

    return changed


def with_part(make, suffix, array):
    def changed(rng, rows, columns):
        parts, values, metadata = make(rng, rows, columns)
        return parts | {suffix: array}, values, metadata

    return changed


MX = mxfp4("weight", "weight_scale")
LINEAR = "<class 'torch.nn.modules.linear.Linear'>"
MIXED = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "config_groups": {
        "group_0": {"format": "float-quantized", "targets": ["Linear"], "weights": CT_FP8},
        "group_1": {"format": "nvfp4-pack-quantized", "targets": ["re:.*self_attn.*"], "weights": CT_NV},
    },
}
TOP_ONLY = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CT_NV, "format": None}},
}
SPELLINGS = {
    "fp8 e5m2": (fp8((128, 128), dtype=E5M2), DEEPSEEK),
    "fp8 e4m3fnuz": (fp8((128, 128), dtype=np.dtype(ml_dtypes.float8_e4m3fnuz)), DEEPSEEK),
    "fp8 e5m2fnuz": (fp8((128, 128), dtype=np.dtype(ml_dtypes.float8_e5m2fnuz)), DEEPSEEK),
    "fp8, bf16 scales": (fp8((128, 128), scale_dtype=ml_dtypes.bfloat16), DEEPSEEK),
    "mxfp8 as weight_scale_inv": (fp8((1, 32), scale_dtype=np.uint8), {"quant_method": "mxfp8"}),
    "modelopt's fp8 blocks in 4 axes": (
        reshaped(fp8((128, 128), suffix="weight_scale"), "weight_scale", 2, 1, 1, 1),
        MODELOPT | {"quant_algo": "FP8_PB_WO"},
    ),
    "quark, one spec in a list": (MX, quark([QUARK_MX])),
    "quark by a module's full name": (MX, quark(None, layer_quant_config={KV_B: {"weight": QUARK_MX}})),
    "quark by a layer's type": (MX, quark(None, layer_type_quant_config={LINEAR: {"weight": QUARK_MX}})),
    "quark in capitals, exclude null": (MX, quark(QUARK_MX, quant_method="QUARK", exclude=None)),
    "quark's dtype mxfp4": (MX, quark(QUARK_MX | {"dtype": "mxfp4"})),
    "modelopt W4A8 mxfp4": (MX, MODELOPT | {"quant_algo": "W4A8_MXFP4_FP8"}),
    "modelopt's file inside config.json": (
        MX,
        {"quant_method": "modelopt", "quantization": {"quant_algo": "MXFP4", "exclude_modules": ["lm_head"]}},
    ),
    "modelopt nvfp4, scale_2 of one element": (
        reshaped(nvfp4_multiplied, "weight_scale_2", 1),
        MODELOPT | {"quant_algo": "W4A16_NVFP4"},
    ),
    "modelopt nvfp4 after AWQ, smoothing in the norm": (nvfp4_multiplied, MODELOPT | {"quant_algo": "NVFP4_AWQ"}),
    "modelopt mixed precision": (
        nvfp4_multiplied,
        MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {KV_B: {"quant_algo": "NVFP4"}}},
    ),
    "compressed-tensors of mixed precision": (nvfp4_divided, MIXED),
    "compressed-tensors, format at the top alone": (nvfp4_divided, TOP_ONLY),
    "compressed-tensors W4A4": (with_part(nvfp4_divided, "input_global_scale", np.ones(1, np.float32)), TOP_ONLY),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_spelling_is_the_same_weight(tmp_path, rng, case):
    make, quantization = SPELLINGS[case]
    parts, expected, _ = make(rng, ROWS, COLUMNS)
    root = write(tmp_path, parts, quantization)
    weight = load_mla_layer(root, 0, dtype=jnp.float32).weights.kv_b_proj
    wide = weight.dequantize() if isinstance(weight, FP4Array) else weight
    assert np.array_equal(np.asarray(wide).reshape(expected.shape), expected)
    (layer,) = inspect_checkpoint(root)["layers"]
    kv_b = next(w for w in layer["weights"] if w["field"] == "kv_b_proj")
    assert layer["loads"] and kv_b["declared"] in (None, kv_b["format"].lower())


I32 = np.int32
FOREIGN = {
    "GPTQ": ({"qweight": I32, "qzeros": I32, "scales": np.float16, "g_idx": I32}, "gptq", r"INT4 \(GPTQ or AWQ\)"),
    "AWQ": ({"qweight": I32, "qzeros": I32, "scales": np.float16}, "awq", r"INT4 \(GPTQ or AWQ\)"),
    "compressed-tensors' INT4": (
        {"weight_packed": I32, "weight_scale": ml_dtypes.bfloat16, "weight_shape": np.int64},
        "compressed-tensors",
        r"INT4 \(compressed-tensors\)",
    ),
    "INT8": ({"weight": np.int8, "weight_scale": np.float32}, "compressed-tensors", "look like INT8"),
    "bitsandbytes NF4": (
        {"weight": np.uint8, "weight.absmax": np.float32, "weight.quant_map": np.float32},
        "bitsandbytes",
        "bitsandbytes' 4-bit floats",
    ),
    "bitsandbytes INT8": ({"weight": np.int8, "SCB": np.float32}, "bitsandbytes", r"INT8 \(bitsandbytes\)"),
    "HQQ": ({"W_q": np.uint8, "scale": np.float16, "zero": np.float16}, "hqq", "HQQ's integers"),
    "MLX": ({"weight": np.uint32, "scales": np.uint8}, "mlx", "MLX's MXFP4"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("case", FOREIGN)
def test_a_format_that_is_not_read_is_named(tmp_path, case):
    dtypes, method, name = FOREIGN[case]
    root = write(tmp_path, {s: np.ones((4, 4), dtype) for s, dtype in dtypes.items()}, {"quant_method": method})
    with pytest.raises(CheckpointError, match=rf"tensors of {KV_B} .*{name}, which is not read"):
        load_mla_layer(root, 0)
