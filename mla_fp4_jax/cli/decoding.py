"""Running a layer as a server would: prefill a prompt, then decode token by token."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from mla_fp4_jax.mla import MLAAttention


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out, and how long it took; seconds.

    Attributes:
        prefill: outputs of the prompt, float32 [B, prompt, E].
        decoded: outputs of the steps, float32 [B, steps, E].
        compile_prefill, compile_step: once each.
        prefill_seconds: of the prompt.
        step_seconds: of every step, compiled, results on the device.
    """

    prefill: np.ndarray
    decoded: np.ndarray
    compile_prefill: float
    compile_step: float
    prefill_seconds: float
    step_seconds: tuple[float, ...]

    @property
    def median_step(self) -> float:
        """Seconds."""
        return statistics.median(self.step_seconds)


def run_layer(layer: MLAAttention, x: np.ndarray, prompt: int, page_size: int | None) -> Run:
    """Prefill x[:, :prompt], then decode the rest one by one, with a progress bar on stderr.

    Args:
        layer: to run.
        x: float32 [B, prompt + steps, E], rounded to the layer's dtype before use.
        prompt: tokens to prefill, >= 1.
        page_size: of the cache; None makes it contiguous.
    """
    inputs = jnp.asarray(x, layer.dtype)
    cache = layer.init_cache(x.shape[0], x.shape[1], page_size=page_size)
    prefill, compile_prefill = _compile(MLAAttention.prefill, layer, inputs[:, :prompt], cache)
    start = time.perf_counter()
    y, cache = jax.block_until_ready(prefill(layer, inputs[:, :prompt], cache))
    prefill_seconds = time.perf_counter() - start
    prefilled = _whole(layer, y)

    step, compile_step = _compile(MLAAttention.decode, layer, inputs[:, :1], cache)
    outputs, seconds = [], []
    for t in tqdm(range(prompt, x.shape[1]), desc="decode", unit="step", leave=True, disable=jax.process_index() > 0):
        token = jax.block_until_ready(inputs[:, t : t + 1])
        start = time.perf_counter()
        y, cache = jax.block_until_ready(step(layer, token, cache))
        seconds.append(time.perf_counter() - start)
        outputs.append(_whole(layer, y))
    return Run(
        prefilled,
        np.concatenate(outputs, axis=1),
        compile_prefill,
        compile_step,
        prefill_seconds,
        tuple(seconds),
    )


def _compile(function, layer: MLAAttention, x: jax.Array, cache):
    """Ahead of time, so that no step is slower than the others and nothing can be traced again."""

    def anew(layer, x, cache):  # not known to jit, whatever this process has compiled before
        return function(layer, x, cache)

    start = time.perf_counter()
    if layer.sharding is not None:  # jax 0.10's compiled functions do not take float4 arrays bound to devices
        run = jax.jit(anew, donate_argnames=("cache",))
        jax.block_until_ready(run(layer, x, jax.tree.map(jnp.copy, cache)))
        return run, time.perf_counter() - start
    compiled = jax.jit(anew, donate_argnames=("cache",)).lower(layer, x, cache).compile()
    return compiled, time.perf_counter() - start


def _whole(layer: MLAAttention, y: jax.Array) -> np.ndarray:
    """An output as float32, also where other processes have parts of it."""
    if layer.sharding is not None:
        y = _replicated(y, NamedSharding(layer.sharding.mesh, PartitionSpec()))
    return np.asarray(y, np.float32)


@functools.partial(jax.jit, static_argnums=1)
def _replicated(y: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(y, sharding)
