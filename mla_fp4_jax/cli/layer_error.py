"""What converting weights does to a layer's output: two checkpoints' layers in float64, on inputs with outliers."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from mla_fp4_jax.checkpoint.plan import LayerPlan
from mla_fp4_jax.cli.oracle import Float64Layer

TOKENS = 16
# A trained model's normed hidden states: a few channels carry values far beyond the rest (27.8 standard deviations in
# SmolLM2's, 15.8 in MiniLM's), and all differ in scale.
OUTLIER_CHANNELS = 0.005
OUTLIER_GAIN = 12.0
SPREAD = 0.5


class StoredLayer(Float64Layer):
    """A layer whose weights are read from its checkpoint a few rows at a time."""

    def __init__(self, plan: LayerPlan):
        self.config = plan.config
        self._planned = {weight.field: weight for weight in plan.weights}

    def has(self, field: str) -> bool:
        """Whether the layer has this weight."""
        return field in self._planned

    def length(self, field: str) -> int:
        """Of a weight's first axis as stored."""
        return self._planned[field].stored.shape[0]

    def rows(self, field: str, part: slice | int) -> np.ndarray:
        """Some of a weight's first axis, in float64; of kv_b_proj a head."""
        planned = self._planned[field]
        if isinstance(part, int):
            rows = self.config.qk_nope_head_dim + self.config.v_head_dim
            part = slice(part * rows, (part + 1) * rows)
        return planned.reader.rows(planned.stored, part).astype(np.float64)


def outlier_inputs(hidden_size: int, tokens: int = TOKENS, seed: int = 0) -> Float[np.ndarray, "T E"]:
    """Normal hidden states whose channels differ in scale, log-normally, and a few of which are outliers."""
    rng = np.random.default_rng(seed)
    gain = np.exp(SPREAD * rng.standard_normal(hidden_size))
    number = max(1, round(OUTLIER_CHANNELS * hidden_size))
    gain[rng.choice(hidden_size, number, replace=False)] *= OUTLIER_GAIN
    x = rng.standard_normal((tokens, hidden_size)) * gain
    return x / np.sqrt(np.mean(x**2))


def layer_output(plan: LayerPlan, x: Float[np.ndarray, "T E"]) -> Float[np.ndarray, "T E"]:
    """The layer's output for one sequence, in float64."""
    layer, positions = StoredLayer(plan), np.arange(len(x))
    latent, k_rope = layer.entries(x)
    return layer.output(layer.naive(layer.queries(x, positions), latent, k_rope, positions))


def relative_error(mine: np.ndarray, reference: np.ndarray) -> float:
    """Root mean square of the difference over that of the reference."""
    size = float(np.sqrt(np.mean(reference**2)))
    return float(np.sqrt(np.mean((mine - reference) ** 2))) / size if size else 0.0
