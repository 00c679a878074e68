# SPDX-License-Identifier: Apache-2.0
"""Files of llm-compressor, and calibration by it: layers and models compute what compressed-tensors computes of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xpu_fp4
from checkpoint_files import IDS, LINEARS, VOCABULARY, layers, llama, save_tokenizer, tensors_of
from checkpoints_of_others import load_theirs
from click.testing import CliRunner, Result
from helpers import assert_same_bits, seeded
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BertConfig, BertModel
from xpu_fp4 import Mode
from xpu_fp4.calibration import LlmCompressorCalibration
from xpu_fp4.checkpoints import CheckpointError, open_checkpoint, plan_quantization, quantize_checkpoint
from xpu_fp4.cli import main
from xpu_fp4.functional import Hadamard

WINDOWS = torch.randint(3, VOCABULARY, (16, 24), generator=seeded(1))
PRESETS: dict[Mode, str] = {"w4a4": "MXFP4", "w4a16": "MXFP4A16"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    llama(hidden=128, intermediate=256).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write(source: Path, folder: Path, recipe: Sequence[Any], *, data: bool = True) -> Path:
    """Lets llm-compressor quantize the model and save it, as its examples do."""
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    if data:
        loader: Any = DataLoader([{"input_ids": ids} for ids in WINDOWS], batch_size=4)  # type: ignore[arg-type]
        oneshot(model=model, dataset=loader, processor=object(), recipe=list(recipe))
    else:
        oneshot(model=model, recipe=list(recipe), pipeline="datafree")
    model.save_pretrained(folder, save_compressed=True)
    return folder


def nearest(mode: Mode) -> Any:
    return QuantizationModifier(targets="Linear", scheme=PRESETS[mode], ignore=["lm_head"])


def gptq(mode: Mode) -> Any:
    return GPTQModifier(targets="Linear", scheme=PRESETS[mode], ignore=["lm_head"])


def quip(size: int) -> Any:
    return QuIPModifier(rotations=["v"], transform_type="hadamard", transform_block_size=size, ignore="lm_head")


def assert_computes_the_same(folder: Path, mode: Mode, size: Hadamard) -> None:
    """Layers within float32's rounding, each on inputs of its own; logits too, where no activation is rounded."""
    theirs, ours = load_theirs(folder, IDS), xpu_fp4.load_model(folder, dtype="float32")
    generator = seeded(7)
    assert layers(ours).keys() == LINEARS.keys()
    for name, module in layers(ours).items():
        assert (module.mode, module.hadamard) == (mode, size)
        x = torch.randn(24, module.in_features, generator=generator) * 3 + 1
        with torch.inference_mode():
            torch.testing.assert_close(module(x), theirs.get_submodule(name)(x), rtol=2e-5, atol=2e-5)
    with torch.inference_mode():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("mode", PRESETS)
def test_a_model_of_quip_computes_what_compressed_tensors_does(
    source: Path, tmp_path: Path, mode: Mode, size: Hadamard
) -> None:
    assert_computes_the_same(write(source, tmp_path / "out", [quip(size), nearest(mode)], data=False), mode, size)


@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize("mode", PRESETS)
def test_a_model_of_gptq_computes_what_compressed_tensors_does(
    source: Path, tmp_path: Path, mode: Mode, size: Hadamard
) -> None:
    recipe = [*([quip(size)] if size else []), gptq(mode)]
    assert_computes_the_same(write(source, tmp_path / "out", recipe), mode, size)


def test_rotations_in_the_weights_alone_load(source: Path, tmp_path: Path) -> None:
    recipe = [SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"), nearest("w4a16")]
    assert_computes_the_same(write(source, tmp_path / "out", recipe, data=False), "w4a16", 0)


REFUSED: dict[str, tuple[Any, str]] = {
    "its defaults": (QuIPModifier(), "random-hadamard"),
    "the whole width": (QuIPModifier(transform_type="hadamard"), "head_dim"),
    "outputs too": (QuIPModifier(rotations=["v", "u"], transform_type="hadamard", transform_block_size=32), "output"),
    "keys and queries": (SpinQuantModifier(rotations=["R3"], transform_type="hadamard"), "q_attn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(source: Path, tmp_path: Path, case: str) -> None:
    transform, word = REFUSED[case]
    folder = write(source, tmp_path / "out", [transform, nearest("w4a16")], data=False)
    with pytest.raises(CheckpointError, match=word):
        xpu_fp4.load_model(folder)
    result = run("inspect", folder)
    assert result.exit_code == 1
    assert word in result.output


def test_it_randomizes_nothing_and_a_file_that_says_so_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        QuIPModifier(randomize=True)
    folder = write(source, tmp_path / "out", [quip(32), nearest("w4a16")], data=False)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["v"]["randomize"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="randomize"):
        open_checkpoint(folder)


# ---- calibration by it ----


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("mode", "size"), [("w4a4", 0), ("w4a4", 32), ("w4a16", 0), ("w4a16", 64)])
def test_what_it_decides_is_written(source: Path, tmp_path: Path, mode: Mode, size: Hadamard) -> None:
    # There are as many windows as fit in one of our batches.
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    loader: Any = DataLoader([{"input_ids": WINDOWS}], batch_size=None)  # type: ignore[arg-type]
    recipe = [*([quip(size)] if size else []), gptq(mode)]
    oneshot(model=model, dataset=loader, processor=object(), recipe=recipe)
    model.save_pretrained(tmp_path / "theirs", save_compressed=True)
    plan = plan_quantization(source)
    folder = quantize_checkpoint(
        plan, tmp_path / "ours", mode=mode, hadamard=size, calibration=LlmCompressorCalibration(WINDOWS)
    )
    expected, found = tensors_of(tmp_path / "theirs"), tensors_of(folder)
    for name in LINEARS:
        for part in ("weight_packed", "weight_scale"):
            assert_same_bits(found[f"{name}.{part}"], expected[f"{name}.{part}"])
    assert_computes_the_same(folder, mode, size)
    rounded = tensors_of(quantize_checkpoint(plan, tmp_path / "nearest", mode=mode, hadamard=size))
    assert any(not torch.equal(rounded[name], tensor) for name, tensor in found.items())


def test_layers_kept_high_and_a_seed_of_text(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 100}" for i in range(4000)))
    options = ("--calibrate", text, "--with", "llm-compressor", "--samples", 8, "--length", 16)
    result = run("quantize", source, tmp_path / "out", "--scheme", "w4a4", "--keep-high", "q_proj,k_proj,v_proj", *options)
    assert result.exit_code == 0, result.output
    modes = {name: layer.scheme.mode for name, layer in open_checkpoint(tmp_path / "out").layers.items()}
    assert {name for name, mode in modes.items() if mode == "w4a16"} == {n for n in LINEARS if n[-6:-5] in "qkv"}
    assert xpu_fp4.load_model(tmp_path / "out")(IDS).logits.isfinite().all()


def test_an_interrupted_run_calibrates_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_quantization(source)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, tmp_path / "out", mode="w4a4", calibration=LlmCompressorCalibration(WINDOWS), progress=stop)
    monkeypatch.setattr("llmcompressor.oneshot", None)
    quantize_checkpoint(plan, tmp_path / "out", mode="w4a4", calibration=LlmCompressorCalibration(WINDOWS))
    assert len(open_checkpoint(tmp_path / "out").layers) == len(LINEARS)


def test_an_encoder_is_calibrated_too(tmp_path: Path) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = BertModel(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "bert")
    plan = plan_quantization(tmp_path / "bert")
    quantize_checkpoint(plan, tmp_path / "out", mode="w4a16", calibration=LlmCompressorCalibration(WINDOWS))
    assert xpu_fp4.load_model(tmp_path / "out")(IDS).last_hidden_state.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "w4a8"}, "llm-compressor knows no w4a8, expected w4a4 or w4a16"),
        ({"mode": "w4a4", "offset": True}, "llm-compressor knows no offset"),
        ({"mode": "w4a4", "scale_mode": "ceil"}, "llm-compressor knows no scale mode ceil"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(source: Path, tmp_path: Path, options: Any, message: str) -> None:
    calibration = LlmCompressorCalibration(WINDOWS)
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(plan_quantization(source), tmp_path / "out", calibration=calibration, **options)
    assert not list(tmp_path.iterdir())
