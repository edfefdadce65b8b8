"""What the demo runs on: the checkpoint shipped with the package, or a user's."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float

from mla_fp4_jax.checkpoint import plan_mla_layer
from mla_fp4_jax.checkpoint.plan import LayerPlan

EMBEDDED = Path(__file__).resolve().parents[1] / "demo_data"
EMBEDDED_TITLE = "the embedded checkpoint: a tiny DeepSeek-V3 with random weights, exported by AMD Quark"
SEED = 0
DEFAULT_BATCH = 2
DEFAULT_PROMPT = 17  # of the recording
DEFAULT_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """A layer to load and what to feed it.

    Attributes:
        title: for the report.
        plan: of the layer.
        x: hidden states, float32 [B, prompt + steps, E].
        prompt: tokens to prefill.
        recorded: transformers' outputs of x's first tokens, [2, 24, E], if x is what they were recorded for.
    """

    title: str
    plan: LayerPlan
    x: Float[np.ndarray, "B S E"]
    prompt: int
    recorded: np.ndarray | None


def find_source(args: argparse.Namespace) -> Source:
    """The layer that the command line names, and inputs for it.

    Raises:
        CheckpointError: there is no such layer.
    """
    batch = args.batch or DEFAULT_BATCH
    prompt = args.prompt_length or DEFAULT_PROMPT
    steps = args.steps or DEFAULT_STEPS
    embedded = args.checkpoint is None
    plan = plan_mla_layer(EMBEDDED if embedded else args.checkpoint, args.layer, prefix=args.prefix)
    shape = (batch, prompt + steps, plan.config.hidden_size)
    # Normed hidden states are about unit normal.
    x = np.random.default_rng(SEED).standard_normal(shape, np.float32)
    if not embedded:
        return Source(str(args.checkpoint), plan, x, prompt, None)
    with np.load(EMBEDDED / "io.npz", allow_pickle=False) as arrays:
        recorded_x = (arrays["x:bf16"].astype(np.uint32) << 16).view(np.float32)
        recorded = arrays["fp32_dequant.prefill"]
    fits = batch >= recorded_x.shape[0] and x.shape[1] >= recorded_x.shape[1]
    if fits:
        x[: recorded_x.shape[0], : recorded_x.shape[1]] = recorded_x
    return Source(EMBEDDED_TITLE, plan, x, prompt, recorded if fits else None)
