"""Prefill attention at DeepSeek-V3's shapes, 128 heads of 192 / 128: every implementation beside cuDNN.

    python -m bench.prefill --out bench/results/FILE.json

Rows: "kernel" is the attention of T tokens on expanded keys and values; "route" is mla_prefill_attention on the
latent cache, kv_b_proj and merging included, after `context` tokens that are cached already.
cuDNN is jax.nn.dot_product_attention with values padded to 192 columns and, where torch can be imported, torch's own
192 / 128. Nothing is timed before its result agrees with the XLA implementation's: a relative error of at most 1 %,
where two bf16 results differ by 0.3 %. TFLOP/s count 2 (P + R + V) operations for each key that a query sees.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from bench import environment
from bench.step_timing import kernels, total
from mla_fp4_jax.cache import LatentCache
from mla_fp4_jax.ops import implementations, mla_prefill_attention
from pallas_kernels import mla_prefill_triton as triton

P, R, V, L = 128, 64, 128, 512
SCALE = (P + R) ** -0.5


def kernel_operands(tokens: int, heads: int):
    keys = jax.random.split(jax.random.key(tokens, impl="rbg"), 3)
    q = jax.random.normal(keys[0], (1, tokens, heads, P + R), jnp.bfloat16)
    kv = jax.random.normal(keys[1], (1, tokens, heads, P + V), jnp.bfloat16)
    k_rope = jax.random.normal(keys[2], (1, tokens, R), jnp.bfloat16)
    return q, kv, k_rope, jnp.arange(1, tokens + 1, dtype=jnp.int32)[None]


def mosaic(q, kv, k_rope, visible, **config):
    from pallas_kernels import mla_prefill_mosaic_gpu as kernel

    chosen = kernel.Config(**config) if config else None
    return kernel.mla_prefill_mosaic_gpu(q, kv, k_rope, visible, scale=SCALE, config=chosen)[0]


def triton_kernel(q, kv, k_rope, visible, **config):
    chosen = triton.Config(**config) if config else None
    return triton.mla_prefill_triton(q, kv, k_rope, visible, v_head_dim=V, scale=SCALE, config=chosen)[0]


def padded(kv, k_rope):
    """Keys of 192 columns a head, and values padded to as many: what jax.nn asks for."""
    rope = jnp.broadcast_to(k_rope[:, :, None], (*kv.shape[:3], R))
    return jnp.concatenate([kv[..., :P], rope], -1), jnp.pad(kv[..., P:], ((0, 0),) * 3 + ((0, P + R - V),))


def cudnn(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=True, implementation="cudnn")[..., :V]


def plain(q, kv, k_rope, rows: int):
    """The last rows' attention of the first and last head in float32, scores and all."""
    ends = jnp.array([0, q.shape[2] - 1])
    wide = [x.astype(jnp.float32) for x in (q[:, -rows:, ends], kv[:, :, ends], k_rope)]
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("bthp,bshp->bhts", wide[0][..., :P], wide[1][..., :P])
        scores += jnp.einsum("bthr,bsr->bhts", wide[0][..., P:], wide[2])
        tokens = q.shape[1]
        seen = jnp.arange(tokens)[None] <= jnp.arange(tokens - rows, tokens)[:, None]
        p = jax.nn.softmax(jnp.where(seen, scores * SCALE, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshv->bthv", p, wide[1][..., P:])


def relative_error(out, exact) -> float:
    out, exact = out.astype(jnp.float32), exact.astype(jnp.float32)
    return float(jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2)))


def timed(row: dict, call, args, exact, rows: int, flops: float, calls: int) -> dict:
    """Gate, then time; `exact` is of the last `rows` tokens."""
    heads = jnp.array([0, args[0].shape[2] - 1])
    out = call(*args)
    error = relative_error(out[:, -rows:, heads], exact)
    if not error <= 1e-2:
        raise RuntimeError(f"relative error {error:.2e}, more than 1e-2; not timed.")
    if jax.default_backend() == "cpu":  # proves the bench, measures nothing
        return row | {"relative_error": error}
    del out
    seen, _ = kernels(lambda _, given: call(*given), jnp.zeros(1), args, calls)
    median = total(seen)
    largest = sorted(seen, key=lambda part: -part[1])[:4]
    return row | {
        "us": round(median, 1),
        "kernels": {name[:40]: us for name, us in largest},
        "tflops": round(flops / median / 1e6, 1),
        "relative_error": error,
    }


def kernel_rows(tokens: int, heads: int, calls: int, names: dict):
    """Rows on expanded keys and values."""
    q, kv, k_rope, visible = kernel_operands(tokens, heads)
    rows = min(tokens, 256)
    exact = jax.jit(functools.partial(plain, rows=rows))(q, kv, k_rope)
    flops = tokens * (tokens + 1) / 2 * heads * 2 * (P + R + V)
    where = {"kind": "kernel", "tokens": tokens, "heads": heads}
    for name, (call, config) in names.items():
        args = (q, *jax.jit(padded)(kv, k_rope)) if call is cudnn else (q, kv, k_rope, visible)
        jitted = jax.jit(functools.partial(call, **config))
        yield functools.partial(
            timed, where | {"name": name, "config": config}, jitted, args, exact, rows, flops, calls
        )


def route(q, cache, visible, kv_b, *, name):
    def expand(latent):
        product = jnp.einsum("bkl,nl->bkn", latent, kv_b, preferred_element_type=jnp.float32).astype(q.dtype)
        return product.reshape(*latent.shape[:2], q.shape[2], P + V)

    return mla_prefill_attention(q, cache, visible, expand, scale=SCALE, v_head_dim=V, implementation=name)[0]


def route_row(name: str, tokens: int, context: int, capacity: int, heads: int, calls: int) -> dict:
    """A chunk of `tokens` after `context` cached ones."""
    keys = jax.random.split(jax.random.key(tokens, impl="rbg"), 3)
    held = context + tokens
    entries = jax.random.normal(keys[0], (1, capacity, L + R), jnp.bfloat16)
    cache = LatentCache(entries, jnp.full((1,), held, jnp.int32), L)
    q = jax.random.normal(keys[1], (1, tokens, heads, P + R), jnp.bfloat16)
    kv_b = jax.random.normal(keys[2], (heads * (P + V), L), jnp.bfloat16) * L**-0.5
    visible = jnp.arange(context + 1, held + 1, dtype=jnp.int32)[None]
    last, ends = min(tokens, 64), jnp.array([0, heads - 1])
    some = kv_b.reshape(heads, P + V, L)[ends].reshape(-1, L)
    exact = jax.jit(functools.partial(route, name="xla"))(q[:, -last:, ends], cache, visible[:, -last:], some)
    flops = (held * (held + 1) - context * (context + 1)) / 2 * heads * 2 * (P + R + V)
    flops += 2 * held * heads * (P + V) * L
    row = {"kind": "route", "name": name, "tokens": tokens, "context": context, "capacity": capacity, "heads": heads}
    call = jax.jit(functools.partial(route, name=name))
    return timed(row, call, (q, cache, visible, kv_b), exact, last, flops, calls)


def torch_rows(tokens: int, heads: int):
    """cuDNN's attention through torch, 192 / 128, events around ten calls."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    q, k, v = (
        torch.randn(1, heads, tokens, width, device="cuda", dtype=torch.bfloat16) for width in (P + R, P + R, V)
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        call = functools.partial(
            torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True, scale=SCALE
        )
        for _ in range(3):
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            call()
        end.record()
        torch.cuda.synchronize()
    us = start.elapsed_time(end) * 1e3 / 5
    flops = tokens * (tokens + 1) / 2 * heads * 2 * (P + R + V)
    return {
        "kind": "kernel",
        "name": "torch cuDNN",
        "tokens": tokens,
        "heads": heads,
        "us": round(us, 1),
        "tflops": round(flops / us / 1e6, 1),
    }


def main() -> None:
    """Most important rows first; what time does not allow is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after so long")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes, the interpreter's Triton: proves the bench"
    )
    parser.add_argument("--sweep", action="store_true", help="other tiles too")
    args = parser.parse_args()
    start, rows, skipped = time.monotonic(), [], []
    plan = []
    if args.small:
        interpreted = functools.partial(route_row, "triton_interpret", heads=2, calls=2)
        plan.append(("route", functools.partial(interpreted, 32, 17, 64)))
    else:
        plan += _plan(args.sweep)
    for name, make in plan:
        if time.monotonic() - start > args.seconds:
            skipped.append(name)
            continue
        try:
            rows.append(make())
        except Exception as error:  # one failure must not hide the other rows
            rows.append({"name": name, "error": str(error)[:300]})
        print(f"{time.monotonic() - start:5.1f} s", rows[-1], flush=True)
        result = {"environment": environment.describe(args.commit), "rows": rows, "not_run": skipped}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if skipped:
        print("not run:", skipped)


def _plan(sweep: bool) -> list:
    heads, plan = 128, []
    names = {"mosaic_gpu": (mosaic, {}), "triton": (triton_kernel, {}), "jax cuDNN, padded": (cudnn, {})}
    if sweep:
        for config in ((2, 128, 2, False), (3, 64, 3, False), (2, 64, 4, True)):
            keys = ("warpgroups", "block_keys", "slots", "schedule")
            names[f"mosaic_gpu {config}"] = (mosaic, dict(zip(keys, config, strict=True)))
        for config in ((128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3)):
            keys = ("block_rows", "block_keys", "num_warps", "num_stages")
            names[f"triton {config}"] = (triton_kernel, dict(zip(keys, config, strict=True)))

    def kernels(tokens, chosen, calls):
        def make(name):
            return next(kernel_rows(tokens, heads, calls, {name: names[name]}))()

        return [(f"{name}, T = {tokens}", functools.partial(make, name)) for name in chosen]

    base = [name for name in names if "(" not in name]
    for name in base:
        why = implementations.why_not(name) if name in implementations.NAMES else None
        if why is not None:
            base = [other for other in base if other != name]
    plan += kernels(4096, base, 4)
    plan.append(("torch cuDNN, T = 4096", functools.partial(torch_rows, 4096, heads)))
    plan += kernels(4096, [name for name in names if "(" in name], 4)
    plan += kernels(16_384, base, 3)
    plan.append(("torch cuDNN, T = 16384", functools.partial(torch_rows, 16_384, heads)))
    for shape in ((4096, 0, 4096), (4096, 0, 32_768), (4096, 12_288, 32_768), (16_384, 0, 16_384)):
        for name in ("mosaic_gpu", *(("triton", "xla") if shape == (4096, 0, 4096) else ())):
            if name == "xla" or implementations.why_not(name) is None:
                plan.append((f"route {name} {shape}", functools.partial(route_row, name, *shape, heads, 3)))
    return plan


if __name__ == "__main__":
    main()
