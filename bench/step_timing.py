"""Times of donated steps, and what this GPU allows."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp


class _Calls:
    """Something the profiler calls as it is, instead of jitting it; it has the methods of a jitted function."""

    def __init__(self, run, state, given, calls: int):
        self.run, self.state, self.given, self.calls = run, state, given, calls

    def __call__(self):
        for _ in range(self.calls):
            self.state = self.run(self.state, self.given)
        return jax.tree.leaves(self.state)[0]

    def trace(self):
        raise NotImplementedError

    lower = trace


def kernels(run, state, given, calls: int = 6):
    """(kernels of a call as (name, median us), the state after): run is (state, given) -> state, state donated."""
    from jax.experimental.mosaic.gpu import profiler

    again = _Calls(run, state, given, calls)
    _, seen = profiler.measure(again, aggregate=False)()
    seen = [(kernel, 1e3 * ms) for kernel, ms in seen or ()]
    per_call, rest = divmod(len(seen), calls)
    if rest or not per_call:
        raise RuntimeError(f"every call must launch as many kernels; got {len(seen)} for {calls}.")
    by_kernel = zip(*(seen[i * per_call : (i + 1) * per_call] for i in range(calls)), strict=True)
    return [(each[0][0][:60], round(statistics.median(us for _, us in each), 3)) for each in by_kernel], again.state


def loop_us(run, state, given, calls: int = 20, rounds: int = 5, seconds: float = 0.5):
    """(median wall time of a call in a loop of so many, spread of the rounds, the state after); microseconds.

    So many rounds, and more until so many seconds have passed: a host may be slow for a tenth of one.
    """
    for _ in range(3):
        state = run(state, given)
    jax.block_until_ready(state)
    times = []
    while len(times) < rounds or sum(times) * calls < seconds * 1e6:
        start = time.perf_counter()
        for _ in range(calls):
            state = run(state, given)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times), max(times) - min(times), state


def total(seen) -> float:
    """Of kernels' times."""
    return sum(us for _, us in seen)


def held(tree) -> int:
    """Bytes of arrays; a float4 element takes half of one."""
    leaves = jax.tree.leaves(tree)
    return (
        sum((4 if leaf.dtype == jnp.float4_e2m1fn else 8 * leaf.dtype.itemsize) * leaf.size for leaf in leaves) // 8
    )


def measure_ceilings() -> dict[str, float]:
    """TB/s of reading a gigabyte and of copying one (both ways counted), TFLOP/s of an 8192^3 bf16 matmul, by XLA."""
    if jax.default_backend() == "cpu":
        return {"tb_per_s": 3.0, "copy_tb_per_s": 3.0, "tflops": 750.0}
    data, square = jnp.ones((1 << 29,), jnp.bfloat16), jnp.ones((8192, 8192), jnp.bfloat16)

    def best(step, state, given):
        seen, _ = kernels(jax.jit(step, donate_argnums=0), state, given, 5)
        return total(seen)

    read = best(lambda s, d: s + jnp.max(d.astype(jnp.float32)), jnp.zeros(()), data)
    copy = best(lambda s, d: -d, data + 0, data)
    multiply = best(lambda s, w: (s @ w) * jnp.bfloat16(0.01), square + 0, square)
    return {
        "tb_per_s": round(data.nbytes / read / 1e6, 3),
        "copy_tb_per_s": round(2 * data.nbytes / copy / 1e6, 3),
        "tflops": round(2 * 8192**3 / multiply / 1e6, 1),
    }
