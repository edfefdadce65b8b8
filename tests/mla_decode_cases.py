"""Caches with poison where nothing lies, a float64 oracle of the latent attention, and how far a kernel may stray."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mla_fp4_jax.cache import Cache, LatentCache, PagedLatentCache
from mla_fp4_jax.ops import mla_decode

SCALE = 192**-0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of mla_decode: sizes, and what its cache looks like.

    Attributes:
        lengths: keys a sequence holds, the new tokens' own included.
        page: page size; None for a contiguous cache.
        bad_pages: replace some page ids by ones that are no page.
        dtype: of the queries and the result.
        cache_dtype: of the cache, where it is another.
        entries_scale: of the cache; entries are of this size.
    """

    lengths: tuple[int, ...]
    tokens: int = 1
    heads: int = 3
    rank: int = 32
    rope: int = 16
    capacity: int = 0
    page: int | None = None
    bad_pages: bool = False
    dtype: str = "bfloat16"
    cache_dtype: str | None = None
    entries_scale: float = 1.0

    def __str__(self) -> str:
        kind = "contiguous" if self.page is None else f"page{self.page}" + "bad" * self.bad_pages
        kind += f"x{self.entries_scale}" * (self.entries_scale != 1)
        return f"{self.cache_dtype or self.dtype}-{kind}-T{self.tokens}-H{self.heads}-L{self.rank}-" + "_".join(
            map(str, self.lengths)
        )


@dataclasses.dataclass(frozen=True)
class Built:
    """The call's operands, and the entries each sequence sees as float64, None where there is none."""

    q: jnp.ndarray
    cache: Cache
    visible: jnp.ndarray
    entries: list[list[np.ndarray | None]]


def build(case: Case, rng: np.random.Generator) -> Built:
    batch, width = len(case.lengths), case.rank + case.rope
    dtype = jnp.dtype(case.dtype)
    cache_dtype = jnp.dtype(case.cache_dtype or dtype)
    capacity = case.capacity or max(*case.lengths, 1)
    lengths = np.array(case.lengths, np.int32)
    steps = np.arange(case.tokens)[None]
    visible = np.maximum(lengths[:, None] - case.tokens + 1 + steps, 0).astype(np.int32)
    q = rounded(rng.standard_normal((batch, case.tokens, case.heads, width)) * 2, dtype)

    if case.page is None:
        stored = np.full((batch, capacity, width), np.nan, np.float32)
        entries = []
        for b, length in enumerate(case.lengths):
            stored[b, :length] = rounded(rng.standard_normal((length, width)), cache_dtype)
            entries.append(list(stored[b, :length].astype(np.float64) * case.entries_scale))
        held = jnp.asarray(stored, cache_dtype), jnp.asarray(lengths)
        cache: Cache = LatentCache(*held, case.rank, case.entries_scale)
        return Built(jnp.asarray(q, dtype), cache, jnp.asarray(visible), entries)

    columns = -(-capacity // case.page)
    number = batch * columns + 2
    stored = np.full((number, case.page, width), np.nan, np.float32)
    table = rng.permutation(number)[: batch * columns].reshape(batch, columns).astype(np.int32)
    for b, length in enumerate(case.lengths):
        slots = np.arange(length)
        keys = rounded(rng.standard_normal((length, width)), cache_dtype)
        stored[table[b, slots // case.page], slots % case.page] = keys
    if case.bad_pages:
        table[0, 0] = -1
        table[-1, min(1, columns - 1)] = number
        table[batch // 2, -1] = np.iinfo(np.int32).max
    entries, scaled = [], stored.astype(np.float64) * case.entries_scale
    for b, length in enumerate(case.lengths):
        pages = [table[b, s // case.page] for s in range(length)]
        entries.append([scaled[p, s % case.page] if 0 <= p < number else None for s, p in enumerate(pages)])
    held = jnp.asarray(stored, cache_dtype), jnp.asarray(table), jnp.asarray(lengths)
    cache = PagedLatentCache(*held, case.rank, case.entries_scale)
    return Built(jnp.asarray(q, dtype), cache, jnp.asarray(visible), entries)


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    """x as float32, after rounding to dtype."""
    return np.asarray(jnp.asarray(x.astype(np.float32), dtype).astype(jnp.float32))


def one_key_of_every_code(rng: np.random.Generator, *, heads: int, rank: int, rope: int):
    """q, an e4m3 cache, visible and the exact output of sequences of one key; every finite code is in a latent."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    batch = 2 * -(-256 // rank)
    entries = np.zeros((batch, 128, rank + rope), np.uint8)
    entries[:, 0, :rank] = np.resize(rng.permutation(codes), (batch, rank))
    entries[:, 1:] = 0x7F
    stored = jax.lax.bitcast_convert_type(jnp.asarray(entries), jnp.float8_e4m3fn)
    q = jnp.ones((batch, 1, heads, rank + rope), jnp.bfloat16).at[..., :rank].set(0)
    values = np.array([e4m3(code) for code in range(256)], np.float32)[entries[:, 0, :rank]]
    exact = np.tile(values[:, None, None], (1, 1, heads, 1))
    return q, LatentCache(stored, jnp.ones(batch, jnp.int32), rank), jnp.ones((batch, 1), jnp.int32), exact


def e4m3(code: int) -> float:
    """OCP 8-bit Floating Point Specification, E4M3."""
    sign, exponent, mantissa = 1 - 2 * (code >> 7), code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)


def run_steps(built: Built, **how) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Out and LSE of a decode loop that appends the cache's entries one by one to an empty one, donated.

    A sequence takes part from the first token that sees anything.
    """
    full_cache = built.cache
    entries, _ = full_cache.block(jnp.zeros((), jnp.int32), full_cache.capacity)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, q, entry, visible):
        cache = cache.append(entry, visible > 0)
        return cache, mla_decode(q, cache, visible, scale=SCALE, return_lse=True, **how)

    empty = jnp.zeros_like(full_cache.length)
    if isinstance(full_cache, PagedLatentCache):
        pages = jnp.full_like(full_cache.pages, jnp.nan)
        table = jnp.array(full_cache.page_table, copy=True)  # to be donated
        cache: Cache = dataclasses.replace(full_cache, pages=pages, page_table=table, length=empty)
    else:
        cache = dataclasses.replace(full_cache, entries=jnp.full_like(full_cache.entries, jnp.nan), length=empty)
    results = []
    for t in range(built.q.shape[1]):
        visible = built.visible[:, t : t + 1]
        entry = jnp.take_along_axis(entries, jnp.maximum(visible - 1, 0)[..., None], axis=1)
        cache, result = step(cache, built.q[:, t : t + 1], entry, visible)
        results.append(result)
    out, lse = (jnp.concatenate(parts, axis=1) for parts in zip(*results, strict=True))
    return out, lse


def check(out, lse, case: Case, built: Built) -> None:
    """Assert that a result is the oracle's, within what float32 sums and the dtype's roundings can do.

    Let u be the unit roundoff of the dtype (2^-8 for bfloat16). A score is a sum of D products in float32, on tensor
    cores with truncation, so off by at most ds = 2 D 2^-24 scale sum |q k|; an exponential by its own 2^-22 and by
    what the score moves it. Rounding a probability moves the output by at most u sum p |v| / sum p, and so on:

        |out - exact| <= (u + 2 ds + S 2^-23 + 2^-20) sum p |v| / sum p + u |exact|
        |lse - exact| <= ds + S 2^-23 + 2^-21 (1 + |exact|)
    """
    out = np.asarray(jnp.asarray(out).astype(jnp.float32), np.float64)
    lse = np.asarray(lse, np.float64)
    q = np.asarray(built.q.astype(jnp.float32), np.float64)
    visible = np.asarray(built.visible)
    unit = float(jnp.finfo(case.dtype).eps) / 2
    assert out.shape == (*q.shape[:3], case.rank) and lse.shape == q.shape[:3]
    for b, t in np.ndindex(*q.shape[:2]):
        seen = [entry for entry in built.entries[b][: visible[b, t]] if entry is not None]
        if not seen:
            assert np.all(out[b, t] == 0), f"sequence {b}, token {t} sees nothing"
            assert np.all(np.isneginf(lse[b, t]))
            continue
        keys = np.stack(seen)
        scores = q[b, t] @ keys.T * SCALE
        highest = scores.max(-1, keepdims=True)
        p = np.exp(scores - highest)
        total = p.sum(-1, keepdims=True)
        exact, exact_lse = p @ keys[:, : case.rank] / total, (highest + np.log(total))[:, 0]
        around = p @ np.abs(keys[:, : case.rank]) / total
        drift = 2 * keys.shape[1] * 2.0**-24 * SCALE * (np.abs(q[b, t]) @ np.abs(keys).T).max(-1, keepdims=True)
        sums = len(seen) * 2.0**-23
        limit = (unit + 2 * drift + sums + 2.0**-20) * around + unit * np.abs(exact)
        # Splits and their merging round twice more, in float32.
        assert np.all(np.abs(out[b, t] - exact) <= limit + 2.0**-21 * around), f"sequence {b}, token {t}"
        lse_limit = drift[:, 0] + sums + 2.0**-21 * (1 + np.abs(exact_lse))
        assert np.all(np.abs(lse[b, t] - exact_lse) <= lse_limit), f"LSE of sequence {b}, token {t}"
