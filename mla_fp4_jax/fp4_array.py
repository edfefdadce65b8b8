"""FP4Array: group-scaled FP4 values as one pytree, MXFP4 and NVFP4 alike."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, UInt8

from mla_fp4_jax import formats
from pallas_kernels import fragments
from pallas_kernels.fragments import FragmentOrder

FORMATS = ("mxfp4", "nvfp4")
SCALE_FORMATS = {"mxfp4": "e8m0", "nvfp4": "e4m3"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP4Array:
    """value[..., c] = e2m1(codes[..., c]) * scale(scales[..., c // G]) * global_scale

    with G = C / groups columns to a scale, 32 in MXFP4 and 16 in NVFP4 (compressed-tensors divides by its global
    scale: see global_divisor). Make one with from_packed, quantize_mxfp4
    or quantize_nvfp4; the constructor itself checks nothing, so that any leaves can stand in (tracers,
    ShapeDtypeStructs, shardings).

    Attributes:
        codes: float4_e2m1fn [..., C], the logical shape, held at 4 bits an element: element 2i of a row is the
            low nibble of its byte i, element 2i + 1 the high one. `codes.nbytes` says twice what it takes.
        scales: uint8 [..., C/G]: e8m0 bytes in MXFP4 (2^(byte - 127), 255 is NaN), e4m3fn bytes in NVFP4.
        global_scale: float32 scalar of NVFP4; None for 1.
        format: "mxfp4" or "nvfp4" (static).
        order: None where codes and scales lie as described; else the same bytes lie in this kernel's order
            (static). Everything but the attributes codes, scales and packed undoes it.
        global_divisor: float32 scalar where the checkpoint has one that divides, beside global_scale, its reciprocal
            rounded to float32: dequantize divides by it and is exact, products use global_scale, off by at most
            2^-24 of each result.
    """

    # Any: what stands in for an array, and a vmapped global_scale, are legal too.
    codes: Any
    scales: Any
    global_scale: Any = None
    format: str = dataclasses.field(default="mxfp4", metadata={"static": True})
    order: FragmentOrder | None = dataclasses.field(default=None, metadata={"static": True})
    global_divisor: Any = None

    @classmethod
    def from_packed(
        cls,
        packed: ArrayLike,
        scales: ArrayLike,
        global_scale: ArrayLike | None = None,
        *,
        format: str | None = None,
    ) -> FP4Array:
        """View packed bytes as an FP4Array; no byte is changed, and inside jit none is moved.

        Args:
            packed: uint8 [..., C/2], two codes to a byte, the low nibble first.
            scales: [..., C/G]; uint8 or float8_e8m0fnu for MXFP4, uint8 or float8_e4m3fn for NVFP4.
            global_scale: a finite float32 scalar that multiplies, NVFP4 only; None for 1.
            format: "mxfp4" or "nvfp4"; None takes NVFP4 where the scales are float8_e4m3fn, else MXFP4.

        Raises:
            TypeError: packed or scales of another dtype. Float scales are never taken for bytes.
            ValueError: shapes that do not fit: other leading axes, groups that do not divide the columns.
        """
        packed, scales = jnp.asarray(packed), jnp.asarray(scales)
        if format is None:
            format = "nvfp4" if scales.dtype == jnp.float8_e4m3fn else "mxfp4"
        if format not in FORMATS:
            raise ValueError(f"FP4Array.from_packed: format must be one of {FORMATS}; got {format!r}. Choose one.")
        if packed.dtype != jnp.uint8:
            raise TypeError(
                f"FP4Array.from_packed: packed must be uint8, two codes to a byte; got {packed.dtype}. "
                "Pass the checkpoint's bytes, or quantise first."
            )
        scale_dtype = jnp.float8_e8m0fnu if format == "mxfp4" else jnp.float8_e4m3fn
        if scales.dtype not in (jnp.uint8, scale_dtype):
            raise TypeError(
                f"FP4Array.from_packed: scales must be uint8 or {jnp.dtype(scale_dtype).name} for {format}; got "
                f"{scales.dtype}. Pass the bytes as stored, not their values."
            )
        if packed.ndim < 1 or packed.ndim != scales.ndim or packed.shape[:-1] != scales.shape[:-1]:
            raise ValueError(
                "FP4Array.from_packed: scales must have packed's leading axes; got packed "
                f"{packed.shape}, scales {scales.shape}. Expected scales [..., C/G] beside packed [..., C/2]."
            )
        columns, groups = 2 * packed.shape[-1], scales.shape[-1]
        if (groups == 0) != (columns == 0) or (groups and columns % groups):
            raise ValueError(
                "FP4Array.from_packed: scales must divide the columns into equal groups; got "
                f"{columns} columns, {groups} groups. MXFP4 has one scale to 32, NVFP4 one to 16."
            )
        if global_scale is not None:
            if format == "mxfp4":
                raise ValueError(
                    "FP4Array.from_packed: global_scale must be None for mxfp4; got one. Pass format='nvfp4'."
                )
            global_scale = jnp.asarray(global_scale)
            if global_scale.size != 1 or not jnp.issubdtype(global_scale.dtype, jnp.floating):
                raise ValueError(
                    "FP4Array.from_packed: global_scale must be one float; got "
                    f"{global_scale.dtype}{global_scale.shape}. NVFP4 has one for the whole array."
                )
            global_scale = global_scale.astype(jnp.float32).reshape(())
        if scales.dtype != jnp.uint8:
            scales = jax.lax.bitcast_convert_type(scales, jnp.uint8)
        return cls(_codes_from_bytes(packed), scales, global_scale, format)

    @classmethod
    def from_codes(cls, codes: UInt8[Array, "*rows C"], scales: UInt8[Array, "*rows groups"], **kwargs) -> FP4Array:
        """As from_packed, from codes 0 .. 15 that have a byte each."""
        if codes.ndim < 1 or codes.shape[-1] % 2:
            raise ValueError(
                f"FP4Array.from_codes: codes must have an even last axis; got {codes.shape}. Two make a byte."
            )
        return cls.from_packed(formats.pack_nibbles(codes), scales, **kwargs)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical, [..., C]."""
        return tuple(self.codes.shape)

    @property
    def ndim(self) -> int:
        """Of the logical shape."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def group_size(self) -> int:
        """G, columns that share a scale."""
        return self.shape[-1] // self.scales.shape[-1] if self.scales.shape[-1] else 0

    @property
    def scale_format(self) -> str:
        """Of a scale byte: "e8m0" or "e4m3"."""
        return SCALE_FORMATS[self.format]

    @property
    def nbytes_packed(self) -> int:
        """Bytes that the array takes: half a byte a code, one a scale."""
        return self.size // 2 + math.prod(self.scales.shape) + (0 if self.global_scale is None else 4)

    @property
    def packed(self) -> UInt8[Array, "*rows half"]:
        """The codes as bytes [..., C/2], in the order in which they are held; free inside jit on a GPU."""
        return _bytes_from_codes(self.codes)

    def to_packed(self) -> tuple[Array, ...]:
        """What from_packed takes: packed bytes, scale bytes, and the global scale where there is one."""
        if self.order is not None:
            return self.in_checkpoint_order().to_packed()
        parts = (self.packed, self.scales)
        return parts if self.global_scale is None else (*parts, self.global_scale)

    def fragment_order_why_not(self, key_rows: int = 0) -> str | None:
        """Why in_fragment_order would refuse, or None. Reads the scales, so they must be concrete."""
        reason = fragments.unsupported(_by_head(self.shape), self.group_size, FragmentOrder(key_rows))
        if reason is not None or self.size == 0:
            return reason
        group, largest_allowed = fragments.GROUPS[self.format], fragments.MAX_SCALE_BYTES[self.format]
        if self.group_size != group:
            return f"groups of {self.format} must be of {group} columns; got {self.group_size}."
        with jax.ensure_compile_time_eval():  # a constant within jit is as well known
            largest = int(jnp.max(self.scales))
        if largest > largest_allowed:
            scale = 2.0 ** (largest_allowed - 127) if self.format == "mxfp4" else 448.0
            return (
                f"its kernels take scale bytes up to {largest_allowed}, a scale of {scale}; the largest is {largest}."
            )
        return None

    def in_fragment_order(self, key_rows: int = 0) -> FP4Array:
        """The same bytes as the Hopper kernels want them (pallas_kernels/fragments.py); done once, at load.

        Args:
            key_rows: of each head [N, C], the first rows that fp4_bmm will contract over ("rows"): P of kv_b_proj, 0
                of a plain linear.

        Raises:
            ValueError: weights whose shape or scales that order cannot hold; see fragment_order_why_not.
        """
        if self.order is not None:
            same = self.order == FragmentOrder(key_rows)
            return self if same else self.in_checkpoint_order().in_fragment_order(key_rows)
        reason = self.fragment_order_why_not(key_rows)
        if reason is not None:
            raise ValueError(
                f"FP4Array.in_fragment_order: the array must fit fragment order; {reason} Keep it as it is."
            )
        return to_fragment_order(self, FragmentOrder(key_rows))

    def in_checkpoint_order(self) -> FP4Array:
        """The same bytes in row-major order, as from_packed took them; jittable."""
        return self if self.order is None else _from_fragments(self)

    __iter__ = None  # Python would index 0, 1, ... without end: JAX clamps an index past the axis

    def __getitem__(self, index) -> FP4Array:
        """Index the leading axes; `[...]` is the array itself. The last axis cannot be cut: groups lie along it."""
        if index is Ellipsis:
            return self
        parts = index if isinstance(index, tuple) else (index,)
        if self.order is not None and len(parts) >= self.ndim - 1:
            return self.in_checkpoint_order()[index]
        if any(part is Ellipsis for part in parts) or len(parts) >= self.ndim:
            raise IndexError(
                f"FP4Array: an index must leave the last axis alone; got {index!r} for shape {self.shape}. "
                "Dequantise to cut columns."
            )
        return dataclasses.replace(self, codes=self.codes[index], scales=self.scales[index])

    def reshape(self, *shape: int) -> FP4Array:
        """Another split of the leading axes; the last axis stays, since groups lie along it."""
        if not shape or shape[-1] != self.shape[-1]:
            raise ValueError(
                f"FP4Array.reshape: the last axis must stay {self.shape[-1]}; got {shape}. Groups lie along it."
            )
        if self.order is not None and shape != self.shape:
            return self.in_checkpoint_order().reshape(*shape)
        scales = self.scales.reshape(*shape[:-1], self.scales.shape[-1])
        return dataclasses.replace(self, codes=self.codes.reshape(shape), scales=scales)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*rows C"]:
        """The values. MXFP4: exact in bfloat16 and float32 (infinite past their range, NaN under scale byte 255).

        NVFP4: e2m1 * (scale * global_scale), or e2m1 * (scale / global_divisor), in float32 and in this order, which
        is that of torchao, ModelOpt and compressed-tensors: bit for bit theirs. Then one rounding to `dtype`.
        """
        if self.order is not None:
            return self.in_checkpoint_order().dequantize(dtype)
        if self.global_scale is None:
            return self.without_global_scale(dtype)
        # A power of two taken from the elements and given to the scales, lest their product be flushed as subnormal.
        small = self.global_scale < 1
        scales = formats.decode_e4m3(self.scales) * jnp.where(small, 2.0**24, 1.0)
        if self.global_divisor is None:
            scales = scales * self.global_scale
        else:  # a barrier, lest XLA turn division by one scalar into a multiplication, one bit off
            scales = scales / jax.lax.optimization_barrier(jnp.broadcast_to(self.global_divisor, scales.shape))
        codes = formats.unpack_nibbles(self.packed)
        codes = codes.reshape(*self.shape[:-1], self.scales.shape[-1], self.group_size)
        elements = formats.decode_e2m1(codes) * jnp.where(small, 2.0**-24, 1.0)
        return (elements * scales[..., None]).reshape(self.shape).astype(dtype)

    def without_global_scale(self, dtype: DTypeLike) -> Float[Array, "*rows C"]:
        """e2m1 * scale: exact in bfloat16 and float32 in either format."""
        if self.order is not None:
            return self.in_checkpoint_order().without_global_scale(dtype)
        codes = formats.unpack_nibbles(self.packed)
        rows, groups = self.shape[:-1], self.scales.shape[-1]
        codes = codes.reshape(*rows, groups, self.group_size)
        scales = jnp.broadcast_to(self.scales[..., None], codes.shape)
        if self.format == "mxfp4":
            value = formats.decode_e2m1(codes, dtype, scales.astype(jnp.int32) - 127)
            value = jnp.where(scales == formats.E8M0_NAN, jnp.asarray(jnp.nan, dtype), value)
        else:
            value = formats.decode_e2m1(codes, dtype) * formats.decode_e4m3(scales, dtype)
        return value.reshape(self.shape)


def _by_head(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape) if len(shape) == 2 else shape


@functools.partial(jax.jit, static_argnums=1)
def to_fragment_order(w: FP4Array, order: FragmentOrder) -> FP4Array:
    """FP4Array.in_fragment_order of an array that is known to fit, traced or not."""
    codes = formats.unpack_nibbles(w.packed).reshape(_by_head(w.shape))
    packed, scales = fragments.to_fragments(codes, w.scales.reshape(_by_head(w.scales.shape)), order)
    packed, scales = packed.reshape(w.packed.shape), scales.reshape(w.scales.shape)
    return dataclasses.replace(w, codes=_codes_from_bytes(packed), scales=scales, order=order)


@jax.jit
def _from_fragments(w: FP4Array) -> FP4Array:
    assert w.order is not None
    packed = w.packed.reshape(_by_head(w.packed.shape))
    codes, scales = fragments.from_fragments(packed, w.scales.reshape(_by_head(w.scales.shape)), w.order)
    codes = _codes_from_bytes(formats.pack_nibbles(codes).reshape(w.packed.shape))
    return dataclasses.replace(w, codes=codes, scales=scales.reshape(w.scales.shape), order=None)


def _codes_from_bytes(packed: UInt8[Array, "*rows half"]) -> Array:
    # The barrier keeps XLA from folding the bitcast of a constant, which jax 0.10's does wrongly. It moves no byte.
    codes = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(packed), jnp.float4_e2m1fn)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _bytes_from_codes(codes: Array) -> UInt8[Array, "*rows half"]:
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    # The barrier keeps jax 0.12's CPU back end from fusing the bitcast with a slice, as within scan: it cannot.
    return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(pairs), jnp.uint8)
