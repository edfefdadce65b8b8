"""Reader of MXFP4: two e2m1 codes to a byte [out, in/2], the even index in the low nibble, e8m0 scales [out, in/32].

value = e2m1(code) * 2^(scale - 127). The bytes are the same from every producer; the names differ:
`weight` + `weight_scale` AMD Quark and ModelOpt, `weight_packed` + `weight_scale` compressed-tensors and AutoRound,
`weight` + `scale` DeepSeek's own FP4. They stay the checkpoint's own bytes.
"""

from __future__ import annotations

import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.nibbles import decode_codes, to_linear_order
from mla_fp4_jax.checkpoint.placement import Placement
from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight
from mla_fp4_jax.fp4_array import FP4Array

GROUP_SIZE = 32  # OCP Microscaling Formats v1.0, section 5.2
NAN_SCALE = 255  # e8m0's only NaN, section 5.4.1
SCALES = ("U8", "F8_E8M0")


def _recognises(stored: StoredWeight) -> bool:
    return (
        stored.has(weight=("U8", "F4"), weight_scale=SCALES)
        or stored.has(weight_packed=("U8", "F4"), weight_scale=SCALES)
        or stored.has(weight=("U8", "I8", "F4"), scale=("F8_E8M0",))
    )


def _suffixes(stored: StoredWeight) -> tuple[str, str]:
    return stored.first("weight_packed", "weight"), stored.first("weight_scale", "scale")


def _check(stored: StoredWeight) -> None:
    codes, scale = _suffixes(stored)
    check_codes(stored, codes, "MXFP4", GROUP_SIZE)
    rows, columns = stored.shape
    why = f" for MXFP4 {list(stored.shape)}, one scale to {GROUP_SIZE}"
    stored.require_shape(scale, (rows, columns // GROUP_SIZE), why)


def check_codes(stored: StoredWeight, suffix: str, kind: str, group: int) -> None:
    """Raise CheckpointError unless packed codes have the shape that the weight asks for."""
    if len(stored.shape) != 2 or stored.shape[1] % group:
        raise stored.error(suffix, f"must not be {kind}: groups of {group} do not divide {list(stored.shape)}.")
    rows, columns = stored.shape
    if stored.tensors[suffix].dtype == "F4":  # whose shape counts elements
        stored.require_shape(suffix, (rows, columns), f" for {kind}")
    else:
        stored.require_shape(suffix, (rows, columns // 2), f" for {kind} {list(stored.shape)}, two codes to a byte")


def read_codes(stored: StoredWeight, suffix: str, part: slice = slice(None)) -> np.ndarray:
    """Rows of packed codes as uint8 [..., in/2], low nibble first; a view of the file but in GGUF's order."""
    codes = stored.read(suffix)[part].view(np.uint8)
    return to_linear_order(codes) if stored.gguf_nibbles else codes


def check_e8m0(stored: StoredWeight, suffix: str, scales: np.ndarray, origin: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Scale bytes, which begin at `origin` of the tensor, or CheckpointError where one is NaN."""
    scales = scales.view(np.uint8)
    bad = scales == NAN_SCALE
    if bad.any():
        row, group = (np.argwhere(bad)[0] + origin).tolist()
        raise stored.error(suffix, f"must not hold {NAN_SCALE}, e8m0's NaN; found at [{row}, {group}].")
    return scales


def decode_mxfp4(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Values of packed bytes [N, C/2] under e8m0 bytes [N, C/32], as float32, exact."""
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    values = decode_codes(packed).reshape(*scales.shape, -1)
    return (values * powers[..., None]).reshape(packed.shape[0], -1)


def _packed_rows(stored: StoredWeight, part: slice) -> tuple[np.ndarray, np.ndarray]:
    codes, scale = _suffixes(stored)
    return read_codes(stored, codes, part), check_e8m0(stored, scale, stored.read(scale)[part])


def _read(stored: StoredWeight, dtype: DTypeLike, placement: Placement) -> FP4Array:
    del dtype  # of dense weights; these stay packed
    codes, scale = _suffixes(stored)
    scales = stored.read(scale).view(np.uint8)
    for origin, part in placement.local(scales):
        check_e8m0(stored, scale, part, origin)
    return placement.packed(read_codes(stored, codes), scales, "mxfp4")


def _rows(stored: StoredWeight, part: slice) -> np.ndarray:
    return decode_mxfp4(*_packed_rows(stored, part))


READER = Reader("MXFP4", "mxfp4", _recognises, _check, _read, _rows, _packed_rows)
