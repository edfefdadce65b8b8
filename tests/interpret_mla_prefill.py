"""Run the Mosaic prefill kernel's own program in Pallas's GPU interpreter: loads, barriers, ring, masks, softmax.

The interpreter has no wgmma within a loop and no stores from registers, so those two are replaced by what they mean.
Run by test_prefill_interpret.py in a process of its own: a program's threads block each other for ever unless XLA has
as many, which it takes from the number of CPU devices.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

CASES = [
    # configuration, T, S, output dtype; two sequences, two heads, queries that see nothing, ragged lengths
    ((3, 64, 3, False), 192, 320, "bfloat16"),  # more steps than slots
    ((3, 64, 3, False), 130, 70, "bfloat16"),  # neither whole blocks nor whole groups of 8
    ((3, 64, 3, False), 1, 1, "bfloat16"),
    ((3, 64, 3, False), 130, 70, "float32"),
    ((2, 128, 2, True), 128, 384, "bfloat16"),
]


class Held:
    """An accumulator."""

    def __init__(self, value):
        self.value = value

    def __getitem__(self, _):
        return self.value


def replace(kernel: Any) -> None:
    """Products and stores as the interpreter can run them."""
    import functools

    import jax
    import jax.numpy as jnp
    from jax._src import effects
    from jax._src.pallas.mosaic_gpu import core

    effects.lowerable_effects.add_type(core._WGMMAPipelineEffect)
    pl, plgpu = kernel.pl, kernel.plgpu

    def wgmma(acc, a, b):
        a = a if isinstance(a, jax.Array) else a[...]
        acc.value = acc.value + jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))

    def run_state(body):
        def run(value):
            held = Held(value)
            body(held)
            return held.value

        return run

    def store_rows(ref, x, rows):
        @pl.when(rows >= x.shape[0])
        def _():
            ref[...] = x

        for row in range(x.shape[0]):

            @pl.when((rows < x.shape[0]) & (row < rows))
            def _(row=row):
                ref.at[row][...] = x[row]

    class Product:
        def __init__(self, shape, dtype):
            self.shape, self.dtype = shape, dtype

        @staticmethod
        def init(value):
            return value

    # Not for races: the detector takes these reads for ordinary ones, which the next loads would have to fence.
    interpret = plgpu.InterpretGPUParams()
    names = {name: getattr(plgpu, name) for name in dir(plgpu) if not name.startswith("__")}
    kernel.plgpu = types.SimpleNamespace(
        **names | {"wgmma": wgmma, "kernel": functools.partial(plgpu.kernel, interpret=interpret)}
    )
    kernel.pl = types.SimpleNamespace(
        ds=pl.ds,
        when=pl.when,
        run_state=run_state,
        run_scoped=lambda body, product: body(Held(jnp.zeros(product.shape, product.dtype))),
    )
    kernel.ProductRef, kernel.store_rows = Product, store_rows


def errors(kernel, config, tokens: int, keys: int, out_dtype: str) -> dict[str, Any]:
    """How far one call is from NumPy's float64, and whether blind queries are exactly empty."""
    import jax.numpy as jnp
    import numpy as np

    rng, heads, wide = np.random.default_rng(tokens), 2, np.float64
    q, kv, k_rope = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((2, tokens, heads, 192), (2, keys, heads, 256), (2, keys, 64))
    )
    visible = np.stack([np.arange(tokens) + keys - tokens + 1, np.arange(tokens) - tokens // 3])
    visible[0, -1:] = keys + 9
    if tokens > 8:
        visible[:, 7] = 0
    seen = np.arange(keys) < visible[..., None]
    s = np.einsum("bthp,bshp->bths", np.asarray(q[..., :128], wide), np.asarray(kv[..., :128], wide))
    s += np.einsum("bthp,bsp->bths", np.asarray(q[..., 128:], wide), np.asarray(k_rope, wide))
    s = np.where(seen[:, :, None], s * 0.07, -np.inf)
    blind = visible <= 0
    highest = np.where(blind[..., None, None], 0.0, s.max(-1, keepdims=True))
    p = np.exp(s - highest)
    total = p.sum(-1)
    exact = np.einsum("bths,bshv->bthv", p / np.maximum(total, 1e-300)[..., None], np.asarray(kv[..., 128:], wide))
    exact_lse = np.log(np.where(blind[..., None], 1, total)) + highest[..., 0]
    poisoned = jnp.where(blind[..., None, None], jnp.nan, q)
    out, lse = kernel.mla_prefill_mosaic_gpu(
        poisoned,
        kv,
        k_rope,
        jnp.asarray(visible, jnp.int32),
        scale=0.07,
        out_dtype=jnp.dtype(out_dtype),
        config=kernel.Config(*config),
    )
    out, lse = np.asarray(out, wide), np.asarray(lse, wide)
    size = np.sqrt((exact**2).mean(-1))
    return {
        "empty": bool((out[blind] == 0).all() and np.isneginf(lse[blind]).all()),
        "out": float((np.sqrt(((out - exact) ** 2).mean(-1)) / size)[~blind].max()),
        "lse": float(np.abs(lse - exact_lse)[~blind].max()),
    }


def main() -> None:
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=16")
    from pallas_kernels import mla_prefill_mosaic_gpu as kernel

    replace(kernel)
    json.dump([errors(kernel, *case) for case in CASES], sys.stdout)


if __name__ == "__main__":
    main()
