"""fp4_linear: a plain linear map with a packed FP4 weight, with a gradient for x."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mla_fp4_jax.einsum import einsum_rounded
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.bmm import fp4_bmm
from mla_fp4_jax.ops.dense import fp4_dense
from mla_fp4_jax.ops.implementations import MOSAIC
from pallas_kernels import fp4_linear_mosaic_gpu as mosaic
from pallas_kernels.fragments import FragmentOrder


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static side of a call on weights in fragment order."""

    out_dtype: jnp.dtype
    name: str
    named: bool
    config: mosaic.AnyConfig | None


def fp4_linear(
    x: Float[Array, "*batch C"],
    w: FP4Array,
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    config: mosaic.AnyConfig | None = None,
) -> Float[Array, "*batch N"]:
    """x @ w.T for a packed weight w [N, C] ([out, in], as checkpoints store linears).

    Args:
        x: bfloat16, float16 or float32, any leading axes.
        w: scale groups lie along C.
        preferred_element_type: of the result; None for x's.
        implementation: see fp4_bmm, whose numerics and errors these are. "mosaic_gpu" takes w in fragment order
            (FP4Array.in_fragment_order) and x in bfloat16. Up to mosaic.MOST_TOKENS tokens go through kernels that
            decode on their way; with more, w is decoded once for this call and a library's matmul does the rest.
        config: tiles of such a kernel, which is then used for any number of tokens; None for the default.

    Numerics:
        As fp4_bmm's, but with "mosaic_gpu" a row's result does not depend, bit for bit, on the batch that it sits
        in for batches of up to mosaic.INVARIANT_TOKENS tokens; for more, the order of its sum follows their number.
    """
    if not isinstance(w, FP4Array) or w.ndim != 2:
        got = f"shape {w.shape}" if isinstance(w, FP4Array) else type(w).__name__
        raise ValueError(f"fp4_linear: w must be an FP4Array [N, C]; got {got}. Reshape it first.")
    if x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"fp4_linear: x must be [..., C = {w.shape[1]}]; got {jnp.shape(x)}. w is [out, in].")
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out_dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
    name = _choose(flat, w, out_dtype, implementation)
    if name == MOSAIC:
        y = _linear(flat, w, _Call(out_dtype, name, implementation is not None, config))
    else:
        # In checkpoint order from here on: this is for devices and dtypes that the order was not made for.
        y = fp4_bmm(
            flat[:, None],
            w.in_checkpoint_order().reshape(1, *w.shape),
            "columns",
            preferred_element_type=preferred_element_type,
            implementation=implementation,
        )
    return y.reshape(*x.shape[:-1], w.shape[0])


def _choose(x: Array, w: FP4Array, out_dtype: jnp.dtype, implementation: str | None) -> str | None:
    """MOSAIC where its kernels are wanted and can run; None for what fp4_bmm says."""
    implementations.check_name("fp4_linear", implementation)
    if implementation not in (None, MOSAIC):
        return None
    reason = _why_not(x, w, out_dtype)
    if reason is None:
        implementations.log_choice("fp4_linear", MOSAIC, "asked for" if implementation else "")
        return MOSAIC
    if implementation == MOSAIC:
        raise NotImplementedError(
            f"fp4_linear: implementation {MOSAIC!r} cannot run: {reason} Use None for one that can."
        )
    return None


def _why_not(x: Array, w: FP4Array, out_dtype: jnp.dtype) -> str | None:
    """Why the Mosaic GPU kernels cannot take these operands here, or None."""
    reason = implementations.why_not(MOSAIC)
    if reason is not None:
        return reason
    if w.format != "mxfp4":
        return f"it takes MXFP4; w is {w.format}."
    if w.order != FragmentOrder(0):
        return "w is not in fragment order without key rows; see FP4Array.in_fragment_order."
    if x.dtype != jnp.bfloat16 or out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"it multiplies bfloat16 into bfloat16 or float32; got {x.dtype} into {out_dtype}."
    return mosaic.unsupported(x.shape, w.shape)


def _primal(x: Array, w: FP4Array, call: _Call) -> Array:
    kernel = functools.partial(_run, call=call)
    if call.named:
        return kernel(x, w)
    # Decided for the device that is traced for; a program lowered for another one falls back.
    return jax.lax.platform_dependent(x, w, cuda=kernel, default=functools.partial(_plain, out_dtype=call.out_dtype))


def _run(x: Array, w: FP4Array, call: _Call) -> Array:
    if call.config is None and x.shape[0] > mosaic.MOST_TOKENS:
        return _plain(x, w, out_dtype=call.out_dtype)
    return mosaic.fp4_linear_mosaic_gpu(x, w.packed, w.scales, out_dtype=call.out_dtype, config=call.config)


def _plain(x: Array, w: FP4Array, *, out_dtype: jnp.dtype) -> Array:
    return einsum_rounded("mc,nc->mn", x, fp4_dense(w, jnp.bfloat16), out_dtype)


def _forward(x: Array, w: FP4Array, call: _Call):
    return _linear(x, w, call), w


def _backward(call: _Call, w: FP4Array, g: Array):
    """dx = g @ w, x's dtype being bfloat16."""
    del call
    return einsum_rounded("mn,nc->mc", g, fp4_dense(w, g.dtype), jnp.bfloat16), None


_linear = jax.custom_vjp(_primal, nondiff_argnums=(2,))
_linear.defvjp(_forward, _backward)
