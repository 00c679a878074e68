# SPDX-License-Identifier: Apache-2.0
"""Models in memory: what each block and layer is given, and what becomes nearer to the original."""

import copy
from typing import Any

import pytest
import torch
import xpu_fp4
from calibration_cases import BATCHES, MANY, MODELS, OTHERS, WINDOWS, batches_for, bert, last_of, linears_of
from checkpoint_files import llama
from helpers import assert_same_bits, normal
from torch import Tensor, nn
from xpu_fp4 import Mode, MXFP4Linear
from xpu_fp4.calibration import calibrate_
from xpu_fp4.calibration import model as calibration_model
from xpu_fp4.calibration.blocks import Call, block_lists, stages, walk
from xpu_fp4.calibration.layers import quantize_block


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
