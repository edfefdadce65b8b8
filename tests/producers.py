"""One random weight as each producer lays it out, with its values by the oracle: shares no code with the readers.

PRODUCERS: name -> (make(rng, rows, columns) -> (tensors by suffix, expected float32 values, file metadata), the
quantization_config that goes with it).
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import oracle

E8M0, E4M3, E5M2 = (np.dtype(getattr(ml_dtypes, f"float8_{name}")) for name in ("e8m0fnu", "e4m3fn", "e5m2"))


def codes_and_e8m0(rng, rows, columns):
    """Packed codes, scale bytes, and the values they make."""
    packed = rng.integers(0, 256, (rows, columns // 2), np.uint8)
    scales = rng.integers(118, 128, (rows, columns // 32), np.uint8)
    return packed, scales, oracle.dequantize(oracle.unpack(packed), oracle.e8m0(scales)).astype(np.float32)


def codes_and_e4m3(rng, rows, columns):
    """Packed codes, positive e4m3 scale bytes, the codes' values and the scales' as float32."""
    packed = rng.integers(0, 256, (rows, columns // 2), np.uint8)
    scales = rng.integers(8, 0x7F, (rows, columns // 16), np.uint8)
    values = oracle.E2M1[oracle.unpack(packed)].astype(np.float32)
    return packed, scales, values, oracle.e4m3(scales).astype(np.float32)


def swizzle(scales: np.ndarray) -> np.ndarray:
    """Scale bytes as Blackwell's tensor cores read them: byte by byte from the layout's definition.

    Row r, column c of a tile of 128 x 4 lies at byte (r % 32) * 16 + (r // 32) * 4 + c; tiles row by row.
    """
    rows, columns = scales.shape
    row_tiles, column_tiles = -(-rows // 128), -(-columns // 4)
    out = np.zeros(row_tiles * column_tiles * 512, np.uint8)
    for r in range(rows):
        for c in range(columns):
            tile = (r // 128) * column_tiles + c // 4
            out[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales[r, c]
    return out.reshape(row_tiles * 32, column_tiles * 16)


def mxfp4(codes: str, scale: str, codes_dtype=np.uint8, scale_dtype=np.uint8):
    def make(rng, rows, columns):
        packed, scales, values = codes_and_e8m0(rng, rows, columns)
        return {codes: packed.view(codes_dtype), scale: scales.view(scale_dtype)}, values, {}

    return make


def f4(rng, rows, columns):
    """Codes as safetensors' own F4, whose header counts elements."""
    packed, scales, values = codes_and_e8m0(rng, rows, columns)
    return (
        {
            "weight": oracle.unpack(packed).view(ml_dtypes.float4_e2m1fn),
            "weight_scale": scales.view(E8M0),
        },
        values,
        {},
    )


def nvfp4_multiplied(rng, rows, columns):
    packed, scales, values, wide = codes_and_e4m3(rng, rows, columns)
    second = np.float32(rng.uniform(1e-4, 1e-2))
    expected = values * np.repeat(wide * second, 16, -1)
    return {"weight": packed, "weight_scale": scales.view(E4M3), "weight_scale_2": second}, expected, {}


def nvfp4_divided(rng, rows, columns):
    packed, scales, values, wide = codes_and_e4m3(rng, rows, columns)
    divisor = np.float32(rng.uniform(100, 5000))
    expected = values * np.repeat(wide / divisor, 16, -1)
    return (
        {
            "weight_packed": packed,
            "weight_scale": scales.view(E4M3),
            "weight_global_scale": np.array([divisor]),
        },
        expected,
        {},
    )


def torchao_mx(swizzled: bool):
    def make(rng, rows, columns):
        packed, scales, values = codes_and_e8m0(rng, rows, columns)
        stored = swizzle(scales) if swizzled else scales
        recipe = {
            "_type": "MXTensor",
            "_data": {
                "elem_dtype": {"_type": "torch.dtype", "_data": "float4_e2m1fn_x2"},
                "block_size": 32,
                "is_swizzled_scales": swizzled,
            },
            "_tensor_data_names": ["qdata", "scale"],
        }
        tensors = {"_weight_qdata": packed, "_weight_scale": stored.view(E8M0)}
        return tensors, values, {"weight": json.dumps(recipe)}

    return make


def torchao_nv(rng, rows, columns):
    packed, scales, values, wide = codes_and_e4m3(rng, rows, columns)
    second = np.float32(rng.uniform(1e-4, 1e-2))
    recipe = {"_type": "NVFP4Tensor", "_data": {"block_size": 16, "is_swizzled_scales": True}}
    tensors = {
        "_weight_qdata": packed,
        "_weight_scale": swizzle(scales).view(E4M3),
        "_weight_per_tensor_scale": second,
        "_weight_act_per_tensor_scale": np.float32(0.5),
    }
    return tensors, values * np.repeat(wide * second, 16, -1), {"weight": json.dumps(recipe)}


def fp8(block=None, scale_shape=None, suffix="weight_scale_inv", scale_dtype=np.float32, dtype=E4M3):
    """FP8 with scales to a block (rows, columns), the last of which may be partial, or of a given shape."""

    def make(rng, rows, columns):
        weight = (rng.standard_normal((rows, columns)) * 30).astype(dtype)
        height, width = block(rows, columns) if callable(block) else block
        grid = (-(-rows // height), -(-columns // width))
        if scale_dtype in (E8M0, np.uint8):
            raw = rng.integers(118, 128, grid, np.uint8)
            scales, wide = raw.view(scale_dtype), oracle.e8m0(raw)
        else:
            scales = rng.uniform(1e-4, 1e-2, grid).astype(scale_dtype)
            wide = scales.astype(np.float64)
        # One scale to one element: no shape arithmetic in common with the reader.
        spread = np.array([[wide[r // height, c // width] for c in range(columns)] for r in range(rows)])
        expected = weight.astype(np.float32) * spread.astype(np.float32)
        shape = grid if scale_shape is None else scale_shape(rows)
        return {"weight": weight, suffix: scales.reshape(shape)}, expected, {}

    return make


def _whole(rows, columns):
    return rows, columns


def _row(rows, columns):
    return 1, columns


def quark(spec, **more) -> dict:
    return {
        "quant_method": "quark",
        "global_quant_config": {"weight": spec, "input_tensors": None, "output_tensors": None},
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["lm_head", "*mlp.gate*"],
    } | more


def compressed_tensors(form: str, weights: dict, *, inside: bool = True, **more) -> dict:
    group = {"targets": ["re:.*kv_b_proj$"], "weights": weights, "format": form if inside else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", r"re:.*\.mlp\.(gate|up)_proj.*"],
    } | more


QUARK_MX = {"dtype": "fp4", "group_size": 32, "scale_format": "e8m0", "qscheme": "per_group", "is_dynamic": False}
QUARK_NV = [{"dtype": "fp4", "group_size": 16}, {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}]
CT_MX = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"}
CT_NV = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}
CT_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp", "group_size": 32, "act_bits": 4}
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MODELOPT = {"quant_method": "modelopt", "ignore": ["lm_head", "model.layers.*.mlp*"]}

PRODUCERS = {
    "quark mxfp4": (mxfp4("weight", "weight_scale"), quark(QUARK_MX)),
    "quark mxfp4 w4a4": (
        mxfp4("weight", "weight_scale"),
        quark(
            QUARK_MX,
            global_quant_config={"weight": QUARK_MX, "input_tensors": {"dtype": "fp4", "is_dynamic": True}},
        ),
    ),
    "quark mxfp4 by layer": (
        mxfp4("weight", "weight_scale"),
        quark({"dtype": "fp8_e4m3"}, layer_quant_config={"*kv_b_proj": {"weight": QUARK_MX}}),
    ),
    "quark nvfp4": (nvfp4_multiplied, quark(QUARK_NV)),
    "mxfp4 without a config": (mxfp4("weight", "weight_scale"), None),
    "mxfp4 as F4 and F8_E8M0": (f4, None),
    "modelopt mxfp4": (mxfp4("weight", "weight_scale"), MODELOPT | {"quant_algo": "mxfp4"}),
    "modelopt nvfp4": (nvfp4_multiplied, MODELOPT | {"quant_algo": "NVFP4"}),
    "compressed-tensors mxfp4": (
        mxfp4("weight_packed", "weight_scale"),
        compressed_tensors("mxfp4-pack-quantized", CT_MX),
    ),
    "compressed-tensors nvfp4": (nvfp4_divided, compressed_tensors("nvfp4-pack-quantized", CT_NV)),
    "auto-round mxfp4": (mxfp4("weight_packed", "weight_scale"), AUTO_ROUND),
    "auto-round mxfp4 for llm-compressor": (
        mxfp4("weight_packed", "weight_scale"),
        compressed_tensors("mxfp4-pack-quantized", CT_MX, inside=False, provider="auto-round"),
    ),
    "auto-round nvfp4": (nvfp4_divided, AUTO_ROUND | {"data_type": "nv_fp4_with_static_gs", "group_size": 16}),
    "torchao mxfp4": (torchao_mx(swizzled=True), None),
    "torchao mxfp4, plain scales": (torchao_mx(swizzled=False), None),
    "torchao nvfp4": (torchao_nv, None),
    "deepseek fp4": (mxfp4("weight", "scale", np.int8, E8M0), None),
    "deepseek fp8": (fp8((128, 128)), DEEPSEEK),
    "deepseek fp8 without a config": (fp8((128, 128)), None),
    "deepseek fp8, blocks of 32 x 48": (fp8((32, 48)), DEEPSEEK | {"weight_block_size": [32, 48]}),
    "deepseek fp8, e8m0 scales": (fp8((128, 128), scale_dtype=E8M0), DEEPSEEK | {"scale_fmt": "ue8m0"}),
    "deepseek fp8, own names": (fp8((128, 128), suffix="scale"), DEEPSEEK),
    "mistral fp8": (fp8(_whole, lambda rows: ()), DEEPSEEK | {"weight_block_size": None}),
    "fp8 a row, [N, 1]": (
        fp8(_row, lambda rows: (rows, 1), "weight_scale", ml_dtypes.bfloat16),
        compressed_tensors("float-quantized", CT_FP8),
    ),
    "fp8 a row, [N]": (fp8(_row, lambda rows: (rows,), "weight_scale"), quark({"dtype": "fp8_e4m3"})),
    "fp8 a tensor, []": (fp8(_whole, lambda rows: (), "weight_scale"), MODELOPT | {"quant_algo": "FP8"}),
    "fp8 a tensor, [1]": (fp8(_whole, lambda rows: (1,), "weight_scale", dtype=E5M2), None),
    "fp8 a block, compressed-tensors": (
        fp8((64, 32), suffix="weight_scale"),
        compressed_tensors("float-quantized", CT_FP8 | {"strategy": "block", "block_structure": [64, 32]}),
    ),
    "mxfp8": (fp8((1, 32), suffix="weight_scale", scale_dtype=np.uint8), MODELOPT | {"quant_algo": "MXFP8"}),
}
