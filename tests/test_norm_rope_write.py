"""norm_rope_write, in XLA and as a kernel in the interpreter, against NumPy in float64."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mla_fp4_jax import LatentCache
from mla_fp4_jax.cache import PagedLatentCache
from mla_fp4_jax.ops.norm_rope_write import Columns, norm_rope_write

B, T, S, PAGE, Q, EPS = 3, 2, 64, 16, 48, 1e-6


@dataclasses.dataclass
class Case:
    """Operands, and where each token's entry must be: (page or sequence, slot), or None."""

    low: Columns | None
    kv: Columns
    cache: LatentCache | PagedLatentCache
    slots: np.ndarray
    places: list[tuple[int, int] | None]
    angles: np.ndarray
    gains: tuple[np.ndarray, np.ndarray]


def make(paged: bool, rank: int, rope: int, dtype, *, joint: bool) -> Case:
    """Tokens in the middle and at the end, one dropped at the capacity; with pages, two of no page."""
    rng = np.random.default_rng(rank + rope)
    array = jnp.asarray(rng.standard_normal((B, T, 5 + Q + rank + rope)), dtype)
    low, kv = Columns(array, 5, Q), Columns(array, 5 + Q, rank + rope)
    if not joint:
        low, kv = None, Columns.all_of(kv.cut())
    slots = np.array([[0, 1], [S - 1, S], [17, 33]])
    length = jnp.asarray([0, S - 1, 17], jnp.int32)
    if paged:
        table = np.array([[2, 3, 4, 5], [6, 7, 8, 0], [9, -1, 99, 1]], np.int32)
        pages = jnp.full((10, PAGE, rank + rope), 7, dtype)
        cache = PagedLatentCache(pages, jnp.asarray(table), length, rank)
        places = [(2, 0), (2, 1), (0, 15), None, None, None]
    else:
        cache = LatentCache(jnp.full((B, S, rank + rope), 7, dtype), length, rank)
        places = [(0, 0), (0, 1), (1, S - 1), None, (2, 17), (2, 33)]
    angles = rng.uniform(0, 100, (B, T, rope // 2))
    gains = (rng.uniform(0.5, 2, Q), rng.uniform(0.5, 2, rank))
    return Case(low, kv, cache, slots, places, angles, gains)


def run(case: Case, implementation: str, *, interleaved: bool):
    return norm_rope_write(
        case.low,
        case.kv,
        case.cache,
        jnp.asarray(case.slots, jnp.int32),
        jnp.asarray(np.cos(case.angles), jnp.float32),
        jnp.asarray(np.sin(case.angles), jnp.float32),
        low_gain=jnp.asarray(case.gains[0], jnp.float32),
        kv_gain=jnp.asarray(case.gains[1], jnp.float32),
        eps=EPS,
        interleaved=interleaved,
        implementation=implementation,
    )


def entries_wanted(case: Case, *, interleaved: bool) -> np.ndarray:
    """float64 [B T, L + R]."""
    rank = case.cache.kv_lora_rank
    kv = np.asarray(case.kv.cut(), np.float64).reshape(B * T, -1)
    pairs = kv[:, rank:]
    a, b = (pairs[:, 0::2], pairs[:, 1::2]) if interleaved else np.split(pairs, 2, axis=1)
    cos, sin = (f(case.angles).reshape(B * T, -1) for f in (np.cos, np.sin))
    return np.concatenate(
        [oracle.rms_norm(kv[:, :rank], case.gains[1], EPS), a * cos - b * sin, b * cos + a * sin], axis=1
    )


# One rounding to the dtype, half a unit in the last place, and float32's error on the way, some units of 2^-24 of
# numbers below 8 (normal ones times a gain of at most 2).
TOLERANCE = {"bfloat16": (2.0**-8, 1e-5), "float32": (2.0**-20, 1e-5)}


@pytest.mark.parametrize("implementation", ["xla", "triton_interpret"])
@pytest.mark.parametrize(
    ("paged", "rank", "rope", "dtype", "joint", "interleaved"),
    [
        (True, 64, 16, "bfloat16", True, True),
        (False, 64, 16, "float32", True, False),
        (True, 40, 12, "float32", False, True),
        (False, 32, 0, "bfloat16", False, False),
    ],
)
def test_agrees_with_float64(implementation, paged, rank, rope, dtype, joint, interleaved):
    case = make(paged, rank, rope, jnp.dtype(dtype), joint=joint)
    normed, cache = run(case, implementation, interleaved=interleaved)
    relative, absolute = TOLERANCE[dtype]
    before = np.asarray(case.cache.pages if paged else case.cache.entries, np.float64)
    wanted, entries = before.copy(), entries_wanted(case, interleaved=interleaved)
    for place, entry in zip(case.places, entries, strict=True):
        if place is not None:
            wanted[place] = entry
    got = np.asarray(cache.pages if paged else cache.entries, np.float64)
    np.testing.assert_allclose(got, wanted, rtol=relative, atol=absolute)
    untouched = np.ones(before.shape[:2], bool)
    for place in case.places:
        if place is not None:
            untouched[place] = False
    assert untouched.sum() == before.shape[0] * before.shape[1] - (3 if paged else 5)
    np.testing.assert_array_equal(got[untouched], 7)
    np.testing.assert_array_equal(np.asarray(cache.length), np.asarray(case.cache.length))
    if case.low is None:
        assert normed is None
    else:
        low = np.asarray(case.low.cut(), np.float64)
        exact = oracle.rms_norm(low, case.gains[0], EPS)
        assert normed.dtype == jnp.dtype(dtype)
        np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=relative, atol=absolute)
