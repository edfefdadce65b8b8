"""Two e2m1 codes to a byte, on the host: their values, and the order that GGUF puts them in."""

from __future__ import annotations

import numpy as np

GGUF_HALF = 16  # bytes of a group of 32
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=-1)


def decode_codes(packed: np.ndarray) -> np.ndarray:
    """e2m1 values of packed bytes [N, C/2], the low nibble first, as float32 [N, C]."""
    return _PAIRS[packed].reshape(packed.shape[0], -1)


def to_linear_order(packed: np.ndarray) -> np.ndarray:
    """Packed bytes [N, C/2] from GGUF's order to the usual one."""
    groups = packed.reshape(packed.shape[0], -1, GGUF_HALF)
    low, high = groups & 15, groups >> 4
    codes = np.concatenate([low, high], axis=-1)  # elements 0 .. 31
    return (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(packed.shape)
