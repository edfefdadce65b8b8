"""A layer's linear maps on dense or FP4 weights: the plain ones, and kv_b_proj's three uses of one array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla_fp4_jax.einsum import einsum_f32, einsum_rounded
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops import fp4_bmm, fp4_linear


def linear(
    x: Float[Array, "*batch C"],
    weight: jax.Array | FP4Array,
    bias: Float[Array, "N"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch N"]:
    """x @ weight.T + bias for a weight [N, C], accumulated in float32, rounded to x's dtype."""
    if isinstance(weight, FP4Array):
        kind = x.dtype if bias is None else jnp.float32
        y = fp4_linear(x, weight, preferred_element_type=kind, implementation=implementation)
    else:
        y = einsum_rounded("...c,nc->...n", x, weight.astype(x.dtype), x.dtype if bias is None else jnp.float32)
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + bias.shape)
    return y.astype(x.dtype)


def k_up_proj(
    q: Float[Array, "B T H PR"],
    kv_b_proj: jax.Array | FP4Array,
    qk_nope_head_dim: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T H L"]:
    """Queries into latent space: out[h, l] = sum_p q[h, p] kv_b_proj[h, p, l] over a head's first P rows.

    q's rope columns are skipped in place, so the whole query goes in.
    """
    with jax.named_scope("mla/k_up_proj"):
        flat, nope = _tokens(q), (0, qk_nope_head_dim)
        if isinstance(kv_b_proj, FP4Array):
            out = fp4_bmm(flat, kv_b_proj, "rows", rows=nope, x_columns=nope, implementation=implementation)
        else:
            key_rows = kv_b_proj[:, :qk_nope_head_dim].astype(q.dtype)
            out = einsum_f32("bhp,hpl->bhl", flat[..., :qk_nope_head_dim], key_rows).astype(q.dtype)
        return out.reshape(*q.shape[:3], out.shape[-1])


def v_up_proj(
    attended: Float[Array, "B T H L"],
    kv_b_proj: jax.Array | FP4Array,
    v_head_dim: int,
    *,
    implementation: str | None = None,
) -> Float[Array, "B T H V"]:
    """Attended latents back to heads: out[h, v] = sum_l a[h, l] kv_b_proj[h, P + v, l], the last V rows."""
    with jax.named_scope("mla/v_up_proj"):
        flat, first = _tokens(attended), kv_b_proj.shape[1] - v_head_dim
        if isinstance(kv_b_proj, FP4Array):
            out = fp4_bmm(flat, kv_b_proj, "columns", rows=(first, v_head_dim), implementation=implementation)
        else:
            out = einsum_f32("bhl,hvl->bhv", flat, kv_b_proj[:, first:].astype(attended.dtype))
            out = out.astype(attended.dtype)
        return out.reshape(*attended.shape[:3], v_head_dim)


def expand_kv_b(
    latent: Float[Array, "B K L"], kv_b_proj: jax.Array | FP4Array, *, implementation: str | None = None
) -> Float[Array, "B K H PV"]:
    """Per-head keys and values of latents, the prefill up-projection: the same array as one linear map."""
    with jax.named_scope("mla/kv_b_proj"):
        heads, rows, rank = kv_b_proj.shape
        out = linear(latent, kv_b_proj.reshape(heads * rows, rank), implementation=implementation)
        return out.reshape(*latent.shape[:2], heads, rows)


def _tokens(x: Float[Array, "B T H D"]) -> Float[Array, "BT H D"]:
    return x.reshape(-1, *x.shape[2:])
