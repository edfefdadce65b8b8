"""The benchmarks of many devices: gates that refuse, a plan that recovers what its data were made from."""

from __future__ import annotations

import json
import sys

import pytest

from bench import calibration, plan, report, scaling
from bench.report.scaling import over_bytes
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
    model, lines = calibration.calibrate({"a": made_from(*truth), "b": made_from(*truth, packed=True)}, GPUS["H100"])
    found = model.projections, model.attention, model.overhead, model.latency, model.rate
    assert found == pytest.approx(truth, rel=1e-6)
    assert "largest 0 %" in "\n".join(lines)


def test_a_coefficient_is_never_negative():
    result = made_from(1.3, 1.7, 0.0, 9e-6, 2e11)
    for row in result["rows"]:
        if row["kind"] in calibration.KINDS:
            row["us"] -= 15  # what a negative overhead would fit
    model, _ = calibration.calibrate({"a": result}, GPUS["H100"])
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
    rows = plan.plan(calibration.Model(GPUS["H100"]))
    assert {row["gpus"] for row in rows} == {8, 72, 512} and {row["model"] for row in rows} == set(plan.MODELS)
    for row in rows:
        layout = [int(part[2:]) for part in row["layout"].split()]
        assert layout[0] * layout[1] * layout[2] == row["gpus"] and layout[0] * layout[2] <= 8
        assert row["step_ms"]["fp4"] <= row["step_ms"]["bf16"]
    text = plan.page(calibration.Model(GPUS["H100"]), rows, [])
    assert "Not calibrated" in text and "## Kimi-K2, 512 GPUs" in text


TRUTH = (1.3, 1.7, 2e-5, 9e-6, 2e11)


def with_flags(flags: str) -> dict:
    result = made_from(*TRUTH)
    return {**result, "environment": {**result["environment"], "xla_flags": flags}}


def test_a_plan_refuses_what_does_not_belong_together():
    one, other = made_from(*TRUTH), made_from(*TRUTH)
    with pytest.raises(SystemExit, match="equal hosts"):
        calibration.calibrate({"a": one, "b": {**other, "devices": 4}}, GPUS["H100"])
    with pytest.raises(SystemExit, match="b was made with --small"):
        calibration.calibrate({"a": one, "b": {**other, "options": {"small": True}}}, GPUS["H100"])
    in_graph = with_flags("--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=+COLLECTIVES")
    with pytest.raises(SystemExit, match="equal XLA options .* b: --xla_gpu_enable_command_buffer"):
        calibration.calibrate({"a": one, "b": in_graph}, GPUS["H100"])
    calibration.calibrate({"a": one, "b": with_flags("--xla_gpu_autotune_level=0")}, GPUS["H100"])
    one["rows"] = one["rows"][:6]
    with pytest.raises(SystemExit, match="at least 4 different layers; got 3"):
        calibration.calibrate({"a": one}, GPUS["H100"])


def test_a_plans_gpu_is_the_measured_one():
    measured = {"a": made_from(*TRUTH)}
    assert plan.choose_gpu({}, None) is GPUS["H100"] and plan.choose_gpu({}, "H200") is GPUS["H200"]
    assert plan.choose_gpu(measured, None) is plan.choose_gpu(measured, "H100") is GPUS["H100"]
    with pytest.raises(SystemExit, match="--gpu must be the one of --measured, H100; got H200"):
        plan.choose_gpu(measured, "H200")
    measured["a"]["environment"]["device"] = "cpu"
    with pytest.raises(SystemExit, match="got 'cpu'"):
        plan.choose_gpu(measured, None)


def test_points_that_spread_widely_are_left_out():
    result = made_from(*TRUTH)
    wild = {"kind": "one", "sequences": 16, "keys": 4096, "us": 900.0, "spread_us": 451.0}
    result["rows"].append(wild)
    model, lines = calibration.calibrate({"a": result}, GPUS["H100"])
    assert (model.projections, model.attention, model.overhead) == pytest.approx(TRUTH[:3], rel=1e-6)
    assert "5 points used, 1 left out" in "\n".join(lines)
    wild["spread_us"] = 449.0
    assert "6 points used, 0 left out" in "\n".join(calibration.calibrate({"a": result}, GPUS["H100"])[1])


def test_an_error_is_of_a_fit_without_equal_points():
    """DP asks of a device what "one" does: either would give the other away."""
    result = made_from(*TRUTH)
    result["rows"] += [{"kind": kind, "sequences": 32, "keys": 8192, "us": 700.0} for kind in ("one", "DP")]
    _, lines = calibration.calibrate({"a": result}, GPUS["H100"])
    one, dp = (line.split("|")[3] for line in lines if "B   32 S   8192" in line)
    part = share(DEEPSEEK_V3, Layout(), 32, 8192)
    bounds = part.projections_s(GPUS["H100"], {"kv_b_proj": "fp4"}), part.attention_s(GPUS["H100"])
    assert one == dp and float(one) == pytest.approx(1e6 * (1.3 * bounds[0] + 1.7 * bounds[1] + 2e-5), abs=0.06)


def test_a_stack_is_compared_and_not_fitted():
    result = made_from(*TRUTH, packed=True)
    without, lines = calibration.calibrate({"a": result}, GPUS["H100"])
    assert "No input has the time of a whole stack" in lines[-1]
    layer = without.layer(DEEPSEEK_V3, Layout(heads=2), 16, 4096, {"kv_b_proj": "fp4"}, "fp4")
    stack = {"kind": "stack", "layout": "TP2 DP1 CP1", "layers": 61, "sequences": 16, "keys": 4096}
    result["rows"].append(stack | {"ms_per_token": 1e3 * 61 * layer / 1.25})
    model, lines = calibration.calibrate({"a": result}, GPUS["H100"])
    assert model == without and "stack of 61 layers" in lines[-1] and "+25 %" in lines[-1]


def test_a_page_says_what_it_was_not_calibrated_with():
    model, lines = calibration.calibrate({"dir/x.json": made_from(*TRUTH, packed=True)}, GPUS["H100"])
    text = plan.page(model, plan.plan(model), lines)
    assert "No input has bf16 weights" in text and "fp4 (bf16, not calibrated)" in text
    assert "groups of 4 and 8 GPUs are extrapolated from measurements on 2" in text
    assert "`dir/x.json`: 2 x NVIDIA H100 80GB HBM3, commit `unknown`" in text and "XLA's defaults" in text
    both = {"a": made_from(*TRUTH), "b": made_from(*TRUTH, packed=True)}
    model, lines = calibration.calibrate(both, GPUS["H100"])
    assert "not calibrated" not in plan.page(model, plan.plan(model), lines)
    assert not [
        line for line in calibration.describe_limits(calibration.Model(GPUS["H100"], devices=8)) if "groups" in line
    ]


def test_a_rate_beyond_the_links_is_none():
    rows = [{"bytes": size, "us": 1e6 * (1e-5 + size / 9e11)} for size in (10**5, 10**6, 10**7)]
    assert calibration.fit_reduction(rows, 2, 4.5e11) == (pytest.approx(1e-5 + 1e6 / 9e11), 0.0)
    assert calibration.fit_reduction(rows, 2, 1e12) == pytest.approx((1e-5, 9e11))


def test_a_floor_of_bytes_holds_no_flops():
    row = {"us": 30.0, "byte_floor_us": 10.0, "over_floor": 1.5, "over_byte_floor_and_all_reduce": 2.0}
    assert over_bytes({"kind": "DP", **row}) == 3.0 and over_bytes({"kind": "TP", **row}) == 2.0
    assert over_bytes({"kind": "CP", "us": 30.0, "over_floor": 1.5}) is None


def test_each_device_has_its_own_sections():
    """An H200's newer results must not hide an H100's."""
    for ending in (name for name in report.SECTIONS if name.startswith("scaling")):
        path = report.newest(ending)
        if path is None:
            assert ending == "scaling_packed"  # not run in this form yet
            continue
        device = json.loads(path.read_text())["environment"]["device"]
        assert ("H200" in device) == ending.endswith("_h200")
