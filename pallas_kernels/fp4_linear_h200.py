"""Tiles of the FP4 linear kernels on an H200 for few tokens; its SMs are an H100's, its memory is quicker.

From bench/results/2026-11-28_h200_fp4_linear_sweep.json and ..._few.json. An H100 has not been seen to gain by them.
"""

from __future__ import annotations

from pallas_kernels import fp4_linear_few as few
from pallas_kernels import fp4_linear_tiles as tiling
from pallas_kernels.fp4_bmm_tiles import SHARED_MEMORY_BYTES
from pallas_kernels.fp4_linear_tiles import Config, Problem
from pallas_kernels.fragments import BLOCK

_SMS = 132
_ONE_WAVE_CTAS = 100  # that leave few SMs without one
_ONE_WAVE_TOKENS = 4  # up to which it is quicker that every CTA reads all of x than that eight form a cluster
_PUSHED_TOKENS = 16  # whose partial results go straight to the CTA that adds them
# Parts of the contraction, in blocks of 64: the shortest that was measured; one from which on more tokens gained too
# (128 blocks and 32 tokens, 27.0 instead of 29.1 us; none was measured between).
_SHORTEST_PART, _LONG_PART = 12, 128
_LONG_PART_TOKENS = 32


def few_tokens(problem: Problem, split: int) -> few.Config | Config | None:
    """The tiles that were quicker than an H100's, or None.

    Args:
        problem: of a batch whose bits may not depend on its size.
        split: parts of the contraction that its weight has for any such batch.
    """
    return _one_wave(problem, split) or _small_ctas(problem, split)


def _one_wave(problem: Problem, split: int) -> few.Config | None:
    """A CTA of 16 outputs for each SM, which has all of its weight on its way at once."""
    config, ctas = few.Config(), few.ctas(problem)
    if split != few.SPLIT or problem.batch > _ONE_WAVE_TOKENS or not _ONE_WAVE_CTAS <= ctas <= _SMS:
        return None
    return config if few.shared_memory_bytes(problem) <= SHARED_MEMORY_BYTES else None


def _small_ctas(problem: Problem, split: int) -> Config | None:
    """A warpgroup a CTA, two or three CTAs an SM, stages of four blocks."""
    ctas, part = problem.outputs // BLOCK * split, problem.contraction // BLOCK // split
    tokens, two = -(-problem.batch // 8) * 8, ctas <= 2 * _SMS
    most = _LONG_PART_TOKENS if two and part >= _LONG_PART else _PUSHED_TOKENS
    if part % 4 or part < _SHORTEST_PART or tokens > most or not _SMS < ctas <= 3 * _SMS:
        return None
    push = split > 1 and tokens <= _PUSHED_TOKENS
    return tiling.with_fitting_slots(problem, Config(split, tokens, 1, 1, 4, 4 if two else 3, push))
