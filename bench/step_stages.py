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
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = .*? (?P<op>fusion|custom-call|copy|call)\(")
_GEMM = re.compile(r'"kind":"[^"]*gemm')
_CALLED = re.compile(r"to_apply=%([\w.\-]+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_SHARED_NAME = re.compile(r'deduplicated_name="([^"]*)"')


def stage_of(op_name: str) -> str:
    """The stage that an instruction of HLO works for, by the scopes in its name."""
    stage = next((stage for scope, stage in _SCOPES.items() if scope in op_name), "other")
    if "mla_decode_combine" in op_name:
        return "combine"
    return "rope_q" if stage in ("attention", "k_up") and op_name.endswith("concatenate") else stage


def launches(text: str) -> list[tuple[str, str, str]]:
    """(kernel's name or "", stage, op) of what a compiled program launches, in order: the entry and what it calls.

    The name is known of fusions and copies, whose kernels are named after them; a library call's kernels are not.
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

    def walk(name: str) -> list[tuple[str, str, str]]:
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
            kernel = re.sub(r"[.\-]", "_", shared[1] if shared else match["name"])
            library = match["op"] == "custom-call" or _GEMM.search(line) is not None
            found.append(("" if library else kernel, stage_of(scope[1] if scope else ""), match["op"]))
        return found

    return walk(entry)


def stages_of_kernels(seen: list[tuple[str, float]], text: str) -> list[str]:
    """The stage of every kernel that was seen, aligned with the program's launches by the names that are known.

    Between two known names there may be more kernels than launches (a product and its reduction) or fewer (a launch
    of nothing): they are given to the launches there in order, and those left over to the last of them.
    """
    planned, result, at = launches(text), [], 0
    known = [name for name, _, _ in planned]
    waiting: list[int] = []

    def settle(last: int) -> None:
        free = [planned[i][1] for i in range(at, last) if planned[i][0] == ""]
        for i, where in enumerate(waiting):
            result[where] = free[min(i, len(free) - 1)] if free else "other"
        waiting.clear()

    for i, (kernel, _) in enumerate(seen):
        result.append("other")
        if kernel in known[at:]:
            index = known.index(kernel, at)
            settle(index)
            result[i], at = planned[index][1], index + 1
        else:
            waiting.append(i)
    settle(len(planned))
    return result


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
