"""Module patterns: the same matches as Python's re, in linear time; what is not understood is refused."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_fp4_jax import CheckpointError
from mla_fp4_jax.checkpoint.patterns import Patterns

KV_B = "model.layers.3.self_attn.kv_b_proj"
ATOMS = st.sampled_from(["a", "b", r"\.", ".", r"\d", r"\w", "[ab]", "[^a]", "[a-c_]", "^", "$"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.tuples(inner, inner).map("|".join).map("({})".format),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{1,}", "*?"])).map(
            lambda x: f"(?:{x[0]}){x[1]}"
        ),
    ),
    max_leaves=6,
)


@given(pattern=PATTERNS, name=st.text("abc_.1", max_size=7))
def test_a_regular_expression_matches_as_pythons_does(pattern, name):
    assert Patterns([f"re:{pattern}"]).match(name) == bool(re.match(pattern, name))


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (KV_B, True),
        ("kv_b_proj", True),
        ("self_attn", True),
        ("model.layers.3", True),
        ("layers.3.self_attn", True),
        ("model.layers.33", False),
        ("model.layers", True),
        ("b_proj", False),
        ("lm_head", False),
        ("", False),
        ("*self_attn*", True),
        ("*self_attn", False),
        ("*.layers.?.*", True),
        ("*.layers.[0-2].*", False),
        ("re:.*kv_b_proj$", True),
        ("re:kv_b_proj", False),
        ("re:model.layers.3", True),
        (r"re:.*layers\.(1|2)\..*", False),
    ],
)
def test_what_a_list_means(pattern, matches):
    assert Patterns(["other", pattern]).match(KV_B) == matches


@pytest.mark.bad_input
@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", "(a*)*(a*)*b", ".*.*.*.*.*.*.*x", "(?:a?){30}a{30}"])
def test_patterns_that_take_others_forever_take_moments(pattern):
    start = time.perf_counter()
    assert not Patterns([f"re:{pattern}"]).match("a" * 29 + "c" * 400)
    assert time.perf_counter() - start < 2


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "pattern",
    ["(", ")", "a)", "[", "[a", "*", "a{", "a{x}", "a{65}", "a{3,2}", "(?=a)", "(?P<n>a)", r"\1", r"\b", "\\"]
    + ["(" * 40 + ")" * 40, "(?:a{64}){64}(?:b{64}){64}"],
)
def test_what_is_not_understood_is_refused(pattern):
    with pytest.raises(CheckpointError, match="which is not understood"):
        Patterns([f"re:{pattern}"])
