"""Record one attention of each family as transformers computes it: families.npz, families.json.

    python tests/data/make_families.py          needs torch 2.13 and transformers 5.24; recorded with those

Weights are made from the tensors' names, here and in the test alike (family_weights), so that only configs, inputs
and outputs are kept.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TOKENS = 16
SIZES = {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 40,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.0, 1.1, 1.3, 2.0],
    "original_max_position_embeddings": 256,
}
INDEXER = {"index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
WIDE = {"qk_nope_head_dim": 48, "v_head_dim": 64}  # P, V as in GLM: 3/4 and 1 of a head
LONGCAT = {"num_layers": 1, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "moe_topk": 2, "head_dim": 8}
CASES = {
    "deepseek_v3": {"rope_interleave": False},
    "deepseek_v32": INDEXER,
    "glm_moe_dsa": {**INDEXER, **WIDE},
    "glm4_moe_lite": WIDE,
    "minicpm3": {"rope_parameters": LONGROPE},
    "longcat_flash": LONGCAT,
    "mistral4": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    "youtu": {"rope_parameters": YARN},
    "axk1": {"rope_parameters": YARN},
}


def family_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of a tensor by its name: splitmix64 of the index, uniform in +-1/4, around 1 for norms."""
    z = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 20)
    with np.errstate(over="ignore"):
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float64) / 2**24
    return ((uniform - 0.5) / 2 + (1.0 if "norm" in name else 0.0)).astype(np.float32).reshape(shape)


def main() -> None:
    """Run every family's attention on the same hidden states."""
    import torch
    from transformers import AutoConfig, AutoModel

    arrays, configs = {}, {}
    for family, changes in CASES.items():
        config = AutoConfig.for_model(family, **{**SIZES, **changes})
        config._attn_implementation = "eager"
        model = AutoModel.from_config(config).eval().float()
        attention = model.layers[0].self_attn
        attention = attention[0] if isinstance(attention, torch.nn.ModuleList) else attention
        with torch.no_grad():
            for name, parameter in attention.named_parameters():
                parameter.copy_(torch.from_numpy(family_weights(name, tuple(parameter.shape))))
        x = torch.from_numpy(family_weights("x", (1, TOKENS, 96)) * 4)
        seen = {}

        def before(module, args, kwargs, x=x):
            kwargs = dict(kwargs)
            if args:
                return (x, *args[1:]), kwargs
            kwargs["hidden_states"] = x
            return args, kwargs

        attention.register_forward_pre_hook(before, with_kwargs=True)
        attention.register_forward_hook(lambda module, args, out, seen=seen: seen.update(y=out[0]))
        with torch.no_grad():
            model(torch.zeros((1, TOKENS), dtype=torch.long) + 5)
        arrays[family] = seen["y"].numpy()
        configs[family] = {
            "config": json.loads(config.to_json_string(use_diff=False)),
            "tensors": {name: list(parameter.shape) for name, parameter in attention.named_parameters()},
        }
        keep = set(SIZES) | {
            "model_type",
            "rope_parameters",
            "rope_interleave",
            "attention_bias",
            "index_topk",
            "num_layers",
        }
        configs[family]["config"] = {k: v for k, v in configs[family]["config"].items() if k in keep}
    np.savez_compressed(HERE / "families.npz", **arrays)
    (HERE / "families.json").write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
