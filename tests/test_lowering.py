"""Every shipped configuration lowers for CUDA and ROCm on a machine without a GPU, to Triton IR that parses."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from kernel_checks import GROUP, Case, run

from mla_fp4_jax import FP4Array
from mla_fp4_jax.ops.implementations import TRITON
from pallas_kernels.backend import abstract_gpu, target_gpu
from pallas_kernels.fp4_bmm_triton import check_config, default_config

DEVICES = {
    "sm_80": ("NVIDIA A100-SXM4-80GB", "cuda"),
    "sm_89": ("NVIDIA L4", "cuda"),
    "sm_90": ("NVIDIA H100 80GB HBM3", "cuda"),
    "sm_100": ("NVIDIA B200", "cuda"),
    "gfx942": ("gfx942", "rocm"),
}
CASES = tuple(
    Case(batch, 3, *sizes, dtype, format)
    for format, dtype, sizes, batch in itertools.product(
        ("mxfp4", "nvfp4"),
        ("bfloat16", "float16", "float32"),
        ((128, 128, 512), (192, 256, 512), (64, 128, 256), (40, 24, 96), (1, 1, 32)),
        (1, 16, 17, 33, 64, 65, 129, 512),
    )
)


def config_of(case: Case, contract: str):
    contraction = case.P if contract == "rows" else case.L
    group = GROUP[case.format]
    return default_config(
        contract, batch=case.B, contraction=contraction, group=group, dtype=jnp.dtype(case.dtype), gpu=target_gpu()
    )


def distinct(contract: str) -> list[Case]:
    """One case for each configuration that the device's defaults come to, and its kind of operands."""
    found = {(case.format, case.dtype, config_of(case, contract)): case for case in CASES}
    return list(found.values())


def lower(case: Case, contract: str, platform: str):
    shape = jax.ShapeDtypeStruct
    rows = (case.H, case.P + case.V)
    scales = shape((*rows, case.L // GROUP[case.format]), jnp.uint8)
    scale = shape((), jnp.float32) if case.format == "nvfp4" else None
    w = FP4Array(shape((*rows, case.L), jnp.float4_e2m1fn), scales, scale, case.format)
    x = shape((case.B, case.H, case.P + 64 if contract == "rows" else case.L), jnp.dtype(case.dtype))
    product = jax.jit(functools.partial(run, TRITON, case, contract))
    return product.trace(x, w).lower(lowering_platforms=(platform,))


def triton_kernels(lowered) -> list[str]:
    """The Triton IR of a lowered program's kernels, parsed and printed again."""
    from jax._src.lib.mlir import ir
    from jax._src.pallas.triton.lowering import _new_ir_context

    found = []

    def visit(op) -> ir.WalkResult:
        if op.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"]):
            found.append(ir.StringAttr(ir.DictAttr(op.attributes["mhlo.backend_config"])["ir"]).value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    with _new_ir_context():
        return [str(ir.Module.parse(code)) for code in found]


@pytest.mark.parametrize("contract", ["rows", "columns"])
@pytest.mark.parametrize("device", DEVICES)
def test_every_default_configuration_lowers(device, contract):
    kind, platform = DEVICES[device]
    with abstract_gpu(kind, platform):
        cases = distinct(contract)
        assert len(cases) >= 10
        for case in cases:
            (kernel,) = triton_kernels(lower(case, contract, platform))
            assert f"fp4_bmm_{contract}" in kernel and "tt.dot" in kernel, case


@pytest.mark.parametrize("device", DEVICES)
def test_default_configurations_fit_the_device(device):
    with abstract_gpu(*DEVICES[device]):
        for case, contract in itertools.product(CASES, ("rows", "columns")):
            operands = {"contract": contract, "group": GROUP[case.format], "dtype": jnp.dtype(case.dtype)}
            check_config(config_of(case, contract), gpu=target_gpu(), **operands)


@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_only_the_tokens_tile_and_the_stages_follow_the_batch(contract):
    """What batch invariance rests on."""
    with abstract_gpu():
        for case in CASES:
            config, alone = config_of(case, contract), config_of(dataclasses.replace(case, B=1), contract)
            same = {"block_b": config.block_b, "num_stages": config.num_stages}
            assert dataclasses.replace(alone, **same) == config


@pytest.mark.parametrize("contract", ["rows", "columns"])
def test_loads_and_stores_are_masked(contract):
    """Before jax 0.12 Pallas adds no masks of its own; every access of a kernel must bring one."""
    with abstract_gpu():
        (kernel,) = triton_kernels(lower(Case(17, 3, 40, 24, 96), contract, "cuda"))
    accesses = [line for line in kernel.splitlines() if "tt.load" in line or "tt.store" in line]
    assert len(accesses) >= 4
    for line in accesses:
        operands = line.split("tt.load" if "tt.load" in line else "tt.store")[1].split(":")[0].split("{")[0]
        # (pointer, mask, other) and (pointer, value, mask).
        assert operands.count("%") >= 3, line
