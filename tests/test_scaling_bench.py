"""The benchmarks of many devices: gates that refuse, a plan that recovers what its data were made from."""

from __future__ import annotations

import json
import sys

import pytest

from bench import plan, scaling
from bench.roofline import DEEPSEEK_V3, GPUS, KIMI_K2, Layout, share


def run_scaling(monkeypatch, path) -> dict:
    monkeypatch.setattr(sys, "argv", ["scaling", "--small", "--devices", "2", "--out", str(path)])
    scaling.main()
    return json.loads(path.read_text())


def test_every_row_is_gated_and_timed(monkeypatch, tmp_path):
    result = run_scaling(monkeypatch, tmp_path / "out.json")
    kinds = [row["kind"] for row in result["rows"]]
    assert kinds[0] == "gate" and {"all-reduce", "one", "TP", "DP", "CP", "stack"} <= set(kinds)
    assert not [row["error"] for row in result["rows"] if "error" in row]
    for row in result["rows"]:
        if row["kind"] in ("TP", "DP", "CP"):
            assert row["us"] > 0 and row["difference_from_one_device"] < 0.02
    (alone,) = (row for row in result["rows"] if row["kind"] == "DP")
    assert alone["bitwise_as_one_device"]
    (stack,) = (row for row in result["rows"] if row["kind"] == "stack")
    config, layers = scaling.SMALL, stack["layers"]
    part = share(config, Layout(heads=2), stack["sequences"], stack["keys"])
    norms = 2 * (config.q_lora_rank + config.kv_lora_rank)
    assert stack["weight_bytes_per_device"] == layers * (part.weight_bytes({}, "fp4") + norms)


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "FLOAT32_BOUND", 0.0)
    with pytest.raises(SystemExit, match="nothing is timed"):
        run_scaling(monkeypatch, tmp_path / "out.json")
    assert '"us"' not in (tmp_path / "out.json").read_text()
    monkeypatch.undo()
    monkeypatch.setattr(scaling, "LAYER_BOUND", 0.0)
    rows = run_scaling(monkeypatch, tmp_path / "out.json")["rows"]
    for row in rows:
        if row["kind"] in ("TP", "CP", "stack"):
            assert "not timed" in row["error"] and "us" not in row and "ms_per_token" not in row


def made_from(a: float, b: float, c: float, latency: float, rate: float, packed: bool = False) -> dict:
    """A scaling result that follows the plan's formula exactly."""
    gpu, n, rows = GPUS["H100"], 2, []
    for sequences in (1, 16, 128):
        size = sequences * 7168 * 2
        rows.append(
            {"kind": "all-reduce", "sequences": sequences, "bytes": size, "us": 1e6 * (latency + size / rate)}
        )
    points = [("one", 64, 4096), ("TP", 64, 4096), ("TP", 1, 4096), ("DP", 16, 16384), ("CP", 8, 131072)]
    for kind, sequences, keys in points:
        layout = {"one": Layout(), "TP": Layout(heads=n), "DP": Layout(batch=n), "CP": Layout(context=n)}[kind]
        part = share(DEEPSEEK_V3, layout, sequences * layout.batch, keys)
        seconds = (
            a * part.projections_s(gpu, {"kv_b_proj": "fp4"}, "fp4" if packed else "bf16")
            + b * part.attention_s(gpu)
            + c
        )
        seconds += latency + part.exchanged / rate if part.group == 2 else 0
        rows.append({"kind": kind, "sequences": sequences, "keys": keys, "us": 1e6 * seconds})
    environment = {"device": "NVIDIA H100 80GB HBM3"}
    return {"environment": environment, "options": {"packed": packed}, "devices": n, "rows": rows}


def test_a_plan_recovers_what_its_data_were_made_from():
    truth = (1.3, 1.7, 2e-5, 9e-6, 2e11)
    model, lines = plan.calibrate([made_from(*truth), made_from(*truth, packed=True)], GPUS["H100"])
    found = model.projections, model.attention, model.overhead, model.latency, model.rate
    assert found == pytest.approx(truth, rel=1e-6)
    assert "largest 0 %" in "\n".join(lines)


def test_a_coefficient_is_never_negative():
    result = made_from(1.3, 1.7, 0.0, 9e-6, 2e11)
    for row in result["rows"]:
        if row["kind"] in plan.KINDS:
            row["us"] -= 15  # what a negative overhead would fit
    model, _ = plan.calibrate([result], GPUS["H100"])
    assert min(model.projections, model.attention, model.overhead) >= 0


def test_the_plans_bytes_are_those_of_the_models():
    """Elements of an attention layer's matrices, by hand from the models' configs."""
    sizes = {
        DEEPSEEK_V3: 1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128,
        KIMI_K2: 1536 * 7168 + 64 * 192 * 1536 + 576 * 7168 + 64 * 256 * 512 + 7168 * 64 * 128,
    }
    assert list(sizes.values()) == [187_105_280, 101_122_048]
    for config, elements in sizes.items():
        part = share(config, Layout(), 1, 1000)
        assert part.weight_bytes({}, "bf16") == 2 * elements and part.cache_bytes == 1000 * 1152
        assert part.weight_bytes({}, "fp4") == elements * 17 / 32
    rows = plan.plan(plan.Model(GPUS["H100"]))
    assert {row["gpus"] for row in rows} == {8, 72, 512} and {row["model"] for row in rows} == set(plan.MODELS)
    for row in rows:
        layout = [int(part[2:]) for part in row["layout"].split()]
        assert layout[0] * layout[1] * layout[2] == row["gpus"] and layout[0] * layout[2] <= 8
        assert row["step_ms"]["fp4"] <= row["step_ms"]["bf16"]
    text = plan.page(plan.Model(GPUS["H100"]), rows, [])
    assert "Not calibrated" in text and "## Kimi-K2, 512 GPUs" in text


def test_a_plan_refuses_what_does_not_belong_together():
    one, other = made_from(1.3, 1.7, 2e-5, 9e-6, 2e11), made_from(1.3, 1.7, 2e-5, 9e-6, 2e11)
    with pytest.raises(SystemExit, match="equal hosts"):
        plan.calibrate([one, {**other, "devices": 4}], GPUS["H100"])
    with pytest.raises(SystemExit, match="--small"):
        plan.calibrate([one, {**other, "options": {"small": True}}], GPUS["H100"])
