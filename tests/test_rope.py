"""The rotation, against complex numbers in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mla_fp4_jax.config import RopeConfig
from mla_fp4_jax.rope import cos_sin, inverse_frequencies, rotate


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim", [2, 32, 64])
def test_rotation_matches_complex_numbers(rng, interleaved, dim):
    rope, positions = RopeConfig(), np.array([0, 1, 2, 3, 100, 4097])
    x = rng.standard_normal((6, 3, dim)).astype(np.float32)
    cos, sin = cos_sin(rope, dim, jnp.asarray(positions))
    turned = rotate(jnp.asarray(x), cos[:, None], sin[:, None], interleaved=interleaved)
    frequencies = inverse_frequencies(rope, dim).astype(np.float64)
    expected = oracle.rotate(x.astype(np.float64), (positions[:, None] * frequencies)[:, None], interleaved)
    # angles are products rounded to float32: 4097 * 2^-24 relative of up to one turn per token.
    np.testing.assert_allclose(turned, expected, atol=4097 * 2**-23 * np.abs(x).max())


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_the_distance_only(rng, interleaved):
    q, k = (jnp.asarray(rng.standard_normal((1, 64)), jnp.float32) for _ in range(2))
    scores = []
    for shift in (0, 5, 700):
        cos, sin = cos_sin(RopeConfig(), 64, jnp.array([[shift + 9], [shift + 2]]))
        turned = [rotate(x, c, s, interleaved=interleaved) for x, c, s in zip((q, k), cos, sin, strict=True)]
        scores.append(float(jnp.vdot(*turned)))
    np.testing.assert_allclose(scores, scores[0], atol=1e-3)


def test_the_two_pairings_differ(rng):
    x = jnp.asarray(rng.standard_normal((1, 8)), jnp.float32)
    cos, sin = cos_sin(RopeConfig(), 8, jnp.array([3]))
    a, b = (rotate(x, cos, sin, interleaved=flag) for flag in (True, False))
    assert np.abs(np.asarray(a - b)).max() > 0.1


def test_position_zero_only_reorders(rng):
    x = jnp.asarray(rng.standard_normal((1, 8)), jnp.float32)
    cos, sin = cos_sin(RopeConfig(), 8, jnp.array([0]))
    np.testing.assert_array_equal(rotate(x, cos, sin, interleaved=False), x)
    np.testing.assert_array_equal(rotate(x, cos, sin, interleaved=True), x[:, [0, 2, 4, 6, 1, 3, 5, 7]])


def test_no_rotary_width():
    cos, sin = cos_sin(RopeConfig(), 0, jnp.zeros((2, 3), jnp.int32))
    assert rotate(jnp.zeros((2, 3, 0)), cos, sin, interleaved=True).shape == (2, 3, 0)
