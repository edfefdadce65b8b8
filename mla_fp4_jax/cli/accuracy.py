"""How far the layer's output is from float64, here and with what the engines make of the same kv_b_proj."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mla_fp4_jax.cli.oracle import Float64Layer, decode_mxfp4
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.kv_b_proj import unpack_kv_b_proj
from mla_fp4_jax.mla import MLAAttention
from mla_fp4_jax.quantize import quantize_mxfp4

GROUP_SIZE = 32
SMALL_LAYER = 20_000_000  # weights; beyond it one sequence and few steps are compared
STEPS_OF_A_LARGE_LAYER = 4
MOST_MULTIPLICATIONS = 1 << 38  # in float64: half a minute or so
HERE, REQUANTISED, W4A4 = "this library", "engines, W_K requantised", "engines, W4A4"


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Relative RMS errors of the output against the float64 layer.

    Attributes:
        sequences, steps: how many were compared.
        errors: by name: HERE as run; REQUANTISED and W4A4 in float64 arithmetic, so that nothing but the
            formats is counted. The latter two only where kv_b_proj is MXFP4 and has the engines' layout.
        w_k_error: what requantising did to W_K alone; None like the above.
        oracle: the float64 outputs, [sequences, steps, E].
    """

    sequences: int
    steps: int
    errors: dict[str, float]
    w_k_error: float | None
    oracle: np.ndarray


def why_not(layer: MLAAttention, tokens: int) -> str | None:
    """Why a float64 comparison after so many tokens would take too long, or None."""
    c = layer.config
    per_token = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    if tokens * per_token <= MOST_MULTIPLICATIONS:
        return None
    return f"{tokens} tokens take too long in float64; at most {MOST_MULTIPLICATIONS // per_token} are compared"


def measure(
    layer: MLAAttention, x: Float[np.ndarray, "B S E"], outputs: Float[np.ndarray, "B N E"], first: int
) -> Accuracy:
    """Compare decoded outputs with float64.

    Args:
        layer: what was run.
        x: its inputs, as float32; x[:, first + n] gave outputs[:, n].
        outputs: of the decoded tokens.
        first: tokens prefilled before them.
    """
    reference = Float64Layer(layer.config, layer.weights)
    sequences, steps = outputs.shape[:2]
    if _size(layer) > SMALL_LAYER:
        sequences, steps = 1, min(steps, STEPS_OF_A_LARGE_LAYER)
    alternatives, w_k_error = _engines(layer)
    exact: list[np.ndarray] = []
    others: dict[str, list[np.ndarray]] = {name: [] for name in alternatives}
    for b in range(sequences):
        tokens = x[b, : first + steps].astype(np.float64)
        positions = np.arange(first, first + steps)
        latent, k_rope = reference.entries(tokens)
        q = reference.queries(tokens[first:], positions)
        heads = [reference.naive(q, latent, k_rope, positions)]
        heads += [
            reference.absorbed(q, latent, k_rope, positions, *alternative) for alternative in alternatives.values()
        ]
        y = np.split(reference.output(np.concatenate(heads)), len(heads))
        exact.append(y[0])
        for name, value in zip(alternatives, y[1:], strict=True):
            others[name].append(value)
    oracle = np.stack(exact)
    found = {
        HERE: outputs[:sequences, :steps],
        **{name: np.stack(value) for name, value in others.items()},
    }
    errors = {name: relative_rms(value, oracle) for name, value in found.items()}
    return Accuracy(sequences, steps, errors, w_k_error, oracle)


def relative_rms(value: np.ndarray, reference: np.ndarray) -> float:
    """|value - reference| / |reference|, root mean square."""
    difference = value.astype(np.float64) - reference
    return float(np.sqrt(np.mean(difference**2) / np.mean(reference**2)))


def _engines(layer: MLAAttention) -> tuple[dict[str, Sequence], float | None]:
    """Arguments of Float64Layer.absorbed for what engines hold and do, and W_K's error."""
    c, kv_b = layer.config, layer.weights.kv_b_proj
    if not (isinstance(kv_b, FP4Array) and kv_b.format == "mxfp4") or c.qk_nope_head_dim % GROUP_SIZE:
        return {}, None
    packed, scales = kv_b.to_packed()[:2]
    heads, rows = kv_b.shape[:2]
    unpacked = unpack_kv_b_proj(
        packed.reshape(heads * rows, -1),
        scales.reshape(heads * rows, -1),
        num_heads=heads,
        qk_nope_head_dim=c.qk_nope_head_dim,
        v_head_dim=c.v_head_dim,
    )
    w_k, w_k_scale, w_v, w_v_scale, error = (np.asarray(array) for array in unpacked)

    def key_rows(h: int) -> np.ndarray:
        return decode_mxfp4(w_k[h], w_k_scale[h]).T

    def value_rows(h: int) -> np.ndarray:
        return decode_mxfp4(w_v[h], w_v_scale[h])

    return {REQUANTISED: (key_rows, value_rows), W4A4: (key_rows, value_rows, _through_mxfp4)}, float(error)


def _through_mxfp4(x: np.ndarray) -> np.ndarray:
    """Activations as MXFP4 kernels see them: quantised in groups of 32 along the contracted axis."""
    quantised = quantize_mxfp4(jnp.asarray(x, jnp.float32), scale_rule="even")
    return np.asarray(quantised.dequantize(jnp.float32)).astype(np.float64)


def _size(layer: MLAAttention) -> int:
    return sum(int(np.prod(value.shape)) for value in vars(layer.weights).values() if value is not None)
