"""Two times of a call on a GPU: its kernels' own, and what a decode loop pays for it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import jax


def kernel_us(function: Callable, calls: Sequence[tuple]) -> tuple[float, float]:
    """Median and spread (interquartile) of the time that CUPTI sees on the device for one call, microseconds.

    Args:
        function: jitted.
        calls: arguments of the calls, which follow each other: distinct weights, more than the L2 cache holds, make
            every one of them cold.
    """
    from jax.experimental.mosaic.gpu import profiler

    jax.block_until_ready(function(*calls[0]))
    _, kernels = profiler.measure(lambda calls: [function(*call) for call in calls], aggregate=False)(calls)
    kernels = kernels or []
    per_call, rest = divmod(len(kernels), len(calls))
    if rest or not per_call:
        raise RuntimeError(f"kernel_us: every call must launch as many kernels; got {len(kernels)} for {len(calls)}.")
    times = [1e3 * sum(ms for _, ms in kernels[i * per_call : (i + 1) * per_call]) for i in range(1, len(calls))]
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def loop_us(step: Callable, state: jax.Array, weights, calls: int, *, repeats: int = 30) -> float:
    """Wall time per call of a chain of `calls` calls within one jitted function, its state donated and fed back.

    Args:
        step: (state, weights) -> state of the same shape, not jitted.
        state: consumed.
        weights: stay where they are.
        calls: that one step makes.
        repeats: steps timed, without waiting in between.
    """
    run = jax.jit(step, donate_argnums=0)
    for _ in range(4):
        state = run(state, weights)
    state.block_until_ready()
    start = time.perf_counter()
    for _ in range(repeats):
        state = run(state, weights)
    state.block_until_ready()
    return (time.perf_counter() - start) / (repeats * calls) * 1e6


def kernels_us(compiled: Callable, args: tuple, calls: int) -> list[list[tuple[str, float]]]:
    """By call, the kernels that CUPTI sees on the device and their times, microseconds.

    Args:
        compiled: jitted or compiled; it is called for itself, so nothing is compiled again here.
        args: of every call.
        calls: how many follow each other. Where they do not all launch the same kernels (loops whose trip count is
            data), each is measured alone.
    """
    from jax.experimental.mosaic.gpu import profiler

    try:
        _, seen = profiler.measure(compiled, aggregate=False, iterations=calls)(*args)
    except RuntimeError:
        seen = [profiler.measure(compiled, aggregate=False)(*args)[1] for _ in range(calls)]
    return [[(name, 1e3 * ms) for name, ms in kernels or ()] for kernels in seen or ()]
