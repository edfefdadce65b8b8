"""What fp4_linear's kernels must pass, as functions: on a GPU (test_linear_gpu.py), and in part on a CPU."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from kernel_checks import assert_untouched, between_guards, bits

from mla_fp4_jax import FP4Array, fp4_linear
from pallas_kernels.fp4_linear_mosaic_gpu import AnyConfig

LARGEST_SCALE = 128  # that fragment order holds


@dataclasses.dataclass(frozen=True)
class Case:
    """x [M, K] by weights [N, K]; the result's dtype, and tiles of the kernel (None for the default's choice)."""

    M: int
    N: int
    K: int
    out: str = "bfloat16"
    config: AnyConfig | None = None

    def __str__(self) -> str:
        tiles = "" if self.config is None else "-" + "-".join(str(int(v)) for v in vars(self.config).values())
        return f"M{self.M}-N{self.N}-K{self.K}-{self.out}{tiles}"


def run(implementation: str | None, case: Case, x, w: FP4Array):
    """The product."""
    return fp4_linear(x, w, preferred_element_type=case.out, implementation=implementation, config=case.config)


def random_parts(rng, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Packed bytes and scale bytes, 2^-2 .. 2."""
    packed = rng.integers(0, 256, (case.N, case.K // 2), np.uint8)
    return packed, rng.integers(125, LARGEST_SCALE + 1, (case.N, case.K // 32)).astype(np.uint8)


def random_x(rng, case: Case, *, exact: bool = True) -> np.ndarray:
    """Integers -2 .. 2, or normal numbers."""
    x = rng.integers(-2, 3, (case.M, case.K)) if exact else rng.standard_normal((case.M, case.K))
    return x.astype(jnp.bfloat16)


def expected(x: np.ndarray, parts, case: Case) -> np.ndarray:
    """The exact product, rounded once."""
    # |x w| <= 24 in steps of 1/8: every partial sum, in any order, is a float32.
    assert case.K * 24 * 8 < 2**24
    weights = oracle.dequantize(oracle.unpack(parts[0]), oracle.e8m0(parts[1]))
    exact = x.astype(np.float64) @ weights.T
    single = exact.astype(np.float32)
    assert (single == exact).all()
    return single.astype(jnp.dtype(case.out))


def check_exact(implementation: str | None, case: Case, rng) -> None:
    """Integers by weights equal the oracle's product, bit for bit."""
    parts = random_parts(rng, case)
    w = FP4Array.from_packed(*parts).in_fragment_order()
    x = random_x(rng, case)
    y = jax.jit(functools.partial(run, implementation, case))(jnp.asarray(x), w)
    want = expected(x, parts, case)
    assert y.dtype == want.dtype and y.shape == want.shape
    np.testing.assert_array_equal(np.asarray(y).astype(np.float32), want.astype(np.float32))


def check_confined(implementation: str, case: Case, rng) -> None:
    """Nothing beside the operands counts, all of the output is written, and nothing beside it.

    Every operand lies between arrays of NaN or 0xFF, the output, a donated array of NaN, between two more.
    """
    parts = random_parts(rng, case)
    w = FP4Array.from_packed(*parts).in_fragment_order()
    x = random_x(rng, case)
    want = expected(x, parts, case)

    def product(out, x, packed, scales, w):
        del out
        codes = jax.lax.bitcast_convert_type(packed, jnp.float4_e2m1fn).reshape(w.shape)
        return run(implementation, case, x, dataclasses.replace(w, codes=codes, scales=scales))

    nan = np.full(want.shape, np.nan, want.dtype)
    placed = [
        between_guards(value, poison, adjacent=True)
        for value, poison in (
            (nan, nan),
            (x, np.full_like(x, np.nan)),
            *((np.asarray(part), np.full(part.shape, 0xFF, np.uint8)) for part in (w.packed, w.scales)),
        )
    ]
    operands = [value for value, _ in placed]
    compiled = jax.jit(product, donate_argnums=0, keep_unused=True).lower(*operands, w).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes == 0, "the product is not written in place"
    address = operands[0].unsafe_buffer_pointer()
    y = compiled(*operands, w)
    assert y.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(np.asarray(y).astype(np.float32), want.astype(np.float32))
    for (_, guards), poison in zip(placed, (nan, np.full_like(x, np.nan)), strict=False):
        for guard in guards:
            assert_untouched(guard, poison)


def check_codes(implementation: str | None, dtype: str) -> None:
    """All 16 codes under every scale byte that fragment order holds, one product each."""
    packed = np.zeros((16 * 192, 64), np.uint8)
    codes, scales = np.tile(np.arange(16), 192), np.minimum(np.repeat(np.arange(192), 16), LARGEST_SCALE)
    packed[:, 0] = codes
    w = FP4Array.from_packed(packed, np.repeat(scales[:, None], 4, axis=1).astype(np.uint8)).in_fragment_order()
    x = jnp.zeros((1, 128), jnp.bfloat16).at[0, 0].set(1)
    y = fp4_linear(x, w, preferred_element_type=dtype, implementation=implementation)
    want = (oracle.E2M1[codes] * oracle.e8m0(scales)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(y)[0].astype(np.float32), want)


def check_repeats(implementation: str | None, case: Case, rng, times: int) -> None:
    """The same call gives the same bits."""
    w = FP4Array.from_packed(*random_parts(rng, case)).in_fragment_order()
    x = jnp.asarray(random_x(rng, case, exact=False))
    call = jax.jit(functools.partial(run, implementation, case))
    first = bits(call(x, w))
    for _ in range(times - 1):
        np.testing.assert_array_equal(bits(call(x, w)), first)


def check_batch_invariance(implementation: str | None, case: Case, rng, batches) -> None:
    """A row's result does not depend on the batch that it sits in, bit for bit."""
    w = FP4Array.from_packed(*random_parts(rng, case)).in_fragment_order()
    x = random_x(rng, case, exact=False)
    call = jax.jit(functools.partial(run, implementation, case))
    whole = bits(call(jnp.asarray(x), w))
    for batch in batches:
        np.testing.assert_array_equal(bits(call(jnp.asarray(x[:batch]), w)), whole[:batch])
        np.testing.assert_array_equal(bits(call(jnp.asarray(x[-batch:]), w)), whole[-batch:])


def check_error(implementation: str | None, case: Case, rng) -> None:
    """On normal numbers the error is that of a dot product in float32, rounded once.

    |error| <= K 2^-24 sum |x w| for any order of K float32 additions of exact products (Higham, Accuracy and
    Stability of Numerical Algorithms, 4.2), plus half an ulp of the result: 2^-8 of it in bfloat16.
    """
    parts = random_parts(rng, case)
    w = FP4Array.from_packed(*parts).in_fragment_order()
    x = random_x(rng, case, exact=False)
    weights = oracle.dequantize(oracle.unpack(parts[0]), oracle.e8m0(parts[1]))
    wide = x.astype(np.float64)
    want, size = wide @ weights.T, np.abs(wide) @ np.abs(weights).T
    got = np.asarray(jax.jit(functools.partial(run, implementation, case))(jnp.asarray(x), w)).astype(np.float64)
    bound = case.K * 2.0**-24 * size
    half_ulp = 2.0**-8 if case.out == "bfloat16" else 2.0**-24
    assert (np.abs(got - want) <= bound + half_ulp * (np.abs(want) + bound)).all()


def check_gradient(implementation: str | None, case: Case, rng) -> None:
    """dx is g times the weights."""
    parts = random_parts(rng, case)
    w = FP4Array.from_packed(*parts).in_fragment_order()
    x = jnp.asarray(random_x(rng, case))
    g = rng.integers(-2, 3, (case.M, case.N)).astype(jnp.dtype(case.out))
    dx = jax.jit(lambda x, g: jax.vjp(lambda x: run(implementation, case, x, w), x)[1](g)[0])(x, jnp.asarray(g))
    weights = oracle.dequantize(oracle.unpack(parts[0]), oracle.e8m0(parts[1]))
    want = (g.astype(np.float64) @ weights).astype(np.float32).astype(jnp.bfloat16)
    assert dx.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(dx).astype(np.float32), want.astype(np.float32))


def check_dense(dense, shape: tuple[int, ...], key_rows: int, rng) -> None:
    """Fragment order back to a matrix: every value, every scale byte that the order holds, bit for bit."""
    packed = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    scales = rng.integers(0, LARGEST_SCALE + 1, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    w = FP4Array.from_packed(packed, scales).in_fragment_order(key_rows)
    want = oracle.dequantize(oracle.unpack(packed), oracle.e8m0(scales)).astype(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(bits(jax.jit(lambda w: dense(w, jnp.bfloat16))(w)), bits(want))
