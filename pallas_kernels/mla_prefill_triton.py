"""MLA's prefill attention in Pallas Triton: any GPU of compute capability 8.0 or later, and ROCm.

    out[b, t, h] = softmax_s(scale (q_nope . K[b, s, h] + q_rope . k_rope[b, s])) V[b, s, h]

q = [q_nope | q_rope] of P + R columns, kv = [K | V] of P + V as kv_b_proj writes them. A program takes block_rows
tokens of one head through the keys that any of them sees, in steps of block_keys, with an online softmax. What a row
sees is a number of keys, `visible`: causal order, a cached context, ragged lengths and padding are all that. Scores
are never in memory.

Every access is masked: keys that no row of a program sees are not read, and may hold NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.backend import pl, pltriton
from pallas_kernels.mla_decode_triton import LOG2_E, LOWEST

_INT32_ELEMENTS = 2**31
_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled.

    Attributes:
        block_rows: tokens a program, a power of 2 of at least 16.
        block_keys: keys a step, likewise.
        num_warps: warps a program.
        num_stages: steps whose loads are in flight at once.
    """

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int


def mla_prefill_triton(
    q: Float[Array, "B T H PR"],
    kv: Float[Array, "B S H PV"],
    k_rope: Float[Array, "B S R"],
    visible: Int32[Array, "B T"],
    *,
    v_head_dim: int,
    scale: float,
    out_dtype=None,
    config: Config | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """The attention of this module's docstring.

    Args:
        q: nope then rotated rope queries; bfloat16, float16 or float32.
        kv: a head's keys, then its values, in q's dtype.
        k_rope: rotated rope keys, in q's dtype.
        visible: row (b, t) sees the keys 0 .. visible[b, t] - 1; values outside 0 .. S count as 0 or S.
        v_head_dim: V.
        scale: the softmax scale, > 0.
        out_dtype: None for q's; float32 for a part that is to be merged.
        config: tiles; None for default_config.
        interpret: run in Pallas's interpreter.

    Returns:
        The attended values in out_dtype and the natural-log LSE in float32. Rows that see nothing get 0 and -inf.
    """
    batch, tokens, heads, _ = q.shape
    config = config or default_config(q.dtype)
    nope = kv.shape[3] - v_head_dim
    kernel = functools.partial(_kernel, config=config, nope=nope, width=v_head_dim, scale=scale)
    out, lse = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((batch, tokens, heads, v_head_dim), out_dtype or q.dtype),
            jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        ],
        grid=(-(-tokens // config.block_rows), heads, batch),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="mla_prefill",
    )(q, kv, *((k_rope,) if k_rope.shape[2] else ()), visible)
    return out, jnp.swapaxes(lse, 1, 2)


def _kernel(q_ref, kv_ref, *refs, config: Config, nope: int, width: int, scale: float):
    *rope_refs, visible_ref, out_ref, lse_ref = refs
    h, b = pl.program_id(1), pl.program_id(2)
    tokens, keys = q_ref.shape[1], kv_ref.shape[1]
    # The last rows of a causal chunk have the most to do: they start first.
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    row = block * np.int32(config.block_rows) + jnp.arange(config.block_rows, dtype=jnp.int32)
    in_rows = row < tokens
    rows = pl.ds(block * np.int32(config.block_rows), config.block_rows)
    seen = jnp.minimum(pltriton.load(visible_ref.at[b, rows], mask=in_rows, other=0), np.int32(keys))
    most = jnp.max(seen)
    least = jnp.min(jnp.where(seen > 0, seen, np.int32(keys)))  # the rows that see nothing are set to 0 at the end

    def load_q(start, size):
        mask = in_rows[:, None] & (jnp.arange(size) >= 0)[None]
        return pltriton.load(q_ref.at[b, rows, h, pl.ds(start, size)], mask=mask, other=0)

    # Blocks have sizes that are powers of 2: 192 columns are 128 and 64.
    parts = _powers_of_2(nope)
    q_nope = [load_q(*part) for part in parts]
    q_rope = load_q(nope, rope_refs[0].shape[2]) if rope_refs else None
    precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    dot = functools.partial(pltriton.dot, precision=precision)

    def step(i, state, *, masked):
        m, total, acc = state
        start = i * np.int32(config.block_keys)
        key = start + jnp.arange(config.block_keys, dtype=jnp.int32)
        at = pl.ds(start, config.block_keys)

        def load(ref, size):
            mask = (key < most)[:, None] & (jnp.arange(size) >= 0)[None]
            return pltriton.load(ref, mask=mask, other=0)

        scores = jnp.zeros((config.block_rows, config.block_keys), jnp.float32)
        for part, (first, size) in zip(q_nope, parts, strict=True):
            scores = scores + dot(part, load(kv_ref.at[b, at, h, pl.ds(first, size)], size).T)
        if q_rope is not None:
            scores = scores + dot(q_rope, load(rope_refs[0].at[b, at], q_rope.shape[1]).T)
        scores = scores * (scale * LOG2_E)
        if masked:
            scores = jnp.where(key[None, :] < seen[:, None], scores, -jnp.inf)
        new_m = jnp.maximum(m, jnp.max(scores, axis=1))
        p = jnp.exp2(scores - new_m[:, None])
        kept = jnp.exp2(m - new_m)
        values = load(kv_ref.at[b, at, h, pl.ds(nope, width)], width)
        acc = acc * kept[:, None] + dot(p.astype(q_ref.dtype), values)
        return new_m, total * kept + jnp.sum(p, axis=1), acc

    start = (
        jnp.full((config.block_rows,), LOWEST, jnp.float32),
        jnp.zeros((config.block_rows,), jnp.float32),
        jnp.zeros((config.block_rows, width), jnp.float32),
    )
    steps = jax.lax.div(jnp.maximum(most, 0) + np.int32(config.block_keys - 1), np.int32(config.block_keys))
    whole = jnp.minimum(jax.lax.div(least, np.int32(config.block_keys)), steps)
    state = jax.lax.fori_loop(np.int32(0), whole, functools.partial(step, masked=False), start)
    m, total, acc = jax.lax.fori_loop(whole, steps, functools.partial(step, masked=True), state)
    nothing = seen <= 0
    safe = jnp.where(nothing, 1.0, total)
    # Not a product with 0: rows that see nothing have met unmasked keys.
    out = jnp.where(nothing[:, None], 0.0, acc / safe[:, None])
    lse = jnp.where(nothing, -jnp.inf, m * (1 / LOG2_E) + jnp.log(safe))
    mask = in_rows[:, None] & (jnp.arange(width) >= 0)[None]
    pltriton.store(out_ref.at[b, rows, h, pl.ds(0, width)], out.astype(out_ref.dtype), mask=mask)
    pltriton.store(lse_ref.at[b, h, rows], lse, mask=in_rows)


def _powers_of_2(n: int) -> list[tuple[int, int]]:
    """0 .. n - 1 as (first, size) of decreasing powers of 2."""
    parts, first = [], 0
    while first < n:
        size = 1 << ((n - first).bit_length() - 1)
        parts.append((first, size))
        first += size
    return parts


def default_config(dtype) -> Config:
    """Tiles by q's dtype; shared memory of every GPU with 99 KB or more holds them at P + R = 192, V = 128."""
    if jnp.dtype(dtype) == jnp.float32:
        return Config(32, 16, 4, 1)
    return Config(64, 32, 4, 2)


def unsupported(q, *, kv_shape: tuple[int, ...], rope: int, v_head_dim: int) -> str | None:
    """Why this kernel cannot take these operands, or None: q anything with shape and dtype, kv of shape kv_shape."""
    if jnp.dtype(q.dtype).name not in _DTYPES:
        return f"q must be one of {', '.join(_DTYPES)}; got {jnp.dtype(q.dtype).name}."
    nope = kv_shape[3] - v_head_dim
    if nope % 16:
        return f"P must be a multiple of 16; got {nope}."
    for name, size in (("R", rope), ("V", v_head_dim)):
        if size & (size - 1) or 0 < size < 16:
            return f"{name} must be a power of 2 of at least 16; got {size}."
    most = max(math.prod(q.shape), math.prod(kv_shape))
    if most >= _INT32_ELEMENTS:
        return f"q and kv must have fewer than 2^31 elements (offsets are 32 bits); got {most}."
    return None
