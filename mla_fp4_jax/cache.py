"""The latent cache: one entry of L + R numbers per token, contiguous or in pages; a value, never mutated.

Entry layout, `cache_dim = L + R` elements: columns 0 .. L-1 hold the latent after its RMS norm, columns
L .. L+R-1 the one shared rope key after rotation, as halves [a' | b']. Both are read together by a decode
kernel, so they lie together. A token's *slot* is its index in its sequence, whatever its rotary position.

Both caches offer the same operations, which is all that attention uses: `capacity`, `append`, `write`, `block`.
Slots past `length` may hold anything, NaN included: they are never seen. A float8_e4m3fn cache holds entries divided
by one number, `entries_scale`, a power of 2: neither dividing by it nor multiplying back rounds anything. Split along
context over C devices, slot s is number s // C of device s % C, so the entries of one sequence are no longer in the
order of its tokens.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.sharding import MLASharding

PAGE_SIZES = (1, 16, 64, 128)
E4M3 = jnp.dtype(jnp.float8_e4m3fn)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """A contiguous latent cache.

    Attributes:
        entries: [B, S, L+R], the layout above; S is the capacity.
        length: int32 [B], tokens held per sequence, 0 .. S.
        kv_lora_rank: L, where an entry's latent ends (static).
        entries_scale: what a stored number is in units of, a power of 2 (static).
    """

    entries: Float[Array, "B S LR"]
    length: Int[Array, "B"]
    kv_lora_rank: int = dataclasses.field(metadata={"static": True})
    entries_scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __post_init__(self) -> None:
        _check_scale(type(self).__name__, self.entries_scale)

    @property
    def capacity(self) -> int:
        """S, tokens a sequence can hold."""
        return self.entries.shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """Of the entries."""
        return self.entries.dtype

    @property
    def latent(self) -> Float[Array, "B S L"]:
        """The normed latents in units of entries_scale, garbage past `length` included."""
        return self.entries[..., : self.kv_lora_rank]

    @property
    def k_rope(self) -> Float[Array, "B S R"]:
        """The rotated rope keys in units of entries_scale, garbage past `length` included."""
        return self.entries[..., self.kv_lora_rank :]

    def append(self, entries: Float[Array, "B T LR"], active: Bool[Array, "B T"]) -> LatentCache:
        """Write each sequence's active tokens after those it holds; tokens past the capacity are dropped."""
        written = self.write(entries, token_slots(self.length, active, self.capacity))
        return dataclasses.replace(written, length=new_length(self.length, active, self.capacity))

    def write(self, entries: Float[Array, "B T LR"], slots: Int[Array, "B T"]) -> LatentCache:
        """Write tokens to slots of their sequence; a slot at the capacity drops one. The length stays."""
        rows = jnp.arange(entries.shape[0])[:, None]
        written = self.entries.at[rows, slots].set(_stored(entries, self), mode="drop")
        return dataclasses.replace(self, entries=written)

    def block(self, index: Int[Array, ""], size: int) -> tuple[Float[Array, "B K LR"], Int[Array, "B K"]]:
        """The index-th block of `size` slots: its entries as stored, and each one's slot (-1 where there is none).

        `size` must not pass the capacity. The last block may overlap the one before; what was already seen
        there, like all slots past `length`, comes back as zeros with slot -1.
        """
        start = jnp.minimum(index * size, self.capacity - size)
        entries = jax.lax.dynamic_slice_in_dim(self.entries, start, size, axis=1)
        slots = start + jnp.arange(size)
        seen = (slots[None] >= index * size) & (slots[None] < self.length[:, None])
        return _masked(entries, jnp.broadcast_to(slots[None], seen.shape), seen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLatentCache:
    """A latent cache in pages that sequences may share, reorder or lack.

    Attributes:
        pages: [N, page_size, L+R].
        page_table: int32 [B, M], the page that holds slots m * page_size ... of a sequence. An id outside
            0 .. N-1 is no page: what lies there reads as absent, what is written there is dropped.
        length: int32 [B], tokens held per sequence, 0 .. M * page_size.
        kv_lora_rank: L, where an entry's latent ends (static).
        entries_scale: what a stored number is in units of, a power of 2 (static).
    """

    pages: Float[Array, "N page LR"]
    page_table: Int[Array, "B M"]
    length: Int[Array, "B"]
    kv_lora_rank: int = dataclasses.field(metadata={"static": True})
    entries_scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __post_init__(self) -> None:
        _check_scale(type(self).__name__, self.entries_scale)

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""
        return self.pages.shape[1]

    @property
    def capacity(self) -> int:
        """M * page_size, tokens a sequence can hold."""
        return self.page_table.shape[1] * self.page_size

    @property
    def dtype(self) -> jnp.dtype:
        """Of the pages."""
        return self.pages.dtype

    def append(self, entries: Float[Array, "B T LR"], active: Bool[Array, "B T"]) -> PagedLatentCache:
        """Write each sequence's active tokens after those it holds.

        Tokens past the capacity, and tokens whose page does not exist, are dropped. Two sequences that share
        a page must not both write to it: make the shared part whole pages.
        """
        written = self.write(entries, token_slots(self.length, active, self.capacity))
        return dataclasses.replace(written, length=new_length(self.length, active, self.capacity))

    def write(self, entries: Float[Array, "B T LR"], slots: Int[Array, "B T"]) -> PagedLatentCache:
        """Write tokens to slots of their sequence; one at the capacity, or without a page, drops its token."""
        page_index = jnp.minimum(slots // self.page_size, self.page_table.shape[1] - 1)
        page = jnp.take_along_axis(self.page_table, page_index, axis=1)
        number = self.pages.shape[0]
        page = jnp.where((slots < self.capacity) & (page >= 0) & (page < number), page, number)
        written = self.pages.at[page, slots % self.page_size].set(_stored(entries, self), mode="drop")
        return dataclasses.replace(self, pages=written)

    def block(self, index: Int[Array, ""], size: int) -> tuple[Float[Array, "B K LR"], Int[Array, "B K"]]:
        """The index-th block of `size` slots, as LatentCache.block; `size` must be whole pages."""
        pages_per_block = size // self.page_size
        first = jnp.minimum(index * pages_per_block, self.page_table.shape[1] - pages_per_block)
        table = jax.lax.dynamic_slice_in_dim(self.page_table, first, pages_per_block, axis=1)
        exists = (table >= 0) & (table < self.pages.shape[0])
        entries = self.pages[jnp.where(exists, table, 0)]
        entries = entries.reshape(table.shape[0], size, self.pages.shape[2])
        slots = first * self.page_size + jnp.arange(size)
        seen = (slots[None] >= index * size) & (slots[None] < self.length[:, None])
        seen &= jnp.repeat(exists, self.page_size, axis=1)
        return _masked(entries, jnp.broadcast_to(slots[None], seen.shape), seen)


Cache = LatentCache | PagedLatentCache


def init_cache(
    config: MLAConfig,
    batch_size: int,
    max_length: int,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    page_size: int | None = None,
    num_pages: int | None = None,
    entries_scale: float = 1.0,
    sharding: MLASharding | None = None,
) -> Cache:
    """An empty cache.

    Args:
        config: gives L and R.
        batch_size: B >= 1.
        max_length: the least capacity per sequence, >= 1; a paged cache rounds it up to whole pages, one that is
            split along context to as many slots on every device.
        dtype: of the entries.
        page_size: None for a contiguous cache, else one of PAGE_SIZES.
        num_pages: N of a paged cache. None makes just enough and gives each sequence its own pages; a number
            leaves the page table empty (-1), to be filled by whoever owns the pages
            (`dataclasses.replace(cache, page_table=...)`).
        entries_scale: with dtype float8_e4m3fn, entries are stored as round(entry / entries_scale), at most +-448; a
            power of 2. As e4m3's precision is relative, from 2^-6 to 448, it has to fit only roughly: 448 times it
            must pass the greatest entry. A latent after its norm is about 1, a rope key up to some hundreds.
        sharding: None for the default device. Split along batch or context, a device has its own N / devices pages,
            and its part of the page table counts them from 0.

    Raises:
        ValueError: a size out of its range, or one that does not divide over the devices; an entries_scale that is
            no power of 2, or one other than 1 with another dtype than float8_e4m3fn.
    """
    _check_scale("init_cache", entries_scale)
    if entries_scale != 1 and jnp.dtype(dtype) != E4M3:
        raise ValueError(
            f"init_cache: entries_scale must be 1 with a cache in {jnp.dtype(dtype).name}; got {entries_scale}. "
            "Leave it out, or make the cache float8_e4m3fn."
        )
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"init_cache: {name} must be at least 1; got {value}. An empty cache holds nothing.")
    along_batch, along_context = (1, 1) if sharding is None else (sharding.size("batch"), sharding.size("context"))
    if sharding is not None:
        sharding.check_batch(batch_size)
    length = jnp.zeros((batch_size,), jnp.int32, device=_on(sharding, "tokens_spec"))
    slots = -(-max_length // along_context)  # on each device
    if page_size is None:
        if num_pages is not None:
            raise ValueError(f"init_cache: num_pages must come with page_size; got {num_pages} alone. Give both.")
        shape = (batch_size, slots * along_context, config.cache_dim)
        entries = jnp.zeros(shape, dtype, device=_on(sharding, "entries_spec"))
        return LatentCache(entries, length, config.kv_lora_rank, float(entries_scale))
    if page_size not in PAGE_SIZES:
        raise ValueError(f"init_cache: page_size must be one of {PAGE_SIZES}; got {page_size}. Choose one of them.")
    devices, sequences, width = along_batch * along_context, batch_size // along_batch, -(-slots // page_size)
    if num_pages is None:
        num_pages = devices * sequences * width
        own = np.arange(sequences * width, dtype=np.int32).reshape(sequences, width)
        table = np.tile(own, (along_batch, along_context))
    elif num_pages >= 1 and num_pages % devices == 0:
        table = np.full((batch_size, along_context * width), -1, np.int32)
    else:
        rule = "at least 1" if devices == 1 else f"a positive multiple of {devices} devices"
        raise ValueError(f"init_cache: num_pages must be {rule}; got {num_pages}. Leave it out for enough.")
    pages = jnp.zeros((num_pages, page_size, config.cache_dim), dtype, device=_on(sharding, "pages_spec"))
    where = _on(sharding, "entries_spec")
    page_table = jnp.asarray(table) if where is None else jax.jit(lambda: jnp.asarray(table), out_shardings=where)()
    return PagedLatentCache(pages, page_table, length, config.kv_lora_rank, float(entries_scale))


def cache_specs(cache: Cache, sharding: MLASharding) -> Cache:
    """The cache with each array's PartitionSpec in its place."""
    if isinstance(cache, PagedLatentCache):
        pages, table, length = sharding.pages_spec, sharding.entries_spec, sharding.tokens_spec
        return dataclasses.replace(cache, pages=pages, page_table=table, length=length)  # type: ignore[arg-type]
    entries, length = sharding.entries_spec, sharding.tokens_spec
    return dataclasses.replace(cache, entries=entries, length=length)  # type: ignore[arg-type]


def numbers(entries: Float[Array, "B K LR"], cache: Cache, dtype: DTypeLike) -> Float[Array, "B K LR"]:
    """What entries that a cache holds stand for: times its entries_scale, exact where `dtype` reaches so far."""
    entries = entries.astype(dtype)
    return entries if cache.entries_scale == 1 else entries * jnp.asarray(cache.entries_scale, dtype)


def _stored(entries: Float[Array, "B T LR"], cache: Cache) -> Float[Array, "B T LR"]:
    """Entries as a cache holds them; in e4m3, what is too great as the greatest number, and NaN as NaN."""
    if cache.dtype != E4M3:
        return entries.astype(cache.dtype)
    most = float(jnp.finfo(E4M3).max)
    return jnp.clip(entries.astype(jnp.float32) * (1 / cache.entries_scale), -most, most).astype(E4M3)


def _check_scale(where: str, scale: float) -> None:
    if not (isinstance(scale, (int, float)) and 0 < scale < math.inf and math.frexp(scale)[0] == 0.5):
        raise ValueError(
            f"{where}: entries_scale must be a power of 2, as 0.5 or 4.0; got {scale}. Round it up to the next one."
        )


def _on(sharding: MLASharding | None, spec: str) -> NamedSharding | None:
    return None if sharding is None else NamedSharding(sharding.mesh, getattr(sharding, spec))


def token_slots(length: Int[Array, "B"], active: Bool[Array, "B T"], capacity: int) -> Int[Array, "B T"]:
    """The slot each active token goes to: its rank among the active ones after `length`; else `capacity`."""
    slots = length[:, None] + jnp.cumsum(active, axis=1, dtype=jnp.int32) - 1
    return jnp.where(active & (slots < capacity), slots, capacity)


def new_length(length: Int[Array, "B"], active: Bool[Array, "B T"], capacity: int) -> Int[Array, "B"]:
    """Lengths after the active tokens are appended, saturating at the capacity."""
    added = jnp.sum(active, axis=1, dtype=jnp.int32)
    return jnp.minimum(length + added, capacity)


def _masked(
    entries: Float[Array, "B K LR"], slots: Int[Array, "B K"], seen: Bool[Array, "B K"]
) -> tuple[Float[Array, "B K LR"], Int[Array, "B K"]]:
    # Zeros, not only a masked score: a probability of 0 times a NaN value is NaN.
    return jnp.where(seen[..., None], entries, jnp.zeros((), entries.dtype)), jnp.where(seen, slots, -1)
