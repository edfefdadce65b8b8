"""fp4_linear on weights in fragment order: what is chosen where, and the same answers without the kernels."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import linear_checks as checks
import numpy as np
import pytest
from flax import nnx
from linear_checks import Case

from mla_fp4_jax import FP4Array, MLAAttention, MLAConfig, fp4_linear
from mla_fp4_jax.kernel_order import order_for_device
from mla_fp4_jax.ops import implementations
from mla_fp4_jax.ops.dense import fp4_dense
from mla_fp4_jax.ops.implementations import MOSAIC, XLA
from pallas_kernels import fp4_linear_few as few
from pallas_kernels import fp4_linear_many as many
from pallas_kernels import fp4_linear_tiles as tiling
from pallas_kernels.backend import abstract_gpu, mosaic_why_not, target_gpu
from pallas_kernels.fp4_linear_mosaic_gpu import INVARIANT_TOKENS, MOST_TOKENS, default_config, default_split
from pallas_kernels.fp4_linear_tiles import Config, Problem, check_config
from pallas_kernels.fragments import FragmentOrder

with abstract_gpu():
    NO_MOSAIC = mosaic_why_not(target_gpu())
for_hopper = pytest.mark.skipif(NO_MOSAIC is not None, reason=str(NO_MOSAIC))
shape = jax.ShapeDtypeStruct


LINEAR = FragmentOrder(0)


def abstract(N: int, K: int, order: FragmentOrder | None = LINEAR) -> FP4Array:
    return FP4Array(shape((N, K), jnp.float4_e2m1fn), shape((N, K // 32), jnp.uint8), order=order)


def kernels(function, *args, platform="cuda") -> int:
    """Mosaic GPU calls in a program lowered for a Hopper GPU, or traced for it and lowered for a CPU."""
    with abstract_gpu():
        text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return text.count("custom_call @mosaic_gpu")


@pytest.mark.parametrize("implementation", [None, XLA])
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
def test_fragment_order_gives_the_same_product_anywhere(implementation, out, rng):
    for case in (Case(3, 64, 128, out), Case(1, 192, 384, out), Case(0, 64, 128, out)):
        checks.check_exact(implementation, case, rng)
    checks.check_gradient(implementation, Case(3, 64, 128, out), rng)
    checks.check_error(implementation, Case(3, 64, 128, out), rng)


def test_the_checks_can_fail(rng, monkeypatch):
    real = checks.fp4_linear
    monkeypatch.setattr(checks, "fp4_linear", lambda x, w, **given: real(x, w, **given).at[-1, -1].add(8))
    with pytest.raises(AssertionError):
        checks.check_exact(XLA, Case(3, 64, 128), rng)
    with pytest.raises(AssertionError):
        checks.check_error(XLA, Case(3, 64, 128), rng)
    monkeypatch.setattr(checks, "fp4_linear", lambda x, w, **given: real(x, w, **given) * x.shape[0])
    with pytest.raises(AssertionError):
        checks.check_batch_invariance(XLA, Case(3, 64, 128), rng, (1,))


@pytest.mark.parametrize(("size", "key_rows"), [((64, 128), 0), ((2, 128, 64), 64)])
def test_dense_is_dequantize_where_there_is_no_kernel(size, key_rows, rng):
    packed = rng.integers(0, 256, (*size[:-1], size[-1] // 2), np.uint8)
    w = FP4Array.from_packed(packed, rng.integers(100, 129, (*size[:-1], size[-1] // 32)).astype(np.uint8))
    for dtype in (jnp.bfloat16, jnp.float32):
        np.testing.assert_array_equal(fp4_dense(w.in_fragment_order(key_rows), dtype), w.dequantize(dtype))


@for_hopper
def test_few_tokens_take_one_kernel_many_a_dense_matrix():
    call = functools.partial(fp4_linear, implementation=None)
    for tokens in (1, 17, MOST_TOKENS, MOST_TOKENS + 1, 4096):
        x = shape((tokens, 128), jnp.bfloat16)
        # One either way: the product's own, or the one that makes the dense matrix.
        assert kernels(call, x, abstract(192, 128)) == 1
        with abstract_gpu():
            text = jax.jit(call).trace(x, abstract(192, 128)).lower(lowering_platforms=("cuda",)).as_text()
        assert ("dot_general" in text) == (tokens > MOST_TOKENS)


@for_hopper
def test_what_the_kernels_do_not_take_goes_elsewhere():
    some = shape((3, 128), jnp.bfloat16)
    assert kernels(fp4_linear, some, abstract(192, 128)) == 1
    assert kernels(fp4_linear, some, abstract(192, 128), platform="cpu") == 0
    assert kernels(fp4_linear, shape((3, 128), jnp.float32), abstract(192, 128)) == 0
    assert kernels(fp4_linear, some, abstract(192, 128, order=None)) == 0
    assert kernels(fp4_linear, shape((3, 192), jnp.bfloat16), abstract(128, 192)) == 0  # K = 3 x 64
    assert kernels(functools.partial(fp4_linear, implementation=XLA), some, abstract(192, 128)) == 0


@for_hopper
@pytest.mark.parametrize(
    ("x", "w", "out", "says"),
    [
        (shape((3, 128), jnp.bfloat16), abstract(192, 128, None), None, "not in fragment order"),
        (shape((3, 128), jnp.bfloat16), abstract(192, 128, FragmentOrder(64)), None, "without key rows"),
        (shape((3, 128), jnp.float32), abstract(192, 128), None, "float32 into float32"),
        (shape((3, 128), jnp.bfloat16), abstract(192, 128), "float16", "into float16"),
        (shape((3, 192), jnp.bfloat16), abstract(64, 192), None, "K of 128"),
        (shape((2**23, 128), jnp.bfloat16), abstract(64, 128), None, "fewer than 2.29 elements"),
    ],
)
def test_the_kernels_say_what_they_do_not_take(x, w, out, says):
    call = functools.partial(fp4_linear, implementation=MOSAIC, preferred_element_type=out)
    with abstract_gpu(), pytest.raises(NotImplementedError, match=says):
        jax.eval_shape(call, x, w)


def test_the_kernels_need_a_hopper_gpu():
    if implementations.why_not(MOSAIC) is None:
        pytest.skip("there is one")
    with pytest.raises(NotImplementedError, match="implementation 'mosaic_gpu' cannot run"):
        jax.eval_shape(
            functools.partial(fp4_linear, implementation=MOSAIC), shape((3, 128), jnp.bfloat16), abstract(64, 128)
        )


PROBLEMS = [
    Problem(tokens, *sizes)
    for tokens in (1, 4, 5, 8, 9, 16, 17, 32, 33, 49, 64, 65, 100, 128, 129, 256, 300, 511, 512)
    for sizes in ((64, 128), (192, 384), (576, 7168), (1536, 7168), (2112, 7168), (7168, 16384), (24576, 1536))
    + ((320, 128), (5120, 16384), (4096, 640), (12288, 1536), (7168, 128))
]


@pytest.mark.parametrize("on_an_h200", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"{p.batch}-{p.outputs}-{p.contraction}")
def test_default_tiles_fit(problem, on_an_h200):
    config = default_config(problem, on_an_h200=on_an_h200)
    if isinstance(config, few.Config):
        few.check_config(problem)
        assert few.SPLIT == default_split(problem.outputs, problem.contraction)
        assert few.ctas(problem) * few.ROWS == problem.outputs
        assert few.stages(problem) * few.SPLIT * 128 == problem.contraction
        return
    if isinstance(config, many.Config):
        many.check_config(problem, config)
        assert many.token_tiles(problem, config) * config.tokens >= problem.batch
        if problem.batch <= INVARIANT_TOKENS:  # the parts of the other kernel
            assert config.split == default_split(problem.outputs, problem.contraction)
            assert problem.contraction % (128 * config.split) == 0
        rows = many.clusters(problem, config) // many.token_tiles(problem, config) * 128
        assert rows >= problem.outputs
        return
    check_config(problem, config)
    if problem.batch <= INVARIANT_TOKENS:  # what batch invariance rests on
        assert config.split == default_split(problem.outputs, problem.contraction)
    # Every token, output and k belongs to one CTA's share.
    assert tiling.token_tiles(problem, config) * config.tokens >= problem.batch
    assert tiling.stages(problem, config) * config.split * config.blocks * 64 == problem.contraction


@pytest.mark.parametrize(
    ("change", "says"),
    [({"split": 3}, "split"), ({"tokens": 12}, "tokens"), ({"tokens": 136, "tiles": 2}, "tokens")]
    + [({"warpgroups": 5}, "warpgroups"), ({"tiles": 3}, "tiles"), ({"blocks": 1}, "even number")]
    + [({"warpgroups": 2}, "divide N"), ({"split": 8, "blocks": 4}, "64-k blocks"), ({"slots": 2}, "slots")]
    + [({"split": 1, "push": True}, "push"), ({"slots": 60}, "227 KiB")],
)
def test_tiles_that_do_not_fit_are_named(change, says):
    fits = Config(2, 8, 1, 1, 2, 4)
    problem = Problem(5, 192, 1024)
    check_config(problem, fits)
    with pytest.raises(ValueError, match=says):
        check_config(problem, dataclasses.replace(fits, **change))


def test_an_h200_takes_other_tiles_for_few_tokens():
    one, some, many_ = Problem(4, 2112, 7168), Problem(16, 7168, 16384), Problem(65, 7168, 16384)
    assert default_config(one, on_an_h200=True) == few.Config() != default_config(one)
    assert not isinstance(default_config(dataclasses.replace(one, batch=5), on_an_h200=True), few.Config)
    assert default_config(some, on_an_h200=True) == Config(2, 16, 1, 1, 4, 4, True) != default_config(some)
    assert default_config(many_, on_an_h200=True) == default_config(many_)


@for_hopper
@pytest.mark.parametrize(
    ("kind", "clusters"), [("NVIDIA H200", 112), ("NVIDIA H100 80GB HBM3", 56), ("NVIDIA GH200 480GB", 56)]
)
def test_which_gpu_is_an_h200(kind, clusters):
    call = functools.partial(fp4_linear, implementation=MOSAIC)
    with abstract_gpu(kind):
        text = str(jax.make_jaxpr(call)(shape((1, 16384), jnp.bfloat16), abstract(7168, 16384)))
    assert f"grid=({clusters},)" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch": 9}, "M must be at most 8"),
        ({"outputs": 208}, "64 must divide N"),
        ({"contraction": 2560}, "1024 must divide K"),
        ({"contraction": 15 * 1024}, "227 KiB"),
    ],
)
def test_what_the_kernel_for_few_tokens_cannot_take_is_named(change, says):
    problem = Problem(8, 192, 3072)
    few.check_config(problem)
    with pytest.raises(ValueError, match=says):
        few.check_config(dataclasses.replace(problem, **change))


@pytest.mark.parametrize(
    ("change", "says"),
    [({"split": 9}, "1 .. 8"), ({"tokens": 264}, "tokens"), ({"tokens": 12}, "tokens")]
    + [({"slots": 5}, "even number"), ({"slots": 16}, "227 KiB")],
)
def test_tiles_of_many_tokens_that_do_not_fit_are_named(change, says):
    fits = many.Config(2, 128, 6)
    problem = Problem(300, 192, 1024)
    many.check_config(problem, fits)
    with pytest.raises(ValueError, match=says):
        many.check_config(problem, dataclasses.replace(fits, **change))


CONFIG = MLAConfig(
    hidden_size=256,
    num_attention_heads=2,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
)


@for_hopper
def test_a_layers_linears_are_put_in_order_once():
    formats = {name: "mxfp4" for name in ("o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")}
    layer = MLAAttention(CONFIG, linear_formats=formats, implementation=XLA, rngs=nnx.Rngs(0))
    weights = layer.weights
    with abstract_gpu():
        ordered = order_for_device(weights, CONFIG)
    for name in formats:
        before, after = getattr(weights, name), getattr(ordered, name)
        assert before.order is None and after.order == FragmentOrder(64 if name == "kv_b_proj" else 0), name
        assert after.nbytes_packed == before.nbytes_packed
        jax.tree.map(np.testing.assert_array_equal, after.to_packed(), before.to_packed())
    # A scale that the kernels cannot fold, another implementation, and dense weights leave them as they are.
    o_proj = weights.o_proj
    assert isinstance(o_proj, FP4Array)
    large = dataclasses.replace(o_proj, scales=o_proj.scales.at[3, 1].set(129))
    with abstract_gpu():
        assert order_for_device(dataclasses.replace(weights, o_proj=large), CONFIG).o_proj is large
        assert order_for_device(weights, CONFIG, XLA).o_proj is o_proj
    if implementations.why_not(MOSAIC) is not None:
        assert order_for_device(weights, CONFIG).o_proj is o_proj


@for_hopper
def test_prefill_decodes_kv_b_proj_with_one_kernel():
    """No XLA passes over the pack: from fragment order to the dense matrix in one launch, then a library's matmul."""
    formats = {"kv_b_proj": "mxfp4"}
    layer = MLAAttention(CONFIG, linear_formats=formats, implementation=None, rngs=nnx.Rngs(0))
    with abstract_gpu():
        weights = order_for_device(layer.weights, CONFIG)
    layer = MLAAttention(CONFIG, weights=weights, dtype=jnp.bfloat16)
    cache = jax.eval_shape(lambda: layer.init_cache(2, 128))
    x = shape((2, 64, CONFIG.hidden_size), jnp.bfloat16)
    assert kernels(MLAAttention.prefill, layer, x, cache) == 1
