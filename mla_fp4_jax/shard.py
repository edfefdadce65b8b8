"""One device's part of a step, inside shard_map: its slots of the cache, and what it shares with the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mla_fp4_jax.cache import Cache, new_length, token_slots

# (cache, visible) -> attended [B, T, H, W] and its LSE [B, T, H]
Attention = Callable[[Cache, Int[Array, "B T"]], tuple[Float[Array, "B T H W"], Float[Array, "B T H"]]]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Names of the manual mesh axes that split heads and context; with none of them every operation is the plain one.

    Device c of the C along context holds slot s = c + C j of a sequence as its j-th. Of the first n slots it holds
    ceil((n - c) / C), so lengths and causal masks, which count slots, become such counts, and nothing else changes.
    """

    heads: tuple[str, ...] = ()
    context: tuple[str, ...] = ()

    def capacity(self, cache: Cache) -> int:
        """Tokens a sequence can hold on all devices together."""
        return cache.capacity * (_size(self.context) if self.context else 1)

    def write_slots(self, cache: Cache, active: Bool[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
        """Where active tokens go in this device's cache, its capacity for those not here; and the new length.

        They go after those that are held; the length counts those of all devices.
        """
        capacity = self.capacity(cache)
        slots, length = token_slots(cache.length, active, capacity), new_length(cache.length, active, capacity)
        if not self.context:
            return slots, length
        size, index = _size(self.context), jax.lax.axis_index(self.context)
        here = (slots % size == index) & (slots < capacity)
        return jnp.where(here, slots // size, cache.capacity), length

    def attend(self, attention: Attention, cache: Cache, visible: Int[Array, "B T"]) -> Float[Array, "B T H W"]:
        """This device's addend of the attention over all slots; over context the addends sum to the whole.

            a_c = w_c attention_c,   w_c = exp(LSE_c - logsumexp_c LSE_c)

        What follows is linear up to the all-reduce after o_proj, so that one does the sum. The LSEs travel alone, one
        float32 a token and head. Where nothing is seen on any device a_c is 0.
        """
        if not self.context:
            return attention(cache, visible)[0]
        size, index = _size(self.context), jax.lax.axis_index(self.context)

        def held(count):
            return (count + (size - 1 - index)) // size

        out, lse = attention(dataclasses.replace(cache, length=held(cache.length)), held(visible))
        total = jax.nn.logsumexp(jax.lax.all_gather(lse, self.context), axis=0)
        weight = jnp.where(jnp.isneginf(total), 0.0, jnp.exp(lse - total))
        return (out.astype(jnp.float32) * weight[..., None]).astype(out.dtype)

    def reduce(self, y: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The sum over heads and context of o_proj's results, in y's dtype: the step's one all-reduce."""
        axes = self.heads + self.context
        return jax.lax.psum(y, axes) if axes else y


WHOLE = Shard()


def _size(axes: tuple[str, ...]) -> int:
    size = 1
    for name in axes:
        size *= jax.lax.axis_size(name)
    return size
