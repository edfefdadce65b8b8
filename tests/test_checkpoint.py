"""Loading: real exporters' layers against what they recorded, and errors that name all that is wrong."""

from __future__ import annotations

import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from checkpoints import CONFIG, DATA, PREFIX, layer_tensors, mxfp4_tensors, write_checkpoint, write_shards

from mla_fp4_jax import CheckpointError, FP4Array, MLAAttention, load_mla_layer
from mla_fp4_jax.checkpoint import plan_mla_layer
from mla_fp4_jax.checkpoint.dtypes import NUMPY

HF_CHECKPOINTS = ["v3_q96", "v3_noq_bias_yarn", "v2_noq_yarn"]
QUARK = ["mxfp4_kvb_only", "mxfp4_all"]
# design.md, "Numerics contract": float32 layers against recorded float32 outputs.
ATOL = 5e-5


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def prefill(layer: MLAAttention, x: np.ndarray) -> np.ndarray:
    return np.asarray(layer.prefill(jnp.asarray(x), layer.init_cache(*x.shape[:2]))[0])


@pytest.mark.parametrize("name", HF_CHECKPOINTS)
def test_a_transformers_checkpoint_gives_what_transformers_computed(name):
    layer = load_mla_layer(DATA / "hf_mla" / f"ckpt_{name}", 0, dtype=jnp.float32)
    with np.load(DATA / "hf_mla" / f"{name}.io.npz") as io:
        y = prefill(layer, bf16(io["x:bf16"]))
        np.testing.assert_allclose(y, io["fp32_eager.prefill.out"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", QUARK)
def test_a_quark_export_dequantises_bit_for_bit_as_quark_does(name):
    layer = load_mla_layer(DATA / "quark" / name, 0, dtype=jnp.float32)
    with np.load(DATA / "quark" / f"{name}.io.npz") as io:
        keys = [key for key in io.files if key.endswith("_dequant") or key.endswith("_dequant:bf16")]
        assert len(keys) == (1 if name == "mxfp4_kvb_only" else 5)
        for key in keys:
            field = key.removeprefix("quark.").removesuffix(":bf16").removesuffix("_dequant")
            expected = bf16(io[key]) if key.endswith(":bf16") else io[key]
            weight = getattr(layer.weights, field)
            assert isinstance(weight, FP4Array)
            assert np.array_equal(np.asarray(weight.dequantize(jnp.float32)).reshape(expected.shape), expected)


@pytest.mark.parametrize("name", QUARK)
def test_a_quark_layer_gives_what_a_float32_layer_on_its_weights_does(name):
    layer = load_mla_layer(DATA / "quark" / name, 0, dtype=jnp.float32)
    with np.load(DATA / "quark" / f"{name}.io.npz") as io:
        y = prefill(layer, bf16(io["x:bf16"]))
        np.testing.assert_allclose(y, io["fp32_dequant.prefill"], atol=ATOL, rtol=0)


def test_packed_weights_are_the_checkpoints_own_bytes(tmp_path, rng):
    tensors = layer_tensors(rng)
    kv_b = load_mla_layer(write_checkpoint(tmp_path, tensors), 0).weights.kv_b_proj
    assert isinstance(kv_b, FP4Array)
    assert kv_b.shape == (3, 48, 64)
    packed, scales = kv_b.to_packed()[:2]
    assert np.array_equal(np.asarray(packed).reshape(144, 32), tensors[f"{PREFIX}kv_b_proj.weight"])
    assert np.array_equal(np.asarray(scales).reshape(144, 2), tensors[f"{PREFIX}kv_b_proj.weight_scale"])


def test_every_projection_may_be_mxfp4(tmp_path, rng):
    config = CONFIG | {"q_lora_rank": 32}
    rows = {"q_a_proj": (32, 96), "q_b_proj": (72, 32), "kv_a_proj_with_mqa": (72, 96), "o_proj": (96, 96)}
    tensors = layer_tensors(rng)
    tensors[f"{PREFIX}q_a_layernorm.weight"] = np.ones(32, ml_dtypes.bfloat16)
    for name, shape in rows.items():
        tensors |= mxfp4_tensors(rng, PREFIX + name, *shape)
    weights = load_mla_layer(write_checkpoint(tmp_path, tensors, config), 0).weights
    for name, shape in {**rows, "kv_b_proj": (3, 48, 64)}.items():
        weight = getattr(weights, name)
        assert isinstance(weight, FP4Array) and weight.shape == shape
        stored = tensors[f"{PREFIX}{name}.weight"], tensors[f"{PREFIX}{name}.weight_scale"]
        expected = oracle.dequantize(oracle.unpack(stored[0]), oracle.e8m0(stored[1]))
        assert np.array_equal(np.asarray(weight.dequantize(jnp.float32)).reshape(expected.shape), expected)


def test_a_scale_stored_as_e8m0_is_the_same_byte(tmp_path, rng):
    tensors = layer_tensors(rng)
    expected = load_mla_layer(write_checkpoint(tmp_path / "u8", tensors), 0).weights.kv_b_proj
    name = f"{PREFIX}kv_b_proj.weight_scale"
    tensors[name] = tensors[name].view(ml_dtypes.float8_e8m0fnu)
    found = load_mla_layer(write_checkpoint(tmp_path / "e8m0", tensors), 0).weights.kv_b_proj
    assert np.array_equal(np.asarray(found.scales), np.asarray(expected.scales))


@pytest.mark.parametrize("stored", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
def test_dense_weights_are_cast_to_the_dtype(tmp_path, rng, stored, dtype):
    tensors = layer_tensors(rng, kv_b="dense", dtype=NUMPY[stored])
    layer = load_mla_layer(write_checkpoint(tmp_path, tensors), 0, dtype=dtype)
    leaves = jax.tree.leaves(layer.weights)
    assert len(leaves) == 7 and all(leaf.dtype == dtype for leaf in leaves)
    assert layer.dtype == jnp.dtype(dtype)
    expected = tensors[f"{PREFIX}o_proj.weight"].astype(np.dtype(dtype))
    assert np.array_equal(np.asarray(layer.weights.o_proj), expected)
    assert layer.weights.kv_b_proj.shape == (3, 48, 64)


def test_shards_one_file_and_a_path_to_either_are_the_same(tmp_path, rng):
    tensors = layer_tensors(rng)
    single, sharded = write_checkpoint(tmp_path / "one", tensors), write_shards(tmp_path / "many", tensors)
    paths = [
        single,
        str(single),
        single / "model.safetensors",
        sharded,
        sharded / "model.safetensors.index.json",
    ]
    layers = [jax.tree.leaves(load_mla_layer(path, 0).weights) for path in paths]
    for leaves in layers[1:]:
        for a, b in zip(layers[0], leaves, strict=True):
            assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


def test_a_lone_file_of_another_name_is_found(tmp_path, rng):
    root = write_checkpoint(tmp_path, layer_tensors(rng))
    (root / "model.safetensors").rename(root / "consolidated.safetensors")
    assert isinstance(load_mla_layer(root, 0), MLAAttention)


def test_only_the_shards_of_the_layer_are_opened(tmp_path, rng):
    tensors = layer_tensors(rng)
    root = write_shards(tmp_path, tensors, shards=2)
    (root / "other.safetensors").write_bytes(b"not even a header")
    index = json.loads((root / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.1.mlp.up_proj.weight"] = "other.safetensors"
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    assert isinstance(load_mla_layer(root, 0), MLAAttention)


@pytest.mark.parametrize(
    "prefix", ["model.layers.3.self_attn.", "language_model.model.layers.3.self_attn.", "layers.3.self_attn."]
)
def test_the_layer_is_found_under_any_model_prefix(tmp_path, rng, prefix):
    tensors = layer_tensors(rng, prefix=prefix) | {
        "model.layers.33.self_attn.o_proj.weight": np.zeros(3),
        "vision_tower.layers.3.self_attn.q_proj.weight": np.zeros(3),
        prefix.replace("self_attn", "mlp") + "up_proj.weight": np.zeros(3),
    }
    root = write_checkpoint(tmp_path, tensors)
    assert plan_mla_layer(root, 3).prefix == prefix
    assert isinstance(load_mla_layer(root, 3), MLAAttention)
    named = plan_mla_layer(root, 3, prefix=prefix.replace("3", "{layer}").rstrip("."))
    assert named.prefix == prefix


def test_two_layers_that_could_be_meant_need_a_prefix(tmp_path, rng):
    tensors = layer_tensors(rng) | layer_tensors(rng, prefix="draft.layers.0.self_attn.")
    root = write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="layer 0 could be 'draft.layers.0.self_attn.' or 'model.*prefix="):
        load_mla_layer(root, 0)
    assert isinstance(load_mla_layer(root, 0, prefix="draft.layers.0.self_attn"), MLAAttention)


def test_scales_of_activations_are_left_out_and_named(tmp_path, rng, caplog):
    extra = {f"{PREFIX}{name}": np.ones((), np.float32) for name in ("kv_b_proj.input_scale", "k_scale")}
    extra[f"{PREFIX}rotary_emb.inv_freq"] = np.ones(4, np.float32)
    root = write_checkpoint(tmp_path, layer_tensors(rng) | extra)
    with caplog.at_level(logging.INFO, "mla_fp4_jax"):
        assert isinstance(load_mla_layer(root, 0), MLAAttention)
    assert all(name in caplog.text for name in extra)
    assert plan_mla_layer(root, 0).unused == tuple(sorted(extra))


def test_the_plan_says_what_each_weight_is(tmp_path, rng):
    planned = {weight.field: weight for weight in plan_mla_layer(DATA / "quark" / "mxfp4_kvb_only", 0).weights}
    assert {field: weight.format for field, weight in planned.items()} == {
        "q_a_proj": "BF16",
        "q_a_layernorm": "BF16",
        "q_b_proj": "BF16",
        "kv_a_proj_with_mqa": "BF16",
        "kv_a_layernorm": "BF16",
        "kv_b_proj": "MXFP4",
        "o_proj": "BF16",
    }
    # 1024 x 128 codes at 4.25 bits.
    assert planned["kv_b_proj"].nbytes == 1024 * 128 * 17 // 32


# What is wrong gets an error that names the tensor, what was expected and what was found.


def change(**updates):
    """Tensors with some replaced, by a function of the old, or removed (None)."""

    def apply(tensors):
        for name, update in updates.items():
            full = PREFIX + name.replace("__", ".")
            if update is None:
                del tensors[full]
            else:
                tensors[full] = update(tensors.get(full))
        return tensors

    return apply


def zeros(*shape, dtype=ml_dtypes.bfloat16):
    return lambda old: np.zeros(shape, dtype)


WRONG = {
    "missing projection": (
        change(o_proj__weight=None),
        r"o_proj\.weight \[96, 96\] is missing; the layer has .*kv_a_layernorm",
    ),
    "missing norm": (change(q_a_layernorm__weight=None), r"q_a_layernorm\.weight \[40\] is missing"),
    "missing kv_b": (
        change(kv_b_proj__weight=None, kv_b_proj__weight_scale=None),
        r"kv_b_proj\.weight \[144, 64\] is missing",
    ),
    "missing codes": (
        change(kv_b_proj__weight=None),
        r"kv_b_proj \(weight_scale U8 \[144, 2\]\) look like no known",
    ),
    "missing scale": (
        change(kv_b_proj__weight_scale=None),
        r"kv_b_proj \(weight U8 \[144, 32\]\) look like packed codes without scales",
    ),
    "extra projection": (
        change(q_proj__weight=zeros(72, 96)),
        r"does not use: .*q_proj\.weight BF16 \[72, 96\]",
    ),
    "extra bias": (
        change(o_proj__bias=zeros(96)),
        r"does not use: .*o_proj\.bias BF16 \[96\].*attention_bias",
    ),
    "bias no variant has": (change(kv_b_proj__bias=zeros(144)), r"kv_b_proj\.bias BF16 \[144\]"),
    "extra module": (change(indexer__wk__weight=zeros(4, 4)), r"indexer\.wk\.weight"),
    "smoothing left behind": (change(o_proj__pre_quant_scale=zeros(96)), "pre_quant_scale"),
    "out of order": (
        change(o_proj__weight=zeros(96, 95)),
        r"o_proj\.weight must be BF16 \[96, 96\]; got BF16 \[96, 95\]",
    ),
    "in and out swapped": (
        change(q_a_proj__weight=zeros(96, 40)),
        r"q_a_proj\.weight must be BF16 \[40, 96\]; got BF16 \[96, 40\]",
    ),
    "norm of another length": (
        change(kv_a_layernorm__weight=zeros(72)),
        r"must be BF16 \[64\]; got BF16 \[72\]",
    ),
    "three axes": (
        change(q_b_proj__weight=zeros(3, 24, 40)),
        r"must be BF16 \[72, 40\]; got BF16 \[3, 24, 40\]",
    ),
    "packed too wide": (
        change(kv_b_proj__weight=zeros(144, 64, dtype=np.uint8)),
        r"kv_b_proj\.weight must be U8 \[144, 32\] for MXFP4 \[144, 64\], two codes to a byte; got U8",
    ),
    "groups of 16": (
        change(kv_b_proj__weight_scale=zeros(144, 4, dtype=np.uint8)),
        r"weight_scale must be U8 \[144, 2\] for MXFP4 \[144, 64\], one scale to 32; got U8 \[144, 4\]",
    ),
    "scale transposed": (change(kv_b_proj__weight_scale=zeros(2, 144, dtype=np.uint8)), r"got U8 \[2, 144\]"),
    "other head count": (change(kv_b_proj__weight=zeros(192, 32, dtype=np.uint8)), r"got U8 \[192, 32\]"),
    "scale as float": (
        change(kv_b_proj__weight_scale=zeros(144, 2, dtype=np.float32)),
        r"weight_scale F32 \[144, 2\].*packed codes without scales that fit them",
    ),
    "codes as int8": (change(kv_b_proj__weight=zeros(144, 32, dtype=np.int8)), "no known format"),
    "dense with a scale": (change(o_proj__weight_scale=zeros(96, 3, dtype=np.uint8)), "no known format"),
    "float64": (
        change(o_proj__weight=zeros(96, 96, dtype=np.float64)),
        r"weight F64 \[96, 96\].*no known format",
    ),
    "packed norm": (
        change(
            kv_a_layernorm__weight=zeros(32, dtype=np.uint8),
            kv_a_layernorm__weight_scale=zeros(2, dtype=np.uint8),
        ),
        r"kv_a_layernorm\.weight must be one of BF16, F16, F32; got U8 \[32\]",
    ),
    "linear that groups do not divide": (
        change(
            q_b_proj__weight=zeros(72, 20, dtype=np.uint8),
            q_b_proj__weight_scale=zeros(72, 1, dtype=np.uint8),
        ),
        r"q_b_proj\.weight must not be MXFP4: groups of 32 do not divide \[72, 40\]",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("write", [write_checkpoint, write_shards])
def test_a_wrong_layer_is_refused_by_name(tmp_path, rng, case, write):
    spoil, match = WRONG[case]
    root = write(tmp_path / "ckpt", spoil(layer_tensors(rng)))
    with pytest.raises(CheckpointError, match=match) as caught:
        load_mla_layer(root, 0)
    assert str(root) in str(caught.value)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("layer", "error", "match"),
    [
        (1, CheckpointError, "no attention layer 1; its layers are 0"),
        (10**9, CheckpointError, "no attention layer"),
        (-1, ValueError, "layer must be >= 0"),
        (0.0, TypeError, "layer must be an integer"),
        ("0", TypeError, "layer must be an integer"),
        (True, TypeError, "layer must be an integer"),
    ],
)
def test_a_layer_that_is_not_there(tmp_path, rng, layer, error, match):
    root = write_checkpoint(tmp_path, layer_tensors(rng))
    with pytest.raises(error, match=match):
        load_mla_layer(root, layer)


@pytest.mark.bad_input
def test_where_there_is_no_checkpoint(tmp_path, rng):
    with pytest.raises(CheckpointError, match="nowhere: does not exist"):
        load_mla_layer(tmp_path / "nowhere", 0)
    with pytest.raises(CheckpointError, match="must hold model.safetensors or .*; found nothing"):
        load_mla_layer(tmp_path, 0)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(CheckpointError, match="must be a directory, a .safetensors file"):
        load_mla_layer(tmp_path / "a.txt", 0)
    write_checkpoint(tmp_path, layer_tensors(rng))
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_mla_layer(tmp_path, 0)


@pytest.mark.bad_input
def test_an_unknown_prefix(tmp_path, rng):
    root = write_checkpoint(tmp_path / "ckpt", layer_tensors(rng))
    with pytest.raises(CheckpointError, match="no tensor's name begins with 'other.0.'"):
        load_mla_layer(root, 0, prefix="other.{layer}")


@pytest.mark.bad_input
def test_config_and_weights_that_disagree(tmp_path, rng):
    tensors = layer_tensors(rng)
    biased = write_checkpoint(tmp_path / "bias", tensors, CONFIG | {"attention_bias": True})
    with pytest.raises(CheckpointError, match=r"q_a_proj\.bias \[40\] is missing"):
        load_mla_layer(biased, 0)
    plain = write_checkpoint(tmp_path / "plain", tensors, CONFIG | {"q_lora_rank": None})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight \[72, 96\] is missing; the layer has .*q_a_proj"):
        load_mla_layer(plain, 0)
    heads = write_checkpoint(tmp_path / "heads", tensors, CONFIG | {"num_attention_heads": 4})
    with pytest.raises(CheckpointError, match=r"q_b_proj\.weight must be BF16 \[96, 40\]; got BF16 \[72, 40\]"):
        load_mla_layer(heads, 0)


@pytest.mark.bad_input
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.float8_e4m3fn, bool])
def test_a_dtype_that_cannot_compute(tmp_path, rng, dtype):
    root = write_checkpoint(tmp_path, layer_tensors(rng))
    with pytest.raises(TypeError, match="dtype must be bfloat16, float16 or float32"):
        load_mla_layer(root, 0, dtype=dtype)


@pytest.mark.bad_input
def test_values_beyond_float16_are_refused_there(tmp_path, rng):
    tensors = layer_tensors(rng)
    tensors[f"{PREFIX}o_proj.weight"][3, 4] = 1e5
    root = write_checkpoint(tmp_path, tensors)
    assert isinstance(load_mla_layer(root, 0), MLAAttention)
    with pytest.raises(CheckpointError, match=r"o_proj\.weight must fit float16"):
        load_mla_layer(root, 0, dtype=jnp.float16)


def test_biases_load_under_their_fields():
    weights = load_mla_layer(DATA / "hf_mla" / "ckpt_v3_noq_bias_yarn", 0).weights
    assert weights.kv_a_proj_bias.shape == (160,) and weights.o_proj_bias.shape == (256,)
    assert weights.q_a_proj is None and weights.q_a_proj_bias is None
