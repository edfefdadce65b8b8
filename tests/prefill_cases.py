"""Cases of the prefill attention with their answers: layers' shapes, ragged and padded chunks, and the oracle."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mla_fp4_jax.cache import Cache, init_cache
from mla_fp4_jax.config import MLAConfig

SCALE = 0.11


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of `lengths` tokens, the last `tokens` of which are queries; fewer where a sequence is shorter.

    `left` puts the padding of short sequences first. P, R, V, L are the config's; page 0 is a contiguous cache, and
    with an e4m3_scale the cache is float8_e4m3fn with that scale.
    """

    lengths: tuple[int, ...]
    tokens: int
    heads: int = 2
    P: int = 32
    R: int = 16
    V: int = 16
    L: int = 32
    page: int = 0
    capacity: int | None = None
    left: bool = False
    dtype: str = "float32"
    e4m3_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """Operands of a case, and the exact result in float64; padding rows of q and unused memory are NaN."""

    q: jax.Array
    cache: Cache
    visible: jax.Array
    kv_b: jax.Array
    out: np.ndarray
    lse: np.ndarray


def build(case: Case, rng: np.random.Generator) -> Built:
    """The operands, rounded to the case's dtype before the oracle sees them."""
    c, batch, dtype = case, len(case.lengths), jnp.dtype(case.dtype)
    longest = max(max(c.lengths), 1)

    def rounded(x):
        return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64)

    entries = rounded(rng.standard_normal((batch, longest, c.L + c.R)))
    if c.e4m3_scale is not None:
        stored = jnp.asarray(entries / c.e4m3_scale, jnp.float8_e4m3fn)
        entries = np.asarray(stored.astype(jnp.float32), np.float64) * c.e4m3_scale
    kv_b = rounded(rng.standard_normal((c.heads, c.P + c.V, c.L)) * c.L**-0.5)
    q = rounded(rng.standard_normal((batch, c.tokens, c.heads, c.P + c.R)))
    visible = np.zeros((batch, c.tokens), np.int64)
    for b, length in enumerate(c.lengths):
        real = min(length, c.tokens)
        seen = length - real + 1 + np.arange(real)
        visible[b, c.tokens - real :] = seen if c.left else 0
        if not c.left:
            visible[b, :real] = seen
    out, lse = _exact(c, q, entries, kv_b, visible, rounded)
    cache = _cache(c, longest, entries, dtype, rng)
    poisoned = np.where(visible[..., None, None] > 0, q, np.nan)
    return Built(
        jnp.asarray(poisoned, dtype), cache, jnp.asarray(visible, jnp.int32), jnp.asarray(kv_b, dtype), out, lse
    )


def _exact(c, q, entries, kv_b, visible, rounded):
    # Keys and values are rounded to the compute dtype once, as the library's up-projection does.
    expanded = rounded(np.einsum("bsl,hnl->bshn", entries[..., : c.L], kv_b, optimize=True))
    scores = np.einsum("bthp,bshp->bths", q[..., : c.P], expanded[..., : c.P], optimize=True)
    scores += np.einsum("bthr,bsr->bths", q[..., c.P :], entries[..., c.L :], optimize=True)
    seen = np.arange(entries.shape[1]) < visible[..., None]
    scores = np.where(seen[:, :, None], scores * SCALE, -np.inf)
    highest = np.where(visible > 0, scores.max((2, 3)), 0.0)[..., None, None]
    p = np.exp(scores - highest)
    total = p.sum(-1)
    p /= np.maximum(total, 1e-300)[..., None]
    out = np.einsum("bths,bshv->bthv", p, expanded[..., c.P :], optimize=True)
    with np.errstate(divide="ignore"):
        return out, np.log(total) + highest[..., 0]


def _cache(c, longest, entries, dtype, rng) -> Cache:
    config = MLAConfig(
        hidden_size=32,
        num_attention_heads=c.heads,
        kv_lora_rank=c.L,
        qk_nope_head_dim=c.P,
        qk_rope_head_dim=c.R,
        v_head_dim=c.V,
    )
    batch, capacity = len(c.lengths), c.capacity or longest
    scaled = {} if c.e4m3_scale is None else {"dtype": jnp.float8_e4m3fn, "entries_scale": c.e4m3_scale}
    cache = init_cache(config, batch, capacity, page_size=c.page or None, **{"dtype": dtype, **scaled})
    cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan) if leaf.ndim == 3 else leaf, cache)
    if c.page:
        order = jnp.asarray(rng.permutation(cache.pages.shape[0]), jnp.int32)
        cache = dataclasses.replace(cache, page_table=order[cache.page_table])
    active = np.arange(longest)[None] < np.array(c.lengths)[:, None]
    return cache.append(jnp.asarray(entries, dtype), jnp.asarray(active))


def expand(kv_b):
    """The up-projection, in the latents' dtype."""

    def up(latent):
        exact = jnp.float32 if latent.dtype == jnp.float32 else latent.dtype
        out = jnp.einsum(
            "bkl,hnl->bkhn",
            latent.astype(jnp.float32),
            kv_b.astype(jnp.float32),
            precision="highest",
        )
        return out.astype(exact)

    return up


def check(out, lse, case: Case, built: Built) -> None:
    """Assert a result right, and exact where a query sees nothing.

    float32: sums of at most a few thousand products of order 1. bfloat16: probabilities and the result are rounded
    to 8 bits, keys and values (through which the oracle's rounding may differ by one in the last place) too; a mean
    of values of order 1 then has a relative error of 3 * 2^-9 in the root mean square.
    """
    out, lse = np.asarray(out.astype(jnp.float32), np.float64), np.asarray(lse, np.float64)
    blind = np.asarray(built.visible) == 0
    assert (out[blind] == 0).all() and np.isneginf(lse[blind]).all()
    difference = out[~blind] - built.out[~blind]
    if case.dtype == "float32":
        np.testing.assert_allclose(difference, 0, atol=3e-5)
        np.testing.assert_allclose(lse[~blind], built.lse[~blind], rtol=0, atol=3e-5)
    elif difference.size:
        # Row by row, so that one wrong row among thousands shows.
        error = np.sqrt((difference**2).mean(-1))
        # Long rows average to small values under rounding errors that average likewise.
        size = np.sqrt((built.out[~blind] ** 2).mean(-1))
        assert (error <= 3 * 2.0**-8 * size + 2.0**-12).all(), (error / size).max()
        np.testing.assert_allclose(lse[~blind], built.lse[~blind], rtol=0, atol=2e-2)
