"""Reader of plain weights: one `weight` tensor in bf16, fp16 or fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.placement import Placement
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight

# Bits of the exponent: all set means infinite or NaN.
EXPONENT_MASKS = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}
DTYPES = tuple(EXPONENT_MASKS)
CHUNK_ELEMENTS = 1 << 20


def _recognises(stored: StoredWeight) -> bool:
    return stored.has(weight=DTYPES)


def _check(stored: StoredWeight) -> None:
    stored.require_shape("weight", stored.shape)


def _read(stored: StoredWeight, dtype: DTypeLike, placement: Placement) -> jax.Array:
    view = stored.read("weight")
    for origin, part in placement.local(view):
        check_finite(stored, "weight", part, origin=origin)
    array = placement.dense(view)
    if jnp.dtype(dtype) != jnp.float16 or array.dtype == jnp.float16:
        return array.astype(dtype)
    return cast_to_float16(stored, "weight", array)


def _rows(stored: StoredWeight, part: slice) -> np.ndarray:
    view = stored.read("weight")[part]
    check_finite(stored, "weight", view, origin=(part.start or 0, 0))
    return view.astype(np.float32)


def check_finite(stored: StoredWeight, suffix: str, view: np.ndarray, *, origin: tuple[int, int] = (0, 0)) -> None:
    """Raise CheckpointError where a plain tensor, of which `view` begins at `origin`, has a NaN or infinity."""
    kind, mask = EXPONENT_MASKS[stored.tensors[suffix].dtype]
    bits = view.reshape(-1).view(kind)
    for start in range(0, bits.size, CHUNK_ELEMENTS):
        chunk = bits[start : start + CHUNK_ELEMENTS]
        bad = (chunk & mask) == mask
        if bad.any():
            index = [int(i) for i in np.unravel_index(start + int(np.argmax(bad)), view.shape)]
            index = [i + first for i, first in zip(index, origin, strict=False)]
            raise stored.error(suffix, f"must be finite; got NaN or infinity at {index}.")


def cast_to_float16(stored: StoredWeight, suffix: str, array: jax.Array) -> jax.Array:
    """Cast finite values, or raise CheckpointError if they do not fit."""
    cast = array.astype(jnp.float16)
    if not bool(jnp.isfinite(cast).all()):
        raise stored.error(suffix, "must fit float16; got larger values. Load it in bfloat16.")
    return cast


READER = Reader("dense", "dense", _recognises, _check, _read, _rows)
