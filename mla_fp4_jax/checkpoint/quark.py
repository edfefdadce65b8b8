"""Reader of AMD Quark's MXFP4: `weight` U8 [out, in/2] and `weight_scale` U8 [out, in/32].

value = e2m1(code) * 2^(scale - 127), the element with the even index in the low nibble. ModelOpt's MXFP4 has
the same tensors. They stay the checkpoint's own bytes.
"""

from __future__ import annotations

import numpy as np
from jax.typing import DTypeLike

from mla_fp4_jax.checkpoint.stored import Reader, StoredWeight, to_device
from mla_fp4_jax.fp4_array import FP4Array

GROUP_SIZE = 32  # OCP Microscaling Formats v1.0, section 5.2
NAN_SCALE = 255  # e8m0's only NaN, section 5.4.1


def _recognises(stored: StoredWeight) -> bool:
    return stored.has(weight=("U8",), weight_scale=("U8", "F8_E8M0"))


def _check(stored: StoredWeight) -> None:
    if len(stored.shape) != 2 or stored.shape[1] % GROUP_SIZE:
        raise stored.error("weight", f"must not be MXFP4: groups of {GROUP_SIZE} do not divide {list(stored.shape)}.")
    rows, columns = stored.shape
    why = f" for MXFP4 {list(stored.shape)}"
    stored.require_shape("weight", (rows, columns // 2), f"{why}, two codes to a byte")
    stored.require_shape("weight_scale", (rows, columns // GROUP_SIZE), f"{why}, one scale to {GROUP_SIZE}")


def _read(stored: StoredWeight, dtype: DTypeLike) -> FP4Array:
    del dtype  # of dense weights; these stay packed
    scales = stored.read("weight_scale").view(np.uint8)
    bad = scales == NAN_SCALE
    if bad.any():
        row, group = np.argwhere(bad)[0].tolist()
        raise stored.error("weight_scale", f"must not hold {NAN_SCALE}, e8m0's NaN; found at [{row}, {group}].")
    return FP4Array.from_packed(to_device(stored.read("weight")), to_device(scales))


READER = Reader("MXFP4", _recognises, _check, _read)
