"""Tensor names of a layer in a checkpoint: Hugging Face's, and what may lie beside them."""

from __future__ import annotations

import re

from mla_fp4_jax.checkpoint.directory import Checkpoint
from mla_fp4_jax.checkpoint.strict_json import quoted
from mla_fp4_jax.errors import CheckpointError

# MLAWeights' field -> module and suffix, where they are not (field, "weight").
BIASES = {
    "q_a_proj_bias": ("q_a_proj", "bias"),
    "kv_a_proj_bias": ("kv_a_proj_with_mqa", "bias"),
    "o_proj_bias": ("o_proj", "bias"),
}
# Scales of activations and of quantised caches: this library keeps both in the compute dtype, so that
# leaving them out changes no weight. Anything else that is left over is an error.
ACTIVATION_SUFFIXES = (
    "input_scale",
    "output_scale",
    "input_global_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "rotary_emb.inv_freq",
)

_LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?layers\.(?P<layer>[0-9]{1,6})\.self_attn\.)")
_NATIVE = re.compile(r"^(?:.*\.)?layers\.[0-9]{1,6}\.attn\.w(?:kv_a|kv_b|q|q_a|o)\.")


def module_and_suffix(field: str) -> tuple[str, str]:
    """Where a field of MLAWeights is stored: module and tensor suffix below the layer's prefix."""
    return BIASES.get(field, (field, "weight"))


def is_activation_scale(rest: str) -> bool:
    """Whether a name below the layer's prefix is a tensor that may be left out."""
    return rest in ACTIVATION_SUFFIXES or any(rest.endswith(f".{suffix}") for suffix in ACTIVATION_SUFFIXES)


def find_prefix(checkpoint: Checkpoint, layer: int, prefix: str | None) -> str:
    """What the names of a layer's attention tensors begin with, "model.layers.0.self_attn.".

    Args:
        checkpoint: where to look.
        layer: its number.
        prefix: None to find it, else where the layer's tensors are, "{layer}" standing for the number.

    Raises:
        CheckpointError: no such layer, or several that could be meant.
    """
    if prefix is not None:
        wanted = prefix.replace("{layer}", str(layer)).rstrip(".")
        wanted += "." if wanted else ""
        if not any(name.startswith(wanted) for name in checkpoint.names):
            raise CheckpointError(f"{checkpoint.root}: no tensor's name begins with {quoted(wanted)}.")
        return wanted
    matches = [match for match in map(_LAYER.match, checkpoint.names) if match]
    found = sorted({match["prefix"] for match in matches if int(match["layer"]) == layer})
    if len(found) > 1:  # a vision tower's layers have a self_attn too
        latent = [name for name in found if any(other.startswith(f"{name}kv_") for other in checkpoint.names)]
        found = latent or found
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{checkpoint.root}: layer {layer} could be {' or '.join(map(quoted, found[:4]))}; pass prefix=."
        )
    if any(map(_NATIVE.match, checkpoint.names)):
        raise CheckpointError(
            f"{checkpoint.root}: has DeepSeek's own tensor names (attn.wkv_b, ...), which are not read; "
            "convert it to Hugging Face's."
        )
    layers = sorted({int(match["layer"]) for match in matches})
    there = f"its layers are {_ranges(layers)}" if layers else "no name has the form layers.N.self_attn"
    raise CheckpointError(f"{checkpoint.root}: has no attention layer {layer}; {there}.")


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [str(low) if low == high else f"{low} .. {high}" for low, high in spans[:8]]
    return ", ".join(shown) + (", ..." if len(spans) > 8 else "")
