"""What every implementation of fp4_bmm must pass, as functions: on a GPU (test_gpu.py), and small in an interpreter.

kv_b_proj [H, P+V, L] is used as the layer uses it: k_up over its first P rows, with q_nope in the first P of x's P+R
columns, and v_up over the other V rows.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from mla_fp4_jax import FP4Array, fp4_bmm

GROUP = {"mxfp4": 32, "nvfp4": 16}
R = 64
# Fragment order holds scales up to these bytes; see FP4Array.fragment_order_why_not.
LARGEST_SCALE = {("mosaic_gpu", "mxfp4"): 128, ("mosaic_gpu", "nvfp4"): 0x7E}
LAST_SCALE = {"mxfp4": 0xFF, "nvfp4": 0x7F}  # NaN; the bytes after it are the e4m3 below 0


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, x's dtype, the weights' format and the result's dtype (None for x's)."""

    B: int
    H: int
    P: int
    V: int
    L: int
    dtype: str = "bfloat16"
    format: str = "mxfp4"
    out: str | None = None

    def __str__(self) -> str:
        kind = "-".join(filter(None, (self.dtype, self.format, self.out)))
        return f"B{self.B}-H{self.H}-P{self.P}-V{self.V}-L{self.L}-{kind}"

    @property
    def out_dtype(self) -> np.dtype:
        return jnp.dtype(self.out or self.dtype)

    @property
    def used(self) -> dict[str, tuple[int, int]]:
        """Rows that each orientation reads."""
        return {"rows": (0, self.P), "columns": (self.P, self.V)}


def run(implementation: str | None, case: Case, contract: str, x, w: FP4Array):
    """One of the layer's two products."""
    x_columns = (0, case.P) if contract == "rows" else None
    return fp4_bmm(
        x,
        w,
        contract,
        rows=case.used[contract],
        x_columns=x_columns,
        preferred_element_type=case.out,
        implementation=implementation,
    )


def random_pack(rng, case: Case, implementation: str | None) -> list[np.ndarray]:
    """Packed bytes, scale bytes 2^-2 .. 2^2 and, for NVFP4, a global scale of 2."""
    rows = (case.H, case.P + case.V)
    packed = rng.integers(0, 256, (*rows, case.L // 2), np.uint8)
    exponents = rng.integers(-2, 3, (*rows, case.L // GROUP[case.format]))
    if case.format == "nvfp4":
        return [packed, ((exponents + 7) << 3).astype(np.uint8), np.array(2.0, np.float32)]
    return [packed, np.minimum(exponents + 127, largest_scale(implementation, "mxfp4")).astype(np.uint8)]


def largest_scale(implementation: str | None, format: str) -> int:
    """Of the scale bytes that an implementation takes."""
    return LARGEST_SCALE.get((implementation or "", format), LAST_SCALE[format])


def random_x(rng, case: Case, contract: str, *, exact: bool = True) -> np.ndarray:
    """Integers -2 .. 2, or normal numbers; NaN in the columns that k_up must not read."""
    shape = (case.B, case.H, case.P if contract == "rows" else case.L)
    x = rng.integers(-2, 3, shape).astype(np.float64) if exact else rng.standard_normal(shape)
    if contract == "rows":
        x = np.concatenate([x, np.full((case.B, case.H, R), np.nan)], axis=-1)
    return x.astype(jnp.dtype(case.dtype))


def prepare(w: FP4Array, implementation: str | None, key_rows: int) -> FP4Array:
    """w as the implementation wants it; NotImplementedError where it cannot be had."""
    if implementation != "mosaic_gpu":
        return w
    reason = w.fragment_order_why_not(key_rows)
    if reason is not None:
        raise NotImplementedError(reason)
    return w.in_fragment_order(key_rows)


def pack_of(parts: list[np.ndarray], case: Case, implementation: str | None) -> FP4Array:
    return prepare(FP4Array.from_packed(*parts, format=case.format), implementation, case.P)


def values(parts: list[np.ndarray], case: Case) -> np.ndarray:
    """The weights, float64."""
    scale = oracle.e8m0 if case.format == "mxfp4" else oracle.e4m3
    return oracle.dequantize(oracle.unpack(parts[0]), scale(parts[1]), *(float(part) for part in parts[2:]))


def expected(x: np.ndarray, parts: list[np.ndarray], case: Case, contract: str) -> np.ndarray:
    """The exact product, rounded once to the result's dtype."""
    first, number = case.used[contract]
    used = x[..., : case.P] if contract == "rows" else x
    exact = oracle.bmm(used.astype(np.float64), values(parts, case)[:, first : first + number], contract)
    single = exact.astype(np.float32)
    assert (single == exact).all(), "the case is not in the exact regime"
    return single.astype(case.out_dtype)


def assert_equal(got, want: np.ndarray) -> None:
    """Equal values, the sign of zero aside."""
    got = np.asarray(got)
    assert got.dtype == want.dtype and got.shape == want.shape
    np.testing.assert_array_equal(got.astype(np.float64), want.astype(np.float64))


def check_exact(implementation: str | None, case: Case, rng) -> None:
    """In the exact regime both products equal the oracle's, bit for bit."""
    parts = random_pack(rng, case, implementation)
    w = pack_of(parts, case, implementation)
    xs = {contract: random_x(rng, case, contract) for contract in ("rows", "columns")}
    both = jax.jit(lambda xs, w: {contract: run(implementation, case, contract, x, w) for contract, x in xs.items()})
    for contract, y in both(jax.tree.map(jnp.asarray, xs), w).items():
        assert_equal(y, expected(xs[contract], parts, case, contract))


def check_confined(implementation: str, case: Case, contract: str, rng, *, adjacent: bool) -> None:
    """Nothing outside the operands counts, all of the output is written, and nothing outside it.

    Every operand lies between arrays of NaN or 0xFF; rows that the product must not use are NaN or large; the
    output is a donated array of NaN that lies between two more.

    Args:
        adjacent: insist that they do lie side by side, as they can where a device has an allocator of its own.
    """
    parts = random_pack(rng, case, implementation)
    first, number = case.used[contract]
    unused = np.ones(case.P + case.V, bool)
    unused[first : first + number] = False
    parts[0][:, unused] = 0x77  # 6 and 6
    parts[1][:, unused] = largest_scale(implementation, case.format)
    w = pack_of(parts, case, implementation)
    x = random_x(rng, case, contract)
    want = expected(x, parts, case, contract)

    def product(out, x, packed, scales, w):
        del out
        codes = jax.lax.bitcast_convert_type(packed, jnp.float4_e2m1fn).reshape(w.shape)
        return run(implementation, case, contract, x, dataclasses.replace(w, codes=codes, scales=scales))

    nan = np.full(want.shape, np.nan, want.dtype)
    placed = [
        between_guards(value, poison, adjacent)
        for value, poison in (
            (nan, nan),
            (x, np.full_like(x, np.nan)),
            *((np.asarray(part), np.full(part.shape, 0xFF, np.uint8)) for part in (w.packed, w.scales)),
        )
    ]
    operands = [value for value, _ in placed]
    compiled = jax.jit(product, donate_argnums=0, keep_unused=True).lower(*operands, w).compile()
    if adjacent:
        assert compiled.memory_analysis().temp_size_in_bytes == 0, "the product is not written in place"
    address = operands[0].unsafe_buffer_pointer()
    y = compiled(*operands, w)
    assert y.unsafe_buffer_pointer() == address
    assert_equal(y, want)
    for (_, guards), poison in zip(placed, (nan, np.full_like(x, np.nan)), strict=False):
        for guard in guards:
            assert_untouched(guard, poison)


def assert_untouched(guard, poison: np.ndarray) -> None:
    """Not a byte of a guard has changed."""
    np.testing.assert_array_equal(np.asarray(guard).view(np.uint8), poison.view(np.uint8))


def between_guards(value: np.ndarray, poison: np.ndarray, adjacent: bool) -> tuple[jax.Array, list[jax.Array]]:
    """The value on the device, and two arrays of poison right before and after it in memory."""
    guards, copies = [jnp.array(poison)], []
    step = -(-value.nbytes // 256) * 256  # what the allocator rounds to
    for _ in range(400):  # the first ones land in holes that earlier arrays left
        copies.append(jnp.array(value))
        guards.append(jnp.array(poison))
        jax.block_until_ready((guards[-1], copies[-1]))
        if not adjacent:
            return copies[0], guards
        at = {guard.unsafe_buffer_pointer(): guard for guard in guards}
        for copy in copies[-2:]:
            address = copy.unsafe_buffer_pointer()
            if address - step in at and address + step in at:
                return copy, [at[address - step], at[address + step]]
    raise AssertionError(f"the allocator put no array of {value.nbytes} bytes between two others")


def check_codes(
    implementation: str | None, dtype: str, contract: str, *, flushes: bool, format: str = "mxfp4"
) -> None:
    """All 16 codes under all scale bytes (of e4m3: from 0 to NaN), one product each.

    Args:
        flushes: the device replaces float32 subnormals by 0 (XLA's CPU back end does).
    """
    size = 64  # of the contracted axis; weights but the first are 0, so that no infinity meets another value
    group, count = GROUP[format], LAST_SCALE[format] + 1
    one, value = (127, oracle.e8m0) if format == "mxfp4" else (0x38, oracle.e4m3)
    codes, scales = np.tile(np.arange(16), count), np.repeat(np.arange(count), 16)
    if contract == "columns":
        all_codes = np.zeros((1, 16 * count, size), np.uint8)
        all_scales = np.full((1, 16 * count, size // group), one, np.uint8)
        all_codes[0, :, 0], all_scales[0, :, 0] = codes, scales
    else:
        all_codes = np.zeros((1, size, count * group), np.uint8)
        all_scales = np.full((1, size, count), one, np.uint8)
        all_codes[0, 0], all_scales[0, 0] = np.tile(np.arange(16), count * group // 16), np.arange(count)
        codes, scales = all_codes[0, 0], np.repeat(np.arange(count), group)
    largest = largest_scale(implementation, format)
    all_scales, scales = np.minimum(all_scales, largest).astype(np.uint8), np.minimum(scales, largest)
    key_rows = size if contract == "rows" else 0
    w = FP4Array.from_codes(jnp.asarray(all_codes), jnp.asarray(all_scales), format=format)
    w = prepare(w, implementation, key_rows)
    x = jnp.zeros((1, 1, size), dtype).at[0, 0, 0].set(1)
    out = None if implementation == "mosaic_gpu" else jnp.float32
    y = jax.jit(
        functools.partial(fp4_bmm, contract=contract, implementation=implementation, preferred_element_type=out)
    )(x, w)
    with np.errstate(over="ignore", invalid="ignore"):
        want = (oracle.E2M1[codes] * value(scales)).astype(np.float32)
        # A weight that bfloat16 cannot hold is infinite in either.
        got = np.asarray(y)[0, 0].astype(np.float32)
    if flushes:
        got, want = (np.where(np.abs(value) < 2.0**-126, 0, value) for value in (got, want))
    np.testing.assert_array_equal(got, want)


def check_repeats(implementation: str | None, case: Case, rng, times: int) -> None:
    """The same call gives the same bits."""
    w = pack_of(random_pack(rng, case, implementation), case, implementation)
    for contract in ("rows", "columns"):
        call = jax.jit(functools.partial(run, implementation, case, contract))
        x = jnp.asarray(random_x(rng, case, contract, exact=False))
        first = bits(call(x, w))
        for _ in range(times - 1):
            np.testing.assert_array_equal(bits(call(x, w)), first)


def check_batch_invariance(implementation: str | None, case: Case, rng, batches) -> None:
    """A row's result does not depend on the batch that it sits in, bit for bit."""
    w = pack_of(random_pack(rng, case, implementation), case, implementation)
    for contract in ("rows", "columns"):
        call = jax.jit(functools.partial(run, implementation, case, contract))
        x = random_x(rng, case, contract, exact=False)
        whole = bits(call(jnp.asarray(x), w))
        for batch in batches:
            np.testing.assert_array_equal(bits(call(jnp.asarray(x[:batch]), w)), whole[:batch])
            np.testing.assert_array_equal(bits(call(jnp.asarray(x[-batch:]), w)), whole[-batch:])


def check_gradient(implementation: str | None, case: Case, rng) -> None:
    """dx is the product over W's other axis, exactly 0 in columns that are not used."""
    parts = random_pack(rng, case, implementation)
    w = pack_of(parts, case, implementation)
    for contract, other in (("rows", "columns"), ("columns", "rows")):
        first, number = case.used[contract]
        x = random_x(rng, case, contract)
        outputs = case.L if contract == "rows" else case.V
        g = rng.integers(-2, 3, (case.B, case.H, outputs)).astype(case.out_dtype)
        call = functools.partial(run, implementation, case, contract)
        dx = jax.jit(lambda x, g, call=call: jax.vjp(lambda x: call(x, w), x)[1](g)[0])(
            jnp.asarray(x), jnp.asarray(g)
        )
        want = np.zeros(x.shape)
        used = oracle.bmm(g.astype(np.float64), values(parts, case)[:, first : first + number], other)
        want[..., : used.shape[-1]] = used
        assert_equal(dx, want.astype(np.float32).astype(x.dtype))


def bits(y) -> np.ndarray:
    """An array's bits, so that NaN and signed zeros count."""
    y = np.asarray(y)
    return y.view(np.dtype(f"u{y.dtype.itemsize}"))
