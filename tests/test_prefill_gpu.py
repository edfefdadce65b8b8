"""The prefill attention's kernels on a real GPU: numerics, padding, parts, repeatability, and a layer's prefill."""

from __future__ import annotations

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prefill_cases import SCALE, Case, build, check, expand

from mla_fp4_jax.ops import implementations, mla_prefill_attention

pytestmark = pytest.mark.gpu

module = sys.modules["mla_fp4_jax.ops.mla_prefill"]
full = functools.partial(Case, P=128, R=64, V=128, L=512, dtype="bfloat16")
KERNELS = ("mosaic_gpu", "triton")
# Each with the number of slots that are expanded at once, None for all.
CASES = [
    (full((1, 0, 1), 1), None),
    (full((128, 128), 128), None),
    (full((700, 128, 1, 0, 129), 700), None),
    (full((700, 128, 1, 0, 129), 700, left=True), None),
    (full((700, 128, 1, 0, 129), 700, left=True, heads=3), 256),
    (full((1000, 300), 130, capacity=1003), None),
    (full((1000, 300, 77), 130, capacity=1003), 512),
    (full((1000, 300, 77), 130, page=16, capacity=1040), 256),
    (full((2000, 1500), 1, page=64), 512),
]


def program(implementation):
    run = functools.partial(mla_prefill_attention, scale=SCALE, v_head_dim=128, implementation=implementation)
    return jax.jit(lambda q, cache, visible, kv_b: run(q, cache, visible, expand(kv_b)))


def operands(built):
    return built.q, built.cache, built.visible, built.kv_b


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint16 if x.dtype == jnp.bfloat16 else np.uint32)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("case", "at_once"), CASES, ids=[f"{case}-{size}" for case, size in CASES])
def test_against_the_oracle(rng, case, at_once, implementation, monkeypatch):
    reason = implementations.why_not(implementation)
    if reason is not None:
        pytest.skip(reason)
    if at_once is not None:
        monkeypatch.setattr(module, "keys_at_once", lambda cache, *sizes: min(cache.capacity, at_once))
    built = build(case, rng)
    call = program(implementation)
    first = call(*operands(built))
    check(*first, case, built)
    for _ in range(3):
        again = call(*operands(built))
        assert all(np.array_equal(bits(x), bits(y)) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        Case((90, 40, 0), 33, P=192, R=64, V=256, L=512, dtype="bfloat16"),
        Case((90, 40, 0), 33, P=64, R=64, V=128, L=256, dtype="float16"),
        Case((90, 40, 0), 33, P=48, R=0, V=32, L=128, dtype="float32"),
    ],
    ids=str,
)
def test_the_triton_kernel_at_other_sizes(rng, case):
    built = build(case, rng)
    run = functools.partial(mla_prefill_attention, scale=SCALE, v_head_dim=case.V, implementation="triton")
    check(*run(built.q, built.cache, built.visible, expand(built.kv_b)), case, built)


def test_the_fastest_is_chosen_and_right(rng):
    case = full((300, 41), 200)
    built = build(case, rng)
    check(*program(None)(*operands(built)), case, built)
