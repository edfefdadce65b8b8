"""mla_decode's kernels on a real GPU: numerics, poison, pages, splits, batch invariance, repeatability."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import make_layer, small_config
from mla_decode_cases import SCALE, Case, build, check, e4m3, one_key_of_every_code, run_steps

from mla_fp4_jax import MLAAttention, mla_prefill
from mla_fp4_jax.ops import implementations, mla_decode
from pallas_kernels import e4m3_triton
from pallas_kernels import mla_decode_triton as triton
from pallas_kernels.backend import pl, pltriton

pytestmark = pytest.mark.gpu

full = functools.partial(Case, rank=512, rope=64)
KERNELS = ("mosaic_gpu", "triton")
BF16, E4M3 = "bfloat16", "float8_e4m3fn"
E4M3_CASES = [
    (full((256, 256), heads=64), None),
    (full((256, 250), heads=128), 128),
    (full((0, 1, 63, 64, 65, 512), heads=128, page=64, bad_pages=True), None),
    (full((0, 1, 63, 128, 129, 520), heads=16), 256),
    (full((0, 127, 128, 129, 300, 1024), heads=16, page=128, bad_pages=True), 384),
    (full((0, 15, 16, 17, 300, 512), heads=128, page=16, bad_pages=True), 256),
    (full((512, 9), tokens=8, heads=128, page=64), 256),
    (full((4096, 3000, 1, 0), heads=20, page=64), 1024),
    (full((300, 129, 1), heads=16, page=64, entries_scale=4.0), 256),
    (full((300, 129, 1), heads=128, entries_scale=2.0**-5), None),
]
CASES = [
    (full((256, 256), heads=64), None),
    (full((256, 256), heads=128), None),  # two row blocks: a cluster that shares its loads
    (full((512, 512), heads=128), 128),
    (full((0, 1, 63, 64, 65, 512), heads=128, page=64), None),
    (full((0, 1, 63, 128, 129, 512), heads=128, page=64), 128),
    (full((0, 1, 63, 128, 129, 520), heads=128), 256),
    (full((0, 127, 128, 129, 300, 1024), heads=128, page=128, bad_pages=True), 384),
    (full((0, 15, 16, 17, 300, 512), heads=128, page=16, bad_pages=True), 256),
    (full((0, 1, 63, 64, 65, 512), heads=16, page=64, bad_pages=True), 256),
    (full((0, 100, 512), heads=8, page=16), None),
    (full((2, 1, 500), tokens=3, heads=20, page=64), 256),
    (full((2, 1, 500), tokens=1, heads=20, page=64), None),
    (full((5, 400), tokens=3, heads=64, page=64), 128),  # three row blocks: no cluster
    (full((512, 9), tokens=8, heads=128, page=64, bad_pages=True), 256),
    (full((512, 9), tokens=2, heads=32, page=128), None),
    (full((4096, 3000, 1, 0), heads=128, page=64), 1024),
    *[(dataclasses.replace(case, cache_dtype=E4M3), split_size) for case, split_size in E4M3_CASES],
]


@functools.partial(jax.jit, static_argnames=("implementation", "split_size"))
def attend(q, cache, visible, *, implementation, split_size):
    return mla_decode(
        q, cache, visible, scale=SCALE, return_lse=True, split_size=split_size, implementation=implementation
    )


def run(built, *, implementation, split_size):
    return attend(built.q, built.cache, built.visible, implementation=implementation, split_size=split_size)


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint16 if x.dtype == jnp.bfloat16 else np.uint32)


def needs(implementation):
    reason = implementations.why_not(implementation)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("case", "split_size"), CASES, ids=[f"{case}-{size}" for case, size in CASES])
def test_against_the_oracle(case, split_size, implementation, rng):
    needs(implementation)
    built = build(case, rng)
    first = run(built, implementation=implementation, split_size=split_size or 1 << 17)
    check(*first, case, built)
    for _ in range(3):
        again = run(built, implementation=implementation, split_size=split_size or 1 << 17)
        assert all(np.array_equal(bits(x), bits(y)) for x, y in zip(first, again, strict=True))


# All that bench.decode_variants may make the default.
TILINGS = [
    (triton.Config(16, 32, 4, 2), (BF16, E4M3)),
    (triton.Config(16, 32, 8, 2), (E4M3,)),
    (triton.Config(16, 64, 4, 2, transposed=True), (BF16,)),
    (triton.Config(16, 64, 4, 1, transposed=True), (BF16,)),
    (triton.Config(16, 64, 8, 2, transposed=True), (BF16,)),
    (triton.Config(16, 64, 8, 1, transposed=True, ahead=True), (E4M3,)),
    (triton.Config(64, 32, 8, 3), (BF16,)),
    (triton.Config(64, 64, 8, 1), (BF16, E4M3)),
    (triton.Config(64, 64, 8, 2), (BF16,)),
]


@pytest.mark.parametrize(("tiling", "cache_dtype"), [(config, dtype) for config, all_ in TILINGS for dtype in all_])
def test_every_tiling_of_the_triton_kernel(tiling, cache_dtype, rng, monkeypatch):
    needs("triton")
    monkeypatch.setattr(triton, "default_config", lambda *operands: tiling)
    case = full((300, 129, 1, 0), heads=20, page=64, cache_dtype=cache_dtype)
    built = build(case, rng)
    call = functools.partial(mla_decode, scale=SCALE, return_lse=True, split_size=256, implementation="triton")
    check(*jax.jit(lambda *operands: call(*operands))(built.q, built.cache, built.visible), case, built)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("heads", [16, 128])
def test_a_sequence_does_not_depend_on_its_neighbours(implementation, heads, rng):
    needs(implementation)
    built = build(full((300, 1, 129, 0, 512), heads=heads, page=64), rng)
    together = run(built, implementation=implementation, split_size=256)
    for b in range(5):
        cache = built.cache
        one = dataclasses.replace(cache, page_table=cache.page_table[b : b + 1], length=cache.length[b : b + 1])
        alone = dataclasses.replace(built, q=built.q[b : b + 1], cache=one, visible=built.visible[b : b + 1])
        for x, y in zip(together, run(alone, implementation=implementation, split_size=256), strict=True):
            assert np.array_equal(bits(x)[b : b + 1], bits(y))


@pytest.mark.parametrize("implementation", KERNELS)
def test_every_finite_e4m3_code_is_read_exactly(implementation, rng):
    """A sequence of one key has that key's latent as its output, whatever the score."""
    needs(implementation)
    q, cache, visible, exact = one_key_of_every_code(rng, heads=64, rank=512, rope=64)
    out, _ = attend(q, cache, visible, implementation=implementation, split_size=128)
    assert np.array_equal(np.asarray(out.astype(jnp.float32)), exact)


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 9)])
def test_every_e4m3_byte_becomes_its_bf16(capability):
    """As each kind of GPU has it, all of which this one knows."""
    needs("triton")

    def kernel(codes_ref, out_ref):
        out_ref[...] = e4m3_triton.to_bf16(codes_ref[...], capability=capability)

    codes = np.arange(1024).astype(np.uint8)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
    )(jnp.asarray(codes))
    exact = np.array([e4m3(int(code)) for code in codes], np.float32)
    np.testing.assert_array_equal(np.asarray(out.astype(jnp.float32)), exact)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", E4M3])
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_nan_that_is_seen_shows(implementation, cache_dtype, rng):
    needs(implementation)
    built = build(full((200, 70), heads=16, cache_dtype=cache_dtype), rng)
    for column in (3, 517):  # of the latent, of the rope key
        entries = built.cache.entries.at[0, 150, column].set(jnp.nan)
        cache = dataclasses.replace(built.cache, entries=entries)
        poisoned = dataclasses.replace(built, cache=cache)
        out = np.asarray(run(poisoned, implementation=implementation, split_size=128)[0].astype(jnp.float32))
        assert np.all(np.isnan(out[0])) and np.all(np.isfinite(out[1]))


# Every H of a device, on every kind of cache, T from 1 to 8; both kinds of entries.
GRID = [
    full((300 + i, tokens, 129), tokens, heads, capacity=512, page=page, cache_dtype=("bfloat16", E4M3)[i % 2])
    for i, (heads, (page, tokens)) in enumerate(
        itertools.product((8, 16, 20, 32, 64, 128), ((None, 1), (16, 2), (64, 3), (128, 5), (64, 8)))
    )
]


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=str)
def test_every_number_of_heads_and_new_tokens(case, rng):
    needs("mosaic_gpu")
    built = build(case, rng)
    check(*run(built, implementation="mosaic_gpu", split_size=256), case, built)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
def test_a_thousand_steps_are_one_prefill(implementation, rng):
    """The decode loop, its cache donated, and one call with all its queries stay within the same bounds."""
    needs(implementation)
    case = full((1000, 700), tokens=1000, heads=16, page=64)
    built = build(case, rng)
    check(*run_steps(built, implementation=implementation, split_size=256), case, built)
    check(*run(built, implementation="xla", split_size=None), case, built)


def soak(implementation, rng, steps):
    """Decode step by step with x and cache donated; each tenth of the steps against one float32 prefill."""
    config = small_config(kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=16, qk_nope_head_dim=32)
    layer = make_layer(config, dtype=jnp.bfloat16, attention_implementation=implementation)
    x = jnp.asarray(rng.standard_normal((2, steps, config.hidden_size)), jnp.bfloat16)
    empty = layer.init_cache(2, steps, page_size=64, dtype=jnp.float32)
    prefill = functools.partial(
        mla_prefill, config=config, dtype=jnp.float32, implementation="xla", attention_implementation="xla"
    )
    exact, _ = jax.jit(prefill)(layer.weights, x.astype(jnp.float32), empty)
    step = jax.jit(MLAAttention.decode, donate_argnames=("x", "cache"))
    cache, outputs = layer.init_cache(2, steps, page_size=64), []
    where = cache.pages.unsafe_buffer_pointer()
    for t in range(steps):
        y, cache = step(layer, x[:, t : t + 1], cache)
        outputs.append(y)
    assert cache.length.tolist() == [steps, steps] and cache.pages.unsafe_buffer_pointer() == where
    y = np.asarray(jnp.concatenate(outputs, axis=1).astype(jnp.float32))
    for ours, theirs in zip(
        np.array_split(y, 10, axis=1), np.array_split(np.asarray(exact), 10, axis=1), strict=True
    ):
        # What a bf16 layer may differ from the float32 one, relative root mean square.
        assert np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)) <= 0.015


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_thousand_steps_of_a_layer_are_one_prefill(implementation, rng):
    needs(implementation)
    soak(implementation, rng, 1000)


def test_the_fastest_is_chosen_and_right(rng):
    case = full((700, 30), heads=128, page=64, tokens=2)
    built = build(case, rng)
    check(*run(built, implementation=None, split_size=None), case, built)
