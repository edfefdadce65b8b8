"""Operands for tests of the FP4 products, with the answer that the float64 oracle gives."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle

from mla_fp4_jax import FP4Array

GROUP = {"mxfp4": 32, "nvfp4": 16}
NAN_BYTE = {"mxfp4": 255, "nvfp4": 0x7F}
GLOBAL = np.float32(0.5)  # of NVFP4 in the exact regime: a power of two


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one product.

    `rows` (first, number) of w's N rows are used, and `first_x` columns of x lie before the used ones, `rest_x`
    after them.
    """

    contract: str
    batch: int
    heads: int
    num_rows: int
    columns: int
    rows: tuple[int, int] | None = None
    first_x: int = 0
    rest_x: int = 0

    @property
    def used(self) -> tuple[int, int]:
        return self.rows or (0, self.num_rows)

    @property
    def contraction(self) -> int:
        return self.columns if self.contract == "columns" else self.used[1]

    @property
    def out(self) -> int:
        return self.used[1] if self.contract == "columns" else self.columns

    @property
    def kwargs(self) -> dict:
        return {"contract": self.contract, "rows": self.rows, "x_columns": (self.first_x, self.contraction)}

    def __str__(self) -> str:
        first, number = self.used
        x = f"-x{self.first_x}+{self.rest_x}" if self.first_x or self.rest_x else ""
        rows = f"N{self.num_rows}" if self.rows is None else f"N{first}+{number}of{self.num_rows}"
        return f"{self.contract}-B{self.batch}-H{self.heads}-{rows}-C{self.columns}{x}"


def random_scales(rng, shape, format: str, exact: bool) -> np.ndarray:
    """Scale bytes: powers of two 2^-2 .. 2^2 in the exact regime, else of weights of order 2^-6 .. 1."""
    if format == "mxfp4":
        return (
            rng.integers(125, 130, shape).astype(np.uint8)
            if exact
            else rng.integers(119, 126, shape).astype(np.uint8)
        )
    return (
        (rng.integers(5, 10, shape) << 3).astype(np.uint8) if exact else rng.integers(8, 64, shape).astype(np.uint8)
    )


def decode(packed: np.ndarray, scales: np.ndarray, format: str, glob: float = 1.0) -> np.ndarray:
    """Float64 weights by the oracle."""
    if not scales.size:
        return np.zeros((*packed.shape[:-1], 2 * packed.shape[-1]))
    scale = oracle.e8m0(scales) if format == "mxfp4" else oracle.e4m3(scales)
    return oracle.dequantize(oracle.unpack(packed), scale, glob)


def operands(rng, case: Case, *, format="mxfp4", exact=True, dtype=jnp.bfloat16, poison=True):
    """x, w and the exact product, float64 [B, H, out].

    In the exact regime x is in {0, +-1, +-2}, so every partial sum is a multiple of 1/8 below 2^16: exact in
    float32 in any order. What lies outside the used rows and columns is poisoned: NaN in x, NaN scales in w.
    """
    assert not exact or case.contraction <= 1024
    shape = (case.heads, case.num_rows, case.columns)
    packed = rng.integers(0, 256, (*shape[:2], case.columns // 2), np.uint8)
    groups = case.columns // GROUP[format]
    scales = random_scales(rng, (*shape[:2], groups), format, exact)
    first, number = case.used
    unused = np.ones(case.num_rows, bool)
    unused[first : first + number] = False
    if poison:
        packed[:, unused] = 0xFF
        scales[:, unused] = NAN_BYTE[format]
    used_x = (case.batch, case.heads, case.contraction)
    inner = rng.integers(-2, 3, used_x) if exact else rng.standard_normal(used_x)
    inner = inner.astype(jnp.dtype(dtype))
    x = np.full((*used_x[:2], case.first_x + case.contraction + case.rest_x), np.nan if poison else 0, inner.dtype)
    x[..., case.first_x : case.first_x + case.contraction] = inner
    glob = GLOBAL if format == "nvfp4" else None
    w = FP4Array.from_packed(packed, scales, glob, format=format)
    dense = decode(packed[:, first : first + number], scales[:, first : first + number], format, float(glob or 1))
    return jnp.asarray(x), w, oracle.bmm(inner.astype(np.float64), dense, case.contract), (inner, dense)


def rounded(exact: np.ndarray, dtype) -> np.ndarray:
    """Float64 values that float32 holds, rounded once to dtype."""
    single = exact.astype(np.float32)
    np.testing.assert_array_equal(single, exact)
    return single.astype(jnp.dtype(dtype))


def ulp(x: np.ndarray, dtype) -> np.ndarray:
    """Spacing of dtype at |x|."""
    bits = ml_dtypes.finfo(jnp.dtype(dtype)).nmant
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(x), 1e-30))) - bits)
