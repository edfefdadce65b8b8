"""Readers of NVFP4: e2m1 codes [out, in/2] as in MXFP4, e4m3 scales [out, in/16], one float32 scale for the weight.

Two producers, two meanings of that last scale, told apart by its name:

    ModelOpt, Quark       `weight`, `weight_scale`, `weight_scale_2`               e2m1 * (scale * scale_2)
    compressed-tensors,   `weight_packed`, `weight_scale`, `weight_global_scale`   e2m1 * (scale / global_scale)
    AutoRound

A quotient by a float32 is not a product with any float32, so FP4Array keeps such a divisor as it is. NVFP4 stays
packed; it is never turned into MXFP4.
"""

from __future__ import annotations

import functools

import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.mxfp4 import check_codes, read_codes
from mla_fp4_jax.checkpoint.nibbles import decode_codes
from mla_fp4_jax.checkpoint.placement import Placement
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.fp4_array import FP4Array

GROUP_SIZE = 16
SCALAR_SHAPES = ((), (1,), (1, 1))
MULTIPLIES, DIVIDES = "weight_scale_2", "weight_global_scale"


def _recognises_multiplied(stored: StoredWeight) -> bool:
    return stored.has(weight=("U8", "F4"), weight_scale=("F8_E4M3",), weight_scale_2=("F32",))


def _recognises_divided(stored: StoredWeight) -> bool:
    return stored.has(weight_packed=("U8", "F4"), weight_scale=("F8_E4M3",), weight_global_scale=("F32",))


def _check(stored: StoredWeight) -> None:
    check_codes(stored, stored.first("weight_packed", "weight"), "NVFP4", GROUP_SIZE)
    rows, columns = stored.shape
    why = f" for NVFP4 {list(stored.shape)}, one scale to {GROUP_SIZE}"
    stored.require_shape("weight_scale", (rows, columns // GROUP_SIZE), why)
    suffix = stored.first(MULTIPLIES, DIVIDES)
    if stored.tensors[suffix].shape not in SCALAR_SHAPES:
        raise stored.error(suffix, f"must be one F32 for the whole weight; got {stored.tensors[suffix]}.")


def check_e4m3(stored: StoredWeight, suffix: str, scales: np.ndarray, origin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """e4m3 scale bytes, which begin at `origin` of the tensor, or CheckpointError where one is NaN."""
    scales = scales.view(np.uint8)
    bad = (scales & 0x7F) == 0x7F
    if bad.any():
        row, group = (np.argwhere(bad)[0] + origin).tolist()
        raise stored.error(suffix, f"must not hold e4m3's NaN; found at [{row}, {group}].")
    return scales


def decode_nvfp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values of packed bytes [N, C/2] under float32 scales [N, C/16], the weight's own scale included."""
    values = decode_codes(packed).reshape(*scales.shape, -1)
    return (values * scales[..., None]).reshape(packed.shape[0], -1)


def _read(stored: StoredWeight, dtype: DTypeLike, placement: Placement) -> FP4Array:
    del dtype  # of dense weights; these stay packed
    scales = stored.read("weight_scale").view(np.uint8)
    for origin, part in placement.local(scales):
        check_e4m3(stored, "weight_scale", part, origin)
    packed = read_codes(stored, stored.first("weight_packed", "weight"))
    if MULTIPLIES in stored.tensors:
        return placement.packed(packed, scales, "nvfp4", global_scale=stored.read_scalar(MULTIPLIES))
    return placement.packed(packed, scales, "nvfp4", global_divisor=stored.read_scalar(DIVIDES, divides=True))


def _rows(stored: StoredWeight, part: slice) -> np.ndarray:
    check_e4m3(stored, "weight_scale", stored.read("weight_scale")[part])
    scales = stored.read("weight_scale")[part].astype(np.float32)
    if MULTIPLIES in stored.tensors:
        scales = scales * stored.read_scalar(MULTIPLIES)
    else:
        scales = scales / stored.read_scalar(DIVIDES, divides=True)
    return decode_nvfp4(read_codes(stored, stored.first("weight_packed", "weight"), part), scales)


_reader = functools.partial(Reader, "NVFP4", "nvfp4", check=_check, read=_read, rows=_rows)
READERS = (_reader(recognises=_recognises_multiplied), _reader(recognises=_recognises_divided))
