"""Mosaic GPU's names, in one place: what Pallas exports, and the little of its inside that the kernels here use.

Import it only where backend.mosaic_why_not allows: before jax 0.11 some of these names do not exist.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir as _ir
from jaxlib.mlir.dialects import arith as _arith
from jaxlib.mlir.dialects import llvm as _llvm
from jaxlib.mlir.dialects import nvvm as _nvvm
from jaxlib.mlir.dialects import scf as _scf
from jaxlib.mlir.dialects import vector as _vector

__all__ = [
    "ACCUMULATOR",
    "ProductRef",
    "ROW",
    "SCALAR",
    "TILED",
    "TILED_F32",
    "WGMMA",
    "FragmentedArray",
    "arith",
    "compiler_params",
    "in_first_warp",
    "inline",
    "ir",
    "load_array",
    "llvm",
    "mgpu_utils",
    "mosaic_kernel",
    "nvvm",
    "plgpu",
    "scf",
    "vector",
]

# The stubs of MLIR's bindings do not describe how its builders are meant to be called.
ir: Any = _ir
arith: Any = _arith
llvm: Any = _llvm
nvvm: Any = _nvvm
scf: Any = _scf
vector: Any = _vector
FragmentedArray: Any = mgpu.FragmentedArray
load_array: Any = plgpu.load  # its second parameter is gone since jax 0.11
# A warpgroup's [64, n] array as wgmma leaves it, in pairs of columns, and one number per row of it.
WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
# A product's accumulator as Pallas's own wgmma takes it, by shape and dtype.
ProductRef: Any = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage]
# The same elements in the same threads, one register each: what an unfinished product must stay in.
ACCUMULATOR = plgpu.Layout._WGMMA_ACC_32BIT
SCALAR = plgpu.Layout.WG_SPLAT(())
# bf16 in shared memory as TMA writes and wgmma reads it: 8 rows of 128 bytes an atom, 128-byte swizzle.
TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
TILED_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


def compiler_params() -> plgpu.CompilerParams:
    """For kernels that place every barrier themselves, with exp2 as the hardware has it (2 ulp)."""
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,
        reduction_scratch_bytes=0,
        lowering_semantics=mgpu.LoweringSemantics.Lane,
    )


def in_first_warp(body: Callable[[], None]) -> None:
    """Trace body for the first warp of the warpgroup alone."""
    with warnings.catch_warnings():
        # jax 0.12 deprecates the name in favour of one that 0.11 lacks.
        warnings.filterwarnings("ignore", "jax.experimental.pallas.core_map is deprecated", DeprecationWarning)
        core_map = pl.core_map

    @core_map(plgpu.WarpMesh(axis_name="warp"))
    def _():
        pl.when(lax.axis_index("warp") == 0)(body)


def inline(arg_types: tuple = (), return_type: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator for a function (context, *operands) that emits code; what it makes takes the operands alone."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)


def mosaic_kernel(
    program: Callable[[], str],
    *,
    out_shape: jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct],
    grid: int,
    warpgroups: int,
    shared_memory_bytes: int,
    cluster: int = 1,
    optional: int = 0,
    name: str | None = None,
    maps: dict[int, tuple[int, int]] | None = None,
):
    """A kernel whose whole body is one PTX block, launched through Mosaic GPU.

    Args:
        program: makes the block; $0, $1, ... are the operands' addresses, then the output's (64-bit), then that of
            shared memory (32-bit), then those of optional operands and of tensor maps (64-bit). It must mask by
            itself, and every thread must reach its end.
        out_shape: of the result, or of several, whose addresses follow each other.
        grid: clusters; CTAs where they are alone.
        warpgroups: of a CTA.
        shared_memory_bytes: dynamic.
        cluster: CTAs of a cluster, neighbours in %ctaid.x.
        optional: how many of the last operands are such.
        name: what a profile calls the kernel.
        maps: for TMA, by operand (a matrix): rows and columns of the box that one instruction copies, in 128-byte
            swizzle.

    Returns:
        A function of the operands.
    """

    outs = 1 if isinstance(out_shape, jax.ShapeDtypeStruct) else len(out_shape)

    def body(*refs):
        always = len(refs) - 1 - outs - optional
        refs = (*refs[:always], *refs[-1 - outs :], *refs[always : -1 - outs])
        shared = always + outs

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
        def inline(ctx, *memrefs):
            addresses = [
                _llvm.ptrtoint(_ir.IntegerType.get_signless(32 if i == shared else 64), mgpu_utils.memref_ptr(memref))
                for i, memref in enumerate(memrefs)
            ]
            for i, box in (maps or {}).items():
                pointer = ctx._get_tma_desc(memrefs[i], (), None, box, 128, None)
                addresses.append(_llvm.ptrtoint(_ir.IntegerType.get_signless(64), pointer))
            constraints = ",".join(["r" if i == shared else "l" for i in range(len(addresses))] + ["~{memory}"])
            _llvm.inline_asm(None, addresses, program(), constraints, has_side_effects=True)

        inline(*refs)

    if name is not None:
        body.__name__ = name  # a profile shows it
    threads = {"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}
    clusters = {"cluster": (cluster,), "cluster_names": ("rank",)} if cluster > 1 else {}
    return plgpu.kernel(
        body,
        out_type=out_shape,
        scratch_types=[plgpu.SMEM((shared_memory_bytes // 4,), jnp.int32)],
        grid=(grid,),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **threads,
        **clusters,
    )
