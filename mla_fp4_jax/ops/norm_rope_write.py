"""norm_rope_write: what lies between a decode step's first projections and its next, in one pass, with dispatch."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_fp4_jax import rope
from mla_fp4_jax.cache import Cache, PagedLatentCache
from mla_fp4_jax.norm import rms_norm
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.implementations import INTERPRET, TRITON, XLA
from pallas_kernels import norm_rope_write_triton as triton


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """A part of an array's last axis, read in place: two products of one kernel lie in one array.

    Attributes:
        array: [B, T, W].
        first: of the part (static).
        number: of its columns (static).
    """

    array: jax.Array
    first: int = dataclasses.field(metadata={"static": True})
    number: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def all_of(cls, array: jax.Array) -> Columns:
        """Every column."""
        return cls(array, 0, array.shape[-1])

    def cut(self) -> jax.Array:
        """The part as an array."""
        return self.array[..., self.first : self.first + self.number]


def norm_rope_write(
    low: Columns | None,
    kv: Columns,
    cache: Cache,
    slots: Int[Array, "B T"],
    cos: Float[Array, "B T half_R"],
    sin: Float[Array, "B T half_R"],
    *,
    low_gain: Float[Array, "Q"] | None,
    kv_gain: Float[Array, "L"],
    eps: float,
    interleaved: bool,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T Q"] | None, Cache]:
    """Norm the query's latent; norm and rotate the new tokens' entries and write them to the cache.

        low' = rms(low) low_gain,   entry = [rms(kv[:L]) kv_gain | rotate(kv[L:], cos, sin)]

    Args:
        low: the query's latent, Q columns; None where queries have none.
        kv: latent and rope key, L + R columns.
        cache: takes the entries at `slots`; its length stays.
        slots: of each token in its sequence; one at the capacity, or without a page, drops its token.
        cos, sin: float32, of each token's position.
        low_gain, kv_gain: the norms'.
        eps: the norms'.
        interleaved: how rope pairs lie; see rope.rotate.
        implementation: "triton" (Pallas, on a GPU; also for "mosaic_gpu"), "xla" (anywhere), "triton_interpret" (the
            kernel in Pallas's interpreter, for tests), or None for the fastest that can run here.

    Returns:
        low' (None for None) and the cache. Computed in float32 and rounded once to kv's dtype, then to the cache's.
    """
    static = {"eps": eps, "interleaved": interleaved}
    run, plain = functools.partial(_run, **static), functools.partial(_plain, **static)
    operands = (low, kv, cache, slots, cos, sin, low_gain, kv_gain)
    if implementation == XLA or _why_not(kv.array, cos, cache, implementation) is not None:
        return plain(*operands)
    if implementation == INTERPRET:
        return run(*operands, interpret=True)
    # Decided for the device that is traced for; a program lowered for another one falls back.
    return jax.lax.platform_dependent(*operands, cuda=run, rocm=run, default=plain)


def _why_not(kv: jax.Array, cos: jax.Array, cache: Cache, implementation: str | None) -> str | None:
    reason = None if implementation == INTERPRET else implementations.why_not(TRITON)
    return reason or triton.unsupported(kv, cos, _entries(cache))


def _entries(cache: Cache) -> jax.Array:
    return cache.pages if isinstance(cache, PagedLatentCache) else cache.entries


def _plain(low, kv, cache, slots, cos, sin, low_gain, kv_gain, *, eps, interleaved):
    normed = None if low is None else rms_norm(low.cut(), low_gain, eps)
    both, rank = kv.cut(), cache.kv_lora_rank
    latent = rms_norm(both[..., :rank], kv_gain, eps)
    k_rope = rope.rotate(both[..., rank:], cos, sin, interleaved=interleaved)
    return normed, cache.write(jnp.concatenate([latent, k_rope], axis=-1), slots)


def _run(low, kv, cache, slots, cos, sin, low_gain, kv_gain, *, eps, interleaved, interpret=False):
    batch, tokens = kv.array.shape[:2]

    def flat(array):
        return array.reshape(batch * tokens, *array.shape[2:])

    paged = isinstance(cache, PagedLatentCache)
    normed, entries = triton.norm_rope_write_triton(
        None if low is None else flat(low.array),
        flat(kv.array),
        low_gain,
        kv_gain,
        flat(cos),
        flat(sin),
        flat(slots.astype(jnp.int32)),
        cache.page_table.astype(jnp.int32) if paged else None,
        _entries(cache),
        low_first=0 if low is None else low.first,
        kv_first=kv.first,
        eps=eps,
        interleaved=interleaved,
        interpret=interpret,
    )
    cache = dataclasses.replace(cache, **{"pages" if paged else "entries": entries})
    return (None if normed is None else normed.reshape(batch, tokens, -1)), cache
