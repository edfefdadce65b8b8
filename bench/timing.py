"""Two times of a call on a GPU: its kernels' own, and what a decode loop pays for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from bench import step_timing


def in_place(function: Callable, call: tuple) -> Callable:
    """run(out, call) -> out: a function of a call's arguments, compiled for one call's to write where it is told.

    Args:
        function: see kernel_us.
        call: arrays, or anything with their shapes and dtypes.
    """
    run = jax.jit(lambda out, call: function(*call), donate_argnums=0, keep_unused=True)
    return run.lower(jax.eval_shape(lambda call: function(*call), call), call).compile()


def kernel_us(function: Callable, calls: Sequence[tuple], run: Callable | None = None) -> tuple[float, float]:
    """Median and spread (interquartile) of the time that CUPTI sees on the device for one call, microseconds.

    Every call writes where the one before it wrote, as a model's layers do: results in fresh memory would cost the
    write-back of old ones.

    Args:
        function: of a call's arguments; one array or a tree of arrays.
        calls: arguments of the calls, which follow each other: distinct weights, more than the L2 cache holds, make
            every one of them cold.
        run: in_place of the function, where it is compiled already.
    """
    from jax.experimental.mosaic.gpu import profiler

    run = in_place(function, calls[0]) if run is None else run
    out = run(empty_out(function, calls[0]), calls[0])

    def all_calls():
        nonlocal out
        for call in calls:
            out = run(out, call)
        return out

    _, kernels = profiler.measure(_AsItIs(all_calls), aggregate=False)()
    if kernels is None:
        raise RuntimeError("kernel_us: CUPTI saw no kernel.")
    per_call, rest = divmod(len(kernels), len(calls))
    if rest or not per_call:
        raise RuntimeError(f"kernel_us: every call must launch as many kernels; got {len(kernels)} for {len(calls)}.")
    times = [1e3 * sum(ms for _, ms in kernels[i * per_call : (i + 1) * per_call]) for i in range(1, len(calls))]
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def empty_out(function: Callable, call: tuple):
    """Zeros where a call's result may go."""
    shapes = jax.eval_shape(lambda call: function(*call), call)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


class _AsItIs:
    """A function that the profiler is not to jit: it has the methods of jax.stages.Wrapped, which nothing calls."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self):
        return self.function()

    def trace(self):
        raise NotImplementedError

    def lower(self):
        raise NotImplementedError


def loop_us(step: Callable, state: jax.Array, weights, calls: int) -> dict[str, object]:
    """A call's wall time in a chain within one jitted function: "call_us", a median, and "call_spread_us".

    Args:
        step: (state, weights) -> state of the same shape, fed back; not jitted, or compiled with its state donated.
        state: consumed.
        weights: stay where they are.
        calls: that one step makes.
    """
    run = step if isinstance(step, jax.stages.Compiled) else jax.jit(step, donate_argnums=0)
    median, spread, _ = step_timing.loop_us(run, state, weights, calls=30)
    return {"call_us": round(median / calls, 3), "call_spread_us": round(spread / calls, 3)}


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
