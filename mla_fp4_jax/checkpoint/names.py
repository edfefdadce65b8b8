"""Tensor names of layers in a checkpoint: Hugging Face's, DeepSeek's own, and what may lie beside them."""

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
# DeepSeek's own names (deepseek-ai/DeepSeek-V3, inference/convert.py) -> Hugging Face's.
NATIVE = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}
# Scales of activations and of quantised caches: this library keeps both in the compute dtype, so that
# leaving them out changes no weight. Anything else that is left over is an error.
ACTIVATION_SUFFIXES = (
    "input_scale",
    "output_scale",
    "activation_scale",
    "input_global_scale",
    "input_scale_ub",
    "_weight_act_per_tensor_scale",
    "k_scale",
    "v_scale",
    "q_scale",
    "kv_scale",
    "rotary_emb.inv_freq",
)

_LAYER = re.compile(
    r"^(?P<prefix>(?:.*\.)?layers\.(?P<layer>[0-9]{1,4})\.(?:self_attn|attn)\.(?:(?P<part>[01])\.)?)(?P<rest>.+)$"
)
LATENT_MODULES = ("kv_b_proj.", "kv_a_proj_with_mqa.", "wkv_b.", "wkv_a.")


def module_and_suffix(field: str) -> tuple[str, str]:
    """Where a field of MLAWeights is stored: module and tensor suffix below the layer's prefix."""
    return BIASES.get(field, (field, "weight"))


def is_activation_scale(rest: str) -> bool:
    """Whether a name below the layer's prefix is a tensor that may be left out."""
    return rest in ACTIVATION_SUFFIXES or any(rest.endswith(f".{suffix}") for suffix in ACTIVATION_SUFFIXES)


class LayerNames:
    """The attention tensors of every layer, found in one pass over the names.

    Attributes:
        checkpoint: whose they are.
    """

    def __init__(self, checkpoint: Checkpoint, attentions_per_layer: int = 1):
        """Sort the names; an attention's number is layer * attentions_per_layer + part."""
        self.checkpoint = checkpoint
        self._found: dict[int, dict[str, dict[str, str]]] = {}
        for name in checkpoint.names:
            match = _LAYER.match(name)
            if match is None or (match["part"] is not None and attentions_per_layer == 1):
                continue
            number = int(match["layer"]) * attentions_per_layer + int(match["part"] or 0)
            self._found.setdefault(number, {}).setdefault(match["prefix"], {})[match["rest"]] = name
        for number, prefixes in self._found.items():
            # A vision tower's layers have a self_attn too.
            latent = {p: rests for p, rests in prefixes.items() if any(r.startswith(LATENT_MODULES) for r in rests)}
            self._found[number] = latent or prefixes

    @property
    def layers(self) -> list[int]:
        """Numbers of the attentions that hold latent projections."""
        return sorted(
            number
            for number, prefixes in self._found.items()
            if any(rest.startswith(LATENT_MODULES) for rests in prefixes.values() for rest in rests)
        )

    def find(self, layer: int, prefix: str | None = None) -> tuple[str, dict[str, str]]:
        """A layer's prefix, "model.layers.0.self_attn.", and its tensors: name below that -> full name.

        Args:
            layer: its number.
            prefix: None to find it, else where the layer's tensors are, "{layer}" standing for the number.

        Raises:
            CheckpointError: no such layer, or several that could be meant.
        """
        root = self.checkpoint.root
        if prefix is not None:
            wanted = prefix.replace("{layer}", str(layer)).rstrip(".")
            wanted += "." if wanted else ""
            below = {name[len(wanted) :]: name for name in self.checkpoint.names if name.startswith(wanted)}
            if not below:
                raise CheckpointError(f"{root}: no tensor's name begins with {quoted(wanted)}.")
            return wanted, below
        found = self._found.get(layer, {})
        if len(found) == 1:
            return next(iter(found.items()))
        if found:
            could = " or ".join(map(quoted, sorted(found)[:4]))
            raise CheckpointError(f"{root}: layer {layer} could be {could}; pass prefix=.")
        numbers = sorted(self._found)
        there = f"its layers are {_ranges(numbers)}" if numbers else "no name has the form layers.N.self_attn"
        raise CheckpointError(f"{root}: has no attention layer {layer}; {there}.")


def tensors_of(module: str, below: dict[str, str]) -> dict[str, str]:
    """A module's tensors, suffix -> full name, under Hugging Face's name for it or else DeepSeek's own."""
    for spelling in (module, *(ours for ours, theirs in NATIVE.items() if theirs == module)):
        start = len(spelling) + 1
        found = {rest[start:]: name for rest, name in below.items() if rest.startswith(f"{spelling}.")}
        if found:
            return found
    return {}


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    shown = [str(low) if low == high else f"{low} .. {high}" for low, high in spans[:8]]
    return ", ".join(shown) + (", ..." if len(spans) > 8 else "")
