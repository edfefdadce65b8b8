"""Compiled for an H100 without one: no spills, shared memory fits, no dequantised weight, packed bytes stay put."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import sm90
from flax import nnx
from kernel_checks import GROUP, Case, run

import pallas_kernels
from mla_fp4_jax import FP4Array, MLAAttention, MLAConfig, fp4_bmm, one_pack
from mla_fp4_jax.ops.implementations import PREFERENCE, TRITON, XLA

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(sm90.why_not() is not None, reason=f"compiles for an H100: {sm90.why_not()}"),
]
KERNELS = tuple(name for name in PREFERENCE if name != XLA)
PACKED = ("u8", "f4e2m1fn")
BATCHES = (1, 8, 16, 17, 32, 64, 128, 256, 512)
H100 = "NVIDIA H100 80GB HBM3"  # as the tuned tables and sm90.TARGET have it
shape = jax.ShapeDtypeStruct


def abstract_pack(case: Case, implementation: str) -> FP4Array:
    rows, groups = (case.H, case.P + case.V), case.L // GROUP[case.format]
    scale = shape((), jnp.float32) if case.format == "nvfp4" else None
    w = FP4Array(shape((*rows, case.L), jnp.float4_e2m1fn), shape((*rows, groups), jnp.uint8), scale, case.format)
    if implementation != "mosaic_gpu":
        return w
    from pallas_kernels.fragments import FragmentOrder

    return dataclasses.replace(w, order=FragmentOrder(case.P))


def compile_bmm(implementation: str, case: Case, contract: str) -> sm90.Program:
    x = shape((case.B, case.H, case.P + 64 if contract == "rows" else case.L), jnp.dtype(case.dtype))
    product = functools.partial(run, implementation, case, contract)
    return sm90.compile_for_h100(product, x, abstract_pack(case, implementation))


def check_kernels(program: sm90.Program) -> None:
    assert program.kernels
    for kernel in program.kernels:
        assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
    for name, dynamic in program.dynamic_shared_bytes.items():
        static = max((kernel.static_shared_bytes for kernel in program.kernels if kernel.name == name), default=0)
        assert static + dynamic <= sm90.SHARED_MEMORY_LIMIT, (name, dynamic)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("contract", ["rows", "columns"])
@pytest.mark.parametrize("batch", BATCHES)
def test_deepseek_v3(implementation, contract, batch):
    program = compile_bmm(implementation, Case(batch, 128, 128, 128, 512), contract)
    check_kernels(program)
    assert len(program.kernels) == 1 and program.dynamic_shared_bytes
    assert program.temp_bytes == 0 and program.moves_of(*PACKED) == [] and program.moves_of("bf16") == []


@functools.cache
def tuned_rows() -> list:
    """(problem, config) of the shipped tables, one for each program but for its numbers of heads and tokens."""
    from pallas_kernels.fp4_bmm_mosaic_gpu import NAME
    from pallas_kernels.fp4_bmm_tiles import Config, Problem

    folder = Path(pallas_kernels.__file__).parent / "tuned_tables"
    rows = [row for path in folder.glob("*.json") for row in json.loads(path.read_text())[NAME]]
    pairs = [(Problem(**row["problem"]), Config(**row["config"])) for row in rows]
    return list({(p.transposed, p.contraction, config): (p, config) for p, config in pairs}.values())


@functools.cache
def untuned_defaults() -> list:
    """(problem, config) for each default of bench.matmul's shapes, up to 512 tokens, that no other test compiles."""
    from bench.matmul import DEEPSEEK_V3, OTHER_SHAPES
    from pallas_kernels.fp4_bmm_mosaic_gpu import NAME, default_config, problem_of
    from pallas_kernels.fragments import FragmentOrder
    from pallas_kernels.tuned import tuned_config

    def problem(size, batch: int, contract: str):
        x = shape((batch, size.H, size.P + size.R if contract == "rows" else size.L), jnp.bfloat16)
        codes, scales = (shape((size.H, size.P + size.V, size.L // n), jnp.uint8) for n in (2, 32))
        return problem_of(x, codes, scales, FragmentOrder(size.P), contract, 0)

    def of(batches, *sizes) -> list:
        pairs = itertools.product(sizes, batches, ("rows", "columns"))
        return [(p, default_config(p)) for p in itertools.starmap(problem, pairs)]

    # What test_tuned_configurations compiles, and what test_deepseek_v3 does for want of a row.
    untuned = [pair for pair in of(BATCHES, DEEPSEEK_V3) if tuned_config(NAME, H100, pair[0]) is None]
    elsewhere = {(p.transposed, p.contraction, config) for p, config in tuned_rows() + untuned}
    found = {}
    for p, config in of(range(1, BATCHES[-1] + 1), DEEPSEEK_V3, *OTHER_SHAPES):
        found.setdefault((p.transposed, p.contraction, config), (p, config))
    own = {key: pair for key, pair in found.items() if key not in elsewhere}
    return [
        pytest.param(p, config, id=f"{'k_up' if p.transposed else 'v_up'}-B{p.batch}-H{p.heads}-K{p.contraction}")
        for p, config in own.values()
    ]


def check_configuration(problem, config) -> None:
    """Compile a product of weights with but 64 rows that it does not use, so that no other test compiles the same."""
    p = problem
    rows = (p.contraction, 64) if p.transposed else (64, p.outputs)
    case = Case(p.batch, p.heads, *rows, p.outputs if p.transposed else p.contraction)
    x = shape((p.batch, p.heads, p.x_width), jnp.bfloat16)
    product = functools.partial(
        fp4_bmm,
        contract="rows" if p.transposed else "columns",
        rows=(0, case.P) if p.transposed else (case.P, case.V),
        x_columns=(p.first_x, p.contraction),
        implementation="mosaic_gpu",
        config=config,
    )
    program = sm90.compile_for_h100(product, x, abstract_pack(case, "mosaic_gpu"))
    check_kernels(program)
    assert len(program.kernels) == 1 and program.dynamic_shared_bytes


@pytest.mark.parametrize(("problem", "config"), tuned_rows())
def test_tuned_configurations(problem, config):
    check_configuration(problem, config)


@pytest.mark.parametrize(("problem", "config"), untuned_defaults())
def test_default_configurations(problem, config):
    check_configuration(problem, config)


@pytest.mark.parametrize("contract", ["rows", "columns"])
@pytest.mark.parametrize("batch", [1, 64, 512])
def test_nvfp4_in_fragment_order(batch, contract):
    program = compile_bmm("mosaic_gpu", Case(batch, 128, 128, 128, 512, format="nvfp4"), contract)
    check_kernels(program)
    assert len(program.kernels) == 1 and program.temp_bytes == 0 and program.moves_of(*PACKED) == []


@pytest.mark.parametrize("contract", ["rows", "columns"])
@pytest.mark.parametrize(
    "case",
    [
        Case(7, 64, 192, 256, 512),
        Case(65, 5, 192, 256, 256),
        Case(16, 16, 64, 64, 128, "float16"),
        Case(3, 8, 128, 128, 512, "float32"),
        Case(129, 8, 128, 128, 512, "float32"),
        Case(17, 3, 40, 24, 96),
    ],
    ids=str,
)
def test_other_sizes_and_dtypes(case, contract):
    program = compile_bmm(TRITON, case, contract)
    check_kernels(program)
    assert program.temp_bytes == 0 and program.moves_of(*PACKED) == []


def test_a_gradient_through_a_named_implementation():
    """Of a kernel whose order serves one contraction of each row: another one takes the backward product."""
    case = Case(4, 8, 128, 128, 512)

    def gradient(x, w):
        return jax.grad(lambda x: run("mosaic_gpu", case, "columns", x, w).astype(jnp.float32).sum())(x)

    x, w = shape((case.B, case.H, case.L), jnp.bfloat16), abstract_pack(case, "mosaic_gpu")
    assert len(sm90.compile_for_h100(gradient, x, w).kernels) >= 1
    with pytest.raises(NotImplementedError, match="rows must be"):  # as a product of its own it is refused
        sm90.compile_for_h100(functools.partial(run, "mosaic_gpu", dataclasses.replace(case, P=64), "rows"), x, w)


@pytest.mark.parametrize("page_size", [None, 64])
def test_a_decode_step_keeps_its_weights_packed(page_size):
    config = MLAConfig(
        hidden_size=512,
        num_attention_heads=16,
        q_lora_rank=256,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )

    def build(implementation: str) -> MLAAttention:
        return MLAAttention(
            config, linear_formats={"o_proj": "mxfp4"}, implementation=implementation, rngs=nnx.Rngs(0)
        )

    def compile_step(implementation: str) -> sm90.Program:
        layer = nnx.eval_shape(functools.partial(build, implementation))
        cache = jax.eval_shape(lambda: layer.init_cache(2, 128, page_size=page_size))
        x = shape((2, 1, config.hidden_size), jnp.bfloat16)
        return sm90.compile_for_h100(MLAAttention.decode, layer, x, cache, donate_argnums=(2,))

    program = compile_step(TRITON)
    names = {kernel.name for kernel in program.kernels}
    assert {"fp4_bmm_rows", "fp4_bmm_columns"} <= names
    for kernel in program.kernels:
        assert kernel.spill_bytes == 0, kernel
    dequantised = 2 * config.num_attention_heads * (128 + 128) * config.kv_lora_rank
    assert program.temp_bytes < dequantised // 4 and program.moves_of(*PACKED) == []
    # The same question of XLA's own products has the other answer, so it is one that can be answered.
    assert compile_step(XLA).temp_bytes > dequantised // 4
    # The cache is updated in place.
    cache_bytes = 2 * 2 * 128 * config.cache_dim
    assert program.compiled.memory_analysis().alias_size_in_bytes >= cache_bytes


def test_the_one_pack_view_moves_nothing():
    """From the checkpoint's own arrays to the kernels, without a byte in between."""

    def products(x, packed, scales):
        w = one_pack(packed, scales, num_heads=128, qk_nope_head_dim=128, v_head_dim=128)
        case = Case(4, 128, 128, 128, 512)
        return run(TRITON, case, "columns", run(TRITON, case, "rows", x, w), w)

    operands = shape((128 * 256, 256), jnp.uint8), shape((128 * 256, 16), jnp.uint8)
    program = sm90.compile_for_h100(products, shape((4, 128, 192), jnp.bfloat16), *operands)
    between = 4 * 128 * 512 * 2  # the first product's result
    assert program.temp_bytes == between and program.moves_of(*PACKED) == []


def test_a_move_is_seen():
    program = sm90.compile_for_h100(
        lambda codes: codes.swapaxes(0, 1) + jnp.uint8(1), shape((64, 96, 128), jnp.uint8)
    )
    copied = sm90.compile_for_h100(lambda codes: codes.T, shape((64, 96), jnp.uint8))
    assert program.moves_of("u8") or copied.moves_of("u8")


def test_spills_are_seen():
    """A tile far too large for the registers spills, and says so."""
    from pallas_kernels.fp4_bmm_triton import Config

    case = Case(128, 2, 128, 128, 512, "float32")
    call = functools.partial(fp4_bmm, contract="columns", implementation=TRITON, config=Config(32, 64, 64, 1, 1))
    program = sm90.compile_for_h100(call, shape((128, 2, 512), jnp.float32), abstract_pack(case, TRITON))
    assert any(kernel.spill_bytes > 0 for kernel in program.kernels)
