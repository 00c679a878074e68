# SPDX-License-Identifier: Apache-2.0
"""Opens a model directory: which format it is in, and what it holds."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from . import compressed_tensors, gpt_oss, quark
from .description import Checkpoint, Layer
from .errors import CheckpointError
from .tensor_files import TensorFiles, read_json

CONFIG = "config.json"
_READERS: dict[str, Callable[[dict[str, Any], TensorFiles], dict[str, Layer]]] = {
    compressed_tensors.METHOD: compressed_tensors.read_layers,
    quark.METHOD: quark.read_layers,
    gpt_oss.METHOD: gpt_oss.read_layers,
}


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a model directory, or None if it is not quantized."""
    config = read_json(folder / CONFIG)
    # Of a model with several parts, it may stand with the language model.
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{folder / CONFIG}: quantization_config is a {type(found).__name__}, expected an object")
    return found


def open_checkpoint(folder: str | PathLike[str]) -> Checkpoint:
    """Reads the headers of an MXFP4 model directory (config.json, *.safetensors), and no weights.

    Raises CheckpointError, naming the file and the tensor: nothing quantized, another scheme than MXFP4, a damaged or missing
    file, a tensor whose dtype or shape does not fit.
    """
    folder = Path(folder)
    config = quantization_config(folder)
    if config is None:
        raise CheckpointError(f"{folder / CONFIG} has no quantization_config: the model is not quantized")
    method = config.get("quant_method")
    if method not in _READERS:
        known = ", ".join(_READERS)
        raise CheckpointError(f"{folder / CONFIG} has the quant_method {method!r}, which is not MXFP4; expected one of {known}")
    files = TensorFiles(folder)
    layers = _READERS[method](config, files)
    if not layers:
        raise CheckpointError(f"{folder} has no MXFP4 weights, but {CONFIG} says that it is quantized by {method}")
    return Checkpoint(folder, method, files, layers)
