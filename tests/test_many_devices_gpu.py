"""Real GPUs together against one of them, through NCCL and the kernels that None chooses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from mla_fp4_jax import MLAAttention, MLAConfig, MLASharding

pytestmark = pytest.mark.gpu
CONFIG = MLAConfig(
    hidden_size=1024,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
# Each output is within a layer's own rounding of the exact one, relative rms; README says 1.5 % for bfloat16.
BOUND = 2 * 0.015


def outputs(layer: MLAAttention, x: jax.Array, page_size: int | None) -> tuple[np.ndarray, np.ndarray]:
    cache = layer.init_cache(4, 512, page_size=page_size)
    y, cache = jax.jit(MLAAttention.prefill)(layer, x[:, :300], cache)
    step = jax.jit(MLAAttention.decode, donate_argnames=("cache",))
    steps = []
    for t in range(300, 304):
        z, cache = step(layer, x[:, t : t + 1], cache)
        steps.append(z)
    return np.asarray(y, np.float64), np.asarray(jnp.concatenate(steps, 1), np.float64)


@pytest.mark.parametrize("logical", ["heads", "batch", "context"])
@pytest.mark.parametrize("page_size", [None, 64])
def test_many_gpus_give_what_one_gives(logical, page_size, rng):
    gpus = jax.devices("gpu")
    if len(gpus) < 2:
        pytest.skip("one GPU in this process")
    count = max(n for n in (2, 4, 8) if n <= len(gpus)) if logical != "batch" else 2
    mesh = jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,), devices=gpus[:count])
    plain = MLAAttention(CONFIG, rngs=nnx.Rngs(0))
    layer = MLAAttention(CONFIG, weights=plain.weights, sharding=MLASharding(mesh, **{logical: "x"}))
    x = jnp.asarray(rng.standard_normal((4, 304, 1024)), jnp.bfloat16)
    for expected, got in zip(outputs(plain, x, page_size), outputs(layer, x, page_size), strict=True):
        assert np.isfinite(got).all()
        assert np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)) <= BOUND
