"""What kv_b_proj takes in memory: in bf16, as engines hold it, and here."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mla_fp4_jax.config import MLAConfig
from mla_fp4_jax.fp4_array import FP4Array
from mla_fp4_jax.weights import MLAWeights, Weight

BF16, ENGINES, HERE = "bf16", "engines, two copies", "here, one pack"
GROUP_SIZE = 32


def kv_b_memory(config: MLAConfig, kv_b: Weight) -> dict[str, int]:
    """Bytes by name.

    Engines keep the checkpoint's pack for prefill and, for decode, W_K [H, L, P/2] and W_V [H, V, L/2] with
    their scales (vLLM, SGLang and ATOM on ROCm; some keep a third copy).
    """
    c = config
    elements = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    held = {BF16: 2 * elements}
    if isinstance(kv_b, FP4Array):
        if kv_b.format == "mxfp4" and c.qk_nope_head_dim % GROUP_SIZE == 0:
            held[ENGINES] = 2 * (elements // 2 + elements // GROUP_SIZE)
        held[HERE] = int(kv_b.nbytes_packed)
    else:
        held["here, as in the checkpoint"] = kv_b.size * kv_b.dtype.itemsize
    return held


def bytes_on_a_device(weights: MLAWeights) -> int:
    """What one device of this process holds of weights that are spread; a code is half a byte."""
    bits = 0
    for leaf in jax.tree.leaves(weights):
        each = 4 if leaf.dtype == jnp.float4_e2m1fn else 8 * leaf.dtype.itemsize
        bits += each * leaf.addressable_shards[0].data.size
    return bits // 8
