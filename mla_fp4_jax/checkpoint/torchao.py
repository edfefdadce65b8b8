"""Reader of torchao's safetensors: MXFP4 and NVFP4 tensors flattened into their parts, scales often swizzled.

    `_weight_qdata` U8 [out, in/2], `_weight_scale` F8_E8M0 (MXFP4) or F8_E4M3 (NVFP4), and for NVFP4 a
    `_weight_per_tensor_scale` F32 that multiplies

Swizzled scales, the order that Blackwell's tensor cores read, are padded to 128 rows and 4 columns and stored as
[ceil(rows/128) * 32, ceil(columns/4) * 16]: no plain scales have that shape, so it tells; the recipe in the file's
header (JSON under the weight's name) must agree. The scales are put in plain order, codes are the file's own bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.dtypes import NUMPY
from mla_fp4_jax.checkpoint.mxfp4 import check_codes, check_e8m0, decode_mxfp4, read_codes
from mla_fp4_jax.checkpoint.nvfp4 import SCALAR_SHAPES, check_e4m3, decode_nvfp4
from mla_fp4_jax.checkpoint.placement import Placement
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.checkpoint.strict_json import parse_object, quoted
from mla_fp4_jax.errors import CheckpointError
from mla_fp4_jax.fp4_array import FP4Array

CODES, SCALES, GLOBAL = "_weight_qdata", "_weight_scale", "_weight_per_tensor_scale"
_TYPES = {"MXTensor": 32, "NVFP4Tensor": 16}


def _recognises_mx(stored: StoredWeight) -> bool:
    return stored.has(_weight_qdata=("U8", "F4"), _weight_scale=("F8_E8M0", "U8"))


def _recognises_nv(stored: StoredWeight) -> bool:
    with_global = {CODES: ("U8", "F4"), SCALES: ("F8_E4M3",), GLOBAL: ("F32",)}
    return stored.has(**with_global) or stored.has(_weight_qdata=("U8", "F4"), _weight_scale=("F8_E4M3",))


def _check(stored: StoredWeight, *, group: int) -> None:
    check_codes(stored, CODES, "MXFP4" if group == 32 else "NVFP4", group)
    if GLOBAL in stored.tensors and stored.tensors[GLOBAL].shape not in SCALAR_SHAPES:
        raise stored.error(GLOBAL, f"must be one F32 for the whole weight; got {stored.tensors[GLOBAL]}.")
    recipe = _recipe(stored)
    swizzled = _is_swizzled(stored, group)
    said = recipe.get("is_swizzled_scales")
    if isinstance(said, bool) and said != swizzled:
        raise stored.error(
            SCALES,
            f"must be {'swizzled' if said else 'plain'}, as the header's recipe says; got {stored.tensors[SCALES]}.",
        )
    if type(recipe.get("block_size")) is int and recipe["block_size"] != group:
        raise stored.error(SCALES, f"must have groups of {group}; the header's recipe says {recipe['block_size']}.")


def _recipe(stored: StoredWeight) -> dict:
    """The tensor subclass's attributes from the file's header; empty without them.

    Raises:
        CheckpointError: not JSON, or of a class that is not read.
    """
    name = f"{stored.name}.weight"
    text = stored.source.metadata_of(stored.tensors[CODES].name).get(name)
    if text is None:
        return {}
    where = f"{stored.source.file_of(stored.tensors[CODES].name)}: the recipe of {quoted(name)}"
    recipe = parse_object(text.encode("utf-8", "surrogatepass"), where)
    if recipe.get("_type") not in _TYPES:
        raise CheckpointError(f"{where} must be of {' or '.join(_TYPES)}; got {quoted(recipe.get('_type'))}.")
    data = recipe.get("_data")
    data = data if isinstance(data, dict) else {}
    element = data.get("elem_dtype")
    element = element.get("_data") if isinstance(element, dict) else element
    if element not in (None, "float4_e2m1fn_x2"):
        raise CheckpointError(f"{where} must be of float4_e2m1fn_x2 elements; got {quoted(element)}.")
    return data


def _is_swizzled(stored: StoredWeight, group: int) -> bool:
    rows, groups = stored.shape[0], stored.shape[1] // group
    swizzled = (-(-rows // 128) * 32, -(-groups // 4) * 16)
    entry = stored.tensors[SCALES]
    if entry.shape == swizzled:
        return True
    stored.require_shape(SCALES, (rows, groups), f" or, swizzled, {list(swizzled)}")
    return False


def unswizzle(scales: np.ndarray, rows: int, groups: int) -> np.ndarray:
    """Scale bytes in plain order [rows, groups] from the order of Blackwell's tensor cores."""
    row_tiles, column_tiles = -(-rows // 128), -(-groups // 4)
    tiles = scales.reshape(row_tiles, column_tiles, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return tiles.reshape(128 * row_tiles, 4 * column_tiles)[:rows, :groups]


def scale_bytes(stored: StoredWeight, group: int) -> np.ndarray:
    """The scales' bytes in plain order [rows, groups]."""
    scales = stored.read(SCALES).view(np.uint8)
    if not _is_swizzled(stored, group):
        return scales
    return np.ascontiguousarray(unswizzle(scales, stored.shape[0], stored.shape[1] // group))


def _plain_scales(stored: StoredWeight, group: int) -> np.ndarray:
    scales = scale_bytes(stored, group)
    return check_e8m0(stored, SCALES, scales) if group == 32 else check_e4m3(stored, SCALES, scales)


def _read(stored: StoredWeight, dtype: DTypeLike, placement: Placement, *, group: int) -> FP4Array:
    del dtype  # of dense weights; these stay packed
    scales, packed = _plain_scales(stored, group), read_codes(stored, CODES)
    if group == 32:
        return placement.packed(packed, scales, "mxfp4")
    whole = stored.read_scalar(GLOBAL) if GLOBAL in stored.tensors else None
    return placement.packed(packed, scales, "nvfp4", global_scale=whole)


def _rows(stored: StoredWeight, part: slice, *, group: int) -> np.ndarray:
    scales, packed = _plain_scales(stored, group)[part], read_codes(stored, CODES, part)
    if group == 32:
        return decode_mxfp4(packed, scales)
    values = np.ascontiguousarray(scales).view(NUMPY["F8_E4M3"]).astype(np.float32)
    return decode_nvfp4(packed, values * stored.read_scalar(GLOBAL) if GLOBAL in stored.tensors else values)


def _reader(name: str, recognises: Callable[[StoredWeight], bool], group: int) -> Reader:
    return Reader(
        name,
        name.lower(),
        recognises,
        functools.partial(_check, group=group),
        functools.partial(_read, group=group),
        functools.partial(_rows, group=group),
    )


READERS = (_reader("MXFP4", _recognises_mx, 32), _reader("NVFP4", _recognises_nv, 16))
