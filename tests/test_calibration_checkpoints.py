# SPDX-License-Identifier: Apache-2.0
"""Model directories: the bytes of a calibration in memory, also after an interruption."""

from pathlib import Path
from typing import Any

import pytest
import xpu_fp4
from calibration_cases import OTHERS, WINDOWS, bert, last_of
from checkpoint_files import IDS, llama, save_llama, tensors_of
from helpers import assert_same_bits
from transformers import (
    AutoModel,
)
from xpu_fp4 import MXFP4Linear
from xpu_fp4.calibration import CheckpointCalibration, calibrate_
from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("calibrated") / "source")


OPTIONS: dict[str, Any] = {"mode": "w4a8", "hadamard": 32, "offset": True, "keep_high": ["q_proj"]}


def assert_same_directory(folder: Path, expected: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("correct", [False, True])
def test_a_checkpoint_holds_what_calibrate_makes_in_memory(correct: bool, source: Path, tmp_path: Path) -> None:
    calibration = CheckpointCalibration(WINDOWS, correct=correct)
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out", calibration=calibration, **OPTIONS)
    expected = calibrate_(llama(), [WINDOWS], correct=correct, **OPTIONS)
    model = xpu_fp4.load_model(out)
    for name, module in expected.named_modules():
        if isinstance(module, MXFP4Linear):
            loaded = model.get_submodule(name)
            assert (loaded.mode, loaded.hadamard) == (module.mode, module.hadamard)
            for part, tensor in module.state_dict().items():
                assert_same_bits(loaded.state_dict()[part], tensor)
    assert_same_bits(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("correct", [False, True])
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(correct: bool, source: Path, tmp_path: Path) -> None:
    plan = plan_quantization(source)
    calibration = CheckpointCalibration(WINDOWS, correct=correct)
    expected = quantize_checkpoint(plan, tmp_path / "expected", calibration=calibration, **OPTIONS)

    def stop_after_one(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    calibration = CheckpointCalibration(WINDOWS, stop_after_one, correct)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, tmp_path / "out", calibration=calibration, **OPTIONS)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / ".calibrated").iterdir()}
    assert {path.name for path in finished} == {"model.layers.0.safetensors"}
    (tmp_path / "out.partial" / ".calibrated" / "model.layers.1.safetensors.tmp").write_text("half of a block")
    kept: list[dict[Path, int]] = []
    calibration = CheckpointCalibration(
        WINDOWS, lambda *step: kept.append({path: path.stat().st_mtime_ns for path in finished}), correct
    )
    out = quantize_checkpoint(plan, tmp_path / "out", calibration=calibration, **OPTIONS)
    assert kept == [finished] * 3
    assert_same_directory(out, expected)


def test_blocks_of_other_windows_or_settings_are_not_kept(source: Path, tmp_path: Path) -> None:
    plan = plan_quantization(source)
    expected = quantize_checkpoint(plan, tmp_path / "expected", calibration=CheckpointCalibration(WINDOWS), **OPTIONS)

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    for calibration, options in (
        (CheckpointCalibration(OTHERS, stop), OPTIONS),
        (CheckpointCalibration(WINDOWS, stop, correct=True), OPTIONS),
        (CheckpointCalibration(WINDOWS, stop), OPTIONS | {"hadamard": 0}),
        (CheckpointCalibration(WINDOWS, stop), OPTIONS | {"keep_high": []}),
    ):
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(plan, tmp_path / "out", calibration=calibration, **options)
        assert list((tmp_path / "out.partial" / ".calibrated").iterdir())
    out = quantize_checkpoint(plan, tmp_path / "out", calibration=CheckpointCalibration(WINDOWS), **OPTIONS)
    assert_same_directory(out, expected)


def test_an_encoder_keeps_its_biases_names(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "source")
    plan = plan_quantization(tmp_path / "source")
    out = quantize_checkpoint(plan, tmp_path / "out", mode="w4a8", calibration=CheckpointCalibration(WINDOWS))
    before, after = tensors_of(tmp_path / "source"), tensors_of(out)
    assert {name for name in before if name.endswith("bias")} == {name for name in after if name.endswith("bias")}
    expected = last_of(AutoModel.from_pretrained(tmp_path / "source").eval(), WINDOWS)
    rounded = quantize_checkpoint(plan, tmp_path / "rounded", mode="w4a8")
    errors = [float((last_of(xpu_fp4.load_model(folder), WINDOWS) - expected).square().mean()) for folder in (out, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_rounding_to_nearest_takes_a_transform_too(source: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out", mode="w4a8", hadamard=32, keep_high=["q_proj"])
    expected = xpu_fp4.quantize_(llama(), mode="w4a8", hadamard=32)
    for layer in expected.model.layers:
        layer.self_attn.q_proj.mode = "w4a16"
    assert_same_bits(xpu_fp4.load_model(out)(IDS).logits, expected(IDS).logits)


def test_settings_that_do_not_fit_a_checkpoint_are_named(source: Path, tmp_path: Path) -> None:
    plan = plan_quantization(source)
    with pytest.raises(ValueError, match="offset is the mean of a layer's inputs: it takes a calibration"):
        quantize_checkpoint(plan, tmp_path / "out", offset=True)
    with pytest.raises(ValueError, match="hadamard is 48, expected 0"):
        quantize_checkpoint(plan, tmp_path / "out", hadamard=48)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"down_proj.weight has shape \[64, 96\], expected \[N, K\] with K a multiple of hadamard, 64"
    ):
        quantize_checkpoint(plan, tmp_path / "out", hadamard=64)
    with pytest.raises(ValueError, match="keep_high has 'qproj'"):
        quantize_checkpoint(plan, tmp_path / "out", keep_high=["qproj"])
    assert not list(tmp_path.iterdir())
