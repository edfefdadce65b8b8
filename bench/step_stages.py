"""The stages of a decode step: which of a compiled step's kernels belong to which, and what each must cost."""

from __future__ import annotations

import math
import re

import jax

from mla_fp4_jax import MLAConfig, MLAWeights

# In order of execution; all that is in no scope of the layer, such as the norm before it, is "other".
STAGES = (
    "qkv_a_proj",
    "norm_rope_write",
    "q_b_proj",
    "k_up",
    "rope_q",
    "attention",
    "combine",
    "v_up",
    "o_proj",
    "other",
)
_SCOPES = {
    "mla/qkv_a_proj": "qkv_a_proj",
    "mla/q_a_proj": "qkv_a_proj",
    "mla/kv_a_proj": "qkv_a_proj",
    "mla/norm_rope_write": "norm_rope_write",
    "mla/q_proj": "q_b_proj",
    "mla/k_up_proj": "k_up",
    "mla/attention": "attention",
    "mla/v_up_proj": "v_up",
    "mla/o_proj": "o_proj",
}
# Kernels whose names, as a profile has them, begin so.
_KERNELS = {"norm_rope_write": "norm_rope_write", "mla_decode_combine": "combine", "mla_decode": "attention"}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = .*? (?P<op>fusion|custom-call|copy|call)\(")
_CALLED = re.compile(r"to_apply=%([\w.\-]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_SHARED_NAME = re.compile(r'deduplicated_name="([^"]*)"')


def stage_of(op_name: str) -> str:
    """The stage that an instruction of HLO works for, by the scopes in its name."""
    stage = next((stage for scope, stage in _SCOPES.items() if scope in op_name), "other")
    if "mla_decode_combine" in op_name:
        return "combine"
    return "rope_q" if stage in ("attention", "k_up") and op_name.endswith("concatenate") else stage


def launches(text: str) -> list[tuple[frozenset[str], str]]:
    """(names that its kernel may have, stage) of what a compiled program launches, in the order of the text.

    A fusion's kernel has its name, or that of an equal one; a library call's kernels have names of their own.
    """
    bodies: dict[str, list[str]] = {}
    entry, body = "", None
    for line in text.splitlines():
        if line and not line[0].isspace() and line.rstrip().endswith("{"):
            name = line.split("(")[0].replace("ENTRY", "").strip().lstrip("%")
            body = bodies.setdefault(name, [])
            entry = name if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            body = None
        elif body is not None:
            body.append(line)

    def walk(name: str) -> list[tuple[frozenset[str], str]]:
        found = []
        for line in bodies.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            if match["op"] == "call":
                called = _CALLED.search(line)
                found += walk(called[1]) if called else []
                continue
            scope, shared = _SCOPE.search(line), _SHARED_NAME.search(line)
            names = {match["name"], *([shared[1]] if shared else [])} if match["op"] != "custom-call" else set()
            names = frozenset(re.sub(r"[.\-]", "_", name) for name in names)
            found.append((names, stage_of(scope[1] if scope else "")))
        return found

    return walk(entry)


def stages_of_kernels(seen: list[tuple[str, float]], text: str) -> list[str]:
    """The stage of every kernel that was seen.

    Kernels go by their names where the program or this project gave them; the others, those of library calls and
    Mosaic, are given to the calls in order, as many to each as there are for every one; what is left is "other".
    """
    planned = launches(text)
    by_name = {name: stage for names, stage in planned for name in names}
    found = [
        next((s for n, s in _KERNELS.items() if kernel.startswith(n)), by_name.get(kernel)) for kernel, _ in seen
    ]
    calls = [stage for names, stage in planned if not names and stage not in _KERNELS.values()]
    nameless = [i for i, stage in enumerate(found) if stage is None]
    if calls and len(nameless) % len(calls) == 0:
        each = len(nameless) // len(calls)
        for number, i in enumerate(nameless):
            found[i] = calls[number // each]
    return [stage or "other" for stage in found]


def by_stage(seen: list[tuple[str, float]], text: str, layers: int) -> dict[str, dict[str, float]]:
    """Microseconds and launches a layer, by stage."""
    found: dict[str, dict[str, float]] = {}
    for (_, us), stage in zip(seen, stages_of_kernels(seen, text), strict=True):
        entry = found.setdefault(stage, {"us": 0.0, "launches": 0.0})
        entry["us"] += us / layers
        entry["launches"] += 1 / layers
    return {
        stage: {key: round(value, 2) for key, value in found[stage].items()} for stage in STAGES if stage in found
    }


def floors(
    config: MLAConfig, weights: MLAWeights, shape: tuple[int, int, int], ceilings: dict[str, float]
) -> dict[str, dict[str, float]]:
    """What every stage must move and multiply: megabytes, operations, and the time of the slower of the two, us."""
    c, (heads, batch, keys) = config, shape
    up = heads * c.kv_lora_rank * batch * 2  # operations of an absorbed product are this times P or V

    def stored(*names: str) -> float:
        arrays = [getattr(weights, name) for name in names]
        return sum(math.prod(a.shape) * (2.0 if isinstance(a, jax.Array) else 4.25 / 8) for a in arrays)

    def linear_part(*names: str) -> tuple[float, float]:
        return stored(*names), sum(2.0 * batch * math.prod(getattr(weights, name).shape) for name in names)

    share = c.qk_nope_head_dim / (c.qk_nope_head_dim + c.v_head_dim)
    entry, latent = c.cache_dim * 2, heads * c.kv_lora_rank * 2
    table = {
        "qkv_a_proj": linear_part("q_a_proj", "kv_a_proj_with_mqa"),
        "norm_rope_write": (2 * batch * entry, 0.0),
        "q_b_proj": linear_part("q_b_proj"),
        "k_up": (share * stored("kv_b_proj"), up * c.qk_nope_head_dim),
        "attention": (
            batch * (keys * entry + heads * entry + latent),
            2.0 * batch * heads * keys * (c.cache_dim + c.kv_lora_rank),
        ),
        "v_up": ((1 - share) * stored("kv_b_proj"), up * c.v_head_dim),
        "o_proj": linear_part("o_proj"),
    }
    result = {}
    for stage, (moved, operations) in table.items():
        us = max(moved / ceilings["tb_per_s"], operations / ceilings["tflops"]) / 1e6
        result[stage] = {"mb": round(moved / 1e6, 3), "gflop": round(operations / 1e9, 3), "us": round(us, 2)}
    return result
