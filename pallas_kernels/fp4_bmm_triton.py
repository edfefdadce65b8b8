"""A batched matmul on packed FP4 weights in Pallas Triton: one kernel for both orientations and both formats.

    contract="rows"     out[b, h, c] = sum_n x[b, h, x0 + n] * W[h, r0 + n, c]     scales along the output
    contract="columns"  out[b, h, n] = sum_c x[b, h, x0 + c] * W[h, r0 + n, c]     scales along the contraction

A program owns block_out outputs of block_b batch rows of one head. It walks the contraction in steps of block_k:
load packed weights and x, decode in registers, multiply, accumulate in float32. The weights are the dot's left
side, so that the tensor core sees block_out weights by block_b batch rows: few rows cost little, and the same
instruction serves 1 row and 128.

Batch invariance: block_out, block_k and num_warps never depend on the batch (default_config), every dot adds its
block_k products to the accumulator in the same order, and block_b only widens the instruction's batch side. So a
row's result does not depend, bit for bit, on the batch that it sits in.

Every load and store is masked. Masked weights read as code 0 with scale byte 0, masked x as 0: a product of 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels.backend import Gpu, pl, pltriton, shared_memory_limit
from pallas_kernels.fp4_tile import decode_tile

X_DTYPES = ("bfloat16", "float16", "float32")
SCALE_FORMATS = ("e8m0", "e4m3")
_INT32_ELEMENTS = 2**31


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled. Any feasible one gives the same result up to the order of summation.

    Attributes:
        block_b: batch rows a program computes.
        block_out: outputs a program computes.
        block_k: contraction elements per step.
        num_warps: warps a program.
        num_stages: steps whose loads are in flight at once.
    """

    block_b: int
    block_out: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class _Problem:
    contract: str
    batch: int
    heads: int
    first_row: int
    num_rows: int
    num_columns: int
    first_x: int
    group: int
    scale_format: str

    @property
    def out(self) -> int:
        return self.num_rows if self.contract == "columns" else self.num_columns

    @property
    def contraction(self) -> int:
        return self.num_columns if self.contract == "columns" else self.num_rows

    def tile(self, config: Config) -> tuple[int, int]:
        """Rows and columns of a weight tile."""
        if self.contract == "columns":
            return config.block_out, config.block_k
        return config.block_k, config.block_out


def fp4_bmm_triton(
    x: Float[Array, "B H X"],
    codes: UInt8[Array, "H N half"],
    scales: UInt8[Array, "H N groups"],
    *,
    contract: str,
    rows: tuple[int, int],
    x_columns: tuple[int, int],
    scale_format: str,
    out_dtype: DTypeLike,
    global_scale: Float[Array, ""] | None = None,
    config: Config | None = None,
    gpu: Gpu | None = None,
    interpret: bool = False,
) -> Float[Array, "B H out"]:
    """The batched matmul of this module's docstring.

    Args:
        x: bfloat16, float16 or float32.
        codes: two e2m1 codes a byte, the low nibble first; C = 2 * half columns.
        scales: scale bytes, one for each C / groups consecutive columns.
        contract: "rows" or "columns".
        rows: (first, number) of W's rows to use, r0 and N above.
        x_columns: (first, number) of x's columns to use; the number is the contraction's length.
        scale_format: "e8m0" or "e4m3".
        out_dtype: of the result.
        global_scale: a float32 factor on the accumulator; None for 1.
        config: None for default_config.
        gpu: what the code is for, to check that the config fits; None for an H100.
        interpret: run in the Pallas interpreter (any device; shows nothing about bounds).

    Returns:
        [B, H, N] or [B, H, C] in out_dtype. Nothing outside is read or written.

    Raises:
        NotImplementedError: see unsupported.
        ValueError: the config does not fit; see check_config.

    Numerics:
        W is exact. Products with bfloat16 and float16 x are exact (float16 goes through TF32, which holds both
        sides), those with float32 x are IEEE float32; all are accumulated in float32.
    """
    batch, heads, _ = x.shape
    columns = 2 * codes.shape[2]
    reason = unsupported(x, codes, scales, contract=contract, rows=rows, scale_format=scale_format)
    if reason is not None:
        raise NotImplementedError(f"fp4_bmm_triton: {reason}")
    group = columns // scales.shape[2] if scales.shape[2] else 0
    problem = _Problem(contract, batch, heads, *rows, columns, x_columns[0], group, scale_format)
    if 0 in (batch, heads, problem.out, problem.contraction):
        return jnp.zeros((batch, heads, problem.out), out_dtype)
    if config is None:
        contraction = problem.contraction
        config = default_config(contract, batch=batch, contraction=contraction, group=group, dtype=x.dtype, gpu=gpu)
    check_config(config, contract=contract, group=group, dtype=x.dtype, gpu=gpu)
    operands = [x, codes, scales]
    if global_scale is not None:
        operands.append(global_scale.astype(jnp.float32).reshape(1))
    tiles = _ceil_div(batch, config.block_b) * _ceil_div(problem.out, config.block_out)
    return pl.pallas_call(
        functools.partial(_kernel, problem=problem, config=config),
        out_shape=jax.ShapeDtypeStruct((batch, heads, problem.out), out_dtype),
        grid=(heads * tiles,),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=f"fp4_bmm_{contract}",
    )(*operands)


def _kernel(x_ref, codes_ref, scales_ref, *rest, problem: _Problem, config: Config):
    *global_scale_ref, out_ref = rest
    block_b, block_out, block_k = config.block_b, config.block_out, config.block_k
    tile_rows, tile_columns = problem.tile(config)
    # One grid axis, whose limit no shape reaches. Neighbours share a head's x, then its weights, in cache.
    program, index_out = _div_rem(pl.program_id(0), _ceil_div(problem.out, block_out))
    head, index_b = _div_rem(program, _ceil_div(problem.batch, block_b))
    first_out, first_b = index_out * block_out, index_b * block_b
    operand, precision = _dot_operands(x_ref.dtype)
    b_mask = _within(first_b, block_b, problem.batch)

    def step(i, acc):
        first_k = i * block_k
        k_mask = _within(first_k, block_k, problem.contraction)
        x = pltriton.load(
            x_ref.at[pl.ds(first_b, block_b), head, pl.ds(problem.first_x + first_k, block_k)],
            mask=b_mask[:, None] & k_mask[None, :],
            other=0,
        )
        columns_contract = problem.contract == "columns"
        row, column = (first_out, first_k) if columns_contract else (first_k, first_out)
        row_mask = _within(row, tile_rows, problem.num_rows)
        row_slice = pl.ds(problem.first_row + row, tile_rows)

        def load_bytes(ref, per_byte):
            first, size = _div_rem(column, per_byte)[0], tile_columns // per_byte
            mask = row_mask[:, None] & _within(first, size, problem.num_columns // per_byte)[None, :]
            return pltriton.load(ref.at[head, row_slice, pl.ds(first, size)], mask=mask, other=0)

        codes, scales = load_bytes(codes_ref, 2), load_bytes(scales_ref, problem.group)
        w = decode_tile(codes, scales, scale_format=problem.scale_format, dtype=operand)
        w = w if columns_contract else w.T
        return acc + pltriton.dot(w, x.astype(operand).T, precision=precision)

    steps = np.int32(_ceil_div(problem.contraction, block_k))
    acc = jax.lax.fori_loop(np.int32(0), steps, step, jnp.zeros((block_out, block_b), jnp.float32))
    if global_scale_ref:
        acc = acc * global_scale_ref[0][0]
    pltriton.store(
        out_ref.at[pl.ds(first_b, block_b), head, pl.ds(first_out, block_out)],
        acc.T.astype(out_ref.dtype),
        mask=b_mask[:, None] & _within(first_out, block_out, problem.out)[None, :],
    )


def _div_rem(a, b: int):
    """Quotient and remainder of a non-negative int32 scalar, int32 under jax_enable_x64 too."""
    return jax.lax.div(a, np.int32(b)), jax.lax.rem(a, np.int32(b))


def _within(first, size: int, limit: int):
    """Which of first .. first + size - 1 lie below limit."""
    return first + jnp.arange(size, dtype=jnp.int32) < limit


def _dot_operands(x_dtype) -> tuple[DTypeLike, jax.lax.Precision | None]:
    """The dtype both sides of the dot take, and its precision."""
    if x_dtype == jnp.bfloat16:
        return jnp.bfloat16, None
    # TF32 holds float16's 11 significant bits and the weights' 6 at most, so nothing is lost; IEEE for float32.
    return jnp.float32, jax.lax.Precision.HIGH if x_dtype == jnp.float16 else jax.lax.Precision.HIGHEST


def unsupported(x, codes, scales, *, contract: str, rows: tuple[int, int], scale_format: str) -> str | None:
    """Why this kernel cannot take these operands (arrays or anything with shape and dtype), or None."""
    if contract not in ("rows", "columns"):
        return f"contract must be 'rows' or 'columns'; got {contract!r}."
    if scale_format not in SCALE_FORMATS:
        return f"scale_format must be one of {SCALE_FORMATS}; got {scale_format!r}."
    if jnp.dtype(x.dtype).name not in X_DTYPES:
        return f"x must be one of {', '.join(X_DTYPES)}; got {jnp.dtype(x.dtype).name}."
    columns, groups = 2 * codes.shape[2], scales.shape[2]
    group = columns // groups if groups else 0
    if columns and (group * groups != columns or group & (group - 1)):
        return f"the group size must be a power of 2 dividing the columns; got {groups} groups of {columns} columns."
    out = rows[1] if contract == "columns" else columns
    sizes = {
        "x": math.prod(x.shape),
        "codes": math.prod(codes.shape),
        "the output": math.prod(x.shape[:2]) * out,
    }
    for name, size in sizes.items():
        if size >= _INT32_ELEMENTS:
            return f"{name} must have fewer than 2^31 elements (offsets are 32 bits); got {size}. Split the batch."
    return None


def default_config(
    contract: str, *, batch: int, contraction: int, group: int, dtype: DTypeLike, gpu: Gpu | None = None
) -> Config:
    """A config that fits the GPU. Only block_b and num_stages look at the batch.

    64 outputs on 4 warps are the least for which Hopper has its own tensor core instruction (wgmma, m64), and
    that one then serves every batch. Smaller tiles would not help few heads: what a warp decodes stays the same.

    Args:
        contract: "rows" or "columns".
        batch: B.
        contraction: elements summed.
        group: columns that share a scale.
        dtype: x's.
        gpu: None for an H100.
    """
    columns = contract == "columns"
    if jnp.dtype(dtype) == jnp.float32:  # no tensor core: larger tiles overflow the registers
        return Config(16, 32 if columns else max(32, group), max(32, group) if columns else 32, 4, 2)
    most = 128 if jnp.dtype(dtype) == jnp.bfloat16 else 64
    block_b = min(max(16, _next_power_of_2(batch)), most)
    block_k = min(max(16, _next_power_of_2(contraction)), 64)
    block_out = 64
    if columns:
        block_k = max(block_k, group)
    else:
        block_out = max(block_out, group)
    config = Config(block_b, block_out, block_k, num_warps=4, num_stages=4 if block_b <= 32 else 3)
    while config.num_stages > 1 and shared_memory_bytes(config, dtype=dtype) > shared_memory_limit(gpu):
        config = dataclasses.replace(config, num_stages=config.num_stages - 1)
    return config


def check_config(config: Config, *, contract: str, group: int, dtype: DTypeLike, gpu: Gpu | None = None) -> None:
    """Raise ValueError unless the config can be compiled for these operands on this GPU (None: an H100)."""
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), 16 if field.name.startswith("block") else 1
        power = isinstance(value, int) and value >= least and value & (value - 1) == 0
        if field.name == "num_stages":
            power = isinstance(value, int) and 1 <= value <= 8
        if not power:
            rule = "between 1 and 8" if field.name == "num_stages" else f"a power of 2 of at least {least}"
            raise ValueError(
                f"fp4_bmm_triton: config.{field.name} must be {rule}; got {value!r}. "
                "Leave config out for a default that fits."
            )
    field = "block_k" if contract == "columns" else "block_out"
    if getattr(config, field) % group:
        raise ValueError(
            f"fp4_bmm_triton: config.{field} must hold whole groups of {group} columns; got "
            f"{getattr(config, field)}. Use a multiple of {group}."
        )
    needed, limit = shared_memory_bytes(config, dtype=dtype), shared_memory_limit(gpu)
    if needed > limit:
        raise ValueError(
            f"fp4_bmm_triton: config must need at most {limit} bytes of shared memory; got about {needed} for "
            f"{config}. Make num_stages, block_k or block_b smaller."
        )


def shared_memory_bytes(config: Config, *, dtype: DTypeLike) -> int:
    """An upper estimate of a program's shared memory in bytes: staged loads, and tiles on their way to the dot."""
    operand = jnp.dtype(_dot_operands(jnp.dtype(dtype))[0]).itemsize
    x, w = config.block_b * config.block_k, config.block_out * config.block_k
    loads = x * jnp.dtype(dtype).itemsize + w // 2 + w // 16
    converted = 0 if jnp.dtype(dtype).itemsize == operand else x * operand
    result = config.block_out * config.block_b * 4
    return max(config.num_stages * loads + converted + w * operand + w // 2, result)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
