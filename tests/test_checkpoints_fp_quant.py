# SPDX-License-Identifier: Apache-2.0
"""FP-Quant's checkpoints compute what FP-Quant computes, and what cannot be computed is refused by name."""

from pathlib import Path
from typing import Any

import fp_quant_of_others as fp_quant
import pytest
import torch
import xpu_fp4
from checkpoint_files import IDS, LINEARS, assert_same_model, layers, llama, llama_json, write_checkpoint
from click.testing import CliRunner
from helpers import assert_same_bits, seeded
from torch import Tensor
from transformers import AutoModelForCausalLM
from xpu_fp4 import Mode, reference
from xpu_fp4.checkpoints import CheckpointError, Scheme, open_checkpoint
from xpu_fp4.checkpoints.compressed_tensors import write_config
from xpu_fp4.cli import main

LARGE: dict[str, Any] = {"hidden": 128, "intermediate": 256}
METHODS = ("abs_max", "quest")
SIZES = (0, 32, 64, 128)
methods, sizes = pytest.mark.parametrize("method", METHODS), pytest.mark.parametrize("size", SIZES)


def save(folder: Path, method: str = "abs_max", size: int = 32, **changes: Any) -> Path:
    """The small Llama's, with changes of its tensors: None takes one away."""
    model, turn = llama(**LARGE), fp_quant.matrix(size)
    tensors: dict[str, Any] = fp_quant.tensors(model, LINEARS, turn, method) | changes.pop("tensors", {})
    config = llama_json(fp_quant.config(method, size, **changes), **LARGE)
    return write_checkpoint(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None}, config)


@methods
@sizes
def test_a_layer_computes_what_fp_quant_does(tmp_path: Path, method: str, size: int) -> None:
    original, ours = llama(**LARGE), xpu_fp4.load_model(save(tmp_path, method, size), dtype=torch.float32)
    generator = seeded(7)
    assert layers(ours).keys() == LINEARS.keys()
    for name, module in layers(ours).items():
        assert (module.mode, module.scale_mode, module.hadamard) == ("w4a4", method, size)
        x = torch.randn(24, module.in_features, generator=generator).bfloat16() * 3 + 1
        want = fp_quant.linear(x, original.get_submodule(name).weight, fp_quant.matrix(size), method).float()
        with torch.inference_mode():
            y = module(x.float())
        if size in (0, 64):  # whose matrices bfloat16 holds
            torch.testing.assert_close(y, want, rtol=2e-5, atol=2e-5)
        else:  # elements next to a tie, a few of thousands, are rounded to its other side
            assert (y - want).norm() < 0.03 * want.norm()


@methods
@sizes
def test_a_model_computes_what_fp_quant_does(tmp_path: Path, method: str, size: int) -> None:
    original = llama(dtype=torch.float32, **LARGE)
    original.load_state_dict(llama(**LARGE).state_dict())
    ours = xpu_fp4.load_model(save(tmp_path, method, size), dtype=torch.float32)
    fp_quant.emulate(original, LINEARS, fp_quant.matrix(size), fp_quant.matrix(size), method)
    with torch.inference_mode():
        expected, found = original(IDS).logits, ours(IDS).logits
        assert (found - expected).norm() < 0.1 * expected.norm()
        for module in layers(ours).values():
            module.weight_global_scale *= 3
        assert (ours(IDS).logits - expected).norm() > 0.5 * expected.norm(), "what skips the factor computes noise"


@methods
@pytest.mark.parametrize("size", [0, 128])
def test_every_way_into_a_model_is_the_same(tmp_path: Path, method: str, size: int) -> None:
    save(tmp_path, method, size)
    loaded = xpu_fp4.load_model(tmp_path)
    assert {str(layer.scheme) for layer in open_checkpoint(tmp_path).layers.values()} == {
        " ".join(["w4a4 scale_mode", method, *([f"hadamard {size}"] if size else [])])
    }
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path, config=xpu_fp4.transformers_config(tmp_path)), loaded)
    assert_same_model(xpu_fp4.apply_checkpoint(llama(**LARGE), tmp_path), loaded)


@methods
@pytest.mark.parametrize("mode", ["w4a8", "w4a16"])
def test_other_modes_have_the_same_weights(tmp_path: Path, method: str, mode: Mode) -> None:
    original, ours = llama(**LARGE), xpu_fp4.load_model(save(tmp_path, method), mode=mode, dtype=torch.float32)
    for name, module in layers(ours).items():
        weight = original.get_submodule(name).weight.float()
        assert (module.weight - weight).norm() < 0.2 * weight.norm()
        codes, scale = fp_quant.quantize(weight, fp_quant.matrix(32), method)
        values = (fp_quant.values(codes, scale) / fp_quant.TIMES[method]).float()
        torch.testing.assert_close(module.weight + 0, reference.transform(values, 32), rtol=1e-5, atol=1e-6)
        x = torch.randn(5, module.in_features, generator=seeded(8))
        with torch.inference_mode():
            y = module(x)
        assert (y - x @ module.weight.t()).norm() < 0.02 * y.norm()


def test_files_without_matrices_are_what_the_config_says(tmp_path: Path) -> None:
    without = {f"{name}.{which}_hadamard_matrix": None for name in LINEARS for which in ("forward", "backward")}
    for size in (0, 64):
        whole, bare = save(tmp_path / f"{size}", size=size), save(tmp_path / f"{size} bare", size=size, tensors=without)
        assert_same_model(xpu_fp4.load_model(bare), xpu_fp4.load_model(whole))


@sizes
def test_a_config_without_transform_init_leaves_it_to_the_matrices(tmp_path: Path, size: int) -> None:
    save(tmp_path, size=size, transform_init=None)
    assert {layer.scheme.hadamard for layer in open_checkpoint(tmp_path).layers.values()} == {size}


def test_transformers_defaults(tmp_path: Path) -> None:
    config = {"quant_method": "fp_quant", "forward_dtype": "mxfp4"}
    tensors = fp_quant.tensors(llama(**LARGE), LINEARS, fp_quant.matrix(32), "abs_max")
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, llama_json(config, **LARGE)))
    assert {layer.scheme for layer in checkpoint.layers.values()} == {
        Scheme("w4a4", "abs_max", hadamard=32, weight_global_scale=3.0)
    }
    assert set(checkpoint.other_tensors()) == {name for name in tensors if name.rpartition(".")[0] not in LINEARS}


def test_inspect_names_the_rule(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(save(tmp_path, "quest", 64))], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert result.output.count("w4a4 scale_mode quest hadamard 64") == len(LINEARS)


def test_a_bias_comes_after_the_factor(tmp_path: Path) -> None:
    name = next(iter(LINEARS))
    model = llama(**LARGE)
    linear = model.get_submodule(name)
    linear.bias = torch.nn.Parameter(torch.linspace(-1, 1, linear.out_features).bfloat16())
    turn = fp_quant.matrix(64)
    tensors = fp_quant.tensors(model, LINEARS, turn, "abs_max")
    write_checkpoint(tmp_path, tensors, llama_json(fp_quant.config("abs_max", 64), **LARGE))
    loaded = xpu_fp4.apply_checkpoint(model, tmp_path).get_submodule(name)
    x = torch.randn(6, linear.in_features, generator=seeded(9)).bfloat16()
    want = fp_quant.linear(x, linear.weight, turn, "abs_max").float() + linear.bias.float()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x.float()), want, rtol=2e-5, atol=2e-5)


# ---- what is refused ----

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "nvfp4": ({"forward_dtype": "nvfp4"}, "quantization_config.forward_dtype is 'nvfp4', expected 'mxfp4'"),
    "gsr": ({"transform_init": "gsr"}, "quantization_config.transform_init 'gsr' turns the inputs of layers by another matrix"),
    "another method": ({"forward_method": "mse"}, "forward_method is 'mse', expected one of abs_max, quest"),
    "another size": ({"hadamard_group_size": 16}, "hadamard_group_size is 16, expected 32, 64 or 128"),
    "no size": ({"hadamard_group_size": 0}, "hadamard_group_size is 0, expected 32, 64 or 128"),
    "pseudo": ({"pseudoquantization": True}, "pseudoquantization is True: weights are stored dequantized"),
    "master": ({"store_master_weights": True}, "store_master_weights is True: weights are stored unquantized"),
    "kept": ({"modules_to_not_convert": ["lm_head", "k_proj"]}, "k_proj.qweight is packed, but .*modules_to_not_convert lists"),
    "identity and turned": ({"transform_init": "identity"}, "forward_hadamard_matrix .* is not the matrix that its"),
    "the wrong type": ({"hadamard_group_size": "32"}, "hadamard_group_size"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_computes_something_else_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(save(tmp_path, **changes))


def test_missing_dtype_is_transformers_default(tmp_path: Path) -> None:
    config = {"quant_method": "fp_quant"}
    with pytest.raises(CheckpointError, match="forward_dtype is 'nvfp4', expected 'mxfp4'"):
        open_checkpoint(write_checkpoint(tmp_path, {"x": torch.zeros(1)}, llama_json(config)))


FIRST = next(iter(LINEARS))
TENSORS: dict[str, tuple[str, Tensor | None, str]] = {
    "no scale of weights": ("weight_global_scale", None, "has no tensor .*weight_global_scale"),
    "no scale of inputs": ("act_global_scale", None, "has no tensor .*act_global_scale"),
    "another scale": (
        "act_global_scale",
        torch.tensor([10.0]),
        r"act_global_scale is \[10.0\], expected \[3\], as abs_max has it",
    ),
    "several scales": ("weight_global_scale", torch.full((2,), 3.0), r"weight_global_scale is \[3.0, 3.0\], expected \[3\]"),
    "gsr": ("forward_hadamard_matrix", fp_quant.sequency_ordered(32), "is not the matrix that its transform_init asks for"),
    "a matrix of another size": ("forward_hadamard_matrix", fp_quant.matrix(64), r"\[64, 64\] is not .* \[32, 32\]"),
    "a vector": ("forward_hadamard_matrix", torch.ones(32), r"\[32\] is not .* \[32, 32\]"),
    "no scales": ("scales", None, "has no tensor .*scales"),
    "scales of padded rows": ("scales", torch.zeros(256, 4, dtype=torch.uint8), r"expected \[128, 4\] beside"),
}


@pytest.mark.parametrize(("name", "tensor", "message"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_is_another_is_named(tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(save(tmp_path, tensors={f"{FIRST}.{name}": tensor}))


def test_trained_matrices_are_named_where_the_config_says_nothing(tmp_path: Path) -> None:
    tensors = {f"{FIRST}.forward_hadamard_matrix": fp_quant.sequency_ordered(32)}
    with pytest.raises(CheckpointError, match="is not Sylvester's Hadamard matrix or the identity"):
        open_checkpoint(save(tmp_path, transform_init=None, tensors=tensors))


def test_a_k_that_is_no_multiple_is_named(tmp_path: Path) -> None:
    tensors = {
        name: t
        for name, t in fp_quant.tensors(llama(), LINEARS, torch.eye(32).bfloat16(), "abs_max").items()
        if "matrix" not in name
    }
    with pytest.raises(CheckpointError, match=r"is of K = .*, expected a multiple of hadamard_group_size, 128"):
        open_checkpoint(write_checkpoint(tmp_path, tensors, llama_json(fp_quant.config("abs_max", 128))))


@pytest.mark.parametrize("scale_mode", METHODS)
def test_other_formats_are_not_written_with_its_rules(scale_mode: xpu_fp4.ScaleMode) -> None:
    with pytest.raises(CheckpointError, match="expected one of floor, ceil, even, rceil"):
        write_config(Scheme("w4a4", scale_mode), [])
    with pytest.raises(ValueError, match="calibrate_ has the scale mode"):
        xpu_fp4.calibrate_(llama(), [IDS], mode="w4a4", scale_mode=scale_mode)


def test_the_fixture_is_told_apart(tmp_path: Path) -> None:
    # abs_max and quest differ, and so do sizes, by more than the tolerances above.
    x, weight = torch.randn(16, 128, generator=seeded(1)), torch.randn(32, 128, generator=seeded(2))
    found = [fp_quant.linear(x, weight, fp_quant.matrix(size), method) for method in METHODS for size in SIZES]
    assert all((a - b).norm() > 0.02 * a.norm() for i, a in enumerate(found) for b in found[:i])
    assert_same_bits(fp_quant.matrix(64) @ fp_quant.matrix(64), torch.eye(64).bfloat16())
