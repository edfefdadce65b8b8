"""latent_query: queries as the latent cache is searched with, absorbed and rotated, in one array."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla_fp4_jax import rope
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.bmm import fp4_bmm
from mla_fp4_jax.ops.implementations import MOSAIC
from pallas_kernels import fp4_bmm_mosaic_gpu as mosaic
from pallas_kernels.fp4_bmm_rope import Rope


def latent_query(
    q: Float[Array, "B T H PR"],
    kv_b_proj: FP4Array,
    cos: Float[Array, "B T half_R"],
    sin: Float[Array, "B T half_R"],
    qk_nope_head_dim: int,
    *,
    interleaved: bool,
    implementation: str | None = None,
) -> Float[Array, "B T H LR"]:
    """[q_nope W_K | rotate(q_pe)]: out[h, l] = sum_p q[h, p] kv_b_proj[h, p, l], then q's last R columns, rotated.

    On a Hopper GPU one kernel writes both; elsewhere k_up's product, the rotation and a concatenation. The kernel is
    not differentiable.

    Args:
        q: P columns, then R.
        kv_b_proj: [H, P+V, L].
        cos, sin: float32, of each token's position.
        qk_nope_head_dim: P.
        interleaved: how rope pairs lie; see rope.rotate.
        implementation: of the product; see fp4_bmm, whose numerics these are.
    """
    static = {"nope": qk_nope_head_dim, "interleaved": interleaved}
    plain = functools.partial(_plain, implementation=implementation, **static)
    if _why_not(q, kv_b_proj, qk_nope_head_dim, interleaved, implementation) is not None:
        return plain(q, kv_b_proj, cos, sin)
    run = functools.partial(_run, **static)
    if implementation == MOSAIC:
        return run(q, kv_b_proj, cos, sin)
    # Decided for the device that is traced for; a program lowered for another one falls back.
    return jax.lax.platform_dependent(q, kv_b_proj, cos, sin, cuda=run, default=plain)


def _why_not(q: Array, w: FP4Array, nope: int, interleaved: bool, implementation: str | None) -> str | None:
    """Why the kernel cannot take these operands here, or None."""
    if implementation not in (None, MOSAIC):
        return f"it is {MOSAIC}'s."
    reason = implementations.why_not(MOSAIC)
    if reason is not None:
        return reason
    if w.order is None or w.order.column_parts > 1:
        return "w must be in fragment order, of one device."
    x = jax.ShapeDtypeStruct((math.prod(q.shape[:2]), *q.shape[2:]), q.dtype)
    codes = jax.ShapeDtypeStruct((*w.shape[:-1], w.shape[-1] // 2), jnp.uint8)
    return mosaic.unsupported(x, codes, w.order, **_operands(q, nope, interleaved))


def _operands(q: Array, nope: int, interleaved: bool) -> dict:
    rotated = Rope(q.shape[-1] - nope, interleaved)
    return {"contract": "rows", "rows": (0, nope), "x_columns": (0, nope), "rope": rotated}


def _run(q: Array, w: FP4Array, cos: Array, sin: Array, *, nope: int, interleaved: bool) -> Array:
    assert w.order is not None
    x, *cos_sin = (array.reshape(-1, *array.shape[2:]) for array in (q, cos, sin))
    operands = _operands(q, nope, interleaved)
    out = mosaic.fp4_bmm_mosaic_gpu(
        x, w.packed, w.scales, w.order, w.global_scale, (cos_sin[0], cos_sin[1]), **operands
    )
    return out.reshape(*q.shape[:3], out.shape[-1])


def _plain(q, w, cos, sin, *, nope: int, interleaved: bool, implementation: str | None = None) -> Array:
    columns = (0, nope)
    flat = q.reshape(-1, *q.shape[2:])
    latent = fp4_bmm(flat, w, "rows", rows=columns, x_columns=columns, implementation=implementation)
    rotated = rope.rotate(q[..., nope:], cos[:, :, None], sin[:, :, None], interleaved=interleaved)
    return jnp.concatenate([latent.reshape(*q.shape[:3], latent.shape[-1]), rotated], axis=-1)
