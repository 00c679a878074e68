# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in models: ours read by compressed-tensors and Transformers, theirs by us, with the same bits."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
import xpu_fp4
from checkpoint_files import (
    IDS,
    LINEARS,
    assert_same_model,
    auto_round_config,
    compressed_tensors_config,
    layers,
    llama,
    llama_config,
    llama_json,
    packed_llama,
    quark_config,
    save_gpt_oss,
    save_llama,
    tensors_of,
    write_checkpoint,
)
from checkpoints_of_others import COMPRESSOR, compress
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from helpers import MODES, assert_same_bits
from torch import nn
from transformers import AutoModelForCausalLM, GptOssForCausalLM, LlamaForCausalLM, Mxfp4Config
from xpu_fp4 import Mode, MXFP4Linear, ScaleMode, reference
from xpu_fp4.checkpoints import (
    CheckpointError,
    MXFP4Experts,
    models,
    open_checkpoint,
    plan_quantization,
    quantize_checkpoint,
)
from xpu_fp4.checkpoints.untrusted import read_json


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_llama(tmp_path / "source")


# ---- what we write ----


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("scale_mode", MODES)
def test_our_checkpoint_is_the_model_quantized_in_place(
    source: Path, tmp_path: Path, mode: Mode, scale_mode: ScaleMode
) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out", mode=mode, scale_mode=scale_mode)
    expected = xpu_fp4.quantize_(LlamaForCausalLM.from_pretrained(source), mode=mode, scale_mode=scale_mode)
    if mode != "w4a4":
        for module in layers(expected).values():
            module.scale_mode = "even"  # it is a rule for MXFP4 activations
    loaded = xpu_fp4.load_model(out)
    assert layers(loaded).keys() == LINEARS.keys()
    assert_same_model(loaded, expected)


@pytest.mark.parametrize("scale_mode", MODES)
def test_compressed_tensors_decompresses_ours_to_our_weights(source: Path, tmp_path: Path, scale_mode: ScaleMode) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out", scale_mode=scale_mode)
    scheme = QuantizationScheme(targets=["Linear"], **PRESET_SCHEMES["MXFP4"])
    stored = tensors_of(out)
    for name, module in layers(xpu_fp4.load_model(out)).items():
        parts = {part: stored[f"{name}.{part}"] for part in ("weight_packed", "weight_scale")}
        theirs = COMPRESSOR.decompress(parts, scheme)["weight"]
        assert_same_bits(theirs, module.dequantized_weight(torch.bfloat16))
        assert_same_bits(theirs.float(), module.dequantized_weight())


@pytest.mark.parametrize("mode", get_args(Mode))
def test_transformers_loads_ours_by_itself(source: Path, tmp_path: Path, mode: Mode) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out", mode=mode)
    ours = xpu_fp4.load_model(out)
    theirs = AutoModelForCausalLM.from_pretrained(out)
    with torch.inference_mode():
        expected = theirs(IDS).logits  # it decompresses at the first forward
    for name, module in layers(ours).items():
        assert_same_bits(theirs.get_submodule(name).weight.data, module.dequantized_weight(torch.bfloat16))
    assert (theirs.get_submodule(name).quantization_scheme.input_activations is not None) == (mode == "w4a4")
    torch.testing.assert_close(ours(IDS).logits, expected, rtol=0.05, atol=0.05)


def test_others_compute_our_w4a8_as_w4a16(source: Path, tmp_path: Path) -> None:
    plan = plan_quantization(source)
    folders = [quantize_checkpoint(plan, tmp_path / mode, mode=mode) for mode in get_args(Mode)]
    with torch.inference_mode():
        w4a4, w4a8, w4a16 = (AutoModelForCausalLM.from_pretrained(folder)(IDS).logits for folder in folders)
    assert_same_bits(w4a8, w4a16)
    assert not torch.equal(w4a8, w4a4)
    for folder in folders[1:]:
        theirs = QuantizationConfig.model_validate(read_json(folder / "config.json")["quantization_config"])
        assert theirs.config_groups["group_0"].input_activations is None


def test_a_float32_model_keeps_its_dtype(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", torch.float32, shards=False)
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    loaded = xpu_fp4.load_model(out)
    assert loaded.dtype == torch.float32
    assert_same_model(loaded, xpu_fp4.quantize_(LlamaForCausalLM.from_pretrained(source)))


# ---- what others write ----


@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_a_checkpoint_that_compressed_tensors_compressed_loads(tmp_path: Path, mode: Mode) -> None:
    theirs = compress(llama(), mode, tmp_path)
    loaded = layers(xpu_fp4.load_model(tmp_path))
    assert loaded.keys() == theirs.keys()
    for name, module in loaded.items():
        assert (module.mode, module.scale_mode) == (mode, "even")
        assert_same_bits(module.dequantized_weight(torch.bfloat16), theirs[name])
        # Their rule for scales is ours.
        q, scale = reference.quantize(llama().get_submodule(name).weight.detach(), "even")
        assert_same_bits(module.weight_scale.data, scale)
        assert_same_bits(module.weight_packed.data, q)


def expected_llama(mode: Mode) -> Any:
    """The small Llama of packed_llama, put together by hand."""
    tensors = packed_llama("weight_packed", "weight_scale")
    model = xpu_fp4.quantize_(llama(), mode=mode)
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_quark_loads_into_our_layers(tmp_path: Path, mode: Mode) -> None:
    folder = write_checkpoint(tmp_path, packed_llama("weight", "weight_scale"), llama_json(quark_config(mode=mode)))
    assert_same_model(xpu_fp4.load_model(folder), expected_llama(mode))


@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_auto_round_loads_into_our_layers(tmp_path: Path, mode: Mode) -> None:
    tensors = packed_llama("weight_packed", "weight_scale")
    folder = write_checkpoint(tmp_path, tensors, llama_json(auto_round_config(mode=mode)))
    expected = expected_llama(mode)
    for module in layers(expected).values() if mode == "w4a4" else ():
        module.scale_mode = "floor"
    assert_same_model(xpu_fp4.load_model(folder), expected)


def test_gpt_oss_loads_into_our_experts(tmp_path: Path) -> None:
    folder = save_gpt_oss(tmp_path)
    model = xpu_fp4.load_model(folder, dtype=torch.float32)  # so that only the order of additions differs
    assert sum(isinstance(module, MXFP4Experts) for module in model.modules()) == 2
    assert sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("_proj")) == 0
    theirs = GptOssForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    assert type(theirs.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, theirs.float()(IDS).logits, rtol=1e-4, atol=1e-4)


MOE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
MIXTRAL = transformers.MixtralConfig(**MOE, num_local_experts=3)
QWEN = transformers.Qwen3MoeConfig(**MOE, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=32)


@pytest.mark.parametrize("config", [MIXTRAL, QWEN], ids=lambda config: config.model_type)
def test_experts_that_are_stored_one_by_one_load_into_our_experts(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    original = AutoModelForCausalLM.from_config(config).eval()
    original.save_pretrained(tmp_path / "source")
    plan = plan_quantization(tmp_path / "source")
    assert sum(".experts." in name for name in plan.quantized) == 2 * 3 * 3
    assert sum("gate" in name for name in plan.kept) == 2, "routers are left alone"
    out = quantize_checkpoint(plan, tmp_path / "out", mode="w4a16")
    loaded = xpu_fp4.load_model(out)
    experts = {name: module for name, module in loaded.named_modules() if isinstance(module, MXFP4Experts)}
    assert len(experts) == 2
    for name, module in loaded.named_modules():  # the original, with the weights that codes and scales stand for
        if isinstance(module, MXFP4Linear):
            original.get_submodule(name).weight.data = module.dequantized_weight()
    for name in experts:
        for projection in ("gate_up_proj", "down_proj"):
            weight = original.get_submodule(name).get_parameter(projection)
            weight.data = xpu_fp4.dequantize(*xpu_fp4.quantize(weight.data))
    with torch.inference_mode():
        torch.testing.assert_close(loaded(IDS).logits, original(IDS).logits, rtol=1e-4, atol=1e-4)
    applied = xpu_fp4.apply_checkpoint(AutoModelForCausalLM.from_config(config).eval(), out)
    assert_same_model(applied, loaded)


# ---- ways in ----


def test_auto_model_takes_our_configuration(source: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out, config=xpu_fp4.transformers_config(out))
    assert_same_model(model, xpu_fp4.load_model(out))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("stored", get_args(Mode))
def test_a_checkpoint_runs_in_the_mode_that_is_asked_for(source: Path, tmp_path: Path, stored: Mode, mode: Mode) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out", mode=stored)
    loaded = xpu_fp4.load_model(out, mode=mode)
    assert_same_model(loaded, xpu_fp4.quantize_(LlamaForCausalLM.from_pretrained(source), mode=mode))
    assert_same_model(xpu_fp4.apply_checkpoint(llama(), out, mode=mode), loaded)
    config = xpu_fp4.transformers_config(out, mode=mode)
    assert_same_model(AutoModelForCausalLM.from_pretrained(out, config=config), loaded)


def test_experts_run_in_the_mode_that_is_asked_for(tmp_path: Path) -> None:
    folder = save_gpt_oss(tmp_path)
    answers = {}
    for mode in get_args(Mode):
        model = xpu_fp4.load_model(folder, mode=mode)
        assert {module.mode for module in model.modules() if isinstance(module, MXFP4Experts)} == {mode}
        with torch.inference_mode():
            answers[mode] = model(IDS).logits.float()
    noise = {mode: float((answer - answers["w4a16"]).norm()) for mode, answer in answers.items()}
    assert 0 < 3 * noise["w4a8"] < noise["w4a4"]


def test_the_rule_that_a_checkpoint_notes_is_that_of_w4a4_in_its_place(source: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out", mode="w4a8", scale_mode="floor")
    modules = layers(xpu_fp4.load_model(out, mode="w4a4")).values()
    assert {(module.mode, module.scale_mode) for module in modules} == {("w4a4", "floor")}


def test_an_unknown_mode_is_named(source: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    loaders: tuple[Callable[..., Any], ...] = (
        xpu_fp4.load_model,
        xpu_fp4.transformers_config,
        partial(xpu_fp4.apply_checkpoint, llama()),
    )
    for load in loaders:
        with pytest.raises(ValueError, match=r"mode is 'w8a8', expected .*w4a8"):
            load(out, mode="w8a8")


FOLDERS = {
    "compressed-tensors": lambda folder: write_checkpoint(
        folder, packed_llama("weight_packed", "weight_scale"), llama_json(compressed_tensors_config())
    ),
    "quark": lambda folder: write_checkpoint(folder, packed_llama("weight", "weight_scale"), llama_json(quark_config())),
    "gpt-oss": save_gpt_oss,
}


@pytest.mark.parametrize("format", FOLDERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_apply_checkpoint_gives_the_loaded_model(tmp_path: Path, format: str, device: str) -> None:
    folder = FOLDERS[format](tmp_path)
    expected = xpu_fp4.load_model(folder)
    with torch.device(device):
        model = type(expected)(transformers.AutoConfig.from_pretrained(folder)).to(torch.bfloat16).eval()
    for name, buffer in expected.named_buffers():  # computed at construction, and not of the checkpoint
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    assert xpu_fp4.apply_checkpoint(model, folder) is model
    assert_same_model(model, expected)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", tied=True)
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(out)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(tied=True)).to(torch.bfloat16)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for loaded in (xpu_fp4.load_model(out), xpu_fp4.apply_checkpoint(model, out)):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert not loaded.lm_head.weight.is_meta


def test_a_base_model_loads_what_was_saved_with_a_head(source: Path, tmp_path: Path) -> None:
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    base = transformers.AutoModel.from_pretrained(out, config=xpu_fp4.transformers_config(out))
    with torch.inference_mode():
        expected = xpu_fp4.load_model(out).model(IDS).last_hidden_state
        assert_same_bits(base(IDS).last_hidden_state, expected)
    with pytest.warns(UserWarning, match=r"the model has no place for lm_head.weight"):
        applied = xpu_fp4.apply_checkpoint(transformers.LlamaModel(llama_config()).to(torch.bfloat16), out)
    assert layers(applied).keys() == {name.removeprefix("model.") for name in LINEARS}


# ---- what does not fit is named, and the model is left alone ----


def test_a_model_that_does_not_fit_is_named(tmp_path: Path) -> None:
    folder = FOLDERS["compressed-tensors"](tmp_path)
    down = "model.layers.1.mlp.down_proj"
    cases: dict[str, nn.Module | None] = {
        rf"{down}.weight_packed is for a weight \[64, 96\], but the model's {down} is \[64, 64\]": nn.Linear(
            64, 64, bias=False
        ),
        rf"the model has a bias for {down}, the checkpoint has none": nn.Linear(96, 64),
        rf"the model's {down} is a Identity, expected nn.Linear": nn.Identity(),
        rf"quantizes {down}, but LlamaForCausalLM has no module of that name": None,
    }
    for message, module in cases.items():
        model = llama()
        model.model.layers[1].mlp.down_proj = module
        with pytest.raises(CheckpointError, match=message):
            xpu_fp4.apply_checkpoint(model, folder)
        assert not layers(model)


def test_experts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = save_gpt_oss(tmp_path)
    config, stored = json.loads((folder / "config.json").read_text()), tensors_of(folder)
    experts = "model.layers.0.mlp.experts"
    whole = {part: stored[f"{experts}.down_proj_{part}"] for part in ("blocks", "scales", "bias")}
    cases: dict[str, dict[str, torch.Tensor]] = {
        r"down_proj is \[3, 64, 96\], but the model's is \[4, 64, 96\]": {part: t[:3].clone() for part, t in whole.items()},
        "down_proj is missing or incomplete": {},
        "experts of model.layers.0.mlp.experts differ in scheme or bias": {p: t for p, t in whole.items() if p != "bias"},
    }
    for message, down in cases.items():
        others = {name: tensor for name, tensor in stored.items() if not name.startswith(f"{experts}.down_proj")}
        write_checkpoint(folder, others | {f"{experts}.down_proj_{part}": t for part, t in down.items()}, config)
        model = GptOssForCausalLM(transformers.AutoConfig.from_pretrained(folder))
        with pytest.raises(CheckpointError, match=message):
            xpu_fp4.apply_checkpoint(model, folder)
        assert type(model.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
        assert model.get_parameter(f"{experts}.down_proj").shape == (4, 96, 64)


def test_a_tensor_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    tensors = packed_llama("weight_packed", "weight_scale")
    del tensors["model.norm.weight"]
    folder = write_checkpoint(tmp_path, tensors, llama_json(compressed_tensors_config()))
    with pytest.raises(CheckpointError, match=r"has no tensors, or of another shape, for model\.norm\.weight"):
        xpu_fp4.load_model(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config())
    with pytest.raises(CheckpointError, match=r"has no tensors for model\.norm\.weight, model\.rotary_emb"):
        xpu_fp4.apply_checkpoint(model, folder)
    with pytest.raises(CheckpointError, match=r"has no tensors for model\.norm\.weight$"):
        xpu_fp4.apply_checkpoint(llama(), folder)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    for architectures, message in ((["NoSuchModel"], "names the architecture NoSuchModel"), ([], "names no architectures")):
        config = llama_json(compressed_tensors_config()) | {"architectures": architectures}
        write_checkpoint(tmp_path, packed_llama("weight_packed", "weight_scale"), config)
        with pytest.raises(CheckpointError, match=message):
            xpu_fp4.load_model(tmp_path)


def test_without_transformers_reading_works_and_loading_says_what_is_missing(tmp_path: Path) -> None:
    folder = FOLDERS["compressed-tensors"](tmp_path)
    code = f"""
import sys
import xpu_fp4
from xpu_fp4.checkpoints import open_checkpoint
light = not {{"transformers", "matplotlib", "compressed_tensors"}} & sys.modules.keys()
assert light, "import xpu_fp4 must stay light"
sys.modules["transformers"] = None
assert len(open_checkpoint({str(folder)!r}).layers) == {len(LINEARS)}
try:
    xpu_fp4.load_model({str(folder)!r})
except ImportError as error:
    assert "pip install 'xpu_fp4[transformers]'" in str(error), error
else:
    raise AssertionError("loaded without transformers")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_checkpoint_may_go_away_after_loading(tmp_path: Path) -> None:
    """The weights are in memory of the model, not in mapped files."""
    folder = FOLDERS["compressed-tensors"](tmp_path / "a")
    model, expected = xpu_fp4.apply_checkpoint(llama(), folder), xpu_fp4.apply_checkpoint(llama(), folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert_same_model(model, expected)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


# ---- versions of transformers ----


def test_the_extra_asks_for_the_versions_that_load() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (major, oldest), (same_major, newest) = models.OLDEST_TRANSFORMERS, models.NEWEST_TRANSFORMERS
    assert major == same_major
    assert f'transformers = ["transformers>={major}.{oldest},<{major}.{newest + 1}"]' in project
    pinned = {int(minor) for minor in re.findall(rf'"transformers=={major}\.(\d+)\.', project)}
    assert (min(pinned), max(pinned)) == (oldest, newest), "which `make test-transformers` runs"


@pytest.mark.parametrize("version", ["4.57.6", "5.7.0", "5.25.0.dev0", "6.0.0"])
def test_another_version_is_refused_in_one_line(source: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    folder = quantize_checkpoint(plan_quantization(source), source.with_name("out"))
    monkeypatch.setattr(models.require_transformers(), "__version__", version)
    message = rf"^transformers {version} is not supported, .* tested with 5.8 to 5.24: pip install 'transformers~=5.24.0'$"
    for load in (xpu_fp4.load_model, xpu_fp4.transformers_config):
        with pytest.raises(ImportError, match=message):
            load(folder)
    assert xpu_fp4.apply_checkpoint(llama(), folder), "which needs no transformers"
