"""MLAAttention: a Flax module that holds one layer's weights and calls the functional core."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mla_fp4_jax import cache as caches
from mla_fp4_jax.cache import Cache
from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.functional import mla_decode, mla_prefill
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.sharding import MLASharding
from mla_fp4_jax.spmd import group_sizes, place_weights
from mla_fp4_jax.weights import MLAWeights, Weight, check_weights, random_weights


class FP4Weight(nnx.Variable):
    """Holds an FP4Array. Not an nnx.Param: optimisers and nnx.grad leave packed weights alone."""


class MLAAttention(nnx.Module):
    """Multi-head Latent Attention (DeepSeek-V2/V3) whose projections are dense or FP4, each as it is stored.

    The weights are attributes under Hugging Face's names (`attn.kv_b_proj[...]`, see MLAWeights): nnx.Param
    for dense ones, FP4Weight for packed ones. Nothing is mutated: prefill and decode return a new cache.

        step = jax.jit(MLAAttention.decode, donate_argnames=("cache",))
        y, cache = step(attn, x, cache)
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        weights: MLAWeights | None = None,
        kv_b_format: str = "mxfp4",
        linear_formats: Mapping[str, str] | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        implementation: str | None = None,
        attention_implementation: str | None = None,
        split_size: int | None = None,
        sharding: MLASharding | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        """Hold given weights, or make random ones; for a checkpoint use load_mla_layer.

        Args:
            config: the layer's sizes.
            weights: held as they are, without a copy (kernel_order.order_for_device makes them ready for this
                device's kernels); the formats below then must be left alone.
            kv_b_format: of random weights: "mxfp4", "nvfp4" or "dense".
            linear_formats: likewise for other projections by name, such as {"o_proj": "mxfp4"}; dense unless
                named.
            dtype: compute dtype, and that of random dense weights and of the cache.
            implementation: of the FP4 products; see fp4_bmm.
            attention_implementation: of the attention between them, in prefill (see ops.mla_prefill_attention) and in
                decode (see ops.mla_decode).
            split_size: of the attention in decode, see ops.mla_decode. It and both implementations may also be set
                as attributes later, as on a layer that was loaded.
            sharding: how weights and caches lie on many devices; weights that lie otherwise are placed. None for one.
            rngs: makes random weights from its `params` stream, normal with variance 1 / fan-in.

        Raises:
            ValueError: neither or both of weights and rngs; a weight that is missing, unexpected or of another
                shape; an unknown format or projection; heads that do not divide over the devices.
        """
        if weights is None and rngs is not None:
            formats = {"kv_b_proj": kv_b_format, **(linear_formats or {})}
            weights = random_weights(config, formats, dtype, rngs)
            if sharding is not None:
                sharding.check(config, group_sizes(weights))
                weights = place_weights(weights, sharding)
            weights = order_for_device(weights, config, implementation, sharding)
        elif weights is None or rngs is not None:
            raise ValueError(
                "MLAAttention: exactly one of weights and rngs must be given; got "
                f"{'neither' if weights is None else 'both'}. Pass rngs=nnx.Rngs(0) for random weights."
            )
        check_weights(config, weights)
        if sharding is not None:
            sharding.check(config, group_sizes(weights))
            weights = place_weights(weights, sharding)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.implementation = implementation
        self.attention_implementation = attention_implementation
        self.split_size = split_size
        self.sharding = sharding
        for field in dataclasses.fields(MLAWeights):
            setattr(self, field.name, _variable(getattr(weights, field.name)))

    @property
    def weights(self) -> MLAWeights:
        """The layer as a plain pytree, for the functional core."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(MLAWeights):
            variable = getattr(self, field.name)
            values[field.name] = None if variable is None else variable.get_value()
        return MLAWeights(**values)

    def init_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        page_size: int | None = None,
        num_pages: int | None = None,
        dtype: DTypeLike | None = None,
        entries_scale: float = 1.0,
    ) -> Cache:
        """An empty cache for this layer, in its dtype unless another is given; see cache.init_cache."""
        return caches.init_cache(
            self.config,
            batch_size,
            max_length,
            dtype=self.dtype if dtype is None else dtype,
            page_size=page_size,
            num_pages=num_pages,
            entries_scale=entries_scale,
            sharding=self.sharding,
        )

    def prefill(
        self,
        x: Float[Array, "B T E"],
        cache: Cache,
        *,
        positions: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        padding_mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Cache]:
        """A prompt, or the next chunk of one; see functional.mla_prefill for arguments, results and errors."""
        return mla_prefill(
            self.weights,
            x,
            cache,
            self.config,
            positions=positions,
            lengths=lengths,
            padding_mask=padding_mask,
            dtype=self.dtype,
            implementation=self.implementation,
            attention_implementation=self.attention_implementation,
            sharding=self.sharding,
        )

    def decode(
        self,
        x: Float[Array, "B T E"],
        cache: Cache,
        *,
        positions: Int[Array, "B T"] | None = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T E"], Cache]:
        """T >= 1 new tokens per sequence; see functional.mla_decode for arguments, results and errors."""
        return mla_decode(
            self.weights,
            x,
            cache,
            self.config,
            positions=positions,
            lengths=lengths,
            dtype=self.dtype,
            implementation=self.implementation,
            attention_implementation=self.attention_implementation,
            split_size=self.split_size,
            sharding=self.sharding,
        )


def _variable(weight: Weight | None) -> nnx.Variable | None:
    if weight is None:
        return None
    return FP4Weight(weight) if isinstance(weight, FP4Array) else nnx.Param(weight)
