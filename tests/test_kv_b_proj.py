"""kv_b_proj's views: the one pack, which moves nothing, and the engines' layouts with the error they cost."""

from __future__ import annotations

import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from mla_fp4_jax import one_pack, quantize_mxfp4, unpack_kv_b_proj

DATA = Path(__file__).parent / "data"
# All sizes differ. P is a multiple of 32 for the engines' layouts, V is not.
H, P, V, L = 3, 64, 40, 96
SIZES = {"num_heads": H, "qk_nope_head_dim": P, "v_head_dim": V}


def stored(rng, low=118, high=136) -> tuple[np.ndarray, np.ndarray]:
    packed = rng.integers(0, 256, (H * (P + V), L // 2), np.uint8)
    return packed, rng.integers(low, high, (H * (P + V), L // 32), np.uint8)


def values(packed, scales) -> np.ndarray:
    """Float64 [H, P+V, L] of the checkpoint's bytes."""
    return oracle.dequantize(oracle.unpack(packed), oracle.e8m0(scales)).reshape(H, P + V, L)


def quantize_even(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The EVEN rule on float64 [..., C] in groups of 32: codes and scale bytes (0 for a group of zeros)."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    half, exponent = np.frexp(np.abs(groups).max(-1))
    byte = np.clip(exponent - 3 + (half >= 0.875) + 127, 0, 254)
    codes = oracle.encode_e2m1(np.ldexp(groups, 127 - byte[..., None]))
    return codes.reshape(x.shape), byte


def stored_bytes(path: Path, name: str) -> np.ndarray:
    """A uint8 tensor of layer 0, read by hand."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[f"model.layers.0.self_attn.{name}"]
    begin, end = entry["data_offsets"]
    return np.frombuffer(data[start + begin : start + end], np.uint8).reshape(entry["shape"])


def pack(codes: np.ndarray) -> np.ndarray:
    return codes[..., 0::2] | codes[..., 1::2] << 4


def test_one_pack_is_the_checkpoints_bytes_by_head(rng):
    packed, scales = stored(rng)
    w = one_pack(packed, scales, **SIZES)
    assert w.shape == (H, P + V, L) and w.format == "mxfp4" and w.group_size == 32
    assert w.nbytes_packed == packed.nbytes + scales.nbytes
    np.testing.assert_array_equal(w.dequantize(), values(packed, scales))
    back, back_scales = (np.asarray(part) for part in w.to_packed())
    assert back.tobytes() == packed.tobytes() and back_scales.tobytes() == scales.tobytes()
    # A head's key rows come before its value rows.
    for head in range(H):
        first = head * (P + V)
        np.testing.assert_array_equal(np.asarray(w.packed)[head, :P], packed[first : first + P])
        np.testing.assert_array_equal(np.asarray(w.packed)[head, P:], packed[first + P : first + P + V])


COMPILE_FOR_H100 = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from mla_fp4_jax import one_pack
target = open(sys.argv[1]).read()
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), P())
rows = 4 * (192 + 256)
args = [jax.ShapeDtypeStruct((rows, n), jnp.uint8, sharding=sharding) for n in (256, 16)]
def view(p, s):
    return one_pack(p, s, num_heads=4, qk_nope_head_dim=192, v_head_dim=256).to_packed()
compiled = jax.jit(view, donate_argnums=(0, 1)).lower(*args).compile()
memory = compiled.memory_analysis()
print("BYTES", memory.argument_size_in_bytes, memory.alias_size_in_bytes, memory.temp_size_in_bytes)
print(compiled.as_text())
"""


def plugins():
    """JAX's installed platform plugins, without importing any."""
    if importlib.util.find_spec("jax_plugins") is None:
        return []
    import jax_plugins

    return list(pkgutil.iter_modules(jax_plugins.__path__))


@pytest.mark.aot
def test_one_pack_moves_no_byte_on_an_h100():
    """The optimised HLO for sm_90 of bytes in, one pack, bytes out: bitcasts alone; the result is the argument."""
    if not any(module.name.startswith("xla_cuda") for module in plugins()):
        pytest.skip("needs the CUDA plugin")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    command = [sys.executable, "-c", COMPILE_FOR_H100, str(DATA / "h100_target_config.txt")]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    argument, alias, temp = map(int, re.search(r"BYTES (\d+) (\d+) (\d+)", run.stdout).groups())
    assert alias == argument == 4 * (192 + 256) * (256 + 16) and temp == 0
    entry = run.stdout[run.stdout.index("ENTRY") :]
    operations = set(re.findall(r"= .*?(?:\}|\)) ([a-z-]+)\(", entry))
    assert {"parameter", "bitcast"} <= operations <= {"parameter", "bitcast", "tuple"}, entry


def test_one_pack_moves_no_byte_elsewhere_on_a_cpu(rng):
    """A CPU spells an FP4 bitcast out element by element, in place; there too no byte changes its place."""
    compiled = jax.jit(lambda p, s: one_pack(p, s, **SIZES)).lower(*stored(rng)).compile()
    operations = set(re.findall(r"(?:\}|\]) ([a-z-]+)\(", compiled.as_text()))
    assert {"parameter", "bitcast"} <= operations
    moves = {"transpose", "gather", "scatter", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad"}
    assert not operations & moves
    assert compiled.memory_analysis().temp_size_in_bytes == 0


def test_one_pack_is_a_reshape_and_nothing_else(rng):
    """Before any optimisation: no arithmetic, slice, gather or transpose, so none on any back end."""
    packed, scales = stored(rng)
    jaxpr = jax.make_jaxpr(lambda p, s: one_pack(p, s, **SIZES))(packed, scales)
    used = {str(equation.primitive) for equation in jaxpr.jaxpr.eqns}
    assert used <= {"bitcast_convert_type", "reshape", "optimization_barrier"}


def test_one_pack_is_jittable_and_takes_e8m0(rng):
    packed, scales = stored(rng)
    expected = one_pack(packed, scales, **SIZES)
    for given in (scales, scales.view(ml_dtypes.float8_e8m0fnu)):
        w = jax.jit(lambda p, s: one_pack(p, s, **SIZES))(packed, given)
        np.testing.assert_array_equal(w.packed, expected.packed)
        np.testing.assert_array_equal(w.scales, expected.scales)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_engines_layouts_match_the_oracle(rng, compiled):
    packed, scales = stored(rng)
    dense = values(packed, scales)

    def unpack(packed, scales):
        return unpack_kv_b_proj(packed, scales, **SIZES)

    w = (jax.jit(unpack) if compiled else unpack)(packed, scales)
    assert w.W_K.shape == (H, L, P // 2) and w.W_K_scale.shape == (H, L, P // 32)
    assert w.W_V.shape == (H, V, L // 2) and w.W_V_scale.shape == (H, V, L // 32)
    assert all(part.dtype == jnp.uint8 for part in w[:4]) and w.error.dtype == jnp.float32
    # Value rows: the checkpoint's own bytes.
    by_head = packed.reshape(H, P + V, -1), scales.reshape(H, P + V, -1)
    np.testing.assert_array_equal(w.W_V, by_head[0][:, P:])
    np.testing.assert_array_equal(w.W_V_scale, by_head[1][:, P:])
    # Key rows: transposed, quantised again along P.
    keys = dense[:, :P].swapaxes(1, 2)
    codes, bytes_ = quantize_even(keys)
    got = oracle.unpack(np.asarray(w.W_K))
    np.testing.assert_array_equal(np.where(got == 8, 0, got), np.where(codes == 8, 0, codes))
    np.testing.assert_array_equal(w.W_K_scale, bytes_)
    again = oracle.dequantize(codes, oracle.e8m0(bytes_))
    error = np.sqrt(((again - keys) ** 2).sum() / (keys**2).sum())
    assert error > 0.05
    np.testing.assert_allclose(float(w.error), error, rtol=1e-5)


@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_the_second_quantisation_takes_any_scale_rule(rng, rule):
    packed, scales = stored(rng)
    w = unpack_kv_b_proj(packed, scales, **SIZES, scale_rule=rule)
    keys = jnp.asarray(values(packed, scales)[:, :P].swapaxes(1, 2), jnp.float32)
    expected = quantize_mxfp4(keys, scale_rule=rule)
    np.testing.assert_array_equal(w.W_K, expected.packed)
    np.testing.assert_array_equal(w.W_K_scale, expected.scales)


def test_what_fits_both_ways_loses_nothing(rng):
    """Powers of two under one scale lie on either grid."""
    packed = pack(rng.choice([2, 4, 10, 12], (H * (P + V), L)).astype(np.uint8))
    w = unpack_kv_b_proj(packed, np.full((H * (P + V), L // 32), 127, np.uint8), **SIZES)
    assert float(w.error) == 0.0
    zeros = unpack_kv_b_proj(np.zeros_like(packed), np.full((H * (P + V), L // 32), 127, np.uint8), **SIZES)
    assert float(zeros.error) == 0.0 and not np.asarray(zeros.W_K).any()


@pytest.mark.parametrize("shift", [-90, 90])
def test_the_error_survives_tiny_and_huge_weights(rng, shift):
    packed, scales = stored(rng)
    plain = unpack_kv_b_proj(packed, scales, **SIZES)
    moved = unpack_kv_b_proj(packed, (scales.astype(int) + shift).astype(np.uint8), **SIZES)
    np.testing.assert_array_equal(moved.W_K, plain.W_K)
    np.testing.assert_allclose(float(moved.error), float(plain.error), rtol=1e-6)


def test_a_quark_export_in_the_engines_layouts():
    """Quark's own dequantised weights, requantised as SGLang and vLLM do (torchao's EVEN rule, Quark's default)."""
    sizes = {"num_heads": 8, "qk_nope_head_dim": 64, "v_head_dim": 64}
    path = DATA / "quark" / "mxfp4_kvb_only" / "model.safetensors"
    packed, scales = (stored_bytes(path, f"kv_b_proj.{name}") for name in ("weight", "weight_scale"))
    bits = np.load(DATA / "quark" / "mxfp4_kvb_only.io.npz")["quark.kv_b_proj_dequant:bf16"]
    dense = (bits.astype(np.uint32) << 16).view(np.float32).reshape(8, 128, 128)
    np.testing.assert_array_equal(one_pack(packed, scales, **sizes).dequantize(), dense)
    w = unpack_kv_b_proj(packed, scales, **sizes)
    values_again = oracle.dequantize(oracle.unpack(np.asarray(w.W_V)), oracle.e8m0(np.asarray(w.W_V_scale)))
    np.testing.assert_array_equal(values_again, dense[:, 64:])
    keys = dense[:, :64].swapaxes(1, 2).astype(np.float64)
    codes, bytes_ = quantize_even(keys)
    again = oracle.dequantize(oracle.unpack(np.asarray(w.W_K)), oracle.e8m0(np.asarray(w.W_K_scale)))
    np.testing.assert_array_equal(again, oracle.dequantize(codes, oracle.e8m0(bytes_)))
    # formats.md section 3: a second quantisation of heavy-tailed weights costs more than a tenth.
    assert 0.05 < float(w.error) < 0.25


def test_values_are_exact_and_keys_are_not_under_torchaos_own_quantisation():
    """kv_b_proj as torchao quantised it (EVEN): one_pack decodes to torchao's values bit for bit."""
    recorded = np.load(DATA / "vectors" / "torchao_mxfp4.npz")
    packed, scales, deq = (recorded[f"kv_b_proj:bf16:even:{part}"] for part in ("packed", "scale", "deq"))
    w = one_pack(packed, scales, num_heads=8, qk_nope_head_dim=64, v_head_dim=64)
    np.testing.assert_array_equal(w.dequantize(), deq.reshape(8, 128, 128))


@pytest.mark.bad_input
@pytest.mark.parametrize("transform", [one_pack, unpack_kv_b_proj])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"num_heads": 4}, ValueError, r"packed must be \[H\*\(P\+V\), L/2\] = \[416, L/2\]; got \(312, 48\)"),
        ({"v_head_dim": 41}, ValueError, "Check num_heads, qk_nope_head_dim and v_head_dim"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1; got 0"),
        ({"qk_nope_head_dim": -64}, ValueError, "qk_nope_head_dim must be at least 1"),
        ({"v_head_dim": 0}, ValueError, "v_head_dim must be at least 1"),
        ({"packed": np.zeros((H, P + V, L // 2), np.uint8)}, ValueError, "packed must be"),
        ({"packed": np.zeros((H * (P + V), L), np.uint8)}, ValueError, r"scales must be .* = \(312, 6\)"),
        ({"packed": np.zeros((H * (P + V), 24), np.uint8)}, ValueError, "whole groups of 32 columns"),
        ({"packed": np.zeros((H * (P + V), L // 2), np.int8)}, TypeError, "packed must be uint8"),
        ({"scales": np.zeros((H * (P + V), 6), np.uint8)}, ValueError, r"scales must be .* = \(312, 3\)"),
        ({"scales": np.zeros((H, 3), np.uint8)}, ValueError, "got \\(3, 3\\). MXFP4 has one scale to 32"),
        ({"scales": np.ones((H * (P + V), 3), np.float32)}, TypeError, "scales must be uint8"),
    ],
)
def test_what_does_not_fit(rng, transform, change, error, text):
    packed, scales = stored(rng)
    given = {"packed": packed, "scales": scales, **SIZES, **change}
    with pytest.raises(error, match=text):
        transform(given.pop("packed"), given.pop("scales"), **given)


@pytest.mark.bad_input
def test_keys_that_are_no_whole_groups_have_no_engine_layout(rng):
    packed, scales = stored(rng)
    sizes = {"num_heads": H, "qk_nope_head_dim": V, "v_head_dim": P}  # 40 is no multiple of 32
    with pytest.raises(ValueError, match="qk_nope_head_dim must be a multiple of 32.*got 40. Use one_pack"):
        unpack_kv_b_proj(packed, scales, **sizes)
    assert one_pack(packed, scales, **sizes).shape == (H, P + V, L)
