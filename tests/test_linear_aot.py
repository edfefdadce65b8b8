"""fp4_linear's kernels compiled for an H100 without one: no spills, shared memory fits, nothing dense in memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
import sm90

from mla_fp4_jax import FP4Array, fp4_linear
from mla_fp4_jax.ops.dense import fp4_dense
from mla_fp4_jax.ops.implementations import MOSAIC
from pallas_kernels import fp4_linear_few as few
from pallas_kernels.fp4_linear_mosaic_gpu import MOST_TOKENS, AnyConfig, default_config, fp4_linear_mosaic_gpu
from pallas_kernels.fp4_linear_tiles import Problem
from pallas_kernels.fragments import FragmentOrder

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(sm90.why_not() is not None, reason=f"compiles for an H100: {sm90.why_not()}"),
]
shape = jax.ShapeDtypeStruct
# DeepSeek-V3's projections, q_a and kv_a fused and apart, then small ones with odd numbers of tiles.
SIZES = ((2112, 7168), (1536, 7168), (576, 7168), (24576, 1536), (7168, 16384), (192, 384), (64, 128), (512, 512))
TOKENS = (1, 8, 16, 17, 24, 32, 33, 64, 65, 80, 96, 128, 129, 256, 300, 512)


def problems(*, on_an_h200: bool) -> dict[tuple[AnyConfig, int], Problem]:
    """One for each configuration that these shapes' defaults come to, and dtype of the result."""
    found = {}
    for sizes in SIZES:
        for tokens in TOKENS:
            for out_bytes in (2, 4) if sizes == (2112, 7168) else (2,):
                problem = Problem(tokens, *sizes, out_bytes)
                found.setdefault((default_config(problem, on_an_h200=on_an_h200), out_bytes), problem)
    return found


def defaults() -> list:
    """Problems without a config for an H100's defaults, with one for those that an H200 has instead."""
    own, other = problems(on_an_h200=False), problems(on_an_h200=True)
    rows = [("h100", None, problem) for problem in own.values()]
    rows += [("h200", key[0], problem) for key, problem in other.items() if key not in own]
    return [
        pytest.param(config, p, id=f"{where}-{p.batch}-{p.outputs}-{p.contraction}-{p.out_bytes}")
        for where, config, p in rows
    ]


def abstract(size: tuple[int, ...], order: FragmentOrder) -> FP4Array:
    scales = shape((*size[:-1], size[-1] // 32), jnp.uint8)
    return FP4Array(shape(size, jnp.float4_e2m1fn), scales, order=order)


def check(program: sm90.Program) -> None:
    """One kernel and nothing else: no spills, products under way together, shared memory that fits, no copies."""
    (kernel,) = program.kernels
    assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0, kernel
    assert not program.serialised
    assert 0 < program.dynamic_shared_bytes["mosaic"] + kernel.static_shared_bytes <= sm90.SHARED_MEMORY_LIMIT
    assert program.temp_bytes == 0 and program.moves_of("u8", "f4e2m1fn", "bf16") == []


@pytest.mark.parametrize(("config", "problem"), defaults())
def test_every_default_configuration(config, problem):
    out = jnp.bfloat16 if problem.out_bytes == 2 else jnp.float32
    call = functools.partial(fp4_linear, implementation=MOSAIC, preferred_element_type=out, config=config)
    x = shape((problem.batch, problem.contraction), jnp.bfloat16)
    w = abstract((problem.outputs, problem.contraction), FragmentOrder(0))
    check(sm90.compile_for_h100(call, x, w))


@pytest.mark.parametrize("first", [0, 1536])
@pytest.mark.parametrize("tokens", [2, 7, 8])  # none that is compiled above
def test_the_kernel_for_few_tokens(tokens, first):
    call = functools.partial(fp4_linear_mosaic_gpu, config=few.Config())
    x = shape((tokens, 7168), jnp.bfloat16)
    weights = [
        (shape((rows, 3584), jnp.uint8), shape((rows, 224), jnp.uint8)) for rows in (first, 2112 - first) if rows
    ]
    check(sm90.compile_for_h100(call, x, *weights[0], *weights[1:]))


@pytest.mark.parametrize(
    ("size", "key_rows"), [((7168, 16384), 0), ((128, 256, 512), 128), ((3, 448, 192), 192), ((2, 64, 64), 64)]
)
def test_the_dense_matrix(size, key_rows):
    dense = functools.partial(fp4_dense, dtype=jnp.bfloat16)
    check(sm90.compile_for_h100(dense, abstract(size, FragmentOrder(key_rows))))


def test_many_tokens_write_the_dense_matrix_once():
    """Above the crossover the only scratch memory is the matrix itself, for as long as the call takes."""
    call = functools.partial(fp4_linear, implementation=MOSAIC)
    x, w = shape((MOST_TOKENS + 1, 1024), jnp.bfloat16), abstract((2048, 1024), FragmentOrder(0))
    program = sm90.compile_for_h100(call, x, w)
    dense = 2 * 2048 * 1024
    assert program.temp_bytes == dense and program.moves_of("u8", "f4e2m1fn") == []
