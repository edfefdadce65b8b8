"""Device memory of all 61 layers of DeepSeek-V3's attention, by the allocator's own count.

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m bench.step_memory      prints one JSON object

First every layer's kv_b_proj alone, then what is left of it all when k_up_proj and v_up_proj have run over each; then
the other weights, the caches, and a decode step through all layers, one jitted layer called 61 times. The peak is
that of the process's whole life, and left out if it was before this. bench.step --memory begins with this account.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from bench.step_layer import fp4_layer, v3_config
from bench.step_timing import held
from mla_fp4_jax import MLAConfig, init_cache, mla_decode
from mla_fp4_jax.cache import Cache
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.projections import k_up_proj, v_up_proj

LAYERS, BATCH, KEYS, PAGE = 61, 32, 4096, 64


def in_use() -> tuple[int, int]:
    """Bytes in use, and at most so far; where the device does not count (CPU), the sizes of the arrays that live."""
    stats = jax.devices()[0].memory_stats()
    if stats is None:
        size = held(jax.live_arrays())
        return size, size
    return stats["bytes_in_use"], stats["peak_bytes_in_use"]


class Account:
    """What was in use after each step, as lines of what it added."""

    def __init__(self):
        self.lines: list[tuple[str, int]] = []
        self.before = in_use()[0]

    def add(self, name: str, arrays=None) -> None:
        """A line, once the arrays are there."""
        jax.block_until_ready(arrays)
        now = in_use()[0]
        self.lines.append((name, now - self.before))
        self.before = now


@functools.partial(jax.jit, static_argnums=0)
def absorbed(config: MLAConfig, kv_b_proj, q, latent):
    """Both products of a layer."""
    return k_up_proj(q, kv_b_proj, config.qk_nope_head_dim), v_up_proj(latent, kv_b_proj, config.v_head_dim)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def step(config: MLAConfig, weights, x, cache: Cache):
    """A layer."""
    y, cache = mla_decode(weights, x, cache, config)
    return x + y, cache


def measure_memory(*, small: bool) -> dict:
    """The account; tiny sizes to prove the bench on a CPU."""
    return measure(v3_config(2 if small else 128, small=small), *((3, 2, 128) if small else (LAYERS, BATCH, KEYS)))


def measure(config: MLAConfig, layers: int, batch: int, keys: int) -> dict:
    """The account."""
    account, highest = Account(), in_use()[1]

    def ordered(i: int):
        return order_for_device(fp4_layer(config, np.int32(i)), config)

    kv_b = [ordered(i).kv_b_proj for i in range(layers)]
    account.add("kv_b_proj of every layer, MXFP4", kv_b)
    heads = config.num_attention_heads
    q = jnp.ones((batch, 1, heads, config.qk_head_dim), jnp.bfloat16)
    latent = jnp.ones((batch, 1, heads, config.kv_lora_rank), jnp.bfloat16)
    account.add("queries and latents", (q, latent))
    for w in kv_b:
        jax.block_until_ready(absorbed(config, w, q, latent))
    account.add("after k_up_proj and v_up_proj over every layer")
    del q, latent
    account.before = in_use()[0]
    weights = [dataclasses.replace(ordered(i), kv_b_proj=w) for i, w in enumerate(kv_b)]
    account.add("the other weights, MXFP4", weights)
    caches = [init_cache(config, batch, keys, page_size=PAGE) for _ in weights]
    account.add(f"caches, bfloat16, {batch} sequences of {keys} tokens", caches)
    x = jnp.ones((batch, 1, config.hidden_size), jnp.bfloat16)
    account.add("the hidden state", x)
    for i, layer in enumerate(weights):
        x, caches[i] = step(config, layer, x, caches[i])
    account.add("after a decode step through every layer", (x, caches))
    now, peak = in_use()
    if peak > highest:  # it was reached here, not before
        account.lines.append(("peak, over what is in use at the end", peak - now))
    return {"layers": layers, "steps": account.lines}


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny layers, to prove the bench on a CPU")
    print(json.dumps(measure_memory(small=parser.parse_args().small)))


if __name__ == "__main__":
    main()
