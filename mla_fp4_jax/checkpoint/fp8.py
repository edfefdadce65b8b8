"""Reader of FP8 weights with coarse scales: q * scale in float32, rounded once to the layer's dtype.

    DeepSeek's own         `weight`, `weight_scale_inv` [ceil(out/128), ceil(in/128)] (it multiplies, whatever its
                           name says), or `scale` under DeepSeek's own tensor names; last blocks may be partial
    compressed-tensors     `weight`, `weight_scale`: one, one a row [out] or [out, 1], or one a block
    Quark, ModelOpt        likewise
    Mistral                `weight`, `weight_scale_inv`: one for the whole weight
    MXFP8                  either name, of e8m0 bytes [out, in/32]

The block is what the config says (weight_block_size), 128 x 128 where it says nothing, and never inferred from
shapes: 160 rows in 2 blocks are 128 + 32, not 80 + 80.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.dense import cast_to_float16
from mla_fp4_jax.checkpoint.dtypes import NUMPY
from mla_fp4_jax.checkpoint.placement import Placement
from mla_fp4_jax.checkpoint.quantization import DEEPSEEK_BLOCK
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight

WEIGHTS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
FLOAT_SCALES = ("F32", "BF16", "F16")
E8M0_SCALES = ("F8_E8M0", "U8")
MX_BLOCK = (1, 32)
CHUNK_ELEMENTS = 1 << 22
_E8M0 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))
_TABLES = {name: np.arange(256, dtype=np.uint8).view(NUMPY[name]).astype(np.float32) for name in WEIGHTS}


def _recognises(stored: StoredWeight) -> bool:
    return any(
        stored.has(weight=WEIGHTS, **{suffix: FLOAT_SCALES + E8M0_SCALES})
        for suffix in ("weight_scale_inv", "weight_scale", "scale")
    )


def _scale_suffix(stored: StoredWeight) -> str:
    return stored.first("weight_scale_inv", "weight_scale", "scale")


def _check(stored: StoredWeight) -> None:
    if len(stored.shape) != 2:
        raise stored.error("weight", f"must not be FP8: it is no matrix; got {stored.tensors['weight']}.")
    stored.require_shape("weight", stored.shape)
    _block(stored)


def _block(stored: StoredWeight) -> tuple[int, int]:
    """Rows and columns to a scale, from the config; the scales' shape must be what they make."""
    suffix = _scale_suffix(stored)
    entry, (rows, columns) = stored.tensors[suffix], stored.shape
    if entry.shape in ((), (1,)):
        return rows, columns
    if suffix == "weight_scale":  # a name that covers several granularities
        if entry.shape == (1, 1):
            return rows, columns
        if entry.shape in ((rows,), (rows, 1)) and entry.dtype not in E8M0_SCALES:
            return 1, columns
    block = stored.declared.block
    if block is None:
        is_mx = entry.dtype in E8M0_SCALES and entry.shape[:1] == (rows,)
        block = MX_BLOCK if is_mx else DEEPSEEK_BLOCK
    expected = (-(-rows // block[0]), -(-columns // block[1]))
    if entry.shape == (expected[0], 1, expected[1], 1):  # ModelOpt's, which multiply [rows, 128, columns, 128]
        return block
    said = "the config's" if stored.declared.block else "the usual"
    stored.require_shape(suffix, expected, f", one scale to {said} {block[0]} x {block[1]} of {list(stored.shape)}")
    return block


def _scales(stored: StoredWeight) -> np.ndarray:
    """Scales as float32 [row blocks, column blocks].

    Raises:
        CheckpointError: one that is not finite and above or equal to zero.
    """
    suffix = _scale_suffix(stored)
    raw = stored.read(suffix)
    if stored.tensors[suffix].dtype in E8M0_SCALES:
        values = _E8M0[raw.view(np.uint8)]
    else:
        values = raw.astype(np.float32)
    bad = ~np.isfinite(values) | (values < 0)
    if bad.any():
        where = [int(i) for i in np.argwhere(bad)[0]]
        raise stored.error(suffix, f"must be finite and >= 0; got {values[tuple(where)]} at {where}.")
    return values.reshape(values.shape[0] if values.ndim else 1, -1)


def _rows(stored: StoredWeight, part: slice, columns: slice = slice(None)) -> np.ndarray:
    block_rows, block_columns = _block(stored)
    raw = stored.read("weight")
    first, last, _ = part.indices(raw.shape[0])
    values = _TABLES[stored.tensors["weight"].dtype][raw[first:last, columns].view(np.uint8)]
    start, stop, _ = columns.indices(raw.shape[1])
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0].tolist()
        where = [first + row, start + column]
        raise stored.error("weight", f"must be finite; got NaN or infinity at {where}.")
    scales = _scales(stored)[np.arange(first, last) // block_rows]
    with np.errstate(over="ignore"):  # found below
        for column in range(start // block_columns, -(-stop // block_columns)):
            first_of_block = max(column * block_columns - start, 0)
            values[:, first_of_block : (column + 1) * block_columns - start] *= scales[:, column, None]
    if not np.isfinite(values).all():
        raise stored.error("weight", "must be finite once scaled; its products overflow float32.")
    return values


def _read(stored: StoredWeight, dtype: DTypeLike, placement: Placement) -> jax.Array:
    kind = np.float32 if jnp.dtype(dtype) == jnp.float16 else jnp.dtype(dtype)

    def compute(rows: slice, columns: slice) -> np.ndarray:
        size = columns.stop - columns.start
        out = np.empty((rows.stop - rows.start, size), kind)
        step = max(1, CHUNK_ELEMENTS // max(size, 1))
        for first in range(0, len(out), step):
            part = slice(rows.start + first, min(rows.start + first + step, rows.stop))
            out[first : first + step] = _rows(stored, part, columns)
        return out

    if placement.sharding is None or placement.sharding.is_fully_addressable:
        array = placement.dense(compute(*(slice(0, size) for size in stored.shape)))
    else:
        array = placement.computed(compute)
    return cast_to_float16(stored, "weight", array) if jnp.dtype(dtype) == jnp.float16 else array


READER = Reader("FP8", "fp8", _recognises, _check, _read, _rows)
