# SPDX-License-Identifier: Apache-2.0
"""Opens a model directory: which format it is in, and what it holds."""

import warnings
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from . import auto_round, compressed_tensors, fp_quant, gpt_oss, quark, schemas
from .description import Checkpoint, Layer
from .errors import CheckpointError, printable
from .tensor_files import TensorFiles
from .transforms import InputTransforms
from .untrusted import check_type, read_json

CONFIG = "config.json"


class _Format(Protocol):
    METHOD: str

    def check_keys(self, config: dict[str, Any], where: str) -> list[str]: ...

    def read_layers(self, config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]: ...


_TYPES = {
    compressed_tensors.METHOD: schemas.check_compressed_tensors,
    quark.METHOD: schemas.check_quark,
    gpt_oss.METHOD: schemas.check_gpt_oss,
    auto_round.METHOD: schemas.check_auto_round,
    fp_quant.METHOD: schemas.check_fp_quant,
}
_FORMATS: dict[str, _Format] = {format.METHOD: format for format in (compressed_tensors, quark, gpt_oss, auto_round, fp_quant)}


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a model directory, or None if it is not quantized."""
    config = read_config(folder)
    # It may stand with the language model, where a model has several parts.
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    check_type(found, dict[str, Any] | None, f"{folder / CONFIG}: quantization_config")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """All of a model directory's config.json. Raises CheckpointError for a key of another type than is read here."""
    config = read_json(folder / CONFIG)
    check_type(config, schemas.Config, f"{folder / CONFIG}: config")
    return config


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """Returns what is left aside of a quantization_config, nothing for a quant_method that is not read here.

    Raises CheckpointError for a key that changes what a layer computes in a way that is not done here.
    """
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _FORMATS:
        return []
    _TYPES[method](config, where)
    return _FORMATS[method].check_keys(config, where)


def open_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """Reads the headers of an MXFP4 model directory (config.json, *.safetensors), and no weights.

    Raises CheckpointError, naming the file and the tensor: nothing quantized, another scheme than MXFP4, a damaged or missing
    file, a tensor whose dtype or shape does not fit, a key that changes what a layer computes in a way that is not done here.

    Keys that are not acted on are named in a warning.
    """
    checkpoint = read_checkpoint(folder)
    if checkpoint.left_aside:
        notes = printable(", ".join(checkpoint.left_aside))
        warnings.warn(f"{checkpoint.folder / CONFIG}: left aside in quantization_config: {notes}", stacklevel=2)
    return checkpoint


def read_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """open_checkpoint without its warning."""
    folder = Path(folder)
    config = quantization_config(folder)
    if config is None:
        raise CheckpointError(f"{folder / CONFIG} has no quantization_config: the model is not quantized")
    method = config.get("quant_method")
    where = f"{folder / CONFIG}: quantization_config"
    left_aside = check_keys(config, where)
    if not isinstance(method, str) or method not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise CheckpointError(f"{folder / CONFIG} has the quant_method {method!r}, which is not MXFP4; expected one of {known}")
    files = TensorFiles(folder)
    layers = _FORMATS[method].read_layers(config, files)
    if not layers:
        raise CheckpointError(f"{folder} has no MXFP4 weights, but {CONFIG} says that it is quantized by {method}")
    transforms = InputTransforms(config.get("transform_config"), f"{where}.transform_config")
    return Checkpoint(folder, method, files, layers, transforms, tuple(left_aside))
