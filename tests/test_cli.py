"""The command: what the demo prints on the embedded checkpoint and on others, and what it says to bad arguments."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest
from checkpoints import CONFIG, DATA, layer_tensors, write_checkpoint

import mla_fp4_jax
from mla_fp4_jax.cli import main
from mla_fp4_jax.cli.text import bar, human_bytes, human_seconds, percent
from mla_fp4_jax.ops import implementations

ROOT = Path(__file__).resolve().parents[1]
FEW = ("--steps", "7")  # as many as were recorded
needs_cpu = pytest.mark.skipif(any(device.platform == "gpu" for device in jax.devices()), reason="there is a GPU")


def demo(capsys, *args) -> str:
    assert main(["demo", *map(str, args)]) == 0
    return capsys.readouterr().out


def errors_of(text: str) -> dict[str, float]:
    """Name -> relative error, from the demo's table."""
    table = text.split("relative RMS")[1].split("Requantising")[0]
    return {
        name.strip(): float(value) / 100 for name, value in re.findall(r"^  (.+?) {2,}([\d.e+-]+) %", table, re.M)
    }


def test_the_embedded_checkpoint(capsys):
    text = demo(capsys, *FEW)
    # What was loaded, each projection by its format.
    formats = dict(re.findall(r"^  (\w+) +[\dx ]+? {2,}(MXFP4|BF16)", text, re.M))
    assert formats.pop("kv_b_proj") == "MXFP4" and set(formats.values()) == {"BF16"} and len(formats) == 6
    # 1024 x 128: 2 bytes each; two copies of half a byte and a 32nd; one.
    sizes = dict(re.findall(r"^  (bf16|engines, two copies|here, one pack) +([\d.]+ KiB)", text, re.M))
    assert sizes == {"bf16": "256.0 KiB", "engines, two copies": "136.0 KiB", "here, one pack": "68.0 KiB"}
    errors = errors_of(text)
    assert list(errors) == ["this library", "engines, W_K requantised", "engines, W4A4"]
    assert 0 < errors["this library"] < 0.015 < errors["engines, W_K requantised"] < errors["engines, W4A4"]
    assert re.search(r"Requantising moved W_K by \d\.\d+ %", text)
    assert re.search(r"decode 2 x 7 tokens +[\d.]+ (us|ms|s) per step", text)
    # The demo's own oracle agrees with what transformers recorded.
    assert float(re.search(r"oracle is within (\S+) of what transformers", text)[1]) < 5e-5


@needs_cpu
def test_the_choice_of_device_and_implementation_is_told(capsys):
    for _ in range(2):  # the library itself says it once per process
        text = demo(capsys, *FEW, "--batch", 1)
        assert "On cpu, in bfloat16, contiguous cache" in text
        assert re.search(r"FP4 products by xla \(.*needs a GPU.*\)", text)
    assert "FP4 products by xla (asked for)" in demo(capsys, *FEW, "--batch", 1, "--implementation", "xla")


def test_float32_and_pages(capsys):
    text = demo(capsys, *FEW, "--dtype", "float32", "--page-size", 16)
    assert errors_of(text)["this library"] < 1e-5 and "cache in pages of 16" in text


def test_the_progress_bar_counts_steps_on_stderr(capsys):
    assert main(["demo", *FEW, "--batch", "1"]) == 0
    captured = capsys.readouterr()
    assert "7/7" in captured.err and "step/s" in captured.err and "7/7" not in captured.out


def test_a_users_checkpoint(capsys, rng, tmp_path):
    write_checkpoint(tmp_path / "model", layer_tensors(rng))
    text = demo(
        capsys, "--checkpoint", tmp_path / "model", "--layer", 0, "--steps", 2, "--batch", 1, "--prompt-length", 3
    )
    assert f"Layer model.layers.0.self_attn of {tmp_path / 'model'}" in text
    assert "kv_b_proj           144 x 64  MXFP4" in text and "prefill 1 x 3 tokens" in text
    # P = 16 has no whole group for the engines' W_K.
    assert "engines, two copies" not in text and "nothing to compare with" in text
    assert "transformers" not in text


def test_a_checkpoint_whose_kv_b_proj_is_dense(capsys, rng, tmp_path):
    write_checkpoint(tmp_path, layer_tensors(rng, kv_b="dense"))
    text = demo(capsys, "--checkpoint", tmp_path, "--steps", 2, "--batch", 1)
    assert "here, as in the checkpoint" in text and "one pack " not in text
    assert "kv_b_proj is not MXFP4 here" in text


def test_all_projections_in_mxfp4(capsys):
    text = demo(capsys, "--checkpoint", DATA / "quark" / "mxfp4_all", "--steps", 2, "--batch", 1)
    assert len(re.findall(r"proj\w* +[\dx ]+ {2,}MXFP4", text)) == 5


def test_the_plot(capsys, tmp_path):
    file = tmp_path / "figure.png"
    assert f"Drawn: {file}" in demo(capsys, *FEW, "--plot", file)
    pixels = matplotlib.image.imread(file)
    height, width = pixels.shape[:2]
    assert width > 2 * height > 600
    # Two panels of bars in the two colours, ours the shorter ones.
    rgb = (pixels[..., :3] * 255).round().astype(int)
    for half in (rgb[:, : width // 2], rgb[:, width // 2 :]):
        ours, theirs = ((half == colour).all(-1).sum(1).max() for colour in ([0x1B, 0x7F, 0x5C], [0xC4, 0x57, 0x2E]))
        assert 0 < ours < theirs


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("args", "text"),
    [
        ("nope", "invalid choice: 'nope'"),
        ("demo --steps 0", "--steps: must be at least 1; got 0"),
        ("demo --steps x", "--steps: invalid integer value: 'x'"),
        ("demo --batch -2", "--batch: must be at least 1; got -2"),
        ("demo --layer -1", "--layer: must be at least 0; got -1"),
        ("demo --page-size 5", "--page-size: invalid choice: 5"),
        ("demo --dtype int8", "--dtype: invalid choice"),
        ("demo --implementation fast", "--implementation: invalid choice: 'fast'"),
        ("demo --plot figure.jpg", "--plot must name a .png file"),
        ("demo --plot /no/such/place.png", "there is no directory /no/such"),
        ("demo --checkpoint /no/such/place", "/no/such/place: does not exist"),
        ("demo --layer 7", "has no attention layer 7"),
        ("demo --prefix elsewhere", "no tensor's name begins with 'elsewhere.'"),
    ],
)
def test_bad_arguments_get_one_line(args, text, capsys):
    try:
        status = main(args.split())
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert text in captured.err and captured.err.startswith("mla-fp4") and captured.err.count("\n") == 1


@needs_cpu
@pytest.mark.bad_input
def test_an_implementation_that_cannot_run_says_why(capsys):
    assert main(["demo", "--implementation", "triton"]) == 2
    captured = capsys.readouterr()
    assert "--implementation triton cannot run here" in captured.err and "GPU" in captured.err and captured.out == ""


@pytest.mark.bad_input
def test_a_broken_checkpoint_is_named(capsys, rng, tmp_path):
    tensors = layer_tensors(rng)
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    write_checkpoint(tmp_path, tensors, CONFIG)
    assert main(["demo", "--checkpoint", str(tmp_path)]) == 2
    assert "model.layers.0.self_attn.o_proj.weight [96, 96] is missing" in capsys.readouterr().err


@pytest.mark.bad_input
def test_traceback_shows_where(tmp_path):
    with pytest.raises(mla_fp4_jax.CheckpointError):
        main(["demo", "--traceback", "--checkpoint", str(tmp_path)])


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name, version in (
        ("mla_fp4_jax", mla_fp4_jax.__version__),
        ("jax", jax.__version__),
        ("numpy", np.__version__),
    ):
        assert re.search(rf"^  {name} +{re.escape(version)}$", text, re.M)
    assert all(str(device) in text for device in jax.devices())
    for name, why in implementations.available().items():
        assert re.search(rf"^  {name} +" + ("can run" if why is None else "cannot: "), text, re.M)


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out


def test_python_m():
    result = subprocess.run(
        [sys.executable, "-m", "mla_fp4_jax", "info"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "Versions" in result.stdout


def test_units():
    assert [human_bytes(n) for n in (0, 1023, 1024, 1 << 21, 1 << 41)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "2.0 MiB",
        "2048.0 GiB",
    ]
    assert [human_seconds(s) for s in (2.5, 0.00123, 4e-6)] == ["2.5 s", "1.23 ms", "4 us"]
    assert [percent(f) for f in (0.0, 0.131, 1e-6)] == ["0 %", "13.1 %", "1.0e-04 %"]
    assert len(bar(1.0)) == 32 and bar(0.0) == "" and bar(1e-9)
