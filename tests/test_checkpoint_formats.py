"""Every producer's layout: loads to the producer's own values, stays packed where it is FP4, and is told apart."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from checkpoints import CONFIG, DATA, PREFIX, layer_tensors, write_checkpoint, write_shards
from producers import E4M3, E8M0, MODELOPT, PRODUCERS, codes_and_e8m0, compressed_tensors, quark, swizzle

from mla_fp4_jax import CheckpointError, FP4Array, load_mla_layer
from mla_fp4_jax.checkpoint import plan_mla_layer
from mla_fp4_jax.checkpoint.dtypes import NUMPY
from mla_fp4_jax.checkpoint.stored import StoredWeight

KV_B = f"{PREFIX}kv_b_proj"
ROWS, COLUMNS = 3 * 48, 64


def made(rng, producer: str):
    """A layer whose kv_b_proj is the producer's: tensors, config, file metadata, expected values [ROWS, COLUMNS]."""
    make, quantization = PRODUCERS[producer]
    parts, expected, metadata = make(rng, ROWS, COLUMNS)
    tensors = layer_tensors(rng, kv_b="dense")
    del tensors[f"{KV_B}.weight"]
    tensors |= {f"{KV_B}.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    config = CONFIG | ({} if quantization is None else {"quantization_config": quantization})
    return tensors, config, {f"{KV_B}.{key}": text for key, text in metadata.items()}, expected


def values(weight) -> np.ndarray:
    wide = weight.dequantize(jnp.float32) if isinstance(weight, FP4Array) else weight
    return np.asarray(wide).reshape(-1, weight.shape[-1])


@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_layout_gives_the_producers_values_bit_for_bit(tmp_path, rng, producer):
    tensors, config, metadata, expected = made(rng, producer)
    root = write_checkpoint(tmp_path, tensors, config, metadata)
    weight = load_mla_layer(root, 0, dtype=jnp.float32).weights.kv_b_proj
    assert weight.shape == (3, 48, 64)
    assert isinstance(weight, FP4Array) == ("fp8" not in producer)
    if isinstance(weight, FP4Array):
        assert weight.format == ("nvfp4" if "nvfp4" in producer else "mxfp4")
        assert weight.group_size == {"mxfp4": 32, "nvfp4": 16}[weight.format]
    assert np.array_equal(values(weight), expected)
    # The same a few rows at a time, which is how conversion reads.
    planned = next(w for w in plan_mla_layer(root, 0).weights if w.field == "kv_b_proj")
    for part in (slice(0, 5), slice(125, 140), slice(None)):
        assert np.array_equal(planned.reader.rows(planned.stored, part), expected[part])


@pytest.mark.parametrize("producer", [name for name in PRODUCERS if "fp8" in name])
def test_fp8_is_rounded_once_to_the_layers_dtype(tmp_path, rng, producer):
    tensors, config, metadata, expected = made(rng, producer)
    root = write_checkpoint(tmp_path, tensors, config, metadata)
    for dtype in (jnp.bfloat16, jnp.float16):
        weight = load_mla_layer(root, 0, dtype=dtype).weights.kv_b_proj
        assert weight.dtype == dtype
        assert np.array_equal(values(weight), expected.astype(np.dtype(dtype)))


@pytest.mark.parametrize("producer", [name for name in PRODUCERS if "fp8" not in name and "torchao" not in name])
def test_packed_bytes_are_the_checkpoints_own(tmp_path, rng, producer):
    tensors, config, metadata, _ = made(rng, producer)
    weight = load_mla_layer(write_checkpoint(tmp_path, tensors, config, metadata), 0).weights.kv_b_proj
    packed, scales = weight.to_packed()[:2]
    codes = next(tensors[f"{KV_B}.{s}"] for s in ("weight_packed", "weight") if f"{KV_B}.{s}" in tensors)
    stored = next(tensors[f"{KV_B}.{s}"] for s in ("weight_scale", "scale") if f"{KV_B}.{s}" in tensors)
    if codes.dtype == ml_dtypes.float4_e2m1fn:
        found = oracle.unpack(np.asarray(packed)).tobytes()
        assert found == codes.tobytes()
    else:
        assert np.asarray(packed).tobytes() == codes.tobytes()
    assert np.asarray(scales).tobytes() == stored.tobytes()


@pytest.mark.parametrize("producer", ["quark nvfp4", "compressed-tensors nvfp4", "torchao nvfp4"])
@pytest.mark.parametrize("module", ["o_proj", "q_a_proj"])
def test_plain_linears_may_be_nvfp4_too(tmp_path, rng, producer, module):
    parts, expected, metadata = PRODUCERS[producer][0](rng, 40 if module == "q_a_proj" else 96, 96)
    tensors = layer_tensors(rng)
    del tensors[f"{PREFIX}{module}.weight"]
    tensors |= {f"{PREFIX}{module}.{suffix}": np.asarray(part) for suffix, part in parts.items()}
    root = write_checkpoint(tmp_path, tensors, None, {f"{PREFIX}{module}.{k}": v for k, v in metadata.items()})
    weight = getattr(load_mla_layer(root, 0).weights, module)
    assert isinstance(weight, FP4Array) and np.array_equal(values(weight), expected)


@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
@pytest.mark.parametrize("producer", [name for name in PRODUCERS if "nvfp4" in name])
def test_a_layer_computes_with_nvfp4_as_with_its_values(tmp_path, rng, producer, implementation):
    """The kernel's path: multiplying by the divisor's float32 reciprocal is off by 2^-24 at most, twice a product."""
    tensors, config, metadata, expected = made(rng, producer)
    root = write_checkpoint(tmp_path / "packed", tensors, config, metadata)
    packed = load_mla_layer(root, 0, dtype=jnp.float32, implementation=implementation)
    dense = {name: array for name, array in tensors.items() if not name.startswith(KV_B)}
    dense[f"{KV_B}.weight"] = expected
    plain = load_mla_layer(write_checkpoint(tmp_path / "dense", dense), 0, dtype=jnp.float32)
    assert packed.weights.kv_b_proj.format == "nvfp4" and packed.weights.kv_b_proj.group_size == 16
    x = jnp.asarray(rng.standard_normal((2, 5, 96)), jnp.float32)
    outputs = []
    for layer in (packed, plain):
        y, cache = layer.prefill(x, layer.init_cache(2, 8))
        step, _ = layer.decode(x[:, :1], cache)
        outputs.append((np.asarray(y), np.asarray(step)))
    for mine, reference in zip(*outputs, strict=True):
        np.testing.assert_allclose(mine, reference, rtol=0, atol=2e-5 * np.abs(reference).max())


# GGUF's nibble order, which only the caller knows.


def gguf_order(packed: np.ndarray) -> np.ndarray:
    codes = oracle.unpack(packed).reshape(packed.shape[0], -1, 32)
    return (codes[..., :16] | codes[..., 16:] << 4).reshape(packed.shape)


@pytest.mark.parametrize("blocks", [False, True])
def test_gguf_order_is_read_when_asked_for(tmp_path, rng, blocks):
    packed, scales, expected = codes_and_e8m0(rng, ROWS, COLUMNS)
    tensors = layer_tensors(rng)
    stored = gguf_order(packed)
    if blocks:
        whole = np.concatenate([scales[..., None], stored.reshape(ROWS, 2, 16)], -1).reshape(ROWS, 34)
        tensors[f"{KV_B}.weight"] = whole
        del tensors[f"{KV_B}.weight_scale"]
    else:
        tensors |= {f"{KV_B}.weight": stored, f"{KV_B}.weight_scale": scales}
    root = write_checkpoint(tmp_path, tensors)
    weight = load_mla_layer(root, 0, nibble_order="gguf").weights.kv_b_proj
    assert np.array_equal(values(weight), expected)
    assert np.array_equal(np.asarray(weight.to_packed()[0]).reshape(packed.shape), packed)
    if blocks:
        with pytest.raises(CheckpointError, match="packed codes without scales"):
            load_mla_layer(root, 0)
    else:
        assert not np.array_equal(values(load_mla_layer(root, 0).weights.kv_b_proj), expected)


@pytest.mark.bad_input
@pytest.mark.parametrize("producer", ["quark nvfp4", "compressed-tensors nvfp4", "torchao mxfp4"])
def test_ggufs_order_is_of_mxfp4_alone(tmp_path, rng, producer):
    tensors, config, metadata, _ = made(rng, producer)
    with pytest.raises(CheckpointError, match="which GGUF's nibble order is not for"):
        load_mla_layer(write_checkpoint(tmp_path, tensors, config, metadata), 0, nibble_order="gguf")


@pytest.mark.bad_input
def test_an_unknown_nibble_order_is_refused(tmp_path, rng):
    root = write_checkpoint(tmp_path, layer_tensors(rng))
    with pytest.raises(ValueError, match="nibble_order must be one of"):
        load_mla_layer(root, 0, nibble_order="big")


# Real exports, a head of each.

EXPORTS = json.loads((DATA / "exports.json").read_text())


@pytest.mark.parametrize("name", EXPORTS)
def test_real_exports_give_their_recorded_values(tmp_path, rng, name):
    about = EXPORTS[name]
    config = CONFIG | {
        "num_attention_heads": 1,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "kv_lora_rank": 128,
        "quantization_config": about.get("quantization_config"),
    }
    shapes = {"q_a_proj": (40, 96), "q_b_proj": (72, 40), "kv_a_proj_with_mqa": (136, 96), "o_proj": (96, 64)}
    tensors = {f"{PREFIX}{m}.weight": np.zeros(shape, ml_dtypes.bfloat16) for m, shape in shapes.items()}
    tensors |= {
        f"{PREFIX}{m}.weight": np.ones(n, np.float32) for m, n in (("q_a_layernorm", 40), ("kv_a_layernorm", 128))
    }
    with np.load(DATA / "exports.npz") as arrays:
        for suffix, (dtype, shape) in about["tensors"].items():
            tensors[f"{KV_B}.{suffix}"] = arrays[f"{name}/{suffix}"].view(NUMPY[dtype]).reshape(shape)
    root = write_checkpoint(tmp_path, tensors, config, about["metadata"])
    layer = load_mla_layer(root, 0, dtype=jnp.bfloat16 if name == "deepseek_fp8" else jnp.float32)
    found = values(layer.weights.kv_b_proj).astype(np.float32)
    if "sha256" in about:
        # Tools differ in the sign of zero, in nothing else.
        assert hashlib.sha256((found + np.float32(0)).tobytes()).hexdigest() == about["sha256"]
    else:  # Quark's NVFP4, not recorded
        part = {suffix: tensors[f"{KV_B}.{suffix}"] for suffix in about["tensors"]}
        scales = oracle.e4m3(part["weight_scale"].view(np.uint8)).astype(np.float32) * part["weight_scale_2"]
        codes = oracle.E2M1[oracle.unpack(part["weight"])].astype(np.float32)
        assert np.array_equal(found, codes * np.repeat(scales, 16, -1))


# DeepSeek's own tensor names.

NATIVE = {
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}
ARGS = {
    "dim": 96,
    "n_heads": 3,
    "n_layers": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
}


@pytest.mark.parametrize("config", [CONFIG, ARGS | {"max_seq_len": 4096}], ids=["HF config", "ModelArgs"])
def test_deepseeks_own_names_are_the_same_layer(tmp_path, rng, config):
    tensors = layer_tensors(rng)
    expected = load_mla_layer(write_checkpoint(tmp_path / "hf", tensors), 0)
    renamed = {}
    for name, array in tensors.items():
        module, suffix = name.removeprefix(PREFIX).rsplit(".", 1)
        renamed[f"layers.0.attn.{NATIVE[module]}.{suffix}"] = array
    found = load_mla_layer(write_checkpoint(tmp_path / "native", renamed, config), 0)
    assert found.config == expected.config
    for a, b in zip(jax.tree.leaves(found.weights), jax.tree.leaves(expected.weights), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_errors_use_the_names_in_the_file(tmp_path, rng):
    tensors = {"layers.0.attn.wkv_b.weight": np.zeros(3), "layers.0.attn.wq_a.weight": np.zeros(3)}
    with pytest.raises(CheckpointError, match=r"tensors of layers\.0\.attn\.wq_a "):
        load_mla_layer(write_checkpoint(tmp_path, tensors), 0)


# What the config says.


def planned(root) -> StoredWeight:
    return next(weight.stored for weight in plan_mla_layer(root, 0).weights if weight.field == "kv_b_proj")


@pytest.mark.parametrize(
    ("quantization", "excluded"),
    [
        (quark({"dtype": "fp4", "group_size": 32}, exclude=["*self_attn*"]), True),
        (quark({"dtype": "fp4", "group_size": 32}, exclude=["model.layers.0.self_attn.kv_b_proj"]), True),
        (
            quark({"dtype": "fp4", "group_size": 32}, exclude=["model.layers.1.self_attn.kv_b_proj", "q_a_proj"]),
            False,
        ),
        (quark({"dtype": "fp4", "group_size": 32}, exclude=["re:.*kv_b_proj"]), True),
        (quark({"dtype": "fp4", "group_size": 32}, exclude=["re:kv_b_proj"]), False),
        (compressed_tensors("mxfp4-pack-quantized", {}, ignore=[r"re:.*self_attn\.(q|kv)_b_proj$"]), True),
        (MODELOPT | {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.0.self_attn*"]}, True),
        ({"quant_method": "fp8", "modules_to_not_convert": ["kv_b_proj"]}, True),
        (
            {
                "quant_method": "auto-round",
                "bits": 4,
                "data_type": "mx_fp",
                "group_size": 32,
                "extra_config": {KV_B: {"bits": 16}},
            },
            True,
        ),
    ],
)
def test_exclusions_are_understood(tmp_path, rng, quantization, excluded):
    config = CONFIG | {"quantization_config": quantization}
    root = write_checkpoint(tmp_path, layer_tensors(rng, kv_b="dense"), config)
    assert planned(root).declared.excluded == excluded


def test_a_packed_weight_that_the_config_excludes_still_loads(tmp_path, rng):
    config = CONFIG | {"quantization_config": quark({"dtype": "fp4", "group_size": 32}, exclude=["*self_attn*"])}
    assert isinstance(
        load_mla_layer(write_checkpoint(tmp_path, layer_tensors(rng), config), 0).weights.kv_b_proj, FP4Array
    )


def test_activations_that_would_be_quantised_are_named(tmp_path, rng, caplog):
    tensors, config, metadata, _ = made(rng, "quark mxfp4 w4a4")
    with caplog.at_level(logging.INFO, "mla_fp4_jax"):
        load_mla_layer(write_checkpoint(tmp_path, tensors, config, metadata), 0)
    assert "activations and caches, which the config would quantise too, stay in the compute dtype" in caplog.text


def test_modelopts_own_file_is_read(tmp_path, rng):
    tensors, config, metadata, _ = made(rng, "modelopt nvfp4")
    quantization = config.pop("quantization_config")
    root = write_checkpoint(tmp_path, tensors, config, metadata)
    text = {"producer": {"name": "modelopt"}, "quantization": quantization | {"exclude_modules": ["kv_b_proj"]}}
    (root / "hf_quant_config.json").write_text(json.dumps(text))
    assert planned(root).declared.excluded


# What is wrong.


def wrong(tmp_path, rng, producer, spoil, match, quantization=None):
    tensors, config, metadata, _ = made(rng, producer)
    if quantization is not None:
        config = config | {"quantization_config": quantization}
    result = spoil(tensors, metadata)
    root = write_checkpoint(tmp_path / "ckpt", tensors if result is None else result, config, metadata)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_mla_layer(root, 0)
    assert str(root) in str(caught.value) and len(str(caught.value)) < 1500


def put(suffix, array):
    def spoil(tensors, metadata):
        tensors[f"{KV_B}.{suffix}"] = array

    return spoil


def drop(suffix):
    def spoil(tensors, metadata):
        del tensors[f"{KV_B}.{suffix}"]

    return spoil


def poke(suffix, index, byte):
    def spoil(tensors, metadata):
        array = np.array(tensors[f"{KV_B}.{suffix}"])
        array.view(np.uint8)[index] = byte
        tensors[f"{KV_B}.{suffix}"] = array

    return spoil


def recipe(**changes):
    def spoil(tensors, metadata):
        key = f"{KV_B}.weight"
        value = json.loads(metadata[key])
        value["_data"] |= {k: v for k, v in changes.items() if not k.startswith("_")}
        value |= {k: v for k, v in changes.items() if k.startswith("_")}
        metadata[key] = json.dumps(value)

    return spoil


WRONG = {
    "no second scale": ("quark nvfp4", drop("weight_scale_2"), "look like NVFP4 without its weight_scale_2"),
    "no divisor": (
        "compressed-tensors nvfp4",
        drop("weight_global_scale"),
        "look like NVFP4 without its weight_global_scale",
    ),
    "both second scales": ("quark nvfp4", put("weight_global_scale", np.ones(1, np.float32)), "which is not read"),
    "second scale a vector": (
        "modelopt nvfp4",
        put("weight_scale_2", np.ones(144, np.float32)),
        "must be one F32 for the whole weight",
    ),
    "second scale NaN": ("modelopt nvfp4", put("weight_scale_2", np.float32(np.nan)), "must be finite and >= 0"),
    "second scale negative": ("modelopt nvfp4", put("weight_scale_2", np.float32(-1)), "must be finite and >= 0"),
    "divisor zero": (
        "compressed-tensors nvfp4",
        put("weight_global_scale", np.zeros(1, np.float32)),
        "must be finite and above 0; got 0.0",
    ),
    "divisor without a reciprocal": (
        "compressed-tensors nvfp4",
        put("weight_global_scale", np.full(1, 1e-45, np.float32)),
        "must be finite and above 0",
    ),
    "e4m3 scale NaN": ("quark nvfp4", poke("weight_scale", (3, 2), 0xFF), r"e4m3's NaN; found at \[3, 2\]"),
    "nvfp4 in groups of 32": (
        "quark nvfp4",
        put("weight_scale", np.ones((144, 2), E4M3)),
        r"must be F8_E4M3 \[144, 4\] for NVFP4 \[144, 64\], one scale to 16; got F8_E4M3 \[144, 2\]",
    ),
    "scale_inv dropped": ("deepseek fp8", drop("weight_scale_inv"), "look like FP8 without its scales"),
    "blocks by another rule": (
        "deepseek fp8",
        put("weight_scale_inv", np.ones((3, 1), np.float32)),
        r"must be F32 \[2, 1\], one scale to the config's 128 x 128 of \[144, 64\]; got F32 \[3, 1\]",
    ),
    "scale_inv NaN": (
        "deepseek fp8",
        put("weight_scale_inv", np.array([[1.0], [np.nan]], np.float32)),
        r"weight_scale_inv must be finite and >= 0; got nan at \[1, 0\]",
    ),
    "scale_inv negative": (
        "deepseek fp8",
        put("weight_scale_inv", np.array([[1.0], [-1]], np.float32)),
        "must be finite and >= 0",
    ),
    "e8m0 scale NaN": ("deepseek fp8, e8m0 scales", poke("weight_scale_inv", (1, 0), 255), "must be finite"),
    "FP8 NaN": ("deepseek fp8", poke("weight", (7, 9), 0x7F), r"must be finite; got NaN or infinity at \[7, 9\]"),
    "product overflows": (
        "deepseek fp8",
        put("weight_scale_inv", np.full((2, 1), 3e38, np.float32)),
        "its products overflow float32",
    ),
    "INT4": (
        "compressed-tensors mxfp4",
        put("weight_packed", np.zeros((144, 8), np.int32)),
        r"look like INT4 \(comp",
    ),
    "AWQ smoothing": (
        "modelopt nvfp4",
        put("pre_quant_scale", np.ones(64, np.float32)),
        "smoothed by ModelOpt's AWQ, whose pre_quant_scale is lost",
    ),
    "torchao scales of another shape": (
        "torchao mxfp4",
        put("_weight_scale", np.ones((64, 32), E8M0)),
        r"must be F8_E8M0 \[144, 2\] or, swizzled, \[64, 16\]; got F8_E8M0 \[64, 32\]",
    ),
    "torchao recipe says plain": ("torchao mxfp4", recipe(is_swizzled_scales=False), "must be plain, as the header"),
    "torchao recipe of FP8": ("torchao mxfp4", recipe(elem_dtype={"_data": "float8_e4m3fn"}), "must be of float4"),
    "torchao recipe of another class": (
        "torchao mxfp4",
        recipe(_type="AffineQuantizedTensor"),
        "must be of MXTensor",
    ),
    "torchao groups of 16": ("torchao mxfp4", recipe(block_size=16), "must have groups of 32; the header's"),
    "torchao NaN in padding is seen only in scales": (
        "torchao mxfp4",
        put("_weight_scale", swizzle(np.full((144, 2), 255, np.uint8)).view(E8M0)),
        r"must not hold 255, e8m0's NaN; found at \[0, 0\]",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("case", WRONG)
def test_a_weight_that_does_not_add_up_is_refused(tmp_path, rng, case):
    producer, spoil, match = WRONG[case]
    wrong(tmp_path, rng, producer, spoil, match)


@pytest.mark.bad_input
def test_a_recipe_that_is_no_json_is_refused(tmp_path, rng):
    def spoil(tensors, metadata):
        metadata[f"{KV_B}.weight"] = "{" * 9

    wrong(tmp_path, rng, "torchao mxfp4", spoil, "the recipe of .* is not JSON")


@pytest.mark.bad_input
def test_packed_bytes_that_the_config_calls_something_else_are_refused(tmp_path, rng):
    """U8 codes and U8 scales of the right shapes could be integers too; the config knows."""
    for said in (quark({"dtype": "int4", "group_size": 32}), MODELOPT | {"quant_algo": "NVFP4"}):
        wrong(
            tmp_path / said["quant_method"],
            rng,
            "quark mxfp4",
            lambda tensors, metadata: None,
            "is MXFP4 by its tensors, but quantization_config calls it",
            said,
        )


QUANTIZATION = {
    "a list": [],
    "method a number": {"quant_method": 3},
    "exclude a string": {"quant_method": "quark", "exclude": "lm_head"},
    "exclude of numbers": {"quant_method": "quark", "exclude": [1]},
    "global a list": {"quant_method": "quark", "global_quant_config": []},
    "weight a string": {"quant_method": "quark", "global_quant_config": {"weight": "fp4"}},
    "groups a list": {"quant_method": "compressed-tensors", "config_groups": [1]},
    "ignore a dict": {"quant_method": "compressed-tensors", "ignore": {}},
    "block of strings": {"quant_method": "fp8", "weight_block_size": ["128", "128"]},
    "block of zero": {"quant_method": "fp8", "weight_block_size": [0, 128]},
    "block of three": {"quant_method": "fp8", "weight_block_size": [128, 128, 128]},
    "a pattern that is none": {"quant_method": "compressed-tensors", "ignore": ["re:(a"]},
    "a pattern too long": {"quant_method": "compressed-tensors", "ignore": ["re:" + "a" * 2000]},
    "too many patterns": {"quant_method": "quark", "exclude": [f"*{i}*" for i in range(5000)]},
    "lookbehind": {"quant_method": "compressed-tensors", "ignore": ["re:(?<=a)b"]},
}


@pytest.mark.bad_input
@pytest.mark.parametrize("case", QUANTIZATION)
def test_a_bad_quantization_config_is_refused(tmp_path, rng, case):
    root = write_checkpoint(
        tmp_path / "ckpt", layer_tensors(rng), CONFIG | {"quantization_config": QUANTIZATION[case]}
    )
    with pytest.raises(CheckpointError, match=r"config\.json: ") as caught:
        load_mla_layer(root, 0)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("producer", ["torchao mxfp4", "compressed-tensors nvfp4", "deepseek fp8"])
def test_shards_may_split_a_weight(tmp_path, rng, producer):
    tensors, config, metadata, expected = made(rng, producer)
    root = write_shards(tmp_path, tensors, config=config, metadata=metadata)
    assert np.array_equal(values(load_mla_layer(root, 0, dtype=jnp.float32).weights.kv_b_proj), expected)


@pytest.mark.parametrize("divisor", [238.0, 237.61299, 3.0e-30, 7.0e30])
def test_a_divisor_is_divided_by_whatever_compiles_it(rng, divisor):
    packed = rng.integers(0, 256, (8, 32), np.uint8)
    scales = rng.integers(8, 0x7F, (8, 4), np.uint8)
    one = np.float32(divisor)
    w = FP4Array.from_packed(packed, scales, np.float32(1) / one, format="nvfp4")
    w = dataclasses.replace(w, global_divisor=jnp.asarray(one))
    expected = oracle.E2M1[oracle.unpack(packed)].astype(np.float32) * np.repeat(
        oracle.e4m3(scales).astype(np.float32) / one, 16, -1
    )
    closed = jax.jit(lambda: w.dequantize())()  # a constant of the program
    for found in (w.dequantize(), jax.jit(FP4Array.dequantize)(w), closed):
        assert np.array_equal(np.asarray(found), expected)
