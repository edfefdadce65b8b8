"""The kernels that a decode step's small parts share, on a real GPU against the oracle.

python3 -m pytest -m gpu tests/test_decode_step_gpu.py
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import linear_checks
import numpy as np
import oracle
import pytest
from kernel_checks import bits
from linear_checks import Case

from mla_fp4_jax import FP4Array
from mla_fp4_jax.cache import PagedLatentCache
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.implementations import MOSAIC, TRITON
from mla_fp4_jax.ops.latent_query import latent_query
from mla_fp4_jax.ops.linear_pair import fp4_linear_pair
from mla_fp4_jax.ops.norm_rope_write import Columns, norm_rope_write

pytestmark = pytest.mark.gpu

ROUNDING = 2.0**-8  # of a result to bfloat16, relative; float32's own error on the way is far below


def need(implementation: str) -> None:
    reason = implementations.why_not(implementation)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("tokens", [1, 3, 16, 24, 33, 64, 128, 130, 300])
@pytest.mark.parametrize("sizes", [(1536, 576, 7168), (128, 64, 256), (256, 192, 512)], ids=str)
def test_a_pair_of_linears_equals_the_oracle(tokens, sizes, rng):
    need(MOSAIC)
    first, second, inputs = sizes
    case = Case(tokens, first + second, inputs)
    parts, x = linear_checks.random_parts(rng, case), linear_checks.random_x(rng, case)
    weights = [
        FP4Array.from_packed(*(part[rows] for part in parts)).in_fragment_order()
        for rows in (slice(first), slice(first, None))
    ]
    y = jax.jit(fp4_linear_pair, static_argnames="implementation")(jnp.asarray(x), *weights, implementation=MOSAIC)
    want = linear_checks.expected(x, parts, case)
    np.testing.assert_array_equal(np.asarray(y).astype(np.float32), want.astype(np.float32))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("batch", [1, 5, 16, 17, 33, 64, 65, 128, 300])
@pytest.mark.parametrize(("heads", "rope"), [(3, 64), (128, 64), (2, 32)])
def test_a_latent_query_equals_the_oracle(batch, heads, rope, interleaved, rng):
    need(MOSAIC)
    nope, rows, rank = 128, 256, 512
    packed = rng.integers(0, 256, (heads, rows, rank // 2), np.uint8)
    scales = rng.integers(125, 129, (heads, rows, rank // 32)).astype(np.uint8)
    w = FP4Array.from_packed(packed, scales).in_fragment_order(nope)
    q = rng.integers(-2, 3, (batch, 1, heads, nope + rope)).astype(jnp.bfloat16)
    angles = rng.uniform(0, 100, (batch, 1, rope // 2))
    cos, sin = (np.asarray(f(angles), np.float32) for f in (np.cos, np.sin))
    call = jax.jit(latent_query, static_argnames=("qk_nope_head_dim", "interleaved", "implementation"))
    given = {"qk_nope_head_dim": nope, "interleaved": interleaved, "implementation": MOSAIC}
    out = np.asarray(call(jnp.asarray(q), w, cos, sin, **given))[:, 0]
    wide = q.astype(np.float64)[:, 0]
    dense = oracle.dequantize(oracle.unpack(packed), oracle.e8m0(scales))[:, :nope]
    exact = oracle.bmm(wide[..., :nope], dense, "rows").astype(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(out[..., :rank].astype(np.float32), exact.astype(np.float32))
    pairs = wide[..., nope:]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else np.split(pairs, 2, axis=-1)
    cos, sin = cos.astype(np.float64), sin.astype(np.float64)
    rotated = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    np.testing.assert_allclose(out[..., rank:].astype(np.float64), rotated, rtol=ROUNDING, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("batch", [1, 32])
def test_norms_rotation_and_write_equal_the_oracle(batch, tokens, rng):
    """DeepSeek-V3's sizes; entries that have no place, and all that is not written, stay as they were."""
    need(TRITON)
    rank, rope, low_rank, page, pages = 512, 64, 1536, 64, 4
    array = rng.standard_normal((batch, tokens, low_rank + rank + rope)).astype(jnp.bfloat16)
    table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
    if batch > 1:
        table[1] = [-1, batch * pages, -7, 2**30]
    slots = rng.integers(0, page * pages - tokens, (batch, 1)) + np.arange(tokens)
    slots[-1, -1] = page * pages
    before = rng.standard_normal((batch * pages, page, rank + rope)).astype(jnp.bfloat16)
    angles = rng.uniform(0, 100, (batch, tokens, rope // 2))
    gains = [rng.uniform(0.5, 2, n).astype(jnp.bfloat16) for n in (low_rank, rank)]

    @jax.jit
    def call(array, pages_before, slots, cos, sin):
        cache = PagedLatentCache(pages_before, jnp.asarray(table), jnp.zeros((batch,), jnp.int32), rank)
        low, kv = Columns(array, 0, low_rank), Columns(array, low_rank, rank + rope)
        low_gain, kv_gain = map(jnp.asarray, gains)
        given = {"low_gain": low_gain, "kv_gain": kv_gain, "eps": 1e-6, "interleaved": True}
        return norm_rope_write(low, kv, cache, slots, cos, sin, **given)

    cos, sin = (np.asarray(f(angles), np.float32) for f in (np.cos, np.sin))
    operands = (jnp.asarray(array), jnp.asarray(before), jnp.asarray(slots, jnp.int32), cos, sin)
    normed, cache = call(*operands)
    wide, (low_gain, kv_gain) = array.astype(np.float64), (gain.astype(np.float64) for gain in gains)
    low_wanted = oracle.rms_norm(wide[..., :low_rank], low_gain, 1e-6)
    np.testing.assert_allclose(np.asarray(normed, np.float64), low_wanted, rtol=ROUNDING, atol=1e-6)
    latent = oracle.rms_norm(wide[..., low_rank : low_rank + rank], kv_gain, 1e-6)
    a, b = wide[..., low_rank + rank :: 2], wide[..., low_rank + rank + 1 :: 2]
    entries = np.concatenate([latent, a * cos - b * sin, b * cos + a * sin], axis=-1)
    got, untouched = np.asarray(cache.pages), np.ones(before.shape[:2], bool)
    for row, token in np.ndindex(batch, tokens):
        slot = slots[row, token]
        if slot == page * pages or (batch > 1 and row == 1):
            continue
        place = (table[row, slot // page], slot % page)
        untouched[place] = False
        np.testing.assert_allclose(got[place].astype(np.float64), entries[row, token], rtol=ROUNDING, atol=1e-6)
    np.testing.assert_array_equal(bits(got)[untouched], bits(before)[untouched])
    assert (bits(call(*operands)[0]) == bits(normed)).all()
