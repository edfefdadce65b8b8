"""A stack of attention layers that decodes, on one device or many: what bench.scaling times."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jaxtyping import Array, Float, Int

from bench.roofline import Layout
from mla_fp4_jax import LatentCache, MLAConfig, MLASharding, MLAWeights, mla_decode
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.spmd import place_weights
from mla_fp4_jax.weights import random_weights

ROOM = 128  # tokens that a cache takes beyond those it begins with
# Not timed: with --xla_gpu_command_buffer_update_mode=SKIP_PROFILED XLA first watches some calls, to learn which
# arrays stay where they are.
WARM_CALLS = 60
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a step is given and gives back, donated: the hidden state, every layer's entries, and their one length."""

    h: Float[Array, "B 1 E"]
    entries: tuple[Float[Array, "B S LR"], ...]
    length: Int[Array, "B"]


def make_state(stack: Stack, sequences: int, keys: int) -> State:
    """Random hidden states of one token a sequence, and caches that hold `keys` random tokens, alike on every layout.

    Along context the set of entries is the same, which is all that a softmax asks of their order; along batch every
    device has the same sequences, so that each must give what one device gives for them.
    """
    sharding, config = stack.sharding, stack.config
    batch, parts = sharding.size("batch"), sharding.size("context")
    own, slots = sequences // batch, keys // parts + -(-ROOM // parts)
    shape, dim = (sequences, parts * slots, config.cache_dim), config.cache_dim
    entries_at = NamedSharding(sharding.mesh, sharding.entries_spec)
    tokens_at = NamedSharding(sharding.mesh, sharding.tokens_spec)

    @jax.jit
    def random(key):
        # One sequence at a time: the bits of all at once would take more memory than the caches.
        each = jax.lax.map(lambda k: jax.random.normal(k, (keys, dim), jnp.bfloat16), jax.random.split(key, own))
        split = each.reshape(own, parts, keys // parts, dim)
        padded = jnp.pad(split, ((0, 0), (0, 0), (0, slots - keys // parts), (0, 0)))
        return padded.reshape(own, parts * slots, dim)

    made = []
    for i in range(len(stack.weights)):
        whole = random(jax.random.key(i % 2, impl="rbg"))  # on the first device: the same bits for every layout
        places = entries_at.addressable_devices_indices_map(shape)
        each = [jax.device_put(whole[:, index[1]], device) for device, index in places.items() if index is not None]
        made.append(jax.make_array_from_single_device_arrays(shape, entries_at, each))
    h = np.random.default_rng(1).standard_normal((own, 1, config.hidden_size), np.float32)
    return State(
        jax.device_put(jnp.asarray(np.tile(h, (batch, 1, 1)), jnp.bfloat16), tokens_at),
        tuple(made),
        jax.device_put(jnp.full((sequences,), keys, jnp.int32), tokens_at),
    )


def compiled_step(stack: Stack, tokens: int = 1, *, unroll: bool = False):
    """(weights, state) -> state, that many tokens later; the state is donated, as a server would.

    Not unrolled, the host asks the device before each token whether the loop goes on: some 30 us.
    """
    config, sharding = stack.config, stack.sharding  # not the stack, whose weights JAX's caches would keep
    implementation, attention = stack.implementation, stack.attention

    def one(weights, state: State) -> State:
        h, length, after = state.h, state.length, []
        for layer, entries in zip(weights, state.entries, strict=True):
            wide = h.astype(jnp.float32)
            x = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(h.dtype)
            cache = LatentCache(entries, state.length, config.kv_lora_rank)
            y, cache = mla_decode(
                layer,
                x,
                cache,
                config,
                implementation=implementation,
                attention_implementation=attention,
                sharding=sharding,
            )
            assert isinstance(cache, LatentCache)
            h, length, after = h + y, cache.length, [*after, cache.entries]
        return State(h, tuple(after), length)

    # The state comes back as it lay, so that the second call is not compiled anew.
    tokens_at: Any = NamedSharding(sharding.mesh, sharding.tokens_spec)
    entries_at: Any = NamedSharding(sharding.mesh, sharding.entries_spec)
    where = State(tokens_at, (entries_at,) * len(stack.weights), tokens_at)

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=where)
    def steps(weights, state: State) -> State:
        if tokens == 1:
            return one(weights, state)
        return jax.lax.fori_loop(0, tokens, lambda _, state: one(weights, state), state, unroll=unroll)

    return steps


def warmed(step, stack: Stack, state: State, *, tokens: int) -> State:
    """The state after calls, of so many tokens each, that end with as many keys as it has; it is consumed."""
    calls = min(WARM_CALLS, (int(state.length.min()) - 1) // tokens)
    fewer = jax.jit(lambda length: length - calls * tokens, out_shardings=state.length.sharding)(state.length)
    state = dataclasses.replace(state, length=fewer)
    for _ in range(calls):
        state = step(stack.weights, state)
    return state


def time_steps(step, stack: Stack, state: State, *, tokens: int, steps: int, repeats: int) -> tuple[float, float]:
    """Median and spread (largest less smallest) of the seconds a call of `tokens` takes; the state is consumed."""
    state = warmed(step, stack, state, tokens=tokens)
    jax.block_until_ready(state.h)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            state = step(stack.weights, state)
        jax.block_until_ready(state.h)
        seconds.append((time.perf_counter() - start) / steps)
    return statistics.median(seconds), max(seconds) - min(seconds)
