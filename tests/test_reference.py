"""Whole layers against what transformers, DeepSeek's own code and AMD Quark computed; see data/README.md."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mla_fp4_jax import FP4Array, MLAAttention, MLAConfig, MLAWeights, load_mla_layer, one_pack, quantize_mxfp4
from mla_fp4_jax.rope import cos_sin, inverse_frequencies

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "hf_mla" / "index.json").read_text())
OFFICIAL = [case for case in CASES if (DATA / "hf_mla" / f"{case}.official.npz").exists()]
QUARK = ["mxfp4_kvb_only", "mxfp4_all"]
PREFILLED = 17  # of 24 tokens; the others were decoded one by one
# design.md, "Numerics contract". At position 100000 one unit in the last place of an angle is 0.008 rad, and the
# recordings too round angles to float32: 2e-3.
ATOL, ATOL_FAR = 5e-5, 2e-3
BF16_RELATIVE_RMS = 0.015
# Where a rotated key's interleaved elements go when written as halves (DeepSeek-V2 and DeepSeek's own code).
HALVES = np.r_[0:32:2, 1:32:2]

prefill = jax.jit(MLAAttention.prefill)
decode = jax.jit(MLAAttention.decode, donate_argnames=("cache",))


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@functools.cache
def recorded(path: str) -> dict[str, np.ndarray]:
    """An .npz with its bf16 arrays as float32, under their names without the mark."""
    with np.load(DATA / path) as arrays:
        return {
            key.removesuffix(":bf16"): bf16(arrays[key]) if key.endswith(":bf16") else arrays[key]
            for key in arrays.files
        }


@functools.cache
def hf_layer(case: str, dtype: str = "float32") -> MLAAttention:
    """A case's layer: the checkpoint's weights under the config that it was recorded with."""
    root = DATA / "hf_mla"
    weights = load_mla_layer(root / f"ckpt_{CASES[case]['weights']}", 0, dtype=dtype).weights
    config = MLAConfig.from_hf(root / f"{case}.config.json")
    assert config.softmax_scale == pytest.approx(CASES[case]["scaling"], rel=1e-12)
    return MLAAttention(config, weights=weights, dtype=dtype)


def prefill_then_decode(layer: MLAAttention, x: np.ndarray, page_size: int | None = None, first: int = PREFILLED):
    """All outputs [B, T, E] and the cache, after `first` tokens at once and the others one by one."""
    x = jnp.asarray(x, layer.dtype)
    y, cache = prefill(layer, x[:, :first], layer.init_cache(*x.shape[:2], page_size=page_size))
    outputs = [y]
    for t in range(first, x.shape[1]):
        y, cache = decode(layer, x[:, t : t + 1], cache)
        outputs.append(y)
    return np.asarray(jnp.concatenate(outputs, axis=1), np.float32), cache


def close(got, expected, atol=ATOL) -> None:
    np.testing.assert_allclose(np.asarray(got), expected, atol=atol, rtol=0)


def relative_rms(got, expected) -> float:
    error = np.asarray(got, np.float64) - expected
    return float(np.sqrt((error**2).mean() / (expected.astype(np.float64) ** 2).mean()))


def test_every_recorded_case_is_here():
    assert len(CASES) == 4 and len(OFFICIAL) == 3
    assert {path.name for path in (DATA / "hf_mla").glob("*.io.npz")} == {f"{case}.io.npz" for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_rotary_tables(case):
    io, layer = recorded(f"hf_mla/{case}.io.npz"), hf_layer(case)
    rope, dim = layer.config.rope, layer.config.qk_rope_head_dim
    np.testing.assert_array_equal(inverse_frequencies(rope, dim), io["meta.inv_freq"])
    for name, first in (("", 0), ("far4090.", 4090), ("far100000.", 100000)):
        cos, sin = cos_sin(rope, dim, jnp.arange(first, first + 24))
        # transformers' V2 keeps complex numbers, its V3 each half twice.
        pair = ("freqs_re", "freqs_im") if f"fp32_eager.{name}freqs_re" in io else ("cos", "sin")
        for got, key in zip((cos, sin), pair, strict=True):
            expected = io[f"fp32_eager.{name}{key}"][0, :, :16]
            # The angles are equal bit for bit, so cosines are to within an ulp or two of the libraries'.
            close(got, expected, atol=3e-7)


@pytest.mark.parametrize("case", CASES)
def test_prefill(case):
    io, layer = recorded(f"hf_mla/{case}.io.npz"), hf_layer(case)
    y, cache = prefill(layer, jnp.asarray(io["x"]), layer.init_cache(2, 24))
    close(y, io["fp32_eager.prefill.out"])
    close(cache.latent, io["fp32_eager.cache.latent"][:, 0])
    k_rot = io["fp32_eager.cache.k_rot"][:, 0]
    close(cache.k_rope, k_rot[..., HALVES] if case.startswith("v2") else k_rot)
    np.testing.assert_array_equal(cache.length, [24, 24])


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("case", CASES)
def test_decode(case, page_size):
    io, layer = recorded(f"hf_mla/{case}.io.npz"), hf_layer(case)
    y, cache = prefill_then_decode(layer, io["x"], page_size)
    close(y, io["fp32_eager.decode.out"])
    if page_size is None:
        close(cache.latent, io["fp32_eager.cache.latent"][:, 0])
    else:
        pages = np.asarray(cache.pages)[np.asarray(cache.page_table)].reshape(2, 32, -1)[:, :24]
        close(pages[..., : layer.config.kv_lora_rank], io["fp32_eager.cache.latent"][:, 0])


@pytest.mark.parametrize(("first", "atol"), [(4090, ATOL), (100000, ATOL_FAR)])
@pytest.mark.parametrize("case", CASES)
def test_far_positions(case, first, atol):
    io, layer = recorded(f"hf_mla/{case}.io.npz"), hf_layer(case)
    positions = jnp.broadcast_to(jnp.arange(first, first + 24, dtype=jnp.int32), (2, 24))
    x = jnp.asarray(io["x"])
    expected = io[f"fp32_eager.far{first}.out"]
    y, _ = prefill(layer, x, layer.init_cache(2, 24), positions=positions)
    close(y, expected, atol)
    # The same tokens absorbed, all in one step of decoding.
    y, _ = decode(layer, x, layer.init_cache(2, 24), positions=positions)
    close(y, expected, atol)


@pytest.mark.parametrize("case", CASES)
def test_left_padding(case):
    io, layer = recorded(f"hf_mla/{case}.io.npz"), hf_layer(case)
    mask = io["meta.leftpad_mask"].astype(bool)
    assert not mask.all() and mask[:, -1].all()
    y, cache = prefill(layer, jnp.asarray(io["x"]), layer.init_cache(2, 24), padding_mask=jnp.asarray(mask))
    close(np.asarray(y)[mask], io["fp32_eager.leftpad.out"][mask])
    assert (np.asarray(y)[~mask] == 0).all()
    np.testing.assert_array_equal(cache.length, mask.sum(1))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16(case):
    """bf16 weights, activations and cache: rounding at every step, so only as near as two bf16 codes are."""
    io, layer = recorded(f"hf_mla/{case}.io.npz"), hf_layer(case, "bfloat16")
    y, cache = prefill_then_decode(layer, io["x"])
    assert cache.dtype == jnp.bfloat16
    assert relative_rms(y, io["fp32_eager.decode.out"]) <= BF16_RELATIVE_RMS
    whole, _ = prefill(layer, jnp.asarray(io["x"], jnp.bfloat16), layer.init_cache(2, 24))
    assert relative_rms(np.asarray(whole, np.float32), io["fp32_eager.prefill.out"]) <= BF16_RELATIVE_RMS
    # The recordings of transformers' own bf16 layer are no nearer.
    assert relative_rms(io["bf16_eager.prefill.out"], io["fp32_eager.prefill.out"]) <= BF16_RELATIVE_RMS


@pytest.mark.parametrize("case", OFFICIAL)
def test_deepseeks_own_code(case):
    official, io = recorded(f"hf_mla/{case}.official.npz"), recorded(f"hf_mla/{case}.io.npz")
    layer = hf_layer(case)
    y, _ = prefill(layer, jnp.asarray(io["x"]), layer.init_cache(2, 24))
    close(y, official["fp32.naive.prefill"])
    y, cache = prefill_then_decode(layer, io["x"])
    close(y, official["fp32.absorb.decode"])
    close(cache.latent, official["fp32.kv_cache"])
    close(cache.k_rope, official["fp32.pe_cache"][..., HALVES])


@functools.cache
def quark_layer(name: str, dtype: str = "float32") -> MLAAttention:
    return load_mla_layer(DATA / "quark" / name, 0, dtype=dtype)


@pytest.mark.parametrize("name", QUARK)
def test_quark_weights_are_exact(name):
    io, weights = recorded(f"quark/{name}.io.npz"), quark_layer(name).weights
    keys = [key for key in io if key.endswith("_dequant")]
    assert len(keys) == {"mxfp4_kvb_only": 1, "mxfp4_all": 5}[name]
    for key in keys:
        weight = getattr(weights, key.removeprefix("quark.").removesuffix("_dequant"))
        assert isinstance(weight, FP4Array)
        for dtype in (jnp.float32, jnp.bfloat16):
            dense = np.asarray(weight.dequantize(dtype), np.float32)
            np.testing.assert_array_equal(dense.reshape(io[key].shape), io[key])


@pytest.mark.parametrize("name", QUARK)
def test_quark_layers(name):
    io, layer = recorded(f"quark/{name}.io.npz"), quark_layer(name)
    y, _ = prefill(layer, jnp.asarray(io["x"]), layer.init_cache(2, 24))
    close(y, io["fp32_dequant.prefill"])
    y, _ = prefill_then_decode(layer, io["x"])
    close(y, io["fp32_dequant.decode"])


@pytest.mark.parametrize("name", QUARK)
def test_quark_layers_in_bfloat16(name):
    io, layer = recorded(f"quark/{name}.io.npz"), quark_layer(name, "bfloat16")
    y, _ = prefill_then_decode(layer, io["x"])
    assert relative_rms(y, io["fp32_dequant.decode"]) <= BF16_RELATIVE_RMS
    if "quark.bf16.decode" in io:
        assert relative_rms(io["quark.bf16.decode"], io["fp32_dequant.decode"]) <= BF16_RELATIVE_RMS


def test_the_kernel_in_the_interpreter_gives_quarks_layer():
    """The one path to all five packed projections that an accelerator takes, on a CPU."""
    io, layer = recorded("quark/mxfp4_all.io.npz"), quark_layer("mxfp4_all")
    layer = MLAAttention(layer.config, weights=layer.weights, dtype="float32", implementation="triton_interpret")
    y, _ = decode(layer, jnp.asarray(io["x"]), layer.init_cache(2, 24))
    close(y, io["fp32_dequant.prefill"])


# One layer of DeepSeek-V3's own size. Its weights are not stored but made, by the recipe in meta.json.

META = json.loads((DATA / "full_v3_layer" / "meta.json").read_text())


def made(name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Near-normal bf16 numbers: sums of the four 16-bit lanes of splitmix64's outputs."""
    seed = np.uint64(int.from_bytes(hashlib.sha256(f"full/{name}".encode()).digest()[:8], "little"))
    out = np.empty(int(np.prod(shape)), ml_dtypes.bfloat16)
    for start in range(0, out.size, 1 << 22):
        index = np.arange(start + 1, min(start + (1 << 22), out.size) + 1, dtype=np.uint64)
        z = seed + index * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        lanes = z.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)
        out[start : start + len(index)] = ((lanes - 131070) / 37836.63 * std).astype(np.float32)
    return out.reshape(shape)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def full_weight(name: str) -> np.ndarray:
    shape, digest, first = META["hashes"][name]
    if name.endswith("layernorm.weight"):
        one = np.ones((), ml_dtypes.bfloat16)
        value = (one.astype(np.float32) + made(name, tuple(shape), 0.25).astype(np.float32)).astype(one.dtype)
    else:
        value = made(name, tuple(shape), META["std"][name])
    assert value.reshape(-1)[:4].view(np.uint16).tolist() == first and sha256(value) == digest
    return value


def test_the_recipe_of_the_full_layer():
    for name in ("q_a_layernorm.weight", "kv_a_layernorm.weight", "kv_a_proj_with_mqa.weight"):
        full_weight(name)
    x = made("x", (1, 12, 7168), 1.0)
    np.testing.assert_array_equal(x.astype(np.float32), recorded("full_v3_layer/io.npz")["x"])


@pytest.mark.slow
def test_a_full_size_layer_with_mxfp4_kv_b():
    io, config = recorded("full_v3_layer/io.npz"), MLAConfig.from_hf(DATA / "full_v3_layer")
    assert config.softmax_scale == pytest.approx(META["scaling"], rel=1e-12)

    def dense(name: str) -> jax.Array:
        return jnp.asarray(full_weight(f"{name}.weight")).astype(jnp.float32)

    packed, scales = (np.asarray(part) for part in quantize_mxfp4(dense("kv_b_proj")).to_packed())
    assert sha256(scales) == META["hashes"]["kv_b_proj.mxfp4.even.scale"][1]
    np.testing.assert_array_equal(scales, io["kv_b_proj.mxfp4.even.scale"])
    np.testing.assert_array_equal(packed[:256], io["kv_b_proj.mxfp4.even.packed_head0"])
    assert sha256(packed) == META["hashes"]["kv_b_proj.mxfp4.even.packed"][1]
    kv_b_proj = one_pack(packed, scales, num_heads=128, qk_nope_head_dim=128, v_head_dim=128)
    assert sha256(np.asarray(kv_b_proj.dequantize())) == META["hashes"]["kv_b_proj.mxfp4.even.dequant_fp32"]
    names = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj")
    layer = MLAAttention(
        config, weights=MLAWeights(kv_b_proj=kv_b_proj, **{name: dense(name) for name in names}), dtype="float32"
    )
    y, cache = prefill(layer, jnp.asarray(io["x"]), layer.init_cache(1, 12))
    close(y, io["fp32_mxfp4_even.prefill"])
    close(cache.latent[0], io["fp32_mxfp4_even.cache.latent"])
    close(cache.k_rope[0], io["fp32_mxfp4_even.cache.k_rot"])
    y, cache = prefill_then_decode(layer, io["x"], first=8)
    close(y, io["fp32_mxfp4_even.decode"])
    # What MXFP4 itself costs here, as recorded.
    error = relative_rms(y, io["fp32.prefill"])
    assert error == pytest.approx(META["rel_rms_vs_fp32"]["fp32_mxfp4_even.prefill"], rel=1e-3)
