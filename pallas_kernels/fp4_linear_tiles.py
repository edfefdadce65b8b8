"""How the Hopper FP4 linear kernel is tiled: its static problem, a config, and what both together need."""

from __future__ import annotations

import dataclasses

from pallas_kernels.fp4_bmm_tiles import ALIGNMENT, SHARED_MEMORY_BYTES, SLAB_BYTES, check_rules
from pallas_kernels.fragments import BLOCK

NAME = "fp4_linear_mosaic_gpu"  # in errors
BLOCK_BYTES = BLOCK * BLOCK // 2  # codes of a 64 x 64 block
BLOCK_SCALE_BYTES = BLOCK * BLOCK // 32
SCALE_WORD_BYTES = 4  # a thread's scales of a block: rows g and g + 8, two groups each
# float32 after each token's, or each output's partial results, lest a warp's accesses meet in a few banks.
EXCHANGE_PAD = 4
PUSH_PAD = 2
BARRIER_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is tiled; only `split` changes bits of the result.

    Attributes:
        split: CTAs of a cluster that share the contraction, 1, 2, 4 or 8.
        tokens: of a CTA, a multiple of 8: the N side of a wgmma.
        warpgroups: of a CTA.
        tiles: 64-output tiles that a warpgroup computes, 1 or 2.
        blocks: 64-k blocks of a stage, 1, 2 or 4.
        slots: stages in shared memory at once; slots - 2 are being loaded while one is used.
        push: partial results go straight from registers to the CTA that adds them, which is quicker but needs room
            beside the ring; else they meet in the ring's place. For split > 1.
        direct: codes and scales go straight to registers, all of them at once (fp4_linear_direct.py): one stage of
            all the blocks of a part, up to 16, in one slot.
    """

    split: int
    tokens: int
    warpgroups: int
    tiles: int = 1
    blocks: int = 4
    slots: int = 4
    push: bool = False
    direct: bool = False


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static side of out[m, n] = sum_k x[m, k] A[n, k].

    Attributes:
        batch: M, tokens.
        outputs: N.
        contraction: K.
        out_bytes: of an element of out, 2 (bfloat16) or 4 (float32).
        first_outputs: those of the first of two weights, where A is one on top of the other; else 0.
    """

    batch: int
    outputs: int
    contraction: int
    out_bytes: int = 2
    first_outputs: int = 0


def rows(config: Config) -> int:
    """Outputs of a CTA."""
    return BLOCK * config.warpgroups * config.tiles


def token_tiles(problem: Problem, config: Config) -> int:
    """CTAs along the tokens."""
    return -(-problem.batch // config.tokens)


def clusters(problem: Problem, config: Config) -> int:
    """Clusters in the grid: token tiles vary fastest, so that those that share weights run together."""
    return problem.outputs // rows(config) * token_tiles(problem, config)


def part_blocks(problem: Problem, config: Config) -> int:
    """64-k blocks of a CTA."""
    return problem.contraction // (BLOCK * config.split)


def stages(problem: Problem, config: Config) -> int:
    """Stages of a CTA."""
    return problem.contraction // (BLOCK * config.split * config.blocks)


def x_bytes(config: Config) -> int:
    """Of x in a stage; first in it, so that slabs stay aligned."""
    return config.blocks * config.tokens * SLAB_BYTES


def code_bytes(config: Config) -> int:
    """Of codes in a stage, after x."""
    if config.direct:
        return 0
    return config.warpgroups * config.tiles * config.blocks * BLOCK_BYTES


def stage_bytes(config: Config) -> int:
    """Of a slot, scales last."""
    scales = 0 if config.direct else config.warpgroups * config.tiles * config.blocks * BLOCK_SCALE_BYTES
    return -(-(x_bytes(config) + code_bytes(config) + scales) // ALIGNMENT) * ALIGNMENT


def share(config: Config) -> int:
    """Outputs that a CTA of the cluster adds up and stores."""
    return rows(config) // config.split


def exchange_bytes(config: Config) -> int:
    """Of partial results, float32: [rank][share][tokens] if pushed, else [tokens][rows], each with padding."""
    if config.push:
        return rows(config) * (config.tokens + PUSH_PAD) * 4 + BARRIER_BYTES
    return config.tokens * (rows(config) + EXCHANGE_PAD) * 4


def shared_memory_bytes(config: Config) -> int:
    """The ring, the partial results after it or in its place, and what aligning may cost."""
    ring, exchange = config.slots * stage_bytes(config), exchange_bytes(config)
    return ALIGNMENT + (ring + exchange if config.push else max(ring, exchange))


def check_config(problem: Problem, config: Config) -> None:
    """Raise ValueError unless the config fits the problem."""
    c = config
    rules = {
        "split must be 1, 2, 4 or 8": c.split in (1, 2, 4, 8),
        "tokens must be a multiple of 8 in 8 .. 256 / tiles": c.tokens % 8 == 0 and 8 <= c.tokens <= 256 // c.tiles,
        "warpgroups must be 1 .. 4": c.warpgroups in (1, 2, 3, 4),
        "tiles must be 1 or 2": c.tiles in (1, 2),
        "blocks must be 1, 2 or 4 and with tiles an even number": c.direct
        or (c.blocks in (1, 2, 4) and c.blocks * c.tiles % 2 == 0),
        "direct must come with one tile and slot, and blocks that are the part's, up to 16": not c.direct
        or (c.tiles == c.slots == 1 and c.blocks <= 16 and c.blocks == part_blocks(problem, c)),
        "a CTA's outputs must divide N": problem.outputs % rows(c) == 0,
        "a warpgroup's outputs must divide the first weight's": problem.first_outputs % (BLOCK * c.tiles) == 0,
        "split * blocks must divide the 64-k blocks": problem.contraction % (BLOCK * c.split * c.blocks) == 0,
        "slots must be 3 or more": c.direct or c.slots >= 3,
        "push must come with a split": not c.push or c.split > 1,
        "shared memory must hold at most 227 KiB": shared_memory_bytes(c) <= SHARED_MEMORY_BYTES,
    }
    check_rules(NAME, rules, problem, config)


def with_fitting_slots(problem: Problem, config: Config) -> Config:
    """No more slots than shared memory holds, nor than there are stages to load ahead; at least 3."""
    most = stages(problem, config) + 2
    while config.slots > 3 and (config.slots > most or shared_memory_bytes(config) > SHARED_MEMORY_BYTES):
        config = dataclasses.replace(config, slots=config.slots - 1)
    return config
