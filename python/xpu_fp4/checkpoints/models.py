# SPDX-License-Identifier: Apache-2.0
"""Puts a checkpoint into a model: MXFP4Linear in place of nn.Linear, its weights as they are in the files."""

import importlib
import warnings
from collections.abc import Callable, Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..modules import MXFP4Linear
from .description import Checkpoint, Layer
from .errors import CheckpointError
from .experts import DOWN, GATE_UP, MXFP4Experts
from .reader import CONFIG, open_checkpoint
from .tensor_files import read_json

Model = TypeVar("Model", bound=nn.Module)


def load_model(folder: str | PathLike[str], **kwargs: Any) -> Any:
    """A Transformers model out of an MXFP4 model directory, its quantized layers as MXFP4Linear.

    The class is the one that config.json names; weights are never there in high precision. Keyword arguments go to
    Transformers' `from_pretrained` (dtype, device_map, attn_implementation, ...).

    Raises:
        CheckpointError: the directory is damaged, not MXFP4, or does not fit the model.
        ImportError: transformers is missing.
    """
    folder = Path(folder)
    open_checkpoint(folder)  # before Transformers builds anything
    load = model_class(folder).from_pretrained
    model, info = load(folder, config=transformers_config(folder), output_loading_info=True, **kwargs)
    # Transformers would go on with random numbers.
    if absent := [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]:
        raise CheckpointError(f"{folder} has no tensors, or of another shape, for {_some(absent)}")
    return model


def transformers_config(folder: str | PathLike[str]) -> Any:
    """The model's configuration, naming us as its quantizer: `AutoModelForCausalLM.from_pretrained(folder, config=...)`.

    Registers our quantizer with Transformers. Needed because a checkpoint names the quantizer that wrote it, and Transformers
    lets nobody else register under that name.
    """
    from .transformers_quantizer import METHOD

    config = require_transformers().AutoConfig.from_pretrained(folder)
    text_config = config.get_text_config()
    if text_config is not config and hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    config.quantization_config = {"quant_method": METHOD}
    return config


def apply_checkpoint(model: Model, folder: str | PathLike[str]) -> Model:
    """Loads an MXFP4 model directory into a model, in place, and returns the model.

    Each nn.Linear (and Transformers' experts module) that the checkpoint quantizes is replaced; all other tensors are loaded
    too. Parameters on the meta device get the checkpoint's memory and keep their dtype, so a model built under
    `torch.device("meta")` costs what the checkpoint holds; others are copied into.

    Raises:
        CheckpointError: a quantized layer that the model does not have as an nn.Linear of that shape, a tensor of another
            shape, or a parameter of the model that the checkpoint lacks.

    Tensors that the model has no place for are named in a warning.
    """
    checkpoint = open_checkpoint(folder)
    names = replace_layers(model, checkpoint)
    for name in checkpoint.layers:
        _load_layer(model, checkpoint, name, names[name])
    left_over = _load_others(model, checkpoint)
    if hasattr(model, "tie_weights"):
        cast(Callable[[], None], model.tie_weights)()
    missing = [name for name, tensor in _state(model).items() if tensor.is_meta]
    if missing:
        raise CheckpointError(
            f"{checkpoint.folder} has no tensors for {_some(missing)}, which the model left on the meta device"
        )
    if left_over:
        warnings.warn(f"{checkpoint.folder}: the model has no place for {_some(left_over)}", stacklevel=2)
    return model


def replace_layers(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Puts MXFP4 modules, on the meta device, where the checkpoint has quantized layers; returns their names in the model.

    Nothing is replaced if any layer does not fit.
    """
    names = {name: _name_in_model(model, checkpoint, name) for name in checkpoint.layers}
    for name, layer in checkpoint.layers.items():
        _check_fits(model, names[name], layer, checkpoint)
    for name, layer in checkpoint.layers.items():
        owner, _, attribute = names[name].rpartition(".")
        if len(layer.shape) == 2:
            setattr(model.get_submodule(owner), attribute, _empty_linear(model.get_submodule(names[name]), layer))
        elif attribute == GATE_UP:
            down = checkpoint.layers[name.removesuffix(GATE_UP) + DOWN]
            source = model.get_submodule(owner)
            dtype = source.get_parameter(GATE_UP).dtype
            experts = MXFP4Experts(source, layer, down, device="meta", dtype=dtype).train(source.training)
            parent, _, last = owner.rpartition(".")
            setattr(model.get_submodule(parent), last, experts)
    return names


def skeleton(folder: Path) -> nn.Module:
    """The model that config.json describes, on the meta device."""
    config = require_transformers().AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model: nn.Module = model_class(folder)(config)
    return model


def model_class(folder: Path) -> Any:
    """The class that config.json's `architectures` names."""
    names = read_json(folder / CONFIG).get("architectures")
    if not names:
        raise CheckpointError(f"{folder / CONFIG} names no architectures")
    found = getattr(require_transformers(), names[0], None)
    if found is None:
        raise CheckpointError(f"{folder / CONFIG} names the architecture {names[0]}, which this version of transformers lacks")
    return found


def require_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"transformers is needed for this: pip install 'xpu_fp4[transformers]' ({error})") from error


def _empty_linear(linear: nn.Module, layer: Layer) -> MXFP4Linear:
    assert isinstance(linear, nn.Linear)
    return MXFP4Linear(
        layer.in_features,
        layer.out_features,
        linear.bias is not None,
        mode=layer.scheme.mode,
        scale_mode=layer.scheme.scale_mode,
        device="meta",
        dtype=linear.weight.dtype,
    ).train(linear.training)


def _name_in_model(model: nn.Module, checkpoint: Checkpoint, name: str) -> str:
    """A checkpoint may have been saved from the base model, or from a model around it: then its names differ by a prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    candidates = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
    is_expert = len(checkpoint.layers[name].shape) == 3
    for candidate in candidates:
        if _has(model, candidate.rpartition(".")[0] if is_expert else candidate):
            return candidate
    raise CheckpointError(f"{checkpoint.folder} quantizes {name}, but {type(model).__name__} has no module of that name")


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _check_fits(model: nn.Module, name: str, layer: Layer, checkpoint: Checkpoint) -> None:
    where = f"{checkpoint.files[layer.packed]}"
    if len(layer.shape) == 3:
        _check_experts_fit(model, name, layer, checkpoint)
        return
    module = model.get_submodule(name)
    if type(module) is not nn.Linear:
        raise CheckpointError(f"{where} is quantized, but the model's {name} is a {type(module).__name__}, expected nn.Linear")
    if layer.shape != tuple(module.weight.shape):
        raise CheckpointError(
            f"{where} is for a weight {list(layer.shape)}, but the model's {name} is {list(module.weight.shape)}"
        )
    if (layer.bias is None) != (module.bias is None):
        has, lacks = ("model", "checkpoint") if layer.bias is None else ("checkpoint", "model")
        raise CheckpointError(f"{where}: the {has} has a bias for {name}, the {lacks} has none")


def _check_experts_fit(model: nn.Module, name: str, layer: Layer, checkpoint: Checkpoint) -> None:
    where = f"{checkpoint.files[layer.packed]}"
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = getattr(module, attribute, None)
    if attribute not in (GATE_UP, DOWN) or not hasattr(module, "_apply_gate") or not isinstance(weight, Tensor):
        raise CheckpointError(
            f"{where} is for experts, but the model's {owner} is a {type(module).__name__} without {attribute}"
        )
    shape = weight.transpose(1, 2).shape if getattr(module, "is_transposed", False) else weight.shape
    if layer.shape != tuple(shape):
        raise CheckpointError(f"{where} is for weights {list(layer.shape)}, but the model's {name} are {list(shape)}")
    other = layer.name.removesuffix(attribute) + (DOWN if attribute == GATE_UP else GATE_UP)
    if other not in checkpoint.layers:
        raise CheckpointError(f"{where} is quantized, but {other} is not: expected both")


def _load_layer(model: nn.Module, checkpoint: Checkpoint, name: str, name_in_model: str) -> None:
    layer = checkpoint.layers[name]
    packed, scale = checkpoint.weight(name)
    bias = checkpoint.bias(name)
    if len(layer.shape) == 2:
        target, parts = model.get_submodule(name_in_model), ("weight_packed", "weight_scale", "bias")
    else:
        owner, _, attribute = name_in_model.rpartition(".")
        target, parts = model.get_submodule(owner), (f"{attribute}_blocks", f"{attribute}_scales", f"{attribute}_bias")
    for part, tensor in zip(parts, (packed, scale, bias), strict=True):
        if tensor is not None:
            _put(target, part, tensor.view(target.get_parameter(part).shape))


def _load_others(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Loads what is not quantized; returns the names that the model has no place for."""
    state = _state(model)
    prefix = getattr(model, "base_model_prefix", "")
    left_over = []
    for name in checkpoint.other_tensors():
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        found = next((candidate for candidate in candidates if candidate in state), None)
        if found is None:
            left_over.append(name)
            continue
        info = checkpoint.files[name]
        if info.shape != tuple(state[found].shape):
            raise CheckpointError(
                f"{info} has shape {list(info.shape)}, but the model's {found} has {list(state[found].shape)}"
            )
        owner, _, attribute = found.rpartition(".")
        _put(model.get_submodule(owner), attribute, checkpoint.files.tensor(name))
    return left_over


def _state(model: nn.Module) -> Mapping[str, Tensor]:
    """Parameters and buffers, the ones that are not saved too."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.data for name, tensor in named}


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Sets a parameter or buffer. Memory of its own, not the file's: a file may be written to or truncated later."""
    target = getattr(module, name)
    if not target.is_meta:
        with torch.no_grad():
            target.copy_(value)
        return
    value = value.to(target.dtype, copy=True)
    if name in module._buffers:
        module._buffers[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=target.requires_grad and value.is_floating_point())
