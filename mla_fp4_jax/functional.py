"""MLA as pure functions on pytrees: weights and cache in, output and cache out. The module is a thin shell.

    c      = rms(x W_kva[:L] + b);  k_pe = rope(x W_kva[L:] + b)      one entry [c | k_pe] per token, cached
    q      = rms(x W_qa + b) W_qb   (or x W_q);  q = [q_nope | rope(q_pe)] per head
    decode:  q_latent[h] = q_nope[h] W_K[h]           k_up_proj   kv_b_proj's first P rows of a head
             a[h]        = softmax(scale [q_latent | q_pe] . [c | k_pe]) c
             o[h]        = W_V[h] a[h]                v_up_proj   its last V rows
    prefill: K[h] = [W_K[h] c | k_pe], V[h] = W_V[h] c, o = softmax(scale q K) V
    y      = o W_o + b

Source: DeepSeek-V2 (arXiv 2405.04434) section 2.1 and appendix C; names and rounding points as Hugging Face's.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mla_fp4_jax import rope
from mla_fp4_jax.cache import Cache
from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops.dense import fp4_dense
from mla_fp4_jax.ops.implementations import XLA
from mla_fp4_jax.ops.latent_query import latent_query
from mla_fp4_jax.ops.linear_pair import fp4_linear_pair
from mla_fp4_jax.ops.mla_decode import mla_decode as latent_attention
from mla_fp4_jax.ops.mla_prefill import mla_prefill_attention
from mla_fp4_jax.ops.norm_rope_write import Columns, norm_rope_write
from mla_fp4_jax.projections import expand_kv_b, k_up_proj, linear, v_up_proj
from mla_fp4_jax.shard import WHOLE, Shard
from mla_fp4_jax.sharding import MLASharding
from mla_fp4_jax.spmd import on_every_device
from mla_fp4_jax.weights import MLAWeights


def mla_prefill(
    weights: MLAWeights,
    x: Float[Array, "B T E"],
    cache: Cache,
    config: MLAConfig,
    *,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    padding_mask: Bool[Array, "B T"] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    attention_implementation: str | None = None,
    sharding: MLASharding | None = None,
) -> tuple[Float[Array, "B T E"], Cache]:
    """Append a chunk of tokens to the cache and attend causally to all that it then holds.

    A whole prompt is one chunk on an empty cache; a long one may come in several. Keys and values are
    expanded through kv_b_proj block by block, so memory does not grow with T * S.

    Args:
        weights: the layer.
        x: hidden states.
        cache: holds the tokens before these.
        config: the layer's sizes.
        positions: rotary positions; default: each token's slot in the cache.
        lengths: how many of a row's first tokens are real, 0 .. T; default all (right padding).
        padding_mask: which tokens are real, for padding anywhere, such as on the left. Padding is not cached.
        dtype: compute dtype.
        implementation: of the FP4 products; see fp4_bmm.
        attention_implementation: see ops.mla_prefill_attention.
        sharding: how weights and cache lie on several devices. x is split along batch, so is the output, and the
            cache comes back as it lay. None for one device.

    Returns:
        The layer's output in `dtype`, exactly 0 where a token is padding or did not fit, and the cache.

    Raises:
        ValueError: shapes that do not fit; concrete lengths out of range or past the cache's capacity. Traced
            ones cannot be checked: a token past the capacity is dropped and harms no other. With a sharding also
            sizes that do not divide over its devices.
    """
    active = _active("mla_prefill", x, lengths, padding_mask)
    _check(x, cache, config, positions, active)
    static = {
        "dtype": jnp.dtype(dtype),
        "implementation": implementation,
        "attention_implementation": attention_implementation,
    }
    if sharding is not None:
        return on_every_device(_prefill, sharding, weights, x, cache, config, positions, active, **static)
    return _prefill(WHOLE, weights, x, cache, config, positions, active, **static)


def _prefill(
    shard: Shard,
    weights: MLAWeights,
    x: Float[Array, "B T E"],
    cache: Cache,
    config: MLAConfig,
    positions: Int[Array, "B T"] | None,
    active: Bool[Array, "B T"],
    *,
    dtype: jnp.dtype,
    implementation: str | None,
    attention_implementation: str | None,
) -> tuple[Float[Array, "B T E"], Cache]:
    # The write's kernel has no gradient, which prefill must have.
    step = _begin(shard, weights, x, cache, config, positions, active, dtype, implementation, XLA)
    kv_b_proj = weights.kv_b_proj
    if isinstance(kv_b_proj, FP4Array) and kv_b_proj.format == "mxfp4" and implementation in (None, "mosaic_gpu"):
        # Decoded once for all blocks of latents: exact, and gone when prefill is. A library's matmul does the rest.
        kv_b_proj = fp4_dense(kv_b_proj, dtype)
    q = jnp.concatenate([step.q[..., : config.qk_nope_head_dim], step.q_rope(config)], axis=-1)

    def attend(cache: Cache, visible: Int[Array, "B T"]):
        return mla_prefill_attention(
            q,
            cache,
            visible,
            lambda latent: expand_kv_b(latent, kv_b_proj, implementation=implementation),
            scale=config.softmax_scale,
            v_head_dim=config.v_head_dim,
            implementation=attention_implementation,
        )

    with jax.named_scope("mla/attention"):
        attended = shard.attend(attend, step.cache, step.visible)
    return _finish(shard, weights, attended, step, implementation)


def mla_decode(
    weights: MLAWeights,
    x: Float[Array, "B T E"],
    cache: Cache,
    config: MLAConfig,
    *,
    positions: Int[Array, "B T"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
    attention_implementation: str | None = None,
    split_size: int | None = None,
    sharding: MLASharding | None = None,
) -> tuple[Float[Array, "B T E"], Cache]:
    """Append T new tokens per sequence (1, or a few speculated) and attend in latent space.

    Arguments, results and errors as mla_prefill's; `lengths` 0 marks a sequence that takes no part in this
    step. The two differ in the order of operations only: here W_K and W_V are absorbed into the query and the
    output, so that the cache is read once for all heads. `attention_implementation` and `split_size` are
    ops.mla_decode's: given a split size, the attention's bits do not depend on how many sequences there are.
    """
    active = _active("mla_decode", x, lengths, None)
    _check(x, cache, config, positions, active)
    static = {
        "dtype": jnp.dtype(dtype),
        "implementation": implementation,
        "attention_implementation": attention_implementation,
        "split_size": split_size,
    }
    if sharding is not None:
        return on_every_device(_decode, sharding, weights, x, cache, config, positions, active, **static)
    return _decode(WHOLE, weights, x, cache, config, positions, active, **static)


def _decode(
    shard: Shard,
    weights: MLAWeights,
    x: Float[Array, "B T E"],
    cache: Cache,
    config: MLAConfig,
    positions: Int[Array, "B T"] | None,
    active: Bool[Array, "B T"],
    *,
    dtype: jnp.dtype,
    implementation: str | None,
    attention_implementation: str | None,
    split_size: int | None,
) -> tuple[Float[Array, "B T E"], Cache]:
    step = _begin(
        shard, weights, x, cache, config, positions, active, dtype, implementation, attention_implementation
    )
    q = _latent_query(step, weights.kv_b_proj, config, implementation)
    with jax.named_scope("mla/attention"):

        def attend(cache: Cache, visible: Int[Array, "B T"]):
            return latent_attention(
                q,
                cache,
                visible,
                scale=config.softmax_scale,
                return_lse=True,
                split_size=split_size,
                implementation=attention_implementation,
            )

        attended = shard.attend(attend, step.cache, step.visible)
    heads = v_up_proj(attended, weights.kv_b_proj, config.v_head_dim, implementation=implementation)
    return _finish(shard, weights, heads, step, implementation)


def _latent_query(
    step: _Step, kv_b_proj: jax.Array | FP4Array, config: MLAConfig, implementation: str | None
) -> Float[Array, "B T H LR"]:
    """[q_nope W_K | rotated q_pe]."""
    nope = config.qk_nope_head_dim
    if isinstance(kv_b_proj, FP4Array):
        with jax.named_scope("mla/k_up_proj"):
            static = {"interleaved": config.rope_interleave, "implementation": implementation}
            return latent_query(step.q, kv_b_proj, step.cos, step.sin, nope, **static)
    q_latent = k_up_proj(step.q, kv_b_proj, nope, implementation=implementation)
    with jax.named_scope("mla/attention"):
        return jnp.concatenate([q_latent, step.q_rope(config)], axis=-1)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What prefill and decode share between the projections in and the projection out."""

    q: Float[Array, "B T H PR"]  # its last R columns are not rotated yet
    cos: Float[Array, "B T half_R"]
    sin: Float[Array, "B T half_R"]
    cache: Cache
    visible: Int[Array, "B T"]

    def q_rope(self, config: MLAConfig) -> Float[Array, "B T H R"]:
        """Those columns, rotated."""
        not_yet, cos, sin = self.q[..., config.qk_nope_head_dim :], self.cos[:, :, None], self.sin[:, :, None]
        return rope.rotate(not_yet, cos, sin, interleaved=config.rope_interleave)


def _begin(
    shard: Shard,
    weights: MLAWeights,
    x: Float[Array, "B T E"],
    cache: Cache,
    config: MLAConfig,
    positions: Int[Array, "B T"] | None,
    active: Bool[Array, "B T"],
    dtype: DTypeLike,
    implementation: str | None,
    write_implementation: str | None,
) -> _Step:
    x = x.astype(dtype)
    slots = cache.length[:, None] + jnp.cumsum(active, axis=1, dtype=jnp.int32) - 1
    if positions is None:
        positions = jnp.maximum(slots, 0)
    cos, sin = rope.cos_sin(config.rope, config.qk_rope_head_dim, positions)
    low, kv = _first_projections(weights, x, config, implementation, pair=write_implementation != XLA)
    with jax.named_scope("mla/norm_rope_write"):
        here, length = shard.write_slots(cache, active)
        gain = weights.kv_a_layernorm
        if config.latent_scale != 1.0:
            gain = gain.astype(jnp.float32) * config.latent_scale
        low, cache = norm_rope_write(
            low,
            kv,
            cache,
            here,
            cos,
            sin,
            low_gain=weights.q_a_layernorm,
            kv_gain=gain,
            eps=config.layernorm_eps,
            interleaved=config.rope_interleave,
            implementation=write_implementation,
        )
        cache = dataclasses.replace(cache, length=length)
    with jax.named_scope("mla/q_proj"):
        if low is None:
            q = linear(x, _given(weights.q_proj, "q_proj"), implementation=implementation)
        else:
            q = linear(low, _given(weights.q_b_proj, "q_b_proj"), implementation=implementation)
        q = q.reshape(*x.shape[:2], config.num_attention_heads, config.qk_head_dim)
        if config.rope.llama_4_scaling_beta:
            q = (q.astype(jnp.float32) * rope.query_scale(config.rope, positions)[..., None, None]).astype(q.dtype)
    visible = jnp.where(active & (slots < shard.capacity(cache)), slots + 1, 0)
    return _Step(q, cos, sin, cache, visible)


def _first_projections(
    weights: MLAWeights, x: Float[Array, "B T E"], config: MLAConfig, implementation: str | None, *, pair: bool
) -> tuple[Columns | None, Columns]:
    """What is projected from x: the query's latent, where it has one; latent and rope key. With `pair` at once."""
    kv_a_proj, low = weights.kv_a_proj_with_mqa, None
    if config.q_lora_rank is not None:
        q_a_proj = _given(weights.q_a_proj, "q_a_proj")
        unbiased = weights.q_a_proj_bias is None and weights.kv_a_proj_bias is None
        if pair and unbiased and isinstance(q_a_proj, FP4Array) and isinstance(kv_a_proj, FP4Array):
            with jax.named_scope("mla/qkv_a_proj"):
                both = fp4_linear_pair(x, q_a_proj, kv_a_proj, implementation=implementation)
            if both is not None:
                low = Columns(both, 0, config.q_lora_rank)
                return low, Columns(both, config.q_lora_rank, config.cache_dim)
        with jax.named_scope("mla/q_a_proj"):
            low = Columns.all_of(linear(x, q_a_proj, weights.q_a_proj_bias, implementation=implementation))
    with jax.named_scope("mla/kv_a_proj"):
        kv = linear(x, kv_a_proj, weights.kv_a_proj_bias, implementation=implementation)
    return low, Columns.all_of(kv)


def _finish(
    shard: Shard, weights: MLAWeights, heads: Float[Array, "B T H V"], step: _Step, implementation: str | None
) -> tuple[Float[Array, "B T E"], Cache]:
    with jax.named_scope("mla/o_proj"):
        flat = heads.reshape(*heads.shape[:2], -1)
        if shard == WHOLE:
            y = linear(flat, weights.o_proj, weights.o_proj_bias, implementation=implementation)
        else:  # the bias once, not once a device
            y = shard.reduce(linear(flat, weights.o_proj, implementation=implementation))
            if weights.o_proj_bias is not None:
                bias = weights.o_proj_bias.astype(jnp.float32).reshape(1, 1, -1)
                y = (y.astype(jnp.float32) + bias).astype(y.dtype)
    return jnp.where((step.visible > 0)[..., None], y, jnp.zeros((), y.dtype)), step.cache


def _active(
    where: str,
    x: Float[Array, "B T E"],
    lengths: Int[Array, "B"] | None,
    padding_mask: Bool[Array, "B T"] | None,
) -> Bool[Array, "B T"]:
    if x.ndim != 3 or x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(f"{where}: x must be [B, T, E] with B, T >= 1; got {x.shape}. Add the missing axis.")
    batch, tokens = x.shape[:2]
    if padding_mask is not None:
        if lengths is not None:
            raise ValueError(f"{where}: lengths and padding_mask must not both be given. Give the one that fits.")
        padding_mask = jnp.asarray(padding_mask)
        if padding_mask.shape != (batch, tokens):
            raise ValueError(
                f"{where}: padding_mask must be [B, T] = {(batch, tokens)}; got {padding_mask.shape}. "
                "True marks a real token."
            )
        return padding_mask.astype(bool)
    if lengths is None:
        return jnp.ones((batch, tokens), bool)
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"{where}: lengths must be integers [B] = {(batch,)}; got {lengths.dtype}{lengths.shape}. "
            "Give the number of real tokens of each row."
        )
    if not isinstance(lengths, Tracer) and lengths.is_fully_addressable:
        known = np.asarray(lengths)  # NumPy, since jnp would trace even constants within jit
        if ((known < 0) | (known > tokens)).any():
            raise ValueError(f"{where}: lengths must lie in 0 .. T = {tokens}; got {known.tolist()}.")
    return jnp.arange(tokens)[None] < lengths[:, None]


def _check(
    x: Float[Array, "B T E"],
    cache: Cache,
    config: MLAConfig,
    positions: Int[Array, "B T"] | None,
    active: Bool[Array, "B T"],
) -> None:
    _check_shapes(x, cache, config, positions)
    _check_capacity(cache, active)


def _check_shapes(
    x: Float[Array, "B T E"], cache: Cache, config: MLAConfig, positions: Int[Array, "B T"] | None
) -> None:
    if x.shape[2] != config.hidden_size:
        raise ValueError(f"mla: x must have E = {config.hidden_size} columns; got {x.shape}. Check the config.")
    if cache.length.shape[0] != x.shape[0]:
        raise ValueError(
            f"mla: cache must hold B = {x.shape[0]} sequences as x does; got {cache.length.shape[0]}. "
            "Call init_cache with this batch_size."
        )
    width = jax.tree.leaves(cache)[0].shape[-1]
    if width != config.cache_dim or cache.kv_lora_rank != config.kv_lora_rank:
        raise ValueError(
            f"mla: cache entries must have L + R = {config.cache_dim} columns, L = {config.kv_lora_rank}; got "
            f"{width}, L = {cache.kv_lora_rank}. Make the cache with this layer's config."
        )
    if positions is not None and jnp.shape(positions) != x.shape[:2]:
        raise ValueError(
            f"mla: positions must be [B, T] = {x.shape[:2]}; got {jnp.shape(positions)}. Broadcast them."
        )


def _check_capacity(cache: Cache, active: Bool[Array, "B T"]) -> None:
    if isinstance(cache.length, Tracer) or isinstance(active, Tracer) or not cache.length.is_fully_addressable:
        return
    after = np.asarray(cache.length) + np.asarray(active).sum(axis=1, dtype=np.int32)
    if (after > cache.capacity).any():
        raise ValueError(
            f"mla: the cache must have room for the new tokens; lengths would become {after.tolist()} of a "
            f"capacity of {cache.capacity}. Make it longer (init_cache max_length) or drop finished sequences."
        )


def _given(weight, name: str):
    if weight is None:
        raise ValueError(f"mla: weights.{name} must be given for this config; got None. Check q_lora_rank.")
    return weight
