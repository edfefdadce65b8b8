"""Reader of plain weights: one `weight` tensor in bf16, fp16 or fp32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight, to_device

# Bits of the exponent: all set means infinite or NaN.
EXPONENT_MASKS = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}
DTYPES = tuple(EXPONENT_MASKS)
CHUNK_ELEMENTS = 1 << 20


def _recognises(stored: StoredWeight) -> bool:
    return stored.has(weight=DTYPES)


def _check(stored: StoredWeight) -> None:
    stored.require_shape("weight", stored.shape)


def _read(stored: StoredWeight, dtype: DTypeLike) -> jax.Array:
    return read_dense(stored, "weight", dtype)


def read_dense(stored: StoredWeight, suffix: str, dtype: DTypeLike) -> jax.Array:
    """One plain tensor, cast on the device.

    Raises:
        CheckpointError: a value that is not finite, in the file or once cast.
    """
    view = stored.read(suffix)
    kind, mask = EXPONENT_MASKS[stored.tensors[suffix].dtype]
    bits = view.reshape(-1).view(kind)
    for start in range(0, bits.size, CHUNK_ELEMENTS):
        chunk = bits[start : start + CHUNK_ELEMENTS]
        bad = (chunk & mask) == mask
        if bad.any():
            index = np.unravel_index(start + int(np.argmax(bad)), view.shape)
            raise stored.error(suffix, f"must be finite; got NaN or infinity at {[int(i) for i in index]}.")
    array = to_device(view)
    if jnp.dtype(dtype) != jnp.float16 or array.dtype == jnp.float16:
        return array.astype(dtype)
    cast = array.astype(dtype)
    if not bool(jnp.isfinite(cast).all()):
        raise stored.error(suffix, "must fit float16; got larger values. Load it in bfloat16.")
    return cast


READER = Reader("dense", _recognises, _check, _read)
