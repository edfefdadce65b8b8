"""MLA's prefill attention on Hopper: per-head keys and values in one array, one rope key for all heads, no scores.

    out[b, t, h] = softmax_s(scale (q_nope . K[b, s, h] + q_rope . k_rope[b, s])) V[b, s, h]
    q = [q_nope | q_rope] of P + R = 192 columns, kv = [K | V] of P + V = 256 as kv_b_proj writes them

A program takes one head and 64 query rows for each of its warpgroups that compute; one more warp loads. Keys come
in blocks, on a ring of slots whose keys and values have barriers of their own. A block's step is

    S = q_nope K' + q_rope k_rope';  P = exp2(c S - m);  O = O * exp2(m_before - m) + P V

Three warpgroups keep the tensor cores busy under each other's softmax: on an H100 544 TFLOP/s at 4096 tokens of 128
heads, where two that take turns in steps of 128 keys reach 439. Programs of one head follow each other, so that its
keys and values come from L2, longest first.

What a row sees is a number of keys, `visible`: causal order, a cached context before the chunk, ragged lengths and
padding are all that. Blocks that all rows of a warpgroup see whole are not masked.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels.backend import pl
from pallas_kernels.global_memory import store_rows
from pallas_kernels.mla_decode_block import LOG2_E, LOWEST
from pallas_kernels.mosaic import ROW, TILED, WGMMA, ProductRef, compiler_params, load_array, plgpu

P, R, V = 128, 64, 128
ROWS = 64  # query rows a warpgroup


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled.

    Attributes:
        warpgroups: that compute, 2 or 3, 64 rows each.
        block_keys: keys a step.
        slots: steps whose keys and values are on chip at once.
        schedule: two warpgroups take turns on the tensor cores; three need no order.
    """

    warpgroups: int = 3
    block_keys: int = 64
    slots: int = 3
    schedule: bool = False

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread that computes and of one that loads: together what a block starts with, 65536 in all."""
        return (240, 24) if self.warpgroups == 2 else (160, 32)


def mla_prefill_mosaic_gpu(
    q: BFloat16[Array, "B T H PR"],
    kv: BFloat16[Array, "B S H PV"],
    k_rope: BFloat16[Array, "B S R"],
    visible: Int32[Array, "B T"],
    *,
    scale: float,
    out_dtype=jnp.bfloat16,
    config: Config | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """The attention of this module's docstring.

    Args:
        q: nope then rotated rope queries.
        kv: a head's keys, then its values. All must be finite, those that nothing sees too: 0 times NaN is NaN.
        k_rope: rotated rope keys, likewise.
        visible: row (b, t) sees the keys 0 .. visible[b, t] - 1; values outside 0 .. S count as 0 or S.
        scale: the softmax scale, > 0.
        out_dtype: bfloat16, or float32 for a part that is to be merged.
        config: tiles; None for the default.

    Returns:
        The attended values in out_dtype and the natural-log LSE in float32. Rows that see nothing get 0 and -inf.
    """
    config = config or Config()
    batch, tokens, heads, _ = q.shape
    keys = kv.shape[1]
    # TMA takes whole groups of 8 rows; past the last it reads zeros and writes nothing.
    q = _pad(q, -tokens % 8)
    kv, k_rope = _pad(kv, -keys % 8), _pad(k_rope, -keys % 8)
    blocks = -(-tokens // (ROWS * config.warpgroups))
    rows = blocks * config.warpgroups * ROWS
    visible = _pad(jnp.clip(visible, 0, keys), rows - tokens)
    per_warpgroup = visible.reshape(batch, -1, ROWS)
    most = jnp.max(per_warpgroup, axis=2)
    # Of the rows that see anything: the others are set to 0 at the end.
    least = jnp.min(jnp.where(per_warpgroup > 0, per_warpgroup, keys), axis=2)
    narrow = jnp.dtype(out_dtype) == jnp.bfloat16

    def mla_prefill(*refs, **scratch):  # a profile shows this name
        _kernel(config, float(scale), narrow, *refs, **scratch)

    out, lse = plgpu.kernel(
        mla_prefill,
        out_type=[
            jax.ShapeDtypeStruct((batch, q.shape[1], heads, V), out_dtype),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ],
        grid=(blocks, heads, batch),
        grid_names=("i", "h", "b"),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        scratch_types=_shared_memory(config),
        compiler_params=compiler_params(),
    )(q, kv, k_rope, visible, most, least)
    return out[:, :tokens], jnp.swapaxes(lse[:, :, :tokens], 1, 2)


def _pad(x: Array, number: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, number)) + ((0, 0),) * (x.ndim - 2)) if number else x


def _shared_memory(config: Config) -> dict:
    tile = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=TILED)
    n, slots = config.warpgroups, config.slots
    return dict(
        q_nope=tile((n, ROWS, P)),  # then the output
        q_rope=tile((n, ROWS, R)),
        k_nope=tile((slots, config.block_keys, P)),
        k_rope=tile((slots, config.block_keys, R)),
        v=tile((slots, config.block_keys, V)),
        seen=plgpu.SMEM((n, ROWS), jnp.int32),
        lse=plgpu.SMEM((n, ROWS), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=3, num_barriers=n),
        k_full=plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        v_full=plgpu.Barrier(num_barriers=slots),
        k_empty=plgpu.Barrier(num_arrivals=n, num_barriers=slots),
        v_empty=plgpu.Barrier(num_arrivals=n, num_barriers=slots),
        turn=plgpu.Barrier(num_arrivals=2),
    )


@dataclasses.dataclass(frozen=True)
class _Refs:
    q: jax.Ref
    kv: jax.Ref
    k_rope: jax.Ref
    visible: jax.Ref
    most: jax.Ref
    least: jax.Ref
    out: jax.Ref
    lse: jax.Ref


def _kernel(config: Config, scale: float, narrow: bool, *refs, **shared):
    refs = _Refs(*refs)
    n = config.warpgroups
    # The last rows of a causal chunk have the most to do: they start first.
    block = refs.lse.shape[2] // (ROWS * n) - 1 - lax.axis_index("i")
    most = functools.reduce(jnp.maximum, [refs.most[lax.axis_index("b"), block * n + w] for w in range(n)])
    steps = lax.div(most + (config.block_keys - 1), jnp.int32(config.block_keys))
    w = lax.axis_index("wg")
    pl.when(w < n)(functools.partial(_compute, config, scale, narrow, refs, shared, block * n + w, steps))
    pl.when(w == n)(functools.partial(_load, config, refs, shared, steps))


def _load(config, refs, shared, steps):
    plgpu.set_max_registers(config.registers[1], action="decrease")
    h, b = lax.axis_index("h"), lax.axis_index("b")

    def keys(i, slot):
        at = pl.ds(i * config.block_keys, config.block_keys)
        full = shared["k_full"].at[slot]
        plgpu.copy_gmem_to_smem(refs.kv.at[b, at, h, pl.ds(0, P)], shared["k_nope"].at[slot], full)
        plgpu.copy_gmem_to_smem(refs.k_rope.at[b, at], shared["k_rope"].at[slot], full)

    def values(i, slot):
        at = pl.ds(i * config.block_keys, config.block_keys)
        plgpu.copy_gmem_to_smem(refs.kv.at[b, at, h, pl.ds(P, V)], shared["v"].at[slot], shared["v_full"].at[slot])

    def fill(i, _):
        keys(i, i)
        values(i, i)

    lax.fori_loop(0, jnp.minimum(steps, config.slots), fill, None)

    def refill(i, _):
        slot = lax.rem(i, jnp.int32(config.slots))
        plgpu.barrier_wait(shared["k_empty"].at[slot])
        keys(i, slot)
        plgpu.barrier_wait(shared["v_empty"].at[slot])
        values(i, slot)

    lax.fori_loop(config.slots, steps, refill, None)


def _compute(config, scale, narrow, refs, shared, tile, steps):
    plgpu.set_max_registers(config.registers[0], action="increase")
    h, b, w = lax.axis_index("h"), lax.axis_index("b"), lax.axis_index("wg")
    rows = pl.ds(tile * ROWS, ROWS)
    q_nope, q_rope, seen_ref = shared["q_nope"].at[w], shared["q_rope"].at[w], shared["seen"].at[w]
    q_full = shared["q_full"].at[w]
    plgpu.copy_gmem_to_smem(refs.q.at[b, rows, h, pl.ds(0, P)], q_nope, q_full)
    plgpu.copy_gmem_to_smem(refs.q.at[b, rows, h, pl.ds(P, R)], q_rope, q_full)
    plgpu.copy_gmem_to_smem(refs.visible.at[b, rows], seen_ref, q_full)
    plgpu.barrier_wait(q_full)

    def take_turns():
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["turn"])

    def step(i, carry, *, masked):
        acc, m, total = carry
        slot = lax.rem(i, jnp.int32(config.slots))
        plgpu.barrier_wait(shared["k_full"].at[slot])

        def scores(product):
            plgpu.wgmma(product, q_nope, shared["k_nope"].at[slot].transpose((1, 0)))
            plgpu.wgmma(product, q_rope, shared["k_rope"].at[slot].transpose((1, 0)))
            if config.schedule:
                take_turns()
            return product[...]

        s = pl.run_scoped(scores, ProductRef((ROWS, config.block_keys), jnp.float32))
        plgpu.barrier_arrive(shared["k_empty"].at[slot])
        if masked:
            key = i * config.block_keys + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=WGMMA)
            seen = load_array(seen_ref, layout=ROW)
            s = jnp.where(key < _columns(seen, config.block_keys), s, -jnp.inf)
        c = scale * LOG2_E
        new_m = jnp.maximum(m, s.max(axis=1) * c)
        p = jnp.exp2(s * c - _columns(new_m, config.block_keys))
        kept = jnp.exp2(m - new_m)
        total = total * kept + p.sum(axis=1)
        acc = acc * _columns(kept, V)
        p16 = p.astype(jnp.bfloat16)
        if config.schedule:
            # All of the softmax stays on this side of the hand-over.
            acc, total, new_m, p16 = lax.optimization_barrier((acc, total, new_m, p16))
            plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["v_full"].at[slot])
        if config.schedule:
            plgpu.barrier_wait(shared["turn"])

        def attend(product):
            plgpu.wgmma(product, p16, shared["v"].at[slot])

        acc = pl.run_state(attend)(ProductRef.init(acc))
        plgpu.barrier_arrive(shared["v_empty"].at[slot])
        return acc, new_m, total

    carry = (_full((ROWS, V), 0.0, WGMMA), _full((ROWS,), LOWEST, ROW), _full((ROWS,), 0.0, ROW))
    whole = jnp.minimum(lax.div(refs.least[b, tile], jnp.int32(config.block_keys)), steps)
    if config.schedule:
        pl.when(w == 1)(take_turns)
    carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), carry)
    acc, m, total = lax.fori_loop(whole, steps, functools.partial(step, masked=True), carry)
    if config.schedule:
        pl.when(w == 0)(take_turns)

    nothing = load_array(seen_ref, layout=ROW) == 0
    # Not a product with 0: a row of padding may be NaN.
    hidden = plgpu.layout_cast(_columns(nothing.astype(jnp.int32), V), WGMMA) != 0
    out = jnp.where(hidden, 0.0, acc * _columns(1.0 / total, V))
    if narrow:
        q_nope[...] = out.astype(jnp.bfloat16)
    else:
        store_rows(refs.out.at[b, rows, h], out, refs.out.shape[1] - tile * ROWS)
    shared["lse"].at[w][...] = jnp.where(nothing, -jnp.inf, (m + jnp.log(total) * LOG2_E) * (1 / LOG2_E))
    plgpu.commit_smem()
    if narrow:
        plgpu.copy_smem_to_gmem(q_nope, refs.out.at[b, rows, h])
    plgpu.copy_smem_to_gmem(shared["lse"].at[w], refs.lse.at[b, h, rows])
    plgpu.wait_smem_to_gmem(0)


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _columns(x, n: int):
    """x [64] as [64, n]."""
    return lax.broadcast_in_dim(x, (x.shape[0], n), [0])


def unsupported(q, *, kv_shape: tuple[int, ...], rope: int, v_head_dim: int) -> str | None:
    """Why this kernel cannot take these operands, or None: q anything with shape and dtype, kv of shape kv_shape."""
    if jnp.dtype(q.dtype) != jnp.bfloat16:
        return f"q must be bfloat16; got {jnp.dtype(q.dtype).name}."
    sizes = (kv_shape[3] - v_head_dim, rope, v_head_dim)
    return None if sizes == (P, R, V) else f"P, R, V must be {P}, {R}, {V}; got {', '.join(map(str, sizes))}."
