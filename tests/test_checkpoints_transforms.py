# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose layers transform their inputs: compressed-tensors' `transform_config`, and our own input offsets."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xpu_fp4
from checkpoint_files import (
    IDS,
    LINEARS,
    assert_same_model,
    compressed_tensors_config,
    layers,
    llama,
    llama_json,
    packed_llama,
    tensors_of,
    write_checkpoint,
)
from checkpoints_of_others import compress, load_theirs, rotate, save_rotated
from click.testing import CliRunner
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformLocation
from helpers import assert_same_bits, seeded
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from xpu_fp4 import Mode, reference
from xpu_fp4.checkpoints import (
    CheckpointError,
    MXFP4Experts,
    Scheme,
    open_checkpoint,
    plan_quantization,
    quantize_checkpoint,
)
from xpu_fp4.checkpoints.compressed_tensors import names_of, write_config
from xpu_fp4.cli import main
from xpu_fp4.functional import Hadamard

LARGE: dict[str, Any] = {"hidden": 128, "intermediate": 256}
SIZES: dict[Hadamard, dict[str, Any]] = {32: {}, 64: LARGE, 128: LARGE}
SCHEMES = [
    Scheme("w4a4", hadamard=32),
    Scheme("w4a8", hadamard=64),
    Scheme("w4a16", hadamard=128),
    Scheme("w4a4", "ceil", input_offset=True),
    Scheme("w4a8", group=32, hadamard=32, input_offset=True),
    Scheme("w4a16", hadamard=128, input_offset=True),
]


# ---- against compressed-tensors ----


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["w4a4", "w4a16"])
def test_a_layer_computes_what_compressed_tensors_does(tmp_path: Path, mode: Mode, size: Hadamard) -> None:
    save_rotated(tmp_path, llama(**SIZES[size]), mode, size=size)
    assert len([name for name in tensors_of(tmp_path) if name.endswith(".v_input.weight")]) == 1
    theirs, ours = load_theirs(tmp_path, IDS), xpu_fp4.load_model(tmp_path, dtype=torch.float32)
    generator = seeded(7)
    assert layers(ours).keys() == LINEARS.keys()
    for name, module in layers(ours).items():
        assert (module.mode, module.hadamard) == (mode, size)
        x = torch.randn(24, module.in_features, generator=generator) * 3 + 1
        with torch.inference_mode():
            torch.testing.assert_close(module(x), theirs.get_submodule(name)(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
def test_a_rotated_model_is_the_one_with_the_weights_turned_back(tmp_path: Path, size: Hadamard) -> None:
    original = llama(**SIZES[size])
    save_rotated(tmp_path, llama(**SIZES[size]), "w4a16", size=size)
    ours, turned_back = xpu_fp4.load_model(tmp_path, dtype=torch.float32), original.float()
    for name, module in layers(ours).items():
        linear = turned_back.get_submodule(name)
        before = linear.weight.detach().clone()
        linear.weight.data = reference.transform(reference.values(*checkpoint_weight(tmp_path, name)).float(), size)
        assert ((linear.weight - before).square().mean() / before.square().mean()).sqrt() < 0.15, "the rounding of MXFP4"
        torch.testing.assert_close(module.weight, linear.weight.detach(), rtol=1e-6, atol=1e-7)
    with torch.inference_mode():
        expected = turned_back(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(load_theirs(tmp_path, IDS)(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        for module in layers(ours).values():
            module.hadamard = 0
        without = ours(IDS).logits
    assert (without - expected).abs().max() > 0.5 * expected.abs().max(), "what skips transforms computes noise"


def checkpoint_weight(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    return open_checkpoint(folder).weight(name)


def test_every_way_into_a_model_has_the_transforms(tmp_path: Path) -> None:
    save_rotated(tmp_path, llama(), "w4a4")
    loaded = xpu_fp4.load_model(tmp_path)
    assert {module.hadamard for module in layers(loaded).values()} == {32}
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path, config=xpu_fp4.transformers_config(tmp_path)), loaded)
    assert_same_model(xpu_fp4.apply_checkpoint(llama(), tmp_path), loaded)
    with torch.inference_mode():
        in_w4a8 = xpu_fp4.load_model(tmp_path, mode="w4a8")
        assert {module.hadamard for module in layers(in_w4a8).values()} == {32}
        original = llama()(IDS).logits
        distance = (in_w4a8(IDS).logits - original).float().square().mean() / original.float().square().mean()
    assert distance < 0.1
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.output.count("w4a4 scale_mode even hadamard 32") == len(LINEARS)


def test_the_matrix_in_the_files_is_no_tensor_of_the_model(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, caplog: Any
) -> None:
    save_rotated(tmp_path, llama(), "w4a16")
    checkpoint = open_checkpoint(tmp_path)
    assert not [name for name in checkpoint.other_tensors() if "v_input" in name]
    recwarn.clear()
    xpu_fp4.apply_checkpoint(llama(), tmp_path)
    xpu_fp4.load_model(tmp_path)
    assert not [warning for warning in recwarn if "v_input" in str(warning.message)]
    assert "v_input" not in caplog.text


# ---- what we write ----


def write_packed(folder: Path, config: dict[str, Any], schemes: Callable[[str], Scheme], **changes: Any) -> Path:
    """A small Llama with random codes; offsets and their biases where the scheme has them."""
    generator = seeded(5)
    model = llama(**changes)
    linears = {name: model.get_submodule(name).weight.shape for name in LINEARS}
    tensors = {n: t.detach().clone() for n, t in model.state_dict().items() if n.removesuffix(".weight") not in linears}
    for name, (n, k) in linears.items():
        names = names_of(schemes(name))
        weight = torch.randn(n, k, generator=generator) * 0.05
        codes, scale = (t.view(torch.uint8) for t in xpu_fp4.quantize(weight))
        tensors |= {f"{name}.{names.packed}": codes, f"{name}.{names.scale}": scale}
        if schemes(name).input_offset:
            tensors[f"{name}.{names.input_offset}"] = torch.randn(k, generator=generator)
            tensors[f"{name}.{names.bias}"] = torch.randn(n, generator=generator).to(torch.bfloat16)
    return write_checkpoint(folder, tensors, llama_json(config, **changes))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_written_is_what_is_read(tmp_path: Path, scheme: Scheme) -> None:
    folder = write_packed(tmp_path, write_config(scheme, ["lm_head"]), lambda _: scheme, **LARGE)
    checkpoint, stored = open_checkpoint(folder), tensors_of(folder)
    assert {layer.scheme for layer in checkpoint.layers.values()} == {scheme}
    loaded = xpu_fp4.load_model(folder)
    names = names_of(scheme)
    for name, module in layers(loaded).items():
        state = module.state_dict()
        parts = {"weight_packed": names.packed, "weight_scale": names.scale}
        if scheme.input_offset:
            parts |= {"bias": names.bias, "input_offset": names.input_offset}
            assert state["input_offset"].dtype == torch.float32
        assert state.keys() == parts.keys()
        for part, suffix in parts.items():
            assert_same_bits(state[part], stored[f"{name}.{suffix}"])
        assert (module.mode, module.hadamard) == (scheme.mode, scheme.hadamard)
    assert_same_model(xpu_fp4.apply_checkpoint(llama(**LARGE), folder), loaded)
    again = LlamaForCausalLM.from_pretrained(folder, config=xpu_fp4.transformers_config(folder))
    assert_same_model(again, loaded)


EXCEPTIONS: dict[str, tuple[Scheme, Scheme]] = {
    "activations": (Scheme("w4a8", hadamard=32), Scheme("w4a16", hadamard=32)),
    "sizes": (Scheme("w4a8", hadamard=32), Scheme("w4a8", hadamard=64)),
    "no transform": (Scheme("w4a4", hadamard=64), Scheme("w4a4")),
    "transform": (Scheme("w4a16"), Scheme("w4a16", hadamard=64)),
    "groups": (Scheme("w4a8"), Scheme("w4a8", group=32)),
    "scale modes": (Scheme("w4a4", "ceil"), Scheme("w4a4")),
    "offset": (Scheme("w4a4", hadamard=32, input_offset=True), Scheme("w4a16", hadamard=32)),
    "all alike": (Scheme("w4a8", hadamard=32), Scheme("w4a8", hadamard=32)),
}


@pytest.mark.parametrize("case", EXCEPTIONS)
def test_layers_that_differ_are_written_and_read(tmp_path: Path, case: str) -> None:
    most, some = EXCEPTIONS[case]
    exceptions = {name: some for name in LINEARS if name.endswith(("q_proj", "k_proj", "v_proj"))}
    config = write_config(most, ["lm_head"], exceptions)
    folder = write_packed(tmp_path, config, lambda name: exceptions.get(name, most), **LARGE)
    assert {n: layer.scheme for n, layer in open_checkpoint(folder).layers.items()} == {
        n: exceptions.get(n, most) for n in LINEARS
    }
    assert xpu_fp4.load_model(folder)(IDS).logits.isfinite().all()
    if not most.input_offset:  # compressed-tensors reads it too
        QuantizationConfig.model_validate(config)
        theirs, ours = load_theirs(folder, IDS), xpu_fp4.load_model(folder, dtype=torch.float32, mode="w4a16")
        if {most.mode, some.mode} <= {"w4a8", "w4a16"}:  # which is W4A16 to others
            with torch.inference_mode():
                torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_experts_are_transformed_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    source = tmp_path / "source"
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(source)
    out = quantize_checkpoint(plan_quantization(source), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    x = torch.randn(5, 64, generator=seeded(4))
    for scheme in (Scheme("w4a8", hadamard=32), Scheme("w4a4")):
        config["quantization_config"] = write_config(scheme, ignore)
        (out / "config.json").write_text(json.dumps(config))
        (experts,) = (m for m in xpu_fp4.load_model(out).modules() if isinstance(m, MXFP4Experts))
        stored = [
            parameter.flatten(2) if name.endswith("blocks") else parameter for name, parameter in experts.named_parameters()
        ]
        ids, weights = torch.tensor([[0, 1]] * 5), torch.rand(5, 2, generator=seeded(5))
        assert_same_bits(experts(x, ids, weights), xpu_fp4.experts(x, ids, weights, *stored, **scheme.arguments_of_experts()))
    config["quantization_config"] = write_config(Scheme("w4a4", hadamard=64), ignore)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"head_dim is 64 for \S*experts.0.w2, whose K is 96"):
        open_checkpoint(out)


def test_one_scheme_is_written_as_before() -> None:
    config = write_config(Scheme("w4a8"), ["lm_head"], {"some.layer": Scheme("w4a8")})
    assert config == write_config(Scheme("w4a8"), ["lm_head"]) | {"config_groups": config["config_groups"]}
    assert config["xpu_fp4"] == {"activations": "mxint8", "group": 128}
    assert "transform_config" not in config


def test_others_end_at_a_layer_with_an_offset(tmp_path: Path) -> None:
    scheme = Scheme("w4a16", input_offset=True)
    folder = write_packed(tmp_path, write_config(scheme, ["lm_head"]), lambda _: scheme)
    with pytest.raises(Exception, match="xpu_fp4-input-offset"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert not any(name.endswith((".weight_packed", ".weight_scale", ".bias")) for name in tensors_of(folder))


def test_an_offset_and_its_bias_leave_the_product_what_it_was(tmp_path: Path) -> None:
    scheme = Scheme("w4a16", hadamard=32, input_offset=True)
    folder = write_packed(tmp_path, write_config(scheme, ["lm_head"]), lambda _: scheme)
    for name, module in layers(xpu_fp4.load_model(folder, dtype=torch.float32)).items():
        x = torch.randn(5, module.in_features, generator=seeded(9))
        w = reference.transform(reference.values(*checkpoint_weight(folder, name)).float(), 32)
        assert module.input_offset is not None
        assert module.bias is not None
        expected = (x - module.input_offset) @ w.t() + module.bias
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


# ---- what is refused ----


def transforms(*applied: Any, **changes: Any) -> dict[str, Any]:
    apply = list(applied) or [{"location": "input", "targets": ["Linear"], "ignore": ["lm_head"]}]
    scheme = {"type": "hadamard", "head_dim": 32, "apply": apply} | changes
    return compressed_tensors_config(transform_config={"config_groups": {"v": scheme}})


def at(location: str, **changes: Any) -> dict[str, Any]:
    return {"location": location, "targets": ["Linear"], "ignore": ["lm_head"]} | changes


V = "config.json: quantization_config.transform_config.config_groups.v"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "outputs": (transforms(at("input"), at("output")), rf"{V} applies a hadamard transform \(a rotation\) at every output of"),
    "keys of the cache": (transforms(at("k_cache", targets=["LlamaAttention"])), rf"{V} applies .* at every k_cache of"),
    "queries": (transforms(at("q_attn", targets=["LlamaAttention"])), rf"{V} applies .* at every q_attn of"),
    "random Hadamard": (transforms(type="random-hadamard"), rf"{V} applies a random-hadamard transform"),
    "random matrix": (transforms(type="random-matrix"), rf"{V} applies a random-matrix transform"),
    "whole width": (transforms(head_dim=None), rf"{V}.head_dim applies .* over the whole width instead of 32, 64 or 128"),
    "size 16": (transforms(head_dim=16), rf"{V}.head_dim applies .* in blocks of 16 instead"),
    "size 256": (transforms(head_dim=256), rf"{V}.head_dim applies .* in blocks of 256 instead"),
    "size -32": (transforms(head_dim=-32), rf"{V}.head_dim applies .* in blocks of -32 instead"),
    "size a text": (transforms(head_dim="32"), rf"{V}.head_dim is '32', expected an integer"),
    "size a boolean": (transforms(head_dim=True), rf"{V}.head_dim is True, expected an integer"),
    "K no multiple": (
        transforms(head_dim=64),
        r"groups.v.head_dim is 64 for model.layers.0.mlp.down_proj, whose K is 96, expected a multiple of it",
    ),
    "randomize": (transforms(randomize=True), rf"{V}.randomize applies .* whose matrix is permuted"),
    "unknown key": (transforms(flip=1), rf"{V} has the keys flip, expected apply, head_dim"),
    "unknown key of apply": (transforms(at("input", part="left")), rf"{V}.apply has the keys part, expected ignore, inverse"),
    "unknown key beside": (
        compressed_tensors_config(transform_config={"config_groups": {}, "R3": True}),
        "quantization_config.transform_config has the keys R3, expected config_groups",
    ),
    "twice": (
        compressed_tensors_config(
            transform_config={"config_groups": {name: transforms()["transform_config"]["config_groups"]["v"] for name in "uv"}}
        ),
        "several transforms at the input of model.layers.0.mlp.down_proj: u, v",
    ),
    "targets a number": (transforms(at("input", targets=3)), rf"{V}.apply\[0\].targets is 3, expected"),
    "ignore of numbers": (transforms(at("input", ignore=[3])), rf"{V}.apply\[0\].ignore\[0\] is 3, expected|apply\[0\].ignore"),
    "no regex": (transforms(at("input", targets=["re:("])), r"transform_config has the pattern '\(', which is no regex"),
    "a group that is none": (
        compressed_tensors_config(xpu_fp4={"groups": {"group_7": {}}}),
        "quantization_config.xpu_fp4.groups has group_7, which is not in config_groups",
    ),
    "an unknown key of a group": (
        compressed_tensors_config(xpu_fp4={"groups": {"group_0": {"rotation": 3}}}),
        "quantization_config.xpu_fp4.groups.group_0 has the keys rotation, expected",
    ),
    "an offset that is a text": (compressed_tensors_config(xpu_fp4={"input_offset": "yes"}), "xpu_fp4.input_offset is 'yes'"),
    "an offset in others' format": (
        compressed_tensors_config(xpu_fp4={"input_offset": True}),
        "config_groups.group_0 has the format 'mxfp4-pack-quantized', expected 'xpu_fp4-input-offset'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_refused_by_name(tmp_path: Path, case: str) -> None:
    config, message = REFUSED[case]
    folder = write_checkpoint(tmp_path, packed_llama("weight_packed", "weight_scale"), llama_json(config))
    ways: list[Callable[[], object]] = [
        lambda: open_checkpoint(folder),
        lambda: xpu_fp4.load_model(folder),
        lambda: xpu_fp4.apply_checkpoint(llama(), folder),
        lambda: xpu_fp4.transformers_config(folder),
    ]
    for way in ways:
        with pytest.raises(CheckpointError, match=message):
            way()


def test_a_refusal_is_one_line_of_every_command(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("w1 w2")
    compress(rotate(llama(), TransformLocation.INPUT, TransformLocation.OUTPUT), "w4a4", tmp_path)
    message = (
        f"{tmp_path}/{V} applies a hadamard transform (a rotation) at every output of ['Linear'], which xpu_fp4 cannot do, and "
        "the model would compute noise without it: use a checkpoint without it, for example one that `xpu-fp4 quantize` makes "
        "from the original model"
    )
    for command in (["inspect"], ["eval", "--text", str(text)], ["generate", "--prompt", "w1"]):
        result = CliRunner().invoke(main, [*command, str(tmp_path)])
        assert (result.exit_code, result.output) == (1, f"Error: {message}\n")


@pytest.mark.parametrize(
    ("apply", "module"),
    [
        (at("input", ignore=[]), "lm_head"),
        (at("input", targets=["Linear", "re:.*embed_tokens"]), "model.embed_tokens"),
        (at("input", targets=["LlamaMLP", "Linear"]), "model.layers.0.mlp"),
    ],
)
def test_a_transform_of_what_is_not_quantized_is_refused(tmp_path: Path, apply: dict[str, Any], module: str) -> None:
    folder = write_checkpoint(tmp_path, packed_llama("weight_packed", "weight_scale"), llama_json(transforms(apply)))
    for load in (xpu_fp4.load_model, lambda folder: xpu_fp4.apply_checkpoint(llama(), folder)):
        with pytest.raises(CheckpointError, match=rf"{V} applies a Hadamard transform at the input of {module}, which is not"):
            load(folder)


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "another": lambda h: h[torch.randperm(32, generator=seeded(1))].contiguous(),
    "negative": lambda h: -h,
    "zero": torch.zeros_like,
    "NaN": lambda h: h * torch.nan,
    "size": lambda h: h[:16, :16].contiguous(),
    "shape": lambda h: h.flatten(),
}


@pytest.mark.parametrize("case", MATRICES)
def test_another_matrix_is_refused(tmp_path: Path, case: str) -> None:
    save_rotated(tmp_path, llama(), "w4a4")
    tensors = tensors_of(tmp_path)
    (name,) = (name for name in tensors if "v_input" in name)
    config = json.loads((tmp_path / "config.json").read_text())
    for factor in (1, 32**-0.5):  # with the root's factor, or without
        assert open_checkpoint(write_checkpoint(tmp_path, tensors | {name: tensors[name] * factor}, config))
    folder = write_checkpoint(tmp_path, tensors | {name: MATRICES[case](tensors[name])}, config)
    with pytest.raises(CheckpointError, match=rf"tensor {re.escape(name)} is not Sylvester's Hadamard matrix \[32, 32\]"):
        open_checkpoint(folder)


OFFSETS: dict[str, tuple[str, Tensor | None, str]] = {
    "missing": ("input_offset", None, "has no tensor model.layers.0.self_attn.q_proj.input_offset"),
    "without a bias": ("offset_bias", None, "has no tensor model.layers.0.self_attn.q_proj.offset_bias"),
    "dtype": (
        "input_offset",
        torch.zeros(64, dtype=torch.bfloat16),
        r"q_proj.input_offset is BF16 \[64\], expected F32 \[64\]",
    ),
    "shape": ("input_offset", torch.zeros(1), r"q_proj.input_offset is F32 \[1\], expected F32 \[64\]"),
}


@pytest.mark.parametrize("case", OFFSETS)
def test_an_offset_that_does_not_fit_is_named(tmp_path: Path, case: str) -> None:
    part, tensor, message = OFFSETS[case]
    scheme = Scheme("w4a16", input_offset=True)
    folder = write_packed(tmp_path, write_config(scheme, ["lm_head"]), lambda _: scheme)
    tensors = tensors_of(folder)
    changed = tensors.pop(f"model.layers.0.self_attn.q_proj.{part}")
    if tensor is not None:
        tensors[f"model.layers.0.self_attn.q_proj.{part}"] = tensor
    assert changed is not None
    write_checkpoint(folder, tensors, json.loads((folder / "config.json").read_text()))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("has_offset", [False, True])
def test_names_of_the_other_kind_are_refused(tmp_path: Path, has_offset: bool) -> None:
    said, named = Scheme("w4a16", input_offset=has_offset), Scheme("w4a16", input_offset=not has_offset)
    folder = write_packed(tmp_path, write_config(said, ["lm_head"]), lambda _: named)
    which = "an" if has_offset else "no"
    with pytest.raises(CheckpointError, match=rf"is packed, but quantization_config.xpu_fp4 gives \S* {which} input_offset"):
        open_checkpoint(folder)


def test_a_transform_of_weights_alone_loads(tmp_path: Path) -> None:
    model = rotate(llama(), TransformLocation.WEIGHT_INPUT)
    theirs = compress(model, "w4a16", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["transform_config"]["config_groups"]
    for name, module in layers(xpu_fp4.load_model(tmp_path)).items():
        assert module.hadamard == 0
        assert_same_bits(module.dequantized_weight(torch.bfloat16), theirs[name])
