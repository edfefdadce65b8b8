"""The benchmark of a decode step: a gate that refuses, kernels given to their stages, a section made of its rows."""

from __future__ import annotations

import json
import sys

import pytest

from bench import step, step_memory
from bench.report import step as section
from bench.step_layer import v3_config
from bench.step_stages import by_stage, stages_of_kernels


def run_step(monkeypatch, path, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["step", "--small", "--out", str(path), *options])
    step.main()
    return json.loads(path.read_text())


def test_every_composition_is_gated_and_timed(monkeypatch, tmp_path):
    result = run_step(monkeypatch, tmp_path / "out.json")
    assert [row["name"] for row in result["rows"]] == list(step.NAMES)
    assert not [row["error"] for row in result["rows"] if "error" in row]
    for row in result["rows"]:
        assert 0 < row["relative_error"] < step.GATE and row["loop_us"] > 0
    packed, mixed, dense = (row["memory"]["weights"] for row in result["rows"])
    assert packed < mixed < dense


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path):
    plain = step.layer_step

    def wrong(name, config, weights, x, pages, table, length):  # a page of another sequence
        return plain(name, config, weights, x, pages, table[::-1], length)

    monkeypatch.setattr(step, "layer_step", wrong)
    (row,) = run_step(monkeypatch, tmp_path / "out.json", "--names", "fp4")["rows"]
    assert "not timed" in row["error"] and "loop_us" not in row


PROGRAM = """
%fused (a: f32[2]) -> f32[2] {
  ROOT %add.1 = f32[2] add(%a, %a)
}

%graph (a: f32[2]) -> f32[2] {
  %gemm.1 = f32[2] custom-call(%a), custom_call_target="x", metadata={op_name="jit(f)/mla/q_a_proj/dot"}
  %gemm.2 = f32[2] custom-call(%gemm.1), custom_call_target="x", metadata={op_name="jit(f)/mla/kv_a_proj/dot"}
  ROOT %fusion.7 = f32[2] fusion(%gemm.2), kind=kLoop, calls=%fused, metadata={op_name="f/mla/norm_rope_write/mul"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %fusion.3 = f32[2] fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/rsqrt"}
  %call = f32[2] call(%fusion.3), to_apply=%graph
  ROOT %o = f32[2] custom-call(%call), custom_call_target="x", metadata={op_name="jit(f)/mla/o_proj/dot"}
}
"""


def test_kernels_are_given_to_their_stages():
    """Those that the program names by name, in whatever order they ran; a library's to its calls, in order."""
    seen = [("fusion_7", 5.0), ("fusion_3", 1.0), ("nvjet", 2.0), ("body", 3.0), ("mla_decode_x", 7.0), ("gemv", 6.0)]
    stages = ["norm_rope_write", "other", "qkv_a_proj", "qkv_a_proj", "attention", "o_proj"]
    assert stages_of_kernels(seen, PROGRAM) == stages
    found = by_stage(seen, PROGRAM, 1)
    assert {stage: entry["us"] for stage, entry in found.items()} == {
        "qkv_a_proj": 5.0,
        "norm_rope_write": 5.0,
        "attention": 7.0,
        "o_proj": 6.0,
        "other": 1.0,
    }
    assert stages_of_kernels([("nvjet", 1.0)] * 4, PROGRAM) == ["other"] * 4


def test_kv_b_is_resident_once():
    config = v3_config(2, small=True)
    account = step_memory.measure(config, 3, 2, 128)
    steps = dict(account["steps"])
    numbers = 2 * (32 + 32) * 64
    assert steps["kv_b_proj of every layer, MXFP4"] == 3 * (numbers // 2 + numbers // 32)
    assert steps["after k_up_proj and v_up_proj over every layer"] == 0


def test_the_section_has_every_shape(tmp_path):
    def row(name, batch, **more):
        return {"name": name, "heads": 128, "keys": 4096, "batch": batch, **more}

    stages = {"attention": {"us": 30.0, "launches": 1.0}, "o_proj": {"us": 20.0, "launches": 1.0}}
    fp4 = {"loop_us": 80.0, "kernel_us": 75.0, "launches": 9.0, "floor_us": 50.0, "stages": stages}
    rows = [row("fp4", b, floors={"attention": {"us": 25.0}}, **fp4) for b in (1, 32)]
    rows += [row("torch", 1, graph_us=240.0), row("xla bf16", 1, error="out of memory")]
    memory = {"layers": 2, "steps": [["kv_b_proj", 17_800_000]]}
    result = {"rows": rows, "memory": memory}
    text = section.section(result)
    assert "| 128 | 4096 | 1 | 80.0 | - | - | 240.0 | - | 3.00 | 50.0 | 1.60 |" in text
    assert "| 128 | 4096 | 32 | 80.0 | - | - | - | - | - | 50.0 | 1.60 |" in text
    assert "30.0 / 25.0" in text and "| kv_b_proj | 17.8 | 8.90 |" in text
    for plot in (section.plot_stages, section.plot_context):
        pytest.importorskip("matplotlib")
        plot(result, tmp_path / "plot.svg")
        assert (tmp_path / "plot.svg").stat().st_size > 1000
