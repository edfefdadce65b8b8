"""How the Hopper FP4 matmul is tiled: its static problem, a config, and what both together need."""

from __future__ import annotations

import dataclasses

from pallas_kernels.fragments import BLOCK, GROUP

SLAB_BYTES = 128  # 64 bfloat16: the row of a 128-byte swizzle
ALIGNMENT = 1024  # of a swizzled matrix, bytes: eight rows
SHARED_MEMORY_BYTES = 227 * 1024  # most that a CTA of a Hopper GPU may have


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled; no choice changes a bit of the result.

    Attributes:
        tokens: tokens of a wgmma, a multiple of 8.
        warpgroups: of a CTA.
        tiles: 64-output tiles that a warpgroup computes.
        token_tiles: tiles of `tokens` tokens that a CTA computes.
        slots: token tiles of x in shared memory at once.
        accumulators: sets of accumulator registers; with more than one, stores overlap the next tile's products.
        delay: x of tiles after the first is asked for once so many 64-k blocks of weights have arrived.
        evict_first: "x" or "out" where that shall leave the L2 cache before anything else, so that the rest of
            operands that do not fit can stay; "" for neither.
    """

    tokens: int
    warpgroups: int
    tiles: int
    token_tiles: int = 1
    slots: int = 1
    accumulators: int = 1
    delay: int = 0
    evict_first: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static side of a product. Sizes are elements unless they say bytes.

    Attributes:
        transposed: the weights are a head's key rows (k_up); else its other rows.
        batch, heads: B, H.
        outputs: M.
        contraction: K.
        x_width, first_x: x is [B, H, x_width] and used from column first_x on.
        head_code_bytes, first_code_byte: of a head's codes, and where the used ones begin in it.
        head_scale_bytes, first_scale_byte: likewise.
        group: weights to a scale: 32 of MXFP4, 16 of NVFP4.
    """

    transposed: bool
    batch: int
    heads: int
    outputs: int
    contraction: int
    x_width: int
    first_x: int
    head_code_bytes: int
    first_code_byte: int
    head_scale_bytes: int
    first_scale_byte: int
    group: int = GROUP


def grid(problem: Problem, config: Config) -> int:
    """CTAs: the parts of a head's outputs vary fastest, then heads, then token tiles."""
    parts = problem.outputs // (BLOCK * config.warpgroups * config.tiles)
    return parts * problem.heads * -(-problem.batch // (config.tokens * config.token_tiles))


def shared_memory_bytes(problem: Problem, config: Config) -> int:
    """x slots, two staging buffers a warpgroup, and what aligning them may cost."""
    return ALIGNMENT + config.slots * slot_bytes(problem, config) + 2 * config.warpgroups * box_bytes(config)


def check_config(problem: Problem, config: Config) -> None:
    """Raise ValueError unless the config fits the problem."""
    c = config
    rules = {
        "tokens must be a multiple of 8 in 8 .. 128": c.tokens % 8 == 0 and 8 <= c.tokens <= 128,
        "warpgroups must be 1, 2 or 4": c.warpgroups in (1, 2, 4),
        "warpgroups * tiles must divide the 64-output tiles": c.tiles >= 1
        and (problem.outputs // BLOCK) % (c.warpgroups * c.tiles) == 0,
        "slots must be 1 .. token_tiles": 1 <= c.slots <= c.token_tiles,
        "a ring of slots must hold one more tile than accumulators": c.slots == c.token_tiles
        or c.slots > c.accumulators,
        "several tiles must come with all token tiles in slots": c.tiles == 1 or c.slots == c.token_tiles,
        'evict_first must be "", "x" or "out"': c.evict_first in ("", "x", "out"),
        "shared memory must hold at most 227 KiB": shared_memory_bytes(problem, c) <= SHARED_MEMORY_BYTES,
    }
    check_rules("fp4_bmm_mosaic_gpu", rules, problem, config)


def check_rules(kernel: str, rules: dict[str, bool], problem: object, config: object) -> None:
    """Raise ValueError with the first rule that does not hold for a kernel's problem and config."""
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"{kernel}: {rule}; got {config} for {problem}. Leave config out for a default.")


def slot_bytes(problem: Problem, config: Config) -> int:
    """Of a token tile of x in shared memory."""
    return config.tokens * problem.contraction * 2


def box_bytes(config: Config) -> int:
    """Of a token tile's 64 outputs, or of one 64-k slab of its x."""
    return config.tokens * SLAB_BYTES
