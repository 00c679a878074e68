# SPDX-License-Identifier: Apache-2.0
"""Puts a checkpoint into a model: MXFP4Linear in place of nn.Linear, its weights as they are in the files."""

import importlib
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .._text import shorten
from ..functional import Mode
from .description import Checkpoint
from .errors import CheckpointError, printable
from .placement import Place, find_tensors, replace_layers, state_of
from .reader import CONFIG, open_checkpoint, read_config
from .tensor_files import TensorFiles, check_metadata

# Left out, Transformers asks on standard input whether to run a directory's code.
_NO_CODE = {"trust_remote_code": False}
_NO_PICKLE = {"use_safetensors": True}

Model = TypeVar("Model", bound=nn.Module)

# The versions of Transformers that `make test-transformers` ran with, as the extra in pyproject.toml has them. 5.8 is the first
# that lets a quantizer say how the weights of single experts are stacked.
OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS = (5, 8), (5, 24)


def load_model(folder: str | PathLike[str], *, mode: Mode | None = None, **kwargs: Any) -> Any:
    """A Transformers model out of an MXFP4 model directory, its quantized layers as MXFP4Linear.

    The class is the one that config.json names; weights are never there in high precision. Every layer computes in `mode`, by
    default in the one that the checkpoint has for it. Other keyword arguments go to Transformers' `from_pretrained` (dtype,
    device_map, attn_implementation, ...).

    Raises:
        ValueError: there is no such mode; trust_remote_code is set, since code in a directory is never run.
        CheckpointError: the directory is damaged, not MXFP4, or does not fit the model.
        ImportError: transformers is missing, or of a version that is not tested.
    """
    folder = Path(folder)
    if kwargs.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code is True, expected False: code in a model directory is never run")
    config = transformers_config(folder, mode=mode)
    check_metadata(folder)
    skeleton(folder)  # whatever config.json makes Transformers raise is its fault, and not the arguments'
    options = {**kwargs, **_NO_CODE, **_NO_PICKLE}
    model, info = model_class(folder).from_pretrained(folder, config=config, output_loading_info=True, **options)
    _check_complete(folder, info)
    return model


def transformers_config(folder: str | PathLike[str], *, mode: Mode | None = None) -> Any:
    """The model's configuration, naming us as its quantizer: `AutoModelForCausalLM.from_pretrained(folder, config=...)`.

    Registers our quantizer with Transformers. Needed because a checkpoint names the quantizer that wrote it, and Transformers
    lets nobody else register under that name. mode: as for load_model.

    Raises:
        ValueError, CheckpointError, ImportError: as load_model does, before Transformers builds anything.
    """
    folder = Path(folder)
    open_checkpoint(folder).in_mode(mode)
    auto_config = require_transformers().AutoConfig
    from .transformers_quantizer import METHOD

    with _of_directory(folder):
        config = auto_config.from_pretrained(folder, **_NO_CODE)
    text_config = config.get_text_config()
    if text_config is not config and hasattr(text_config, "quantization_config"):
        del text_config.quantization_config
    config.quantization_config = {"quant_method": METHOD, "mode": mode}
    return config


def apply_checkpoint(model: Model, folder: str | PathLike[str], *, mode: Mode | None = None) -> Model:
    """Loads an MXFP4 model directory into a model, in place, and returns the model.

    Each nn.Linear (and Transformers' experts module) that the checkpoint quantizes is replaced; all other tensors are loaded
    too. Parameters on the meta device get the checkpoint's memory and keep their dtype, so a model built under
    `torch.device("meta")` costs what the checkpoint holds; others are copied into. mode: as for load_model.

    Raises:
        ValueError: there is no such mode.
        CheckpointError: a quantized layer that the model does not have as an nn.Linear of that shape, a tensor of another
            shape, or a parameter of the model that the checkpoint lacks.

    Tensors that the model has no place for are named in a warning.
    """
    checkpoint = open_checkpoint(folder).in_mode(mode)
    places = replace_layers(model, checkpoint)
    for name, place in places.items():
        _load_layer(model, checkpoint, name, place)
    loaded, left_over = _load_others(model, checkpoint)
    left_over += [layer.packed for name, layer in checkpoint.layers.items() if name not in places]
    if hasattr(model, "tie_weights"):
        cast(Callable[[], None], model.tie_weights)()
    for module in {place.module for place in places.values()}:
        loaded |= {f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()}
    if missing := _missing(model, loaded):
        raise CheckpointError(f"{checkpoint.folder} has no tensors for {shorten(missing)}")
    if left_over:
        warnings.warn(printable(f"{checkpoint.folder}: the model has no place for {shorten(left_over)}"), stacklevel=2)
    return model


def skeleton(folder: Path) -> nn.Module:
    """The model that config.json describes, on the meta device."""
    auto_config, made = require_transformers().AutoConfig, model_class(folder)
    with _of_directory(folder), torch.device("meta"):
        model: nn.Module = made(auto_config.from_pretrained(folder, **_NO_CODE))
    return model


@contextmanager
def _of_directory(folder: Path) -> Iterator[None]:
    """Whatever Transformers raises over a config.json, which it checks in part, becomes a CheckpointError."""
    try:
        yield
    except (CheckpointError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(f"{folder / CONFIG}: transformers refuses it: {type(error).__name__}: {error}") from error


def load_original(folder: Path, dtype: str = "auto") -> Any:
    """The unquantized Transformers model in a directory, by default in the dtype of its own.

    Raises CheckpointError if it has no safetensors or leads out of it.
    """
    TensorFiles(folder)
    return model_class(folder).from_pretrained(folder, dtype=dtype, **_NO_CODE, **_NO_PICKLE)


def map_original(folder: Path) -> Any:
    """load_original without a copy of the weights: they are the files' own memory, of which pages are read when touched.

    Where Transformers stacks or transposes tensors it makes copies of those.
    """
    files = TensorFiles(folder)
    tensors = {name: files.tensor(name) for name in files}
    with _of_directory(folder):
        config = require_transformers().AutoConfig.from_pretrained(folder, **_NO_CODE)
    dtype = config.dtype or next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    model, info = model_class(folder).from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    _check_complete(folder, info)
    return model


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Transformers would go on with random numbers."""
    if absent := [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]:
        raise CheckpointError(f"{folder} has no tensors, or of another shape, for {shorten(absent)}")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model directory that has been opened."""
    return require_transformers().AutoTokenizer.from_pretrained(folder, **_NO_CODE)


def model_class(folder: Path) -> Any:
    """The class that config.json's `architectures` names."""
    names = read_config(folder).get("architectures")
    if not names:
        raise CheckpointError(f"{folder / CONFIG} names no architectures")
    transformers = require_transformers()
    found = getattr(transformers, names[0], None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise CheckpointError(f"{folder / CONFIG} names the architecture {names[0]}, which this version of transformers lacks")
    return found


def require_transformers() -> Any:
    """The package transformers. Raises ImportError, with the remedy, if it is missing or of a version that is not tested."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"transformers is needed for this: pip install 'xpu_fp4[transformers]' ({error})") from error
    major, minor = map(int, transformers.__version__.split(".")[:2])
    if not OLDEST_TRANSFORMERS <= (major, minor) <= NEWEST_TRANSFORMERS:
        oldest, newest = (".".join(map(str, version)) for version in (OLDEST_TRANSFORMERS, NEWEST_TRANSFORMERS))
        raise ImportError(
            f"transformers {transformers.__version__} is not supported, xpu_fp4 is tested with {oldest} to {newest}: "
            f"pip install 'transformers~={newest}.0'"
        )
    return transformers


def _load_layer(model: nn.Module, checkpoint: Checkpoint, name: str, place: Place) -> None:
    target = model.get_submodule(place.module)
    parts = ["weight_packed", "weight_scale", "bias", "input_offset"]
    if place.projection is not None:
        parts = [f"{place.projection}_{part}" for part in ("blocks", "scales", "bias", "input_offset")]
    tensors = (*checkpoint.weight(name), checkpoint.bias(name), checkpoint.input_offset(name))
    for part, tensor in zip(parts, tensors, strict=True):
        if tensor is None:
            continue
        if place.expert is None:
            _put(target, part, tensor.view(target.get_parameter(part).shape))
        else:
            _put_expert(target, part, tensor, place)


def _put_expert(experts: nn.Module, name: str, value: Tensor, place: Place) -> None:
    """Copies one expert's rows into a parameter, which gets its memory with the first of them."""
    target = experts.get_parameter(name)
    if target.is_meta:
        target = nn.Parameter(torch.empty_like(target, device="cpu"), requires_grad=False)
        experts.register_parameter(name, target)
    rows = target.data[place.expert][place.part * len(value) :][: len(value)]
    rows.copy_(value.view(rows.shape))


def _load_others(model: nn.Module, checkpoint: Checkpoint) -> tuple[set[str], list[str]]:
    """Loads what is not quantized; returns the names in the model, and the names that the model has no place for."""
    loaded: set[str] = set()
    left_over = []
    for name, found in find_tensors(model, checkpoint.files, checkpoint.other_tensors()).items():
        if found is None:
            left_over.append(name)
            continue
        owner, _, attribute = found.rpartition(".")
        _put(model.get_submodule(owner), attribute, checkpoint.files.tensor(name))
        loaded.add(found)
    return loaded, left_over


def _missing(model: nn.Module, loaded: Collection[str]) -> list[str]:
    """Parameters that were not loaded under any of their names, saved buffers that were not, and what is still on meta."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {id(parameter) for name, parameter in parameters.items() if name in loaded}
    unknown = {name for name, parameter in parameters.items() if id(parameter) not in known}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    unknown |= (buffers & model.state_dict().keys()) - set(loaded)
    return sorted(unknown | {name for name, tensor in state_of(model).items() if tensor.is_meta})


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
