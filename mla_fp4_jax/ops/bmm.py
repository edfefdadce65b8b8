"""fp4_bmm: a batched matmul on packed FP4 weights, in both orientations, with a gradient for x."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.implementations import INTERPRET, MOSAIC, XLA
from mla_fp4_jax.ops.xla import fp4_bmm_xla
from pallas_kernels import fp4_bmm_mosaic_gpu as mosaic
from pallas_kernels import fp4_bmm_triton as triton

X_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
_BACKWARD = {"rows": "columns", "columns": "rows"}


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static side of a call."""

    contract: str
    rows: tuple[int, int]
    x_columns: tuple[int, int]
    out_dtype: jnp.dtype
    implementation: str | None
    config: triton.Config | mosaic.Config | None


def fp4_bmm(
    x: Float[Array, "B H X"],
    w: FP4Array,
    contract: str,
    *,
    rows: tuple[int, int] | None = None,
    x_columns: tuple[int, int] | None = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | None = None,
    config: triton.Config | mosaic.Config | None = None,
) -> Float[Array, "B H out"]:
    """Multiply per head by packed weights W [H, N, C], which are decoded inside the kernel.

        contract="columns"  out[b, h, n] = sum_c x[b, h, x0 + c] W[h, r0 + n, c]    v_up_proj, plain linears
        contract="rows"     out[b, h, c] = sum_n x[b, h, x0 + n] W[h, r0 + n, c]    k_up_proj

    Batch-major in and out: no transpose surrounds the call. The part of W and of x that is used is read in place.

    Args:
        x: bfloat16, float16 or float32; B may be 0.
        w: [H, N, C]; scale groups lie along C.
        contract: which axis of W is summed over.
        rows: (first, number) of W's rows to use, r0 and N above; None for all.
        x_columns: (first, number) of x's last axis to use, such as q_nope within q; None for all.
        preferred_element_type: of the result; None for x's.
        implementation: "mosaic_gpu" (Pallas, on a Hopper GPU, w in fragment order), "triton" (Pallas, on a GPU, w in
            checkpoint order), "xla" (anywhere), "triton_interpret" (the Triton kernel in Pallas's interpreter, for
            tests), or None for the fastest that can run here.
        config: tiles of the kernel named by implementation; None for its default.

    Returns:
        [B, H, N] or [B, H, C].

    Raises:
        ValueError: shapes, ranges or names that do not fit.
        TypeError: x of another dtype, w not an FP4Array.
        NotImplementedError: the implementation named cannot run here, or not on these operands. None never fails.

    Numerics:
        W is exact (in NVFP4 up to its global scale, which multiplies the accumulator). Products are accumulated in
        float32 and rounded once. The result for a row does not depend on the rest of the batch, bit for bit, with
        implementation "mosaic_gpu" or "triton"; XLA's library calls promise no such thing.

    Differentiable in x, in reverse mode; w is frozen. The gradient takes the implementation named where that can run,
    else what None chooses.
    """
    call = _check(x, w, contract, rows, x_columns, preferred_element_type, implementation, config)
    return _bmm(x, w, call)


def _primal(x: Array, w: FP4Array, call: _Call) -> Array:
    name, why = _choose(x, w, call)
    implementations.log_choice("fp4_bmm", name, why)
    if call.implementation is None and name != XLA:
        # Decided for the device that is traced for; a program lowered for another one falls back.
        return jax.lax.platform_dependent(
            x,
            w,
            cuda=functools.partial(_run, name=name, call=call),
            rocm=functools.partial(_run, name=name, call=call),
            default=functools.partial(_run, name=XLA, call=call),
        )
    return _run(x, w, name=name, call=call)


def _forward(x: Array, w: FP4Array, call: _Call):
    return _bmm(x, w, call), (jax.ShapeDtypeStruct(x.shape, x.dtype), w)


def _backward(call: _Call, saved, g: Array):
    """dx: the same product over W's other axis."""
    x, w = saved
    back = dataclasses.replace(
        call,
        contract=_BACKWARD[call.contract],
        x_columns=(0, g.shape[-1]),
        out_dtype=jnp.dtype(x.dtype),
        config=None,
    )
    if g.dtype not in X_DTYPES:
        g = g.astype(jnp.float32)
    if back.implementation is not None and _why_not(back.implementation, g, w, back) is not None:
        back = dataclasses.replace(back, implementation=None)  # mosaic_gpu's order serves one contraction of each row
    dx = _bmm(g, w, back)
    first, number = call.x_columns
    return jnp.pad(dx, ((0, 0), (0, 0), (first, x.shape[-1] - first - number))), None


_bmm = jax.custom_vjp(_primal, nondiff_argnums=(2,))
_bmm.defvjp(_forward, _backward)


def _choose(x: Array, w: FP4Array, call: _Call) -> tuple[str, str]:
    """The implementation for these operands, and why it is not one that is preferred to it."""
    if call.implementation is not None:
        reason = _why_not(call.implementation, x, w, call)
        if reason is not None:
            raise NotImplementedError(
                f"fp4_bmm: implementation {call.implementation!r} cannot run: {reason} Use None for one that can."
            )
        return call.implementation, "asked for"
    reasons = []
    for name in implementations.PREFERENCE:
        reason = _why_not(name, x, w, call)
        if reason is None:
            return name, " ".join(reasons)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("xla runs everywhere")


def _why_not(name: str, x: Array, w: FP4Array, call: _Call) -> str | None:
    """Why an implementation cannot run here on these operands, or None."""
    reason = implementations.why_not(name)
    if reason is not None or name == XLA:
        return reason
    codes = jax.ShapeDtypeStruct((*w.shape[:-1], w.shape[-1] // 2), jnp.uint8)
    if name == MOSAIC:
        if w.order is None:
            return "w is not in fragment order; see FP4Array.in_fragment_order."
        if w.order.column_parts > 1:
            return f"w's columns are in {w.order.column_parts} parts, for as many devices."
        if call.out_dtype != jnp.bfloat16:
            return f"it returns bfloat16; {call.out_dtype} is asked for."
        operands = {"contract": call.contract, "rows": call.rows, "x_columns": call.x_columns}
        return mosaic.unsupported(x, codes, w.order, **operands)
    if w.order is not None:
        return "w is in fragment order; see FP4Array.in_checkpoint_order."
    operands = {"contract": call.contract, "rows": call.rows, "scale_format": w.scale_format}
    return triton.unsupported(x, codes, w.scales, **operands)


def _run(x: Array, w: FP4Array, *, name: str, call: _Call) -> Array:
    operands = {"contract": call.contract, "rows": call.rows, "x_columns": call.x_columns, "config": call.config}
    if name == XLA:
        w = w.in_checkpoint_order()
        (row, num_rows), (column, num_columns) = call.rows, call.x_columns
        part = dataclasses.replace(
            w, codes=w.codes[:, row : row + num_rows], scales=w.scales[:, row : row + num_rows]
        )
        used = x[..., column : column + num_columns]
        return fp4_bmm_xla(used, part, call.contract, out_dtype=call.out_dtype)
    if name == MOSAIC:
        assert w.order is not None
        return mosaic.fp4_bmm_mosaic_gpu(x, w.packed, w.scales, w.order, w.global_scale, **operands)
    return triton.fp4_bmm_triton(
        x,
        w.packed,
        w.scales,
        scale_format=w.scale_format,
        out_dtype=call.out_dtype,
        global_scale=w.global_scale,
        gpu=implementations.target_gpu(),
        interpret=name == INTERPRET,
        **operands,
    )


def _check(x, w, contract, rows, x_columns, preferred_element_type, implementation, config) -> _Call:
    if not isinstance(w, FP4Array):
        raise TypeError(
            f"fp4_bmm: w must be an FP4Array; got {type(w).__name__}. Use FP4Array.from_packed or quantize_mxfp4."
        )
    implementations.check_name("fp4_bmm", implementation)
    if contract not in _BACKWARD:
        raise ValueError(
            f"fp4_bmm: contract must be 'rows' or 'columns'; got {contract!r}. It names the axis of w summed over."
        )
    if x.dtype not in X_DTYPES:
        raise TypeError(f"fp4_bmm: x must be bfloat16, float16 or float32; got {x.dtype}. Cast it first.")
    if x.ndim != 3 or w.ndim != 3 or x.shape[1] != w.shape[0]:
        raise ValueError(
            "fp4_bmm: x must be [B, H, X] and w [H, N, C] of the same H; got x "
            f"{x.shape}, w {w.shape}. Reshape tokens into one axis."
        )
    num_rows, num_columns = w.shape[1:]
    rows = _range("rows", rows, num_rows)
    x_columns = _range("x_columns", x_columns, x.shape[2])
    contraction = rows[1] if contract == "rows" else num_columns
    if x_columns[1] != contraction:
        raise ValueError(
            f"fp4_bmm: x must have as many columns as w has {contract} to sum over, {contraction}; got "
            f"{x_columns[1]}. Pass x_columns=(first, {contraction}) to use a part of x."
        )
    out_dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
    if not jnp.issubdtype(out_dtype, jnp.floating):
        raise TypeError(
            f"fp4_bmm: preferred_element_type must be a float dtype; got {out_dtype}. Leave it out for x's."
        )
    return _Call(contract, rows, x_columns, out_dtype, implementation, config)


def _range(name: str, value: tuple[int, int] | None, size: int) -> tuple[int, int]:
    if value is None:
        return 0, size
    first, number = value
    if first < 0 or number < 0 or first + number > size:
        raise ValueError(
            f"fp4_bmm: {name} must be (first, number) within 0 .. {size}; got {value}. Check the axis it cuts."
        )
    return int(first), int(number)
