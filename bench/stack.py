"""A stack of attention layers that decodes, on one device or many: what bench.scaling times."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from bench.roofline import Layout
from mla_fp4_jax import LatentCache, MLAConfig, MLASharding, MLAWeights, mla_decode
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.spmd import place_weights
from mla_fp4_jax.weights import random_weights

ROOM = 128  # tokens that a cache takes beyond those it begins with
AXES = ("heads", "batch", "context")


@dataclasses.dataclass(frozen=True)
class Stack:
    """h -> h + attention(h / rms(h)), layer after layer, each with its own weights and cache.

    Attributes:
        config: of every layer.
        sharding: over the first layout.devices devices.
        weights: equal values, distinct buffers.
        attention: attention_implementation.
    """

    config: MLAConfig
    sharding: MLASharding
    weights: tuple[MLAWeights, ...]
    implementation: str | None
    attention: str | None


def find_sharding(layout: Layout) -> MLASharding:
    """Mesh and rules of a layout."""
    sizes = (layout.heads, layout.batch, layout.context)
    devices = jax.devices()[: layout.devices]
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    return MLASharding(mesh, heads="heads", batch="batch", context="context")


@functools.lru_cache(maxsize=4)
def one_layer(config: MLAConfig, packed: bool) -> MLAWeights:
    """Random weights on the first device, in checkpoint order, kv_b_proj always and the linears perhaps in MXFP4."""
    names = ("kv_b_proj", *(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj") if packed else ()))
    formats = dict.fromkeys(names, "mxfp4")
    return jax.jit(lambda: random_weights(config, formats, jnp.bfloat16, nnx.Rngs(0)))()


def make_stack(
    config: MLAConfig, layout: Layout, layers: int, packed: bool, implementation: str | None, attention: str | None
) -> Stack:
    """Place one layer and copy it on its devices."""
    sharding = find_sharding(layout)
    first = place_weights(one_layer(config, packed), sharding)
    first = order_for_device(first, config, implementation, sharding)
    where = jax.tree.map(lambda leaf: leaf.sharding, first)
    copy = jax.jit(lambda weights: jax.tree.map(jnp.copy, weights), out_shardings=where)
    return Stack(config, sharding, (first, *(copy(first) for _ in range(layers - 1))), implementation, attention)


def make_caches(stack: Stack, sequences: int, keys: int) -> tuple[LatentCache, ...]:
    """Caches of random entries that hold `keys` tokens each, alike on every layout.

    Along context the set of entries is the same, which is all that a softmax asks of their order; along batch every
    device has the same sequences, so that each must give what one device gives for them.
    """
    sharding, config = stack.sharding, stack.config
    parts, own = sharding.size("context"), sequences // sharding.size("batch")
    slots = keys // parts + -(-ROOM // parts)
    shape, dim = (sequences, parts * slots, config.cache_dim), config.cache_dim
    entries_at = NamedSharding(sharding.mesh, sharding.entries_spec)
    length_at = NamedSharding(sharding.mesh, sharding.tokens_spec)

    @jax.jit
    def random(key):
        split = jax.random.normal(key, (own, keys, dim), jnp.bfloat16).reshape(own, parts, keys // parts, dim)
        padded = jnp.pad(split, ((0, 0), (0, 0), (0, slots - keys // parts), (0, 0)))
        return padded.reshape(own, parts * slots, dim)

    made = []
    for i in range(len(stack.weights)):
        whole = random(jax.random.key(i % 2, impl="rbg"))  # on the first device: the same bits for every layout
        places = entries_at.addressable_devices_indices_map(shape)
        each = [jax.device_put(whole[:, index[1]], device) for device, index in places.items() if index is not None]
        entries = jax.make_array_from_single_device_arrays(shape, entries_at, each)
        length = jax.device_put(jnp.full((sequences,), keys, jnp.int32), length_at)
        made.append(LatentCache(entries, length, config.kv_lora_rank))
    return tuple(made)


def make_input(stack: Stack, sequences: int) -> jax.Array:
    """Hidden states of one token a sequence, the same on every device along batch."""
    parts = stack.sharding.size("batch")
    h = np.random.default_rng(1).standard_normal((sequences // parts, 1, stack.config.hidden_size), np.float32)
    where = NamedSharding(stack.sharding.mesh, stack.sharding.tokens_spec)
    return jax.device_put(jnp.asarray(np.tile(h, (parts, 1, 1)), jnp.bfloat16), where)


def compiled_step(stack: Stack):
    """(weights, h, caches) -> h, caches; the last two donated, as a server would."""
    config, sharding = stack.config, stack.sharding  # not the stack, whose weights JAX's caches would keep
    implementation, attention = stack.implementation, stack.attention

    # h comes back as it lay, so that the second call is not compiled anew.
    @functools.partial(
        jax.jit, donate_argnums=(1, 2), out_shardings=(NamedSharding(sharding.mesh, sharding.tokens_spec), None)
    )
    def step(weights, h, caches):
        after = []
        for layer, cache in zip(weights, caches, strict=True):
            wide = h.astype(jnp.float32)
            x = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(h.dtype)
            y, cache = mla_decode(
                layer,
                x,
                cache,
                config,
                implementation=implementation,
                attention_implementation=attention,
                sharding=sharding,
            )
            h, after = h + y, [*after, cache]
        return h, tuple(after)

    return step


def time_steps(step, stack: Stack, h, caches, *, steps: int, repeats: int) -> tuple[float, float]:
    """Median and spread (largest less smallest) of the seconds a step takes; h and caches are consumed."""
    for _ in range(2):
        h, caches = step(stack.weights, h, caches)
    jax.block_until_ready(h)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            h, caches = step(stack.weights, h, caches)
        jax.block_until_ready(h)
        seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(seconds), max(seconds) - min(seconds)
