# SPDX-License-Identifier: Apache-2.0
"""Calibration: GPTQ against its definition, what each block and layer is given, and the same bytes after an interruption."""

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xpu_fp4
from checkpoint_files import IDS, VOCABULARY, llama, save_llama, tensors_of
from click.testing import CliRunner
from helpers import assert_same_bits, normal, seeded
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from xpu_fp4 import Mode, MXFP4Linear, reference
from xpu_fp4.calibration import CheckpointCalibration, Conversation, calibrate_, calibration_windows, read_chats
from xpu_fp4.calibration import model as calibration_model
from xpu_fp4.calibration.blocks import Call, block_lists, stages, walk
from xpu_fp4.calibration.gptq import CORRECTION, DAMP, corrected, round_weight
from xpu_fp4.calibration.layers import multiplied_input, quantize_block
from xpu_fp4.checkpoints import CheckpointError, Scheme, plan_quantization, quantize_checkpoint
from xpu_fp4.checkpoints.questions import Question, read_questions
from xpu_fp4.cli import main

LENGTH = 24
WINDOWS = torch.randint(3, VOCABULARY, (12, LENGTH), generator=seeded(1))
BATCHES = list(WINDOWS.split(4))
OTHERS = torch.randint(3, VOCABULARY, (8, LENGTH), generator=seeded(2))
MANY = torch.randint(3, VOCABULARY, (64, LENGTH), generator=seeded(3))


# ---- GPTQ ----


def correlated(rows: int, k: int, seed: int = 5) -> Tensor:
    """Inputs [rows, k] whose channels have much in common and very different sizes."""
    shared = normal(rows, k // 4, seed=seed) @ normal(k // 4, k, seed=seed + 1)
    return (shared + normal(rows, k, seed=seed + 2)) * torch.logspace(-1, 1, k)[torch.randperm(k, generator=seeded(seed))]


def gptq_by_definition(weight: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """Codes [N, K] in float64: after each channel the rest moves to where the output's error is least, by the inverse Hessian
    of the channels that are left."""
    h = hessian.double()
    h.diagonal().add_(DAMP * h.diagonal().mean())
    w = weight.double().clone()
    units = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    left = torch.argsort(hessian.diagonal(), descending=True).tolist()
    while left:
        channel, *rest = left
        inverse = torch.linalg.inv(h[left][:, left])
        code = reference.encode(w[:, channel] / units[:, channel])
        value = torch.where(code >= 8, -1, 1) * reference.MAGNITUDES[(code & 7).long()] * units[:, channel]
        codes[:, channel] = code
        w[:, rest] -= (w[:, channel] - value).outer(inverse[0, 1:] / inverse[0, 0])
        left = rest
    return codes


def test_rounding_is_gptq_by_its_definition() -> None:
    x, weight = correlated(200, 96), normal(24, 96, seed=8)
    hessian = x.T @ x
    _, scale = reference.quantize(weight)
    assert_same_bits(round_weight(weight, scale, hessian), reference.pack(gptq_by_definition(weight, scale, hessian)))


@pytest.mark.parametrize("k", [32, 64, 160])
def test_outputs_are_nearer_than_by_rounding_to_nearest(k: int) -> None:
    x, weight = correlated(400, k), normal(40, k, seed=9)
    codes, scale = reference.quantize(weight)

    def error(q: Tensor) -> float:
        return float(((reference.values(q, scale) - weight) @ x.double().T).square().mean())

    assert error(round_weight(weight, scale, x.T @ x)) < 0.5 * error(codes)


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    # Ties, signed zeros and values beyond the largest among the weights; a power of two for each channel.
    weight = torch.cat([torch.arange(-64, 64) / 8, torch.tensor([0.0, -0.2, 0.25, -0.25, 7.0, -5.0, 1.75, 2.5] * 4)]).view(
        5, 32
    )
    scale = torch.full((5, 1), 127, dtype=torch.uint8)
    codes = round_weight(weight, scale, torch.diag(torch.exp2(torch.arange(32.0) % 7)))
    assert_same_bits(codes, reference.pack(reference.encode(weight)))


def test_channels_without_input_are_rounded_to_nearest() -> None:
    x, weight = correlated(200, 64), normal(8, 64, seed=10)
    x[:, 7] = x[:, 40] = 0
    codes, scale = reference.quantize(weight)
    rounded = reference.unpack(round_weight(weight, scale, x.T @ x))
    for channel in (7, 40):
        assert_same_bits(rounded[:, channel], reference.unpack(codes)[:, channel])


def test_a_hessian_of_too_few_tokens_is_damped_until_it_is_definite() -> None:
    x, weight = normal(3, 64), normal(8, 64, seed=10)
    _, scale = reference.quantize(weight)
    codes = round_weight(weight, scale, x.T @ x, damp=0)
    assert torch.isfinite(reference.values(codes, scale)).all()


def test_a_correction_is_a_share_of_least_squares() -> None:
    x, d, weight = correlated(400, 64), normal(400, 64, seed=3), normal(8, 64, seed=10)
    ridge = (DAMP * (x.T @ x).diagonal().mean()).sqrt() * torch.eye(64)
    # What is to be added has the outputs weight d on x, and is kept small by further rows.
    inputs, outputs = torch.cat([x, ridge]).double(), torch.cat([d @ weight.T, torch.zeros(64, 8)]).double()
    expected = weight + CORRECTION * torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(corrected(weight, x.T @ x, d.T @ x).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("hadamard", [0, 32])
@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_the_hessian_is_of_what_the_layer_multiplies(mode: Mode, hadamard: Any, offset: bool) -> None:
    x, mean = (3 * normal(40, 64)).bfloat16(), normal(64, seed=3) if offset else None
    scheme = Scheme(mode, hadamard=hadamard, input_offset=offset)
    layer = MXFP4Linear(64, 64, False, **scheme.arguments(), input_offset=offset, dtype=torch.bfloat16)
    layer.weight_packed.data, layer.weight_scale.data = (
        xpu_fp4.quantize(torch.eye(64))[0].view(torch.uint8),
        torch.full((64, 2), 125, dtype=torch.uint8),
    )
    layer.input_offset = None if mean is None else nn.Parameter(mean, requires_grad=False)
    # Codes of an identity are 4 under a scale of 1/4, so that the layer gives back its quantized input.
    assert_same_bits(multiplied_input(x, scheme, mean).bfloat16() + 0, layer(x))  # of no negative zeros


# ---- through a model ----


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=32,
        d_ff=96,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).eval()


def gemma() -> Any:
    """Its blocks get different masks and positions."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


def bert(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def linears_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


MODELS: dict[str, Callable[[], Any]] = {"llama": lambda: llama(torch.float32), "bert": bert, "gemma": gemma, "t5": t5}


def batches_for(model: Any, windows: Tensor = WINDOWS) -> list[dict[str, Tensor]]:
    names = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(names, ids) for ids in windows.split(4)]


@torch.no_grad()
def last_of(model: Any, windows: Tensor) -> Tensor:
    output = torch.cat([model(**batch)[0] for batch in batches_for(model, windows)])
    return output.flatten(0, -2)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_block_is_given_what_a_forward_gives_it(name: str) -> None:
    model = MODELS[name]()
    model.config.use_cache = False
    lists = block_lists(model, linears_of(model))
    expected: dict[nn.Module, list[tuple[Any, ...]]] = {}
    hooks = [
        block.register_forward_pre_hook(
            lambda module, args, kwargs: expected.setdefault(module, []).append((args, kwargs)), with_kwargs=True
        )
        for blocks in lists
        for block in blocks.values()
    ]
    for batch in batches_for(model):
        model(**batch)
    for hook in hooks:
        hook.remove()
    seen: list[str] = []

    def compare(name: str, block: nn.Module, calls: list[Call]) -> list[Any]:
        seen.append(name)
        for call, (args, kwargs) in zip(calls, expected[block], strict=True):
            torch.testing.assert_close(list(call.args), list(args), rtol=0, atol=0)
            assert call.kwargs.keys() == kwargs.keys()
            for key, value in kwargs.items():
                if isinstance(value, (Tensor, tuple)):
                    torch.testing.assert_close(call.kwargs[key], value, rtol=0, atol=0)
        return [call.run(block) for call in calls]

    walk(model, batches_for(model), lists, compare)
    assert seen == [name for blocks in lists for name in blocks]
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_linears_with_one_input_share_a_group_and_stages_follow_the_calls() -> None:
    model = llama(torch.float32)
    block = model.model.layers[0]
    calls: list[Call] = []

    def keep(name: str, block: nn.Module, found: list[Call]) -> list[Any]:
        calls.extend(found)
        return [call.run(block) for call in found]

    walk(model, BATCHES[:1], [{"block": block}], keep)
    found = stages(block, linears_of(block), calls[0])
    assert found == [
        [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]],
        [["self_attn.o_proj"]],
        [["mlp.gate_proj", "mlp.up_proj"]],
        [["mlp.down_proj"]],
    ]


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_calibrated_model_is_nearer_to_the_original(name: str, mode: Mode) -> None:
    model = MODELS[name]()
    batches = batches_for(model)
    rounded, calibrated = copy.deepcopy(model), copy.deepcopy(model)
    xpu_fp4.quantize_(rounded, mode=mode, hadamard=32)
    steps: list[tuple[int, int]] = []
    assert calibrate_(calibrated, batches, mode=mode, hadamard=32, progress=lambda *step: steps.append(step)) is calibrated
    names = linears_of(model)
    assert all(isinstance(calibrated.get_submodule(name), MXFP4Linear) for name in names)
    assert steps == [(i, steps[-1][1]) for i in range(len(steps))]
    expected = last_of(model, WINDOWS)
    errors = [float((last_of(m, WINDOWS) - expected).square().mean()) for m in (calibrated, rounded)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("layer", ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_each_linear_is_calibrated_on_what_those_before_it_give_once_quantized(layer: str) -> None:
    options: dict[str, Any] = {"mode": "w4a4", "hadamard": 32}
    whole = calibrate_(llama(torch.float32), BATCHES, **options)
    before, original = llama(torch.float32), llama(torch.float32)
    names = linears_of(before)
    for name in names[: names.index(layer)]:
        owner, _, attribute = name.rpartition(".")
        setattr(before.get_submodule(owner), attribute, whole.get_submodule(name))
    for model, is_equal in ((before, True), (original, False)):
        alone = calibrate_(model, BATCHES, filter_fn=lambda module, name: name == layer, **options).get_submodule(layer)
        assert torch.equal(alone.weight_packed, whole.get_submodule(layer).weight_packed) == is_equal


@torch.no_grad()
def test_a_correction_is_towards_what_the_original_gives_each_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    expected: dict[str, list[Tensor]] = {}
    original = llama(torch.float32)
    for name in linears_of(original):
        original.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: expected.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    for batch in BATCHES:
        original(batch)
    given: dict[str, list[Tensor]] = {}

    def spy(block: nn.Module, calls: Any, schemes: Any, where: str, originals: dict[str, list[Tensor]]) -> Any:
        given.update({f"{where}.{name}": inputs for name, inputs in originals.items()})
        assert len(calls) == len(BATCHES)
        return quantize_block(block, calls, schemes, where, originals)

    monkeypatch.setattr(calibration_model, "quantize_block", spy)
    calibrate_(llama(torch.float32), BATCHES, mode="w4a4", hadamard=32, correct=True)
    assert given.keys() == expected.keys()
    for name, inputs in expected.items():
        torch.testing.assert_close(given[name], inputs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"mode": "w4a8"}),
        ("llama", {"mode": "w4a4", "offset": True, "keep_high": ["q_proj"]}),
        ("bert", {"mode": "w4a4"}),
        ("t5", {"mode": "w4a4"}),
    ],
)
def test_a_corrected_model_is_nearer_to_the_original_on_other_data(name: str, options: dict[str, Any]) -> None:
    original = MODELS[name]()
    batches = batches_for(original, MANY)
    plain, made = (calibrate_(copy.deepcopy(original), batches, hadamard=32, correct=c, **options) for c in (False, True))
    errors = [float((last_of(m, OTHERS) - last_of(original, OTHERS)).square().mean()) for m in (made, plain)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("mode", ["w4a4", "w4a8"])
def test_an_offset_leaves_the_mean_of_outputs_as_it_was(mode: Mode) -> None:
    model = bert(layers=1)
    layer = model.encoder.layer[0].attention.self.query
    calibrated = calibrate_(copy.deepcopy(model), batches_for(model), mode=mode, hadamard=32, offset=True)
    made = calibrated.encoder.layer[0].attention.self.query
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    last_of(model, WINDOWS)
    hook.remove()
    x = torch.cat(inputs)
    assert_same_bits(made.input_offset.data, x.double().mean(0).float())
    assert made.hadamard == 32
    with torch.no_grad():
        expected = layer(x)
    torch.testing.assert_close(made(x).mean(0), expected.mean(0), rtol=0, atol=1e-5)
    assert float((made(x) - expected).abs().max()) > 1e-3  # it is quantized


def test_layers_kept_high_are_w4a16_and_share_no_scheme() -> None:
    model = calibrate_(
        llama(), BATCHES, mode="w4a4", hadamard=32, offset=True, keep_high=["q_proj", "re:.*layers.1.mlp.up_proj"]
    )
    modes = {name: m.mode for name, m in model.named_modules() if isinstance(m, MXFP4Linear)}
    high = {name for name, mode in modes.items() if mode == "w4a16"}
    assert high == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert set(modes.values()) == {"w4a4", "w4a16"}
    attention = model.model.layers[0].self_attn
    assert_same_bits(attention.q_proj.input_offset.data, attention.k_proj.input_offset.data)


def test_the_same_batches_give_the_same_bits() -> None:
    first, second = (calibrate_(llama(), BATCHES, mode="w4a8", hadamard=32).state_dict() for _ in range(2))
    other = calibrate_(llama(), list(OTHERS.split(4)), mode="w4a8", hadamard=32).state_dict()
    for name, tensor in first.items():
        assert_same_bits(second[name], tensor)
    assert any(not torch.equal(other[name], tensor) for name, tensor in first.items())


class Experts(nn.Module):
    """A block with four experts, of which the last sees two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 96), "gate": nn.Linear(64, 96), "down": nn.Linear(96, 64)}) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = torch.zeros_like(rows)
        chosen = torch.arange(len(rows)) % 3
        chosen[-1] = 3
        for i, expert in enumerate(self.experts):
            mine = rows[chosen == i]
            if len(mine):
                out[chosen == i] = expert["down"](expert["gate"](mine).sigmoid() * expert["up"](mine))  # type: ignore[index]
        return x + out.view(x.shape)


class WithExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("correct", [False, True])
def test_experts_that_see_few_tokens_and_layers_outside_are_rounded_to_nearest_and_named(correct: bool) -> None:
    torch.manual_seed(0)
    model = WithExperts().eval()
    weights = {name: copy.deepcopy(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    batches = [normal(2, 60, 64, seed=i) for i in range(2)]
    with pytest.warns(
        UserWarning, match=r"too few tokens reach 6 \(layers.0.experts.3.down, .* 3 more\); in no block are 1 \(head\)"
    ):
        calibrate_(model, batches, mode="w4a8", hadamard=32, correct=correct)
    for name, linear in weights.items():
        nearest = MXFP4Linear.from_linear(linear, mode="w4a8", hadamard=32)
        is_nearest = torch.equal(nearest.weight_packed, model.get_submodule(name).weight_packed)  # type: ignore[arg-type]
        assert is_nearest == (".3." in name or name == "head"), name


# ---- bad arguments ----


def test_what_cannot_be_calibrated_is_named() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate_(llama(), [])
    with pytest.raises(ValueError, match='mode is \'w8a8\', expected "w4a4" or "w4a8" or "w4a16"'):
        calibrate_(llama(), BATCHES, mode="w8a8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in_features 96, expected a multiple of 64: leave it out by filter_fn"):
        calibrate_(llama(), BATCHES, hadamard=64)
    with pytest.raises(
        ValueError, match=r"keep_high has 'qproj', which is no layer's name, nor its last part; a regex starts with re:"
    ):
        calibrate_(llama(), BATCHES, keep_high=["qproj"])
    model = llama()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.mlp\.gate_proj hold NaN or Inf"):
        calibrate_(model, BATCHES)
    assert not any("forward" in module.__dict__ for module in model.modules())
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.1\.mlp\.down_proj holds NaN or Inf"):
        calibrate_(model, BATCHES)


# ---- checkpoints ----


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


# ---- texts and conversations ----

WORDS = [f"w{i}" for i in range(100)]
TEXT = " ".join(WORDS[i * 7 % 100] + "." * (i % 5 == 0) for i in range(4000))
CHATS = [
    [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1} w{i + 2}"}] for i in range(0, 90, 3)
]
TEMPLATE = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "user", "assistant", ".", *WORDS]
    words_to_ids = {word: i for i, word in enumerate(words)}
    made = Tokenizer(WordLevel(words_to_ids, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def chats_among(windows: Tensor) -> int:
    """Windows that begin as the template has it."""
    return int((windows[:, :2] == torch.tensor(tokenizer().convert_tokens_to_ids(["<s>", "user"]))).all(1).sum())


@pytest.mark.parametrize(
    ("texts", "chats", "template", "options", "expected"),
    [
        ([TEXT], [], None, {}, 0),
        ([TEXT], [], TEMPLATE, {}, 4),
        ([TEXT], [], TEMPLATE, {"template": False}, 0),
        ([TEXT], CHATS, TEMPLATE, {}, 4),
        ([TEXT], CHATS, TEMPLATE, {"template": False}, 4),
        ([], CHATS, TEMPLATE, {}, 8),
    ],
)
def test_half_of_the_windows_are_conversations_where_there_is_a_template(
    texts: list[str], chats: list[Conversation], template: str | None, options: dict[str, Any], expected: int
) -> None:
    windows = calibration_windows(tokenizer(template), texts, chats, samples=8, length=40, **options)
    assert windows.shape == (8, 40)
    assert chats_among(windows) == expected
    again, other = (
        calibration_windows(tokenizer(template), texts, chats, samples=8, length=40, seed=s, **options) for s in (0, 1)
    )
    assert torch.equal(windows, again)
    assert not torch.equal(windows, other)
    assert len(windows.unique(dim=0)) == 8


def test_what_is_no_data_to_calibrate_on_is_named() -> None:
    with pytest.raises(ValueError, match="nothing to calibrate on"):
        calibration_windows(tokenizer(), [])
    with pytest.raises(ValueError, match="no chat template"):
        calibration_windows(tokenizer(None), [TEXT], CHATS)
    with pytest.raises(ValueError, match="the texts have 11 characters, too few for windows of 40 tokens"):
        calibration_windows(tokenizer(None), ["w1 w2 w3 w4"], length=40)


def test_conversations_are_lines_or_an_array(tmp_path: Path) -> None:
    lines, array, bare = (tmp_path / name for name in ("lines.jsonl", "array.json", "bare.json"))
    entries = [{"messages": chat, "id": 5} for chat in CHATS]
    lines.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    array.write_text(json.dumps(entries))
    bare.write_text(json.dumps(CHATS, indent=1))
    assert read_chats(lines) == read_chats(array) == read_chats(bare) == CHATS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"chats has no conversations"),
        ("[]", r"chats has no conversations"),
        ('{"messages": [}', r"chats, line 1 is not readable JSON"),
        ('{"messages": []}\n', r"chats, line 1.messages is empty, expected messages"),
        ('{"text": "hi"}', r"chats, line 1 is \{'text': 'hi'\}, expected an object with messages"),
        (
            '[{"messages": [{"role": "user", "content": ["hi"]}]}]',
            r"chats\[0\].messages\[0\].content is \['hi'\], expected a string",
        ),
        ('[[{"role": "user"}]]', r"chats\[0\]\[0\] is \{'role': 'user'\}, expected an object with content"),
        ("[5]", r"chats\[0\] is 5, expected an array"),
        ("[" * 100_000, r"chats is not readable JSON: it is nested too deeply"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "chats").write_text(content)
    with pytest.raises((CheckpointError, ValueError), match=message):
        read_chats(tmp_path / "chats")


def test_the_command_calibrates(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "source")
    tokenizer().save_pretrained(folder)
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "chats").write_text(json.dumps(CHATS))
    data = [f"--calibrate={tmp_path / 'text'}", f"--chat={tmp_path / 'chats'}", "--samples=8", "--length=40", "--seed=3"]
    options = ["--scheme=w4a8", "--hadamard=32", "--offset", "--correct", "--keep-high=q_proj, k_proj,re:.*v_proj"]
    result = CliRunner().invoke(main, ["quantize", str(folder), str(tmp_path / "out"), *options, *data])
    assert result.exit_code == 0, result.output
    windows = calibration_windows(tokenizer(), [TEXT], CHATS, samples=8, length=40, seed=3)
    high = ["q_proj", "k_proj", "v_proj"]
    expected = calibrate_(llama(), [windows], mode="w4a8", hadamard=32, offset=True, keep_high=high, correct=True)
    assert_same_bits(xpu_fp4.load_model(tmp_path / "out")(IDS).logits, expected(IDS).logits)
    assert "14 linear layers are MXFP4" in result.output


def test_the_command_corrects_nothing_without_data(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "out"), "--correct"])
    assert result.exit_code == 1
    assert "--correct is a way to calibrate: it takes --calibrate or --chat" in result.output


def test_the_command_names_what_is_no_text(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "source")
    tokenizer().save_pretrained(folder)
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    result = CliRunner().invoke(main, ["quantize", str(folder), str(tmp_path / "out"), f"--calibrate={tmp_path / 'text'}"])
    assert result.exit_code == 1
    assert "text is no UTF-8 text" in result.output


def test_the_command_says_how_to_get_llm_compressor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)  # as if it were not installed
    folder = save_llama(tmp_path / "source")
    tokenizer().save_pretrained(folder)
    (tmp_path / "text").write_text(TEXT)
    command = ["quantize", str(folder), str(tmp_path / "out"), "--with=llm-compressor"]
    data = [f"--calibrate={tmp_path / 'text'}", "--samples=8", "--length=40"]
    result = CliRunner().invoke(main, [*command, *data])
    assert result.exit_code == 1
    assert "llm-compressor is needed for this: pip install 'xpu_fp4[llm-compressor]'" in result.output
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "--with llm-compressor needs --calibrate or --chat" in " ".join(result.output.split())
    assert not list(tmp_path.glob("out*"))


# ---- the example's data ----

EXAMPLES = Path(__file__).parent.parent / "examples"
ASIDE = """a an the is are was were do does did what which who how many much in on of to at we you i it and said have has call
called known there their its s for from by with that this one be can my me us your people need"""


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[\w+]+", text.lower()))


def is_about(question: Question, exchange: str) -> bool:
    """Whether an exchange has all that the question names, or half of it and its answer."""
    subject, words = words_of(question.question) - words_of(ASIDE), words_of(exchange)
    answers = any(words_of(answer) <= words for answer in question.expected if not answer.isdigit())
    return subject <= words or (answers and 2 * len(subject & words) >= len(subject))


def test_nothing_that_is_asked_is_calibrated_on() -> None:
    questions, chats = read_questions(EXAMPLES / "questions.jsonl"), read_chats(EXAMPLES / "chats.jsonl")
    france = questions[0]
    assert is_about(france, "France's capital? It is Lyon.")
    assert is_about(france, "Which city in France is the largest? Paris.")
    assert not is_about(france, "What is the capital of Norway? The capital of Norway is Oslo.")
    for messages in chats:
        for i in range(0, len(messages) - 1, 2):
            exchange = f"{messages[i]['content']} {messages[i + 1]['content']}"
            assert not [question.question for question in questions if is_about(question, exchange)], exchange
