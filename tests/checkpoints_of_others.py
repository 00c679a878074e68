# SPDX-License-Identifier: Apache-2.0
"""Model directories that compressed-tensors makes, and what it computes of them."""

from pathlib import Path
from typing import Any

import torch
from checkpoint_files import tensors_of
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.transform import (
    TransformArgs,
    TransformConfig,
    TransformLocation,
    TransformScheme,
    apply_transform_config,
)
from torch import nn
from transformers import AutoModelForCausalLM
from xpu_fp4.checkpoints.untrusted import read_json

COMPRESSOR = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
PRESETS = {"w4a4": "MXFP4", "w4a16": "MXFP4A16"}


def compress(model: Any, mode: str, folder: Path) -> dict[str, torch.Tensor]:
    """Lets compressed-tensors quantize and save a model; returns its own dequantized weights."""
    scheme = QuantizationScheme(targets=["Linear"], format="mxfp4-pack-quantized", **PRESET_SCHEMES[PRESETS[mode]])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="mxfp4-pack-quantized")
    apply_quantization_config(model, config)
    quantized = {name: m for name, m in model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    for module in quantized.values():
        groups = module.weight.data.unflatten(-1, (-1, 32))
        scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    stored = tensors_of(folder)
    parts = ("weight_packed", "weight_scale")
    return {name: COMPRESSOR.decompress({p: stored[f"{name}.{p}"] for p in parts}, scheme)["weight"] for name in quantized}


def rotate(model: Any, *locations: TransformLocation, name: str = "v", size: int = 32) -> Any:
    """Has compressed-tensors transform the linear layers by a Hadamard matrix in blocks of size at the locations."""
    apply = [
        TransformArgs(targets=["Linear"], ignore=["lm_head"], location=location, inverse=location.value.startswith("weight"))
        for location in locations
    ]
    scheme = TransformScheme(type="hadamard", head_dim=size, apply=apply)
    apply_transform_config(model, TransformConfig(config_groups={name: scheme}))
    return model


def save_rotated(folder: Path, model: Any, mode: str, *, size: int = 32) -> Path:
    """The model, its linear layers' inputs transformed and its weights transformed and quantized, by compressed-tensors."""
    compress(rotate(model, TransformLocation.INPUT, TransformLocation.WEIGHT_INPUT, size=size), mode, folder)
    return folder


def load_theirs(folder: Path, ids: torch.Tensor) -> Any:
    """Returns what compressed-tensors computes of a directory, float32: Transformers decompresses and leaves out transforms."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(ids)  # decompresses
    nn.Module.float(model)  # not Transformers' own, which refuses
    config = read_json(folder / "config.json")["quantization_config"].get("transform_config")
    if config:
        transforms = TransformConfig.model_validate(config)
        for scheme in transforms.config_groups.values():
            scheme.apply = [apply for apply in scheme.apply if apply.is_online()]  # the others are in the weights
        apply_transform_config(model, transforms)
    return model
