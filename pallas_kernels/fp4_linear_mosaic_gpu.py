"""The FP4 linear map in Pallas Mosaic GPU, for Hopper: checks, choice of tiles, launch."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from pallas_kernels import fp4_linear_direct as direct
from pallas_kernels import fp4_linear_few as few
from pallas_kernels import fp4_linear_h200 as h200
from pallas_kernels import fp4_linear_many as many
from pallas_kernels import fp4_linear_tiles as tiling
from pallas_kernels import fp4_linear_wgmma as wgmma
from pallas_kernels.backend import target_gpu
from pallas_kernels.fp4_bmm_tiles import SHARED_MEMORY_BYTES
from pallas_kernels.fp4_linear_tiles import Config, Problem
from pallas_kernels.fragments import BLOCK

AnyConfig = Config | few.Config | many.Config
# With more tokens than these a weight is decoded once, to memory, and a library does the product. Up to here that is
# slower on an H100: with 512 tokens DeepSeek-V3's linears take 41, 87 and 269 us that way, of which the library's
# product is 29, 52 and 155, and 30, 57 and 153 as they are (bench/linear.py). Above, nobody has measured.
MOST_TOKENS = 512
# Up to so many, a token's bits do not depend on their number: the contraction is split by the weight's shape alone.
INVARIANT_TOKENS = 64
_MIN_K = 2 * BLOCK
_INT32_BYTES = 2**31
_SMS = 132  # of an H100, and of an H200
_FEW_TOKENS = 16  # up to which a thread of a warpgroup has registers to spare
_ENOUGH_WARPGROUPS = 220  # that stream weights, on the whole GPU: not quite two for each of its SMs
_LONG_PART = 32  # blocks of a part from which on a CTA's warpgroups had better share x
_DIRECT_PART = 16  # blocks of a part that a thread's registers hold
_ENOUGH_CTAS = 100
# What more tokens cost, in cycles, as fitted to the sweeps in bench/results (within 15 % for most of them).
_CTA_CYCLES = 9000  # to fill the ring, and to store
_EXCHANGE_CYCLES_PER_BYTE = 0.15  # of a cluster's partial results
_L2_BYTES_PER_CYCLE = 3200  # of x, for all SMs
_WHOLE, _IN_PARTS = 0.9, 1.2  # what that is multiplied by, without and with clusters, to compare with the others
_FITTED_TOKENS = 40  # of a CTA, from which on the cost of fp4_linear_many.py is known
_FEW_OF_MANY = 48  # above, it is quicker where it fills the GPU
_MANY_TOKENS = 256  # from which on fp4_linear_many.py is quicker; what that costs, fitted likewise
_MANY_CTA_CYCLES = 6500
_MANY_CYCLES_PER_PART, _MANY_CYCLES_PER_TOKEN = 1000, 60  # of partial results
_MANY_SLOTS = 16  # more gain nothing
_GPCS, _GPC_SMS = 8, 16  # of an H100, at least: a cluster's CTAs run in one


# Jitted, so that a program of many equal calls lowers one.
@functools.partial(jax.jit, static_argnames=("out_dtype", "config"))
def fp4_linear_mosaic_gpu(
    x: Float[Array, "M K"],
    codes: UInt8[Array, "N half"],
    scales: UInt8[Array, "N groups"],
    second: tuple[UInt8[Array, "N2 half"], UInt8[Array, "N2 groups"]] | None = None,
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: AnyConfig | None = None,
) -> Float[Array, "M N_all"]:
    """out[m, n] = sum_k x[m, k] A[n, k], accumulated in float32.

    Args:
        x: bfloat16.
        codes: packed bytes in fragment order, without key rows.
        scales: scale bytes likewise, none above 128.
        second: codes and scales of another weight, whose outputs follow: A is the first on top of the second.
        out_dtype: bfloat16 or float32.
        config: None for default_config.

    Raises:
        NotImplementedError: see unsupported.
        ValueError: the config does not fit.
    """
    first = codes.shape[0] if second is not None else 0
    batch, outputs = x.shape[0], codes.shape[0] + (0 if second is None else second[0].shape[0])
    reason = unsupported(x.shape, (outputs, 2 * codes.shape[1]))
    if reason is not None:
        raise NotImplementedError(f"fp4_linear_mosaic_gpu: {reason}")
    if batch == 0:
        return jnp.zeros((0, outputs), out_dtype)
    problem = Problem(batch, outputs, 2 * codes.shape[1], jnp.dtype(out_dtype).itemsize, first)
    config = default_config(problem, on_an_h200=_on_an_h200()) if config is None else config
    from pallas_kernels.mosaic import mosaic_kernel  # names that jax before 0.11 lacks

    kernel = mosaic_kernel(
        out_shape=jax.ShapeDtypeStruct((batch, outputs), out_dtype),
        optional=0 if second is None else 2,
        **_launch(problem, config),
    )
    return kernel(x, codes, scales, *(second or ()))


def _launch(problem: Problem, config: AnyConfig) -> dict[str, Any]:
    """mosaic_kernel's arguments for the kernel that this config is of."""
    if isinstance(config, few.Config):
        few.check_config(problem)
        return {
            "program": functools.partial(few.program, problem),
            "grid": few.ctas(problem),
            "warpgroups": few.WARPGROUPS,
            "shared_memory_bytes": few.shared_memory_bytes(problem),
        }
    if isinstance(config, many.Config):
        many.check_config(problem, config)
        return {
            "program": functools.partial(many.program, problem, config),
            "grid": many.clusters(problem, config),
            "cluster": config.split,
            "warpgroups": many.WARPGROUPS,
            "shared_memory_bytes": many.shared_memory_bytes(config),
            "maps": {0: many.box(config)},
        }
    tiling.check_config(problem, config)
    return {
        "program": functools.partial(direct.program if config.direct else wgmma.program, problem, config),
        "grid": tiling.clusters(problem, config),
        "cluster": config.split,
        "warpgroups": config.warpgroups,
        "shared_memory_bytes": tiling.shared_memory_bytes(config),
    }


def unsupported(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> str | None:
    """Why this kernel cannot multiply x [M, K] by weights [N, K], or None."""
    outputs, contraction = w_shape
    if outputs % BLOCK or contraction % _MIN_K or not outputs * contraction:
        return f"w must be [N, K], N a multiple of {BLOCK} and K of {_MIN_K}; got {list(w_shape)}."
    for name, size in (("x", math.prod(x_shape)), ("the output", x_shape[0] * outputs)):
        if 4 * size >= _INT32_BYTES:
            return f"{name} must have fewer than 2^29 elements (offsets are 32 bits); got {size}. Split the batch."
    return None


def default_split(outputs: int, contraction: int) -> int:
    """Parts of the contraction for up to INVARIANT_TOKENS tokens: enough for the whole GPU to stream weights."""
    tiles, blocks = outputs // BLOCK, contraction // BLOCK
    split = 1
    while split < 8 and tiles * split < _ENOUGH_WARPGROUPS and blocks % (4 * split) == 0:
        split *= 2
    return split


def _on_an_h200() -> bool:
    """Whether the code is traced for one; a GH200 has other memory."""
    gpu = target_gpu()
    return gpu is not None and "H200" in gpu.kind.split()


def default_config(problem: Problem, *, on_an_h200: bool = False) -> AnyConfig:
    """Tiles for a problem, from measurements on an H100, and for few tokens on an H200 (bench/results).

    But for `split`, no choice changes a bit of the result.
    """
    if problem.batch <= INVARIANT_TOKENS:
        split = default_split(problem.outputs, problem.contraction)
        return (h200.few_tokens(problem, split) if on_an_h200 else None) or _few_tokens(problem, split)
    if problem.batch > _MANY_TOKENS:
        return _many(problem)
    some, many_ = _some(problem), _many(problem)
    quicker = many_.tokens >= _FITTED_TOKENS and _many_cycles(problem, many_) < _cycles(problem, some)
    return many_ if quicker else some


def _few_tokens(problem: Problem, split: int) -> AnyConfig:
    """As many warpgroups in a CTA, since they share x, as leave a CTA for most SMs.

    Above 48 tokens fp4_linear_many.py where it fills the GPU.
    """
    tiles = problem.outputs // BLOCK
    part = problem.contraction // BLOCK // split
    tokens = _round_up(problem.batch, 8)
    ctas = -(-tiles // 2) * split
    if tokens > _FEW_OF_MANY and _ENOUGH_CTAS <= ctas <= _at_once(split) * split:
        return _with_many_slots(many.Config(split, tokens))
    alone = 2 * _FEW_TOKENS if split == 1 else _FEW_TOKENS
    if tokens <= alone and tiles * split <= 3 * _SMS and part <= _LONG_PART:  # all resident at once
        warpgroups = 1
    else:
        fitting = [number for number in (4, 3, 2, 1) if tiles % number == 0]
        warpgroups = next((n for n in fitting if tiles // n * split >= _ENOUGH_CTAS), 1)
    if warpgroups == 1 and split > 1 and _FEW_TOKENS < tokens <= 2 * _FEW_TOKENS and part <= _DIRECT_PART:
        return Config(split, tokens, 1, 1, part, 1, push=True, direct=True)
    if warpgroups == 1:  # several CTAs to an SM
        slots = 3 if tokens > 2 * _FEW_TOKENS else 6 if split == 1 and tokens <= _FEW_TOKENS else 4
        config = Config(split, tokens, 1, 1, 2, slots, push=split > 1 and tokens <= _FEW_TOKENS)
    elif warpgroups % 2 == 0 and tokens <= 2 * _FEW_TOKENS and part % 4 == 0:
        config = Config(split, tokens, warpgroups, 1, 4, 5 if warpgroups == 2 and tokens <= _FEW_TOKENS else 4)
    else:
        config = Config(split, tokens, warpgroups, 1, 2, 6 if warpgroups == 2 else 8)
    return tiling.with_fitting_slots(problem, config)


def _some(problem: Problem) -> Config:
    """The least by a model of the cost."""
    tiles, blocks = problem.outputs // BLOCK, problem.contraction // BLOCK
    choices = []
    for most_tokens, warpgroups, per_warpgroup in ((128, 2, 2), (128, 3, 1), (256, 2, 1), (128, 1, 1)):
        if tiles % (warpgroups * per_warpgroup) or problem.first_outputs % (BLOCK * per_warpgroup):
            continue
        if most_tokens == 256 and problem.batch <= 128:
            continue
        tokens = _round_up(-(-problem.batch // -(-problem.batch // most_tokens)), 8)
        for split in (1, 2, 4, 8):
            if blocks % (2 * split) == 0:
                slots = 3 if warpgroups == 1 else 8  # a lone warpgroup shares its SM with another CTA
                choices.append(Config(split, tokens, warpgroups, per_warpgroup, 2 // per_warpgroup, slots))
    return tiling.with_fitting_slots(problem, min(choices, key=lambda config: _cycles(problem, config)))


def _cycles(problem: Problem, config: Config) -> float:
    """About how long: waves of CTAs, each as long as its products; mostly under them, x from the L2 cache."""
    ctas = tiling.clusters(problem, config) * config.split
    exchange = tiling.exchange_bytes(config) if config.split > 1 else 0
    # wgmma m64nNk16 takes N / 2 cycles of an SM's tensor cores; short ones leave gaps, a lone warpgroup's more.
    gaps = 1.25 if config.warpgroups == 1 else 1.14 if config.tokens <= 128 else 1.0
    blocks = problem.contraction // BLOCK // config.split
    products = 2 * config.tokens * config.warpgroups * config.tiles * blocks * gaps
    ctas_cycles = -(-ctas // _SMS) * (products + _CTA_CYCLES + _EXCHANGE_CYCLES_PER_BYTE * exchange)
    x_cycles = 2 * config.tokens * blocks * BLOCK * ctas / _L2_BYTES_PER_CYCLE
    both = max(ctas_cycles, x_cycles) + 0.2 * min(ctas_cycles, x_cycles)
    return both * (_WHOLE if config.split == 1 else _IN_PARTS)


def _many(problem: Problem) -> many.Config:
    pairs = problem.contraction // (2 * BLOCK)
    fewest = -(-problem.batch // _MANY_TOKENS)
    most = fewest + 2
    if problem.batch <= _MANY_TOKENS:
        most = max(fewest, problem.batch // _FITTED_TOKENS)
    choices = [
        _with_many_slots(many.Config(split, _round_up(-(-problem.batch // tiles), 8)))
        for tiles in range(fewest, most + 1)
        for split in range(1, min(8, pairs) + 1)
    ]
    return min(choices, key=lambda config: _many_cycles(problem, config))


def _many_cycles(problem: Problem, config: many.Config) -> float:
    """About how long: waves of clusters, each as long as its products and what comes before and after them."""
    split, tokens = config.split, config.tokens
    waves = -(-many.clusters(problem, config) // _at_once(split))
    blocks = 2 * -(-problem.contraction // (2 * BLOCK * split))
    # Few tokens: what decodes, not the tensor cores.
    cycles = max(2 * tokens + 280, 3.8 * tokens + 28) * blocks + _MANY_CTA_CYCLES
    if split > 1:
        cycles += _MANY_CYCLES_PER_PART * split + _MANY_CYCLES_PER_TOKEN * tokens * (split - 1) / split
    return waves * cycles


def _at_once(split: int) -> int:
    """Clusters of CTAs of which an SM takes one."""
    return _SMS if split == 1 else _GPC_SMS // split * _GPCS


def _with_many_slots(config: many.Config) -> many.Config:
    """As many slots as the CTA's shared memory holds, an even number up to _MANY_SLOTS."""
    slots = _MANY_SLOTS
    while many.shared_memory_bytes(dataclasses.replace(config, slots=slots)) > SHARED_MEMORY_BYTES:
        slots -= 2
    return dataclasses.replace(config, slots=slots)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
