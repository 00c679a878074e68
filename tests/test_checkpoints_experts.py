# SPDX-License-Identifier: Apache-2.0
"""Models with experts, family by family: quantized, written and loaded, against the weights that codes stand for."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import xpu_fp4
from checkpoint_files import IDS, assert_same_model, tensors_of
from helpers import assert_same_bits, at_once, normal, seeded
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from xpu_fp4 import Mode, MXFP4Linear
from xpu_fp4.checkpoints import CheckpointError, MXFP4Experts, open_checkpoint, plan_quantization, quantize_checkpoint
from xpu_fp4.moe import PROJECTIONS, RoutedOnInput, experts_in, experts_kind
from xpu_fp4.weight import Gate

TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 32,  # H == 2I, so no shape tells which axis is K
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
TOP_2 = {"num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "gpt-oss": (hf.GptOssForCausalLM, hf.GptOssConfig(**TEXT, **TOP_2, head_dim=32, num_local_experts=4)),
    "qwen3": (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(**TEXT, **TOP_2, head_dim=32, num_experts=4, moe_intermediate_size=32),
    ),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig(**TEXT, num_local_experts=4)),
    "deepseek": (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            **TEXT, **TOP_2, moe_intermediate_size=32, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1,
            q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32, n_shared_experts=1,
        ),
    ),
    "llama4": (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(
            **TEXT, **TOP_2, head_dim=32, intermediate_size_mlp=64, num_local_experts=4, interleave_moe_layer_step=1
        ),
    ),
    "granite": (hf.GraniteMoeForCausalLM, hf.GraniteMoeConfig(**TEXT, **TOP_2, num_local_experts=4)),
}  # fmt: skip
LAYERS_WITH_EXPERTS = dict.fromkeys(FAMILIES, 2) | {"deepseek": 1}
IS_TRANSPOSED = dict.fromkeys(FAMILIES, False) | {"gpt-oss": True, "llama4": True}


def original(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small model with random weights, biases among them."""
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), dtype=dtype).eval()
    generator = seeded(11)
    if not list(experts_in(model)):
        pytest.skip("this Transformers has these experts in layers of its own, which stay as they are")
    for name, module in experts_in(model):
        for kind, parameter in module.named_parameters():
            size = 0.3 if kind.endswith("bias") else 0.1
            parameter.data = (torch.randn(parameter.shape, generator=generator) * size).to(dtype)
        assert name.endswith("experts")
    return model


def rounded(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """The values that a weight's codes and scales stand for, along K."""
    matrix = weight.transpose(-2, -1) if transposed else weight
    values = xpu_fp4.dequantize(*xpu_fp4.quantize(matrix.contiguous()))
    return values.transpose(-2, -1) if transposed else values


def with_rounded_weights(model: Any, family: str, *, linears: bool) -> Any:
    """The model as Transformers computes it, its experts' (and linear layers') weights rounded: what W4A16 is to be near."""
    for _, module in experts_in(model):
        for name in PROJECTIONS:
            module.get_parameter(name).data = rounded(module.get_parameter(name).data, transposed=IS_TRANSPOSED[family])
    for name, module in model.named_modules():
        if linears and type(module) is nn.Linear and name != "lm_head" and module.weight.shape[0] >= 32:
            module.weight.data = rounded(module.weight.data)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(IDS).logits
    return result


def experts_of(model: nn.Module) -> list[MXFP4Experts]:
    return [module for module in model.modules() if isinstance(module, MXFP4Experts)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_quantized_in_place(family: str) -> None:
    model = original(family)
    expected = logits(with_rounded_weights(copy.deepcopy(model), family, linears=True))
    plain = logits(model)
    xpu_fp4.quantize_(model, mode="w4a16")
    assert len(experts_of(model)) == LAYERS_WITH_EXPERTS[family]
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert all(module.is_prepacked for module in experts_of(model))
    assert (plain - expected).abs().max() > 100 * 1e-4, "rounding is too small to be seen"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_quantized_and_loads_in_every_way(family: str, tmp_path: Path) -> None:
    model = original(family)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    plan = plan_quantization(tmp_path / "source")
    out = quantize_checkpoint(plan, tmp_path / "out", mode="w4a16")
    checkpoint = open_checkpoint(out)
    assert checkpoint.format == ("mxfp4" if family == "gpt-oss" else "compressed-tensors")
    assert not any(".experts" in name for name in plan.kept)
    loaded = xpu_fp4.load_model(out)
    assert len(experts_of(loaded)) == LAYERS_WITH_EXPERTS[family]
    linears = [module for module in loaded.modules() if isinstance(module, MXFP4Linear)]
    assert (len(linears) == 0) == (family == "gpt-oss"), "its own format has experts alone"
    expected = with_rounded_weights(copy.deepcopy(model), family, linears=family != "gpt-oss")
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-4)
    applied = xpu_fp4.apply_checkpoint(FAMILIES[family][0]._from_config(FAMILIES[family][1]).eval(), out)
    assert_same_model(applied, xpu_fp4.load_model(out))
    by_config = AutoModelForCausalLM.from_pretrained(out, config=xpu_fp4.transformers_config(out))
    assert_same_bits(logits(by_config), logits(loaded))


@pytest.mark.parametrize("mode", ["w4a4", "w4a8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_keeps_its_mode(family: str, mode: Mode, tmp_path: Path) -> None:
    model = original(family, torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    out = quantize_checkpoint(plan_quantization(tmp_path / "source"), tmp_path / "out", mode=mode, scale_mode="floor")
    loaded = xpu_fp4.load_model(out)
    # The rule for scales of x is W4A4's own.
    expected = {(mode, "floor" if mode == "w4a4" else "even")}
    assert {(module.mode, module.scale_mode) for module in experts_of(loaded)} == expected
    is_gpt_oss = family == "gpt-oss"
    names = {name for name, module in loaded.named_modules() if isinstance(module, MXFP4Linear | MXFP4Experts)}
    assert is_gpt_oss == (not any("attn" in name for name in names))
    xpu_fp4.quantize_(model, mode=mode, scale_mode="floor", filter_fn=lambda _, name: name in names)
    assert_same_bits(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["mixtral", "llama4", "granite"])
def test_experts_are_turned_by_a_hadamard(family: str, tmp_path: Path) -> None:
    model = original(family)
    model.save_pretrained(tmp_path / "source")
    out = quantize_checkpoint(plan_quantization(tmp_path / "source"), tmp_path / "out", mode="w4a8", hadamard=32)
    loaded = xpu_fp4.load_model(out)
    assert {module.hadamard for module in experts_of(loaded)} == {32}
    names = {name for name, module in loaded.named_modules() if isinstance(module, MXFP4Linear | MXFP4Experts)}
    xpu_fp4.quantize_(model, mode="w4a8", hadamard=32, filter_fn=lambda _, name: name in names)
    assert_same_bits(logits(loaded), logits(model))


def test_transformers_itself_reads_what_gpt_oss_becomes(tmp_path: Path) -> None:
    original("gpt-oss", torch.bfloat16).save_pretrained(tmp_path / "source")
    out = quantize_checkpoint(plan_quantization(tmp_path / "source"), tmp_path / "out", mode="w4a8")
    theirs = hf.GptOssForCausalLM.from_pretrained(out, quantization_config=hf.Mxfp4Config(dequantize=True))
    ours = xpu_fp4.load_model(out, mode="w4a16", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs.float()), rtol=1e-4, atol=1e-4)


def test_gpt_oss_one_by_one_has_its_gate_in_halves(tmp_path: Path) -> None:
    """compressed-tensors stores gate and up as layers of their own, whatever rows the model alternates."""
    model = original("gpt-oss")
    model.save_pretrained(tmp_path / "source")
    out = quantize_checkpoint(plan_quantization(tmp_path / "source"), tmp_path / "out", mode="w4a16")
    expected = logits(xpu_fp4.load_model(out))
    tensors, config = tensors_of(out), json.loads((out / "config.json").read_text())
    single: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, found, part = name.partition(".experts.")
        if not found:
            single[name] = tensor
            continue
        projection, _, kind = part.rpartition("_")
        kind = {"blocks": "weight_packed", "scales": "weight_scale", "bias": "bias"}[kind]
        for expert, rows in enumerate(tensor):
            rows = rows.flatten(1) if kind == "weight_packed" else rows
            pieces = {"gate_proj": rows[0::2], "up_proj": rows[1::2]} if projection == "gate_up_proj" else {"down_proj": rows}
            single |= {f"{layer}.experts.{expert}.{piece}.{kind}": of.clone() for piece, of in pieces.items()}
    from checkpoint_files import compressed_tensors_config, write_checkpoint

    described = compressed_tensors_config(mode="w4a16")
    folder = write_checkpoint(tmp_path / "single", single, config | {"quantization_config": described})
    loaded = xpu_fp4.load_model(folder)
    assert {module.gate.interleaved for module in experts_of(loaded)} == {False}
    assert_same_bits(logits(loaded), expected)
    applied = xpu_fp4.apply_checkpoint(FAMILIES["gpt-oss"][0]._from_config(FAMILIES["gpt-oss"][1]).eval(), folder)
    assert_same_bits(logits(applied), expected)


# ---- which kind of experts ----


def test_kinds_are_told_by_classes() -> None:
    def kind(family: str) -> Any:
        _, module = next(experts_in(original(family)))
        return experts_kind(module)

    assert kind("gpt-oss").gate == Gate("swiglu_oai", interleaved=True, alpha=1.702, limit=7.0)
    assert kind("llama4").router_on_input
    for family in FAMILIES:
        assert kind(family).is_transposed == IS_TRANSPOSED[family]
        assert (kind(family).gate == Gate()) == (family != "gpt-oss")


def test_gpt_oss_has_its_own_alpha_and_limit() -> None:
    config = hf.GptOssConfig(**TEXT, **TOP_2, head_dim=32, num_local_experts=4, swiglu_limit=0.25, swiglu_alpha=1.25)
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(config).eval()
    for _, module in experts_in(model):
        module.gate_up_proj_bias.data.normal_(generator=seeded(3))  # type: ignore[operator]
    expected = logits(with_rounded_weights(copy.deepcopy(model), "gpt-oss", linears=True))
    torch.testing.assert_close(logits(xpu_fp4.quantize_(model, mode="w4a16")), expected, rtol=1e-4, atol=1e-4)


def gelu(folder: Path) -> Any:
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_local_experts=4, hidden_act="gelu")).eval()
    model.save_pretrained(folder)
    return model


def test_experts_of_another_gate_are_refused_by_name(tmp_path: Path) -> None:
    model = gelu(tmp_path / "source")
    _, module = next(experts_in(model))
    with pytest.raises(ValueError, match="the experts are MixtralExperts with the activation GELUActivation, expected SiLU"):
        MXFP4Experts.from_experts(module)
    with pytest.warns(UserWarning, match=r"in no nn.Linear: model.layers.0.mlp.experts.down_proj"):
        xpu_fp4.quantize_(model)
    assert not experts_of(model)
    original("mixtral").save_pretrained(tmp_path / "silu")
    out = quantize_checkpoint(plan_quantization(tmp_path / "silu"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(CheckpointError, match=r"for model.layers.0.mlp.experts: the experts are MixtralExperts with the activ"):
        xpu_fp4.load_model(out)


def test_fused_experts_of_another_gate_are_kept_and_named(tmp_path: Path) -> None:
    config = hf.GraniteMoeConfig(**TEXT, **TOP_2, num_local_experts=4, hidden_act="gelu")
    hf.GraniteMoeForCausalLM(config).save_pretrained(tmp_path / "source")
    with pytest.warns(
        UserWarning, match=r"of the weights are not quantized, in no linear layer: model.layers.0.block_sparse_moe"
    ):
        plan = plan_quantization(tmp_path / "source")
    assert "model.layers.0.block_sparse_moe.input_linear" in plan.kept
    assert not plan.experts


def test_llama4_routes_instead_of_multiplying_all() -> None:
    model = original("llama4")
    xpu_fp4.quantize_(model, mode="w4a8")
    layers = [module for module in model.modules() if isinstance(module, RoutedOnInput)]
    assert len(layers) == 2
    seen: list[tuple[int, ...]] = []
    handle = layers[0].experts.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    logits(model)
    handle.remove()
    assert seen == [(IDS.numel(), 64)]
    assert_same_bits(logits(copy.deepcopy(model)), logits(model))


# ---- what is left out, or asked for in vain ----


@pytest.mark.parametrize("family", ["gpt-oss", "llama4", "granite"])
def test_experts_may_be_ignored(family: str, tmp_path: Path) -> None:
    original(family).save_pretrained(tmp_path / "source")
    plan = plan_quantization(tmp_path / "source", ["re:.*(experts|block_sparse_moe)"])
    assert not plan.experts
    out = quantize_checkpoint(plan, tmp_path / "out", mode="w4a16")
    assert open_checkpoint(out).format == "compressed-tensors"
    assert not experts_of(xpu_fp4.load_model(out))


def test_one_layer_of_gpt_oss_may_be_ignored(tmp_path: Path) -> None:
    original("gpt-oss").save_pretrained(tmp_path / "source")
    plan = plan_quantization(tmp_path / "source", ["model.layers.1.mlp.experts"])
    out = quantize_checkpoint(plan, tmp_path / "out", mode="w4a16")
    loaded = xpu_fp4.load_model(out)
    assert len(experts_of(loaded)) == 1
    assert logits(loaded).isfinite().all()


BAD: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "hadamard": (lambda plan, out: quantize_checkpoint(plan, out, hadamard=32), "hadamard is given, but gpt-oss' format"),
    "keep_high": (
        lambda plan, out: quantize_checkpoint(plan, out, keep_high=["experts"]),
        "keep_high is given, but gpt-oss' format",
    ),
    "include": (lambda plan, out: plan_quantization(plan.source, include=["lm_head"]), "include has lm_head, but gpt-oss'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_gpt_oss_has_no_place_for_is_named(case: str, tmp_path: Path) -> None:
    original("gpt-oss").save_pretrained(tmp_path / "source")
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(plan_quantization(tmp_path / "source"), tmp_path / "out")


def test_an_unknown_hint_in_gpt_oss_is_named(tmp_path: Path) -> None:
    original("gpt-oss").save_pretrained(tmp_path / "source")
    out = quantize_checkpoint(plan_quantization(tmp_path / "source"), tmp_path / "out", mode="w4a8")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["xpu_fp4"]["group"] = 64
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantization_config.xpu_fp4 is .*'group': 64.*, expected one of"):
        open_checkpoint(out)


def test_fused_experts_of_a_layer_may_stay_in_w4a16(tmp_path: Path) -> None:
    original("granite").save_pretrained(tmp_path / "source")
    name = "model.layers.1.block_sparse_moe.experts"
    out = quantize_checkpoint(plan_quantization(tmp_path / "source"), tmp_path / "out", mode="w4a8", keep_high=[name])
    loaded = xpu_fp4.load_model(out)
    assert [module.mode for module in experts_of(loaded)] == ["w4a8", "w4a16"]


@pytest.mark.parametrize("family", ["gpt-oss", "granite"])
def test_a_k_that_is_no_multiple_of_a_block_is_named(family: str, tmp_path: Path) -> None:
    original(family)  # which may skip
    model_class, config = FAMILIES[family]
    changed = type(config).from_dict(config.to_dict() | {"intermediate_size": 48})
    model = model_class(changed)
    model.save_pretrained(tmp_path / "source")
    shape = r"\[4, 48, 64\], expected \[E, K, N\]" if family == "gpt-oss" else r"\[4, 64, 48\], expected \[E, N, K\]"
    with pytest.raises(CheckpointError, match=rf"has shape {shape} with K a multiple of 32: leave it out by ignore"):
        plan_quantization(tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"experts: down_proj has K = 48, expected a multiple of 32: leave it out by filter_fn"
    ):
        xpu_fp4.quantize_(model)


def test_nan_in_an_expert_is_named(tmp_path: Path) -> None:
    model = original("llama4")
    model.model.layers[1].feed_forward.experts.down_proj.data[2, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"layers.1.feed_forward.experts.down_proj holds NaN or Inf"):
        quantize_checkpoint(plan_quantization(tmp_path / "source"), tmp_path / "out")


# ---- the module ----


def experts_and_input(mode: Mode = "w4a8") -> tuple[MXFP4Experts, tuple[Tensor, Tensor, Tensor]]:
    _, source = next(experts_in(original("gpt-oss", torch.bfloat16)))
    generator = seeded(5)
    x = torch.randn(7, 64, generator=generator).bfloat16()
    ids = torch.randint(-1, 6, (7, 2), generator=generator)  # also those that others have
    return MXFP4Experts.from_experts(source, mode=mode), (x, ids, torch.rand(7, 2, generator=generator))


def test_stored_tensors_stay_reachable(tmp_path: Path) -> None:
    module, x = experts_and_input()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    expected = module(*x)
    assert module.is_prepacked
    assert not any(name in dict(module.named_parameters()) for name in module._stored_names)
    for name, tensor in before.items():
        assert_same_bits(module.state_dict()[name], tensor)
        assert_same_bits(getattr(module, name).detach(), tensor)
    other = MXFP4Experts(4, 64, 32, True, gate=module.gate, mode="w4a8", dtype=torch.bfloat16)
    other(*x)
    other.load_state_dict(module.state_dict())
    assert_same_bits(other(*x), expected)
    assert_same_bits(copy.deepcopy(module)(*x), expected)
    torch.save(module, tmp_path / "experts.pt")
    assert_same_bits(torch.load(tmp_path / "experts.pt", weights_only=False)(*x), expected)
    assert not module.unprepack_().is_prepacked
    assert_same_bits(module(*x), expected)
    assert not module.to(torch.float32).is_prepacked


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_offsets_are_subtracted_from_what_each_product_multiplies(mode: Mode) -> None:
    given, x = experts_and_input(mode)
    module = MXFP4Experts(4, 64, 32, True, gate=given.gate, mode=mode, input_offset=True, dtype=torch.bfloat16)
    module.load_state_dict(given.state_dict(), strict=False)
    assert_same_bits(module(*x), given(*x))
    offsets = {f"{name}_input_offset": normal(k, seed=k) for name, (_, k) in module.shapes().items()}
    module.load_state_dict(offsets, strict=False)
    options = {**given.gate.options(), "mode": mode, "w13_offset": offsets["gate_up_proj_input_offset"]}
    biases = given.state_dict()["gate_up_proj_bias"], given.state_dict()["down_proj_bias"]
    weights = given._weight().stored_tensors()
    expected = xpu_fp4.experts(*x, *weights, *biases, **options, w2_offset=offsets["down_proj_input_offset"])
    assert not torch.equal(expected, given(*x))
    assert_same_bits(module(*x), expected)
    assert_same_bits(copy.deepcopy(module)(*x), expected)
    module.to(torch.bfloat16)
    for name, offset in offsets.items():
        assert_same_bits(module.state_dict()[name], offset)
    assert "input_offset=True" in repr(module)


def test_threads_share_experts() -> None:
    for _ in range(5):
        module, x = experts_and_input()
        expected = copy.deepcopy(module)(*x)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

        def forward(module: MXFP4Experts = module, x: tuple[Tensor, ...] = x, expected: Tensor = expected) -> None:
            for _ in range(5):
                assert_same_bits(module(*x), expected)

        def save_and_undo(module: MXFP4Experts = module, before: dict[str, Tensor] = before) -> None:
            for name, tensor in module.state_dict().items():
                assert_same_bits(tensor, before[name])
            module.unprepack_()

        at_once(forward, forward, save_and_undo, save_and_undo)


def test_a_compiled_module_has_the_same_bits() -> None:
    module, x = experts_and_input()
    expected = copy.deepcopy(module)(*x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(*x), expected)
    module(*x)
    assert_same_bits(compiled(*x), expected)


# ---- calibration ----


def batches() -> list[Tensor]:
    return [torch.randint(2, 128, (8, 32), generator=seeded(seed)) for seed in range(2)]


def error_of(model: nn.Module, plain: Tensor) -> float:
    with torch.inference_mode():
        return float((model(batches()[0]).logits - plain).norm())


@pytest.mark.parametrize("family", ["gpt-oss", "qwen3", "llama4"])
@pytest.mark.filterwarnings("ignore:rounded to nearest")
def test_experts_are_calibrated_on_the_tokens_routed_to_them(family: str, tmp_path: Path) -> None:
    model = original(family)
    with torch.inference_mode():
        plain = model(batches()[0]).logits
    nearest = xpu_fp4.quantize_(copy.deepcopy(model), mode="w4a16", filter_fn=lambda _, name: name.endswith("experts"))
    calibrated = copy.deepcopy(model)
    xpu_fp4.calibrate_(calibrated, batches(), mode="w4a16", filter_fn=lambda _, name: name.endswith("experts"))
    assert len(experts_of(calibrated)) == 2
    assert error_of(calibrated, plain) < 0.9 * error_of(nearest, plain)
    model.save_pretrained(tmp_path / "source")
    ignore = ["re:.*(attn|shared_expert).*"] if family != "gpt-oss" else []
    plan = plan_quantization(tmp_path / "source", ignore)
    calibration = xpu_fp4.calibration.CheckpointCalibration(torch.cat(batches()))
    out = quantize_checkpoint(plan, tmp_path / "out", mode="w4a16", calibration=calibration)
    assert error_of(xpu_fp4.load_model(out), plain) < 0.9 * error_of(nearest, plain)


def test_experts_that_saw_few_tokens_are_rounded_to_nearest_and_counted() -> None:
    model = original("gpt-oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] = -1e4  # no token for the last expert
    nearest = xpu_fp4.quantize_(copy.deepcopy(model), mode="w4a16")
    with pytest.warns(
        UserWarning, match=r"too few tokens reach 4 \(model.layers.0.mlp.experts.3.down_proj, model.layers.0.mlp.ex"
    ):
        xpu_fp4.calibrate_(model, batches(), mode="w4a16")
    for ours, theirs in zip(experts_of(model), experts_of(nearest), strict=True):
        for name in PROJECTIONS:
            blocks, expected = ours.get_parameter(f"{name}_blocks"), theirs.get_parameter(f"{name}_blocks")
            assert_same_bits(blocks[3], expected[3])
            assert not torch.equal(blocks[0], expected[0])
