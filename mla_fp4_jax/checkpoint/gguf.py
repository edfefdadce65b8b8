"""GGUF's MXFP4, on request only: nothing in the bytes tells that they lie in GGUF's order.

There a group's byte i holds element i in its low nibble and element i + 16 in its high one; everywhere else elements
2i and 2i + 1. Codes are put in the usual order, none is changed. A tensor may have its scales apart, or be blocks
`weight` U8 [out, in/32 * 17], each an e8m0 byte and then its 16 bytes of codes. The .gguf container is not read.
"""

from __future__ import annotations

import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.mxfp4 import GROUP_SIZE, decode_mxfp4
from mla_fp4_jax.checkpoint.nibbles import to_linear_order
from mla_fp4_jax.checkpoint.placement import Placement
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.fp4_array import FP4Array

BLOCK_BYTES = 1 + GROUP_SIZE // 2


def _recognises(stored: StoredWeight) -> bool:
    return stored.gguf_nibbles and stored.has(weight=("U8",))


def _check(stored: StoredWeight) -> None:
    if len(stored.shape) != 2 or stored.shape[1] % GROUP_SIZE:
        raise stored.error("weight", f"must not be MXFP4: groups of {GROUP_SIZE} do not divide {list(stored.shape)}.")
    rows, columns = stored.shape
    why = f" for {list(stored.shape)} in GGUF's blocks of {BLOCK_BYTES} bytes"
    stored.require_shape("weight", (rows, columns // GROUP_SIZE * BLOCK_BYTES), why)


def _packed_rows(stored: StoredWeight, part: slice) -> tuple[np.ndarray, np.ndarray]:
    blocks = stored.read("weight")[part]
    blocks = blocks.reshape(blocks.shape[0], -1, BLOCK_BYTES)
    scales = np.ascontiguousarray(blocks[..., 0])
    if (scales == 255).any():
        row, group = np.argwhere(scales == 255)[0].tolist()
        raise stored.error("weight", f"must not hold a scale of 255, e8m0's NaN; found in block [{row}, {group}].")
    return to_linear_order(blocks[..., 1:].reshape(blocks.shape[0], -1)), scales


def _read(stored: StoredWeight, dtype: DTypeLike, placement: Placement) -> FP4Array:
    del dtype  # of dense weights; these stay packed
    return placement.packed(*_packed_rows(stored, slice(None)), "mxfp4")


def _rows(stored: StoredWeight, part: slice) -> np.ndarray:
    return decode_mxfp4(*_packed_rows(stored, part))


READER = Reader("MXFP4 (GGUF blocks)", "mxfp4", _recognises, _check, _read, _rows, _packed_rows)
