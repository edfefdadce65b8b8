"""fp4_linear's kernels on a real GPU: the oracle, poisoned neighbours, repeats, batches, and the dense matrix.

python3 -m pytest -m gpu tests/test_linear_gpu.py
"""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
import linear_checks as checks
import numpy as np
import pytest
from kernel_checks import bits
from linear_checks import Case

from mla_fp4_jax import FP4Array
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.dense import fp4_dense
from mla_fp4_jax.ops.implementations import MOSAIC
from pallas_kernels.fp4_linear_few import Config as Few
from pallas_kernels.fp4_linear_many import Config as Many
from pallas_kernels.fp4_linear_mosaic_gpu import INVARIANT_TOKENS, MOST_TOKENS
from pallas_kernels.fp4_linear_tiles import Config

pytestmark = pytest.mark.gpu

TOKENS = (0, 1, 2, 3, 7, 16, 17, 64, 65, 129, 512)
# One CTA; odd numbers of tiles; a contraction that clusters of 2, 4 and 8 share.
SIZES = ((64, 128), (192, 384), (320, 1024), (512, 2048), (576, 7168))
CASES = (
    *(Case(tokens, *sizes) for tokens, sizes in itertools.product(TOKENS, SIZES)),
    *(Case(tokens, 2112, 7168) for tokens in (1, 31, 33, 80, 129, 200, 256, 300)),
    *(Case(tokens, 7168, 16384) for tokens in (2, 40, 64, 90, 200)),
    *(Case(tokens, 24576, 1536) for tokens in (3, 48, 250)),
    *(Case(tokens, 512, 2048, "float32") for tokens in (1, 17, 65)),
    Case(MOST_TOKENS + 1, 192, 384),  # a library's matmul
)
# Each way through the kernel: clusters, tiles of a warpgroup, blocks of a stage, few and many slots, pushed or not.
CONFIGS = (
    Case(5, 512, 2048, config=Config(8, 8, 1, 1, 2, 3, True)),
    Case(37, 512, 2048, config=Config(2, 40, 2, 2, 1, 6, True)),
    Case(37, 512, 2048, "float32", Config(4, 24, 4, 1, 4, 4, True)),
    Case(9, 512, 2048, config=Config(8, 16, 4, 1, 4, 3, False)),
    Case(70, 512, 2048, "float32", Config(2, 40, 2, 2, 2, 5, False)),
    Case(150, 512, 2048, config=Config(1, 128, 2, 2, 1, 8, False)),
    Case(260, 512, 2048, config=Config(4, 256, 2, 1, 2, 3, False)),
    # Weights straight to registers: pushed or not, one warpgroup or three, no cluster.
    Case(5, 576, 2048, config=Config(4, 8, 1, 1, 8, 1, True, True)),
    Case(20, 576, 7168, "float32", Config(8, 16, 3, 1, 14, 1, True, True)),
    Case(64, 192, 384, config=Config(2, 64, 1, 1, 3, 1, False, True)),
    Case(3, 192, 384, config=Config(1, 8, 3, 1, 6, 1, False, True)),
    # The kernel for many tokens: few and many slots, parts of unequal length, a last tile of outputs half there.
    Case(512, 512, 2048, config=Many(1, 256, 6)),
    Case(130, 576, 7168, config=Many(3, 136, 4)),
    Case(300, 192, 384, "float32", Many(2, 152, 6)),
    Case(70, 64, 128, config=Many(1, 72, 4)),
    Case(200, 320, 1024, config=Many(5, 104, 8)),
    Case(13, 320, 1024, config=Many(8, 16, 4)),
    Case(60, 512, 2048, config=Many(2, 64, 16)),
    # The kernel for few tokens, one stage or several; an H200's tiles.
    *(Case(tokens, 2112, 7168, config=Few()) for tokens in (1, 3, 8)),
    Case(8, 576, 7168, "float32", Few()),
    Case(4, 192, 4096, config=Few()),
    Case(5, 192, 2048, config=Few()),
    Case(2, 320, 1024, "float32", Few()),
    Case(16, 512, 2048, config=Config(2, 16, 1, 1, 4, 4, True)),
    Case(8, 512, 1536, "float32", Config(1, 8, 1, 1, 4, 3)),
)


@pytest.fixture(autouse=True)
def needs_the_kernels():
    reason = implementations.why_not(MOSAIC)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", [*CASES, *CONFIGS], ids=str)
def test_it_equals_the_oracle(case, rng):
    checks.check_exact(MOSAIC, case, rng)


@pytest.mark.parametrize("case", [Case(17, 192, 384), Case(5, 128, 128, "float32")], ids=str)
def test_none_chooses_something_right(case, rng):
    checks.check_exact(None, case, rng)


@pytest.mark.parametrize("tokens", [1, 3, 17, 65, 129, 300])
@pytest.mark.parametrize("sizes", [(64, 128), (192, 384), (512, 2048)], ids=str)
def test_it_stays_within_its_operands(tokens, sizes, rng):
    checks.check_confined(MOSAIC, Case(tokens, *sizes), rng)


@pytest.mark.parametrize("case", [Case(1, 192, 1024, config=Few()), Case(8, 512, 3072, config=Few())], ids=str)
def test_few_tokens_stay_within_their_operands(case, rng):
    checks.check_confined(MOSAIC, case, rng)


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_few_tokens_get_the_bits_of_clusters(tokens, out, rng):
    case = Case(tokens, 576, 7168, out, config=Config(8, 8, 1, 1, 2, 4, True))
    w = FP4Array.from_packed(*checks.random_parts(rng, case)).in_fragment_order()
    x = jnp.asarray(checks.random_x(rng, case, exact=False))
    want = bits(checks.run(MOSAIC, case, x, w))
    got = bits(checks.run(MOSAIC, dataclasses.replace(case, config=Few()), x, w))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_code_under_every_scale(dtype):
    checks.check_codes(MOSAIC, dtype)


@pytest.mark.parametrize("case", [Case(7, 2112, 7168), Case(65, 512, 2048), Case(300, 2112, 7168)], ids=str)
def test_twenty_repeats_are_equal(case, rng):
    checks.check_repeats(MOSAIC, case, rng, 20)


@pytest.mark.parametrize("sizes", [(2112, 7168), (576, 1536), (512, 2048), (7168, 4096)], ids=str)
def test_rows_do_not_depend_on_their_batch(sizes, rng):
    checks.check_batch_invariance(MOSAIC, Case(INVARIANT_TOKENS, *sizes), rng, (1, 7, 8, 16, 17, 32, 33, 63))


@pytest.mark.parametrize("case", [Case(5, 576, 7168), Case(65, 576, 7168), Case(5, 576, 7168, "float32")], ids=str)
def test_the_error_is_that_of_float32_sums(case, rng):
    checks.check_error(MOSAIC, case, rng)


@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_the_gradient_equals_the_oracle(out, rng):
    checks.check_gradient(MOSAIC, Case(17, 192, 384, out), rng)


@pytest.mark.parametrize(
    ("shape", "key_rows"),
    [
        ((64, 64), 0),
        ((576, 7168), 0),
        ((3, 128, 64), 64),
        ((5, 256, 512), 128),
        ((2, 448, 512), 192),
        ((2, 64, 192), 0),
    ]
    + [((1, 192, 192), 192)],
    ids=str,
)
def test_dense_equals_the_oracle(shape, key_rows, rng):
    checks.check_dense(fp4_dense, shape, key_rows, rng)


def test_the_checks_of_dense_can_fail(rng):
    with pytest.raises(AssertionError):
        checks.check_dense(lambda w, dtype: fp4_dense(w, dtype) * jnp.asarray(2, dtype), (64, 64), 0, rng)
