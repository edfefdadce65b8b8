"""fp4_linear's kernel for few tokens and outputs, run instruction by instruction on a CPU (ptx_machine.py)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import linear_checks as checks
import numpy as np
import oracle
import pytest
from linear_checks import Case
from ptx_machine import Memory, run_cta

from mla_fp4_jax import FP4Array
from pallas_kernels import fp4_linear_few as few
from pallas_kernels.fp4_linear_few import Config
from pallas_kernels.fp4_linear_tiles import Problem

SHARED = 0x400 + 4  # not even aligned


def run(problem: Problem, config: Config, x: np.ndarray, weights: list[FP4Array], rng) -> np.ndarray:
    """All CTAs, one after another; every operand lies alone in memory, the result begins as NaN."""
    few.check_config(problem, config)
    memory, out = Memory(), np.full((problem.batch, problem.outputs), np.nan, np.float32)
    out = out.astype(jnp.bfloat16) if problem.out_bytes == 2 else out
    arrays = [np.asarray(part) for w in weights for part in (w.packed, w.scales)]
    places = [memory.place((i + 1) << 36, array.copy()) for i, array in enumerate([x, *arrays, out])]
    memory.arrays[-1] = (places[-1], out.view(np.uint8).reshape(-1))
    operands = [*places[:3], places[-1], SHARED, *places[3:-1]]
    text = few.program(problem, config)
    for cta in range(few.ctas(problem, config)):
        order = rng.permutation(config.split)
        run_cta(text, operands, memory, (SHARED, few.shared_memory_bytes(problem, config)), cta, order)
    return out.astype(np.float32)


# One token, an odd number of them, a full tile, two tiles; all stages at once, a ring of one or two slots.
CASES = [
    Case(1, 64, 1024, config=Config(8, 1, 1)),
    Case(3, 64, 2560, "float32", Config(4, 1, 2)),
    Case(8, 64, 3072, config=Config(8, 2, 3)),
    Case(13, 128, 1536, "float32", Config(4, 2, 1)),
    Case(16, 64, 2560, config=Config(4, 1, 5)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_the_oracle(case, rng):
    parts = checks.random_parts(rng, case)
    x = checks.random_x(rng, case)
    want = checks.expected(x, parts, case)
    problem = Problem(case.M, case.N, case.K, want.dtype.itemsize)
    assert isinstance(case.config, Config)
    got = run(problem, case.config, x, [FP4Array.from_packed(*parts).in_fragment_order()], rng)
    np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("config", [Config(4, 1, 3), Config(4, 2, 1), Config(8, 1, 2)], ids=str)
def test_the_order_of_the_sums_is_that_of_split_alone(config, rng):
    case = Case(3, 64, 2048 if config.split == 8 else 1536, "float32")
    parts = checks.random_parts(rng, case)
    x = checks.random_x(rng, case, exact=False)
    got = run(Problem(3, 64, case.K, 4), config, x, [FP4Array.from_packed(*parts).in_fragment_order()], rng)
    weights = oracle.dequantize(oracle.unpack(parts[0]), oracle.e8m0(parts[1]))
    steps = np.einsum(
        "mpsk,npsk->psmn",
        x.astype(np.float64).reshape(3, config.split, -1, 16),
        weights.reshape(64, config.split, -1, 16),
    )
    chains = np.zeros((config.split, 3, 64), np.float32)
    for step in range(steps.shape[1]):
        chains = (chains + steps[:, step]).astype(np.float32)
    want = np.zeros((3, 64), np.float32)
    for chain in chains:
        want += chain
    np.testing.assert_array_equal(got, want)
    assert (np.float32(steps.sum((0, 1))) != want).any()


@pytest.mark.parametrize("tiles", [1, 2])
def test_two_weights_follow_each_other(tiles, rng):
    case = Case(2, 192, 512)
    parts = checks.random_parts(rng, case)
    x = checks.random_x(rng, case)
    weights = [
        FP4Array.from_packed(*(part[rows] for part in parts)).in_fragment_order()
        for rows in (slice(0, 128), slice(128, None))
    ]
    got = run(Problem(2, 192, 512, 2, 128), Config(4, tiles, 1), x, weights, rng)
    np.testing.assert_array_equal(got, checks.expected(x, parts, case).astype(np.float32))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"split": 2}, "split"), ({"tiles": 3}, "tiles"), ({"slots": 0}, "slots"), ({"slots": 6}, "slots")]
    + [({"split": 8, "slots": 1}, "128 split"), ({"batch": 17}, "at most 16"), ({"contraction": 7168}, "227 KiB")],
)
def test_what_does_not_fit_is_named(change, says):
    problem, config = Problem(16, 192, 2048 + 512), Config(4, 1, 4)
    few.check_config(problem, config)
    sizes = {field.name for field in dataclasses.fields(Problem)}
    if "contraction" in change:
        config = dataclasses.replace(config, slots=14)
    problem = dataclasses.replace(problem, **{k: v for k, v in change.items() if k in sizes})
    config = dataclasses.replace(config, **{k: v for k, v in change.items() if k not in sizes})
    with pytest.raises(ValueError, match=says):
        few.check_config(problem, config)
