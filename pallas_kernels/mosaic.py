"""Mosaic GPU's names, in one place: what Pallas exports, and the little of its inside that the kernels here use.

Import it only where backend.mosaic_why_not allows: before jax 0.11 some of these names do not exist.
"""

from __future__ import annotations

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

__all__ = [
    "ACCUMULATOR",
    "ROW",
    "SCALAR",
    "TILED",
    "WGMMA",
    "FragmentedArray",
    "arith",
    "compiler_params",
    "ir",
    "llvm",
    "mgpu_utils",
    "nvvm",
    "plgpu",
    "scf",
    "vector",
]

FragmentedArray = mgpu.FragmentedArray
# A warpgroup's [64, n] array as wgmma leaves it, in pairs of columns, and one number per row of it.
WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
# The same elements in the same threads, one register each: what an unfinished product must stay in.
ACCUMULATOR = plgpu.Layout._WGMMA_ACC_32BIT
SCALAR = plgpu.Layout.WG_SPLAT(())
# bf16 in shared memory as TMA writes and wgmma reads it: 8 rows of 128 bytes an atom, 128-byte swizzle.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def compiler_params() -> plgpu.CompilerParams:
    """For kernels that place every barrier themselves, with exp2 as the hardware has it (2 ulp)."""
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        lowering_semantics=mgpu.LoweringSemantics.Lane,
    )
