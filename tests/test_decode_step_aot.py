"""A decode step of a whole FP4 layer, compiled for an H100 without one: as few kernels as it was made for."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest
import sm90
from test_mla_decode_compile import MOST_SPILLED

from mla_fp4_jax import FP4Array, MLAConfig, MLAWeights, init_cache, mla_decode
from mla_fp4_jax.ops.implementations import MOSAIC, why_not
from mla_fp4_jax.weights import weight_shapes

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(sm90.why_not() is not None, reason=f"compiles for an H100: {sm90.why_not()}"),
]
ATTENTION = "mla_decode_mosaic_gpu_kernel"
V3 = MLAConfig(
    hidden_size=7168,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


def packed_layer(config: MLAConfig) -> MLAWeights:
    """Every projection in MXFP4 and fragment order, as shapes."""
    from pallas_kernels.fragments import FragmentOrder

    def weight(name: str, shape: tuple[int, ...]):
        if name.endswith("layernorm"):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        codes = jax.ShapeDtypeStruct(shape, jnp.float4_e2m1fn)
        scales = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // 32), jnp.uint8)
        return FP4Array(codes, scales, order=FragmentOrder(config.qk_nope_head_dim if name == "kv_b_proj" else 0))

    return MLAWeights(**{name: weight(name, shape) for name, shape in weight_shapes(config).items()})


# Sizes of no other test that compiles: ptxas says nothing of a kernel that this process has compiled before.
@pytest.mark.parametrize("page_size", [None, 64])
@pytest.mark.parametrize("batch", [3, 40, 100])
def test_its_kernels(batch, page_size):
    def layer(weights, x, cache):
        assert why_not(MOSAIC) is None
        return mla_decode(weights, x, cache, V3)

    cache = jax.eval_shape(functools.partial(init_cache, V3, batch, 4096, page_size=page_size))
    x = jax.ShapeDtypeStruct((batch, 1, V3.hidden_size), jnp.bfloat16)
    program = sm90.compile_for_h100(layer, packed_layer(V3), x, cache, donate_argnums=2)
    entry = program.hlo[program.hlo.index("\nENTRY") :]
    calls = re.findall(r"custom_call_target=\"([^\"]*)\"", entry)
    # Both first projections; norms, rotation and write; q_b; k_up with the rotated query; attention; merging its
    # splits, where there are any; v_up; o_proj.
    splits = batch < 64
    assert calls.count("mosaic_gpu_v2") == 6 + splits and calls.count("__gpu$xla.gpu.triton") == 1
    assert len(calls) == 7 + splits
    # What the test of the other kind of cache has compiled before is not seen again, but these two are its own.
    assert {"norm_rope_write", ATTENTION} <= {kernel.name for kernel in program.kernels}
    for kernel in program.kernels:
        if kernel.name == ATTENTION and not splits:
            assert max(kernel.spill_store_bytes, kernel.stack_bytes) <= MOST_SPILLED[None], kernel
        else:
            assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
    # Between them nothing is copied, cut, joined or converted: what XLA makes is lengths, angles and the last mask.
    assert not re.search(r" = bf16\[[^=]* (concatenate|copy|transpose|slice|scatter|dynamic-update-slice)\(", entry)
    largest = max(batch * V3.hidden_size, 64 * batch)
    made = re.findall(r"%\S+ = \(?(\w+)\[([\d,]*)\]\S* fusion\(", entry)
    sizes = [jnp.prod(jnp.array([int(n) for n in shape.split(",") if n] or [1])) for _, shape in made]
    assert made and max(map(int, sizes)) <= largest
    # The cache is written in place.
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)[:1])
    assert program.compiled.memory_analysis().alias_size_in_bytes >= held
