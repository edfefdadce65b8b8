"""Compiled for four H100s that are not there: one all-reduce, nothing gathered, every shard where it belongs."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
import sm90
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_fp4_jax import MLAAttention, MLAConfig, MLASharding, mla_decode
from mla_fp4_jax.cache import cache_specs
from mla_fp4_jax.spmd import weight_specs
from pallas_kernels.fragments import FragmentOrder

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(sm90.why_not() is not None, reason=f"compiles for an H100: {sm90.why_not()}"),
]
DEVICES, BATCH = 4, 4
CONFIG = MLAConfig(
    hidden_size=512,
    num_attention_heads=16,
    q_lora_rank=256,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
COLLECTIVE = re.compile(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter|ragged-\S+?)(?:-start)?\(")


def on(mesh, tree, specs):
    """Abstract arrays with their shardings."""
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
    )


def compile_step(rules: dict, implementation: str, *, split: bool = True, page_size: int | None = None):
    mesh = sm90.h100_mesh(DEVICES)
    sharding = MLASharding(mesh, **rules)
    layer = nnx.eval_shape(
        lambda: MLAAttention(CONFIG, rngs=nnx.Rngs(0), linear_formats={"o_proj": "mxfp4"}, implementation="xla")
    )
    weights = layer.weights
    if implementation == "mosaic_gpu":
        kv_b = dataclasses.replace(weights.kv_b_proj, order=FragmentOrder(CONFIG.qk_nope_head_dim))
        weights = dataclasses.replace(weights, kv_b_proj=kv_b, o_proj=jax.ShapeDtypeStruct((512, 2048), jnp.bfloat16))
    cache = jax.eval_shape(lambda: layer.init_cache(BATCH, 1024, page_size=page_size))
    weights = on(mesh, weights, weight_specs(weights, sharding))
    cache = on(mesh, cache, cache_specs(cache, sharding))
    x = on(mesh, jax.ShapeDtypeStruct((BATCH, 1, 512), jnp.bfloat16), sharding.tokens_spec)
    step = functools.partial(
        mla_decode, config=CONFIG, implementation=implementation, sharding=sharding if split else None
    )
    return sm90.compile_for_h100(step, weights, x, cache, mesh=mesh, donate_argnums=(2,))


def collectives(program: sm90.Program) -> list[tuple[str, str]]:
    return [(operation, result) for result, operation in COLLECTIVE.findall(program.hlo)]


@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu", "xla"])
def test_a_tensor_parallel_step(implementation):
    program = compile_step({"heads": "x"}, implementation)
    ((operation, result),) = collectives(program)
    assert operation == "all-reduce" and f"bf16[{BATCH},1,512]" in result
    if implementation == "triton":
        assert {"fp4_bmm_rows", "fp4_bmm_columns"} <= {kernel.name for kernel in program.kernels}
    # A device's arguments: its share of the heads' weights, all of the others, all of the cache.
    shared = 2 * (256 * 512 + 576 * 512) + 2 * BATCH * 1024 * 576
    o_proj = 2 * 512 * 512 if implementation == "mosaic_gpu" else 512 * 512 * 17 // 32
    heads = 2 * 4 * 192 * 256 + 4 * 256 * 512 * 17 // 32 + o_proj
    assert abs(program.compiled.memory_analysis().argument_size_in_bytes - shared - heads) < 1 << 14
    assert program.moves_of("u8", "f4e2m1fn") == [] or implementation == "xla"
    assert program.compiled.memory_analysis().alias_size_in_bytes >= 2 * BATCH * 1024 * 576  # the cache, in place


@pytest.mark.parametrize("page_size", [None, 64])
def test_a_context_parallel_step(page_size):
    program = compile_step({"context": "x"}, "triton", page_size=page_size)
    found = sorted(collectives(program))
    assert [operation for operation, _ in found] == ["all-gather", "all-reduce"]
    assert f"f32[{DEVICES},{BATCH},16]" in found[0][1] and f"bf16[{BATCH},1,512]" in found[1][1]


def test_a_data_parallel_step():
    assert collectives(compile_step({"batch": "x"}, "triton")) == []


def test_without_the_rules_weights_are_gathered():
    """What a plain jit does to the same sharded weights, and why the library wraps its kernels."""
    program = compile_step({"heads": "x"}, "triton", split=False)
    assert any(operation == "all-gather" and "u8[" in result for operation, result in collectives(program))


def test_the_mesh_has_four_devices():
    assert sm90.h100_mesh(DEVICES).shape == {"x": DEVICES}
    doubled = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(sm90.h100_mesh(DEVICES), P("x")))
    program = sm90.compile_for_h100(lambda a: a.sum(), doubled, mesh=sm90.h100_mesh(DEVICES))
    assert [operation for operation, _ in collectives(program)] == ["all-reduce"]
