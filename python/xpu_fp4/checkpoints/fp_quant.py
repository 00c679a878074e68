# SPDX-License-Identifier: Apache-2.0
"""FP-Quant's `quant_method`, `fp_quant`, with `forward_dtype` mxfp4: W4A4 under a Hadamard transform.

Per module `qweight` uint8 [N, K/2], packed as in compressed-tensors, and `scales` uint8 [N, K/32]. `forward_method` is the rule
for the scales of inputs, as it was for those of weights: under `abs_max` codes stand for 3 times what was quantized, which
`weight_global_scale` and `act_global_scale` [1] say, under `quest` for it alone. `forward_hadamard_matrix` is the transform's,
or the identity. How the model was trained (`backward_dtype`, `backward_hadamard_matrix`) changes nothing.
"""

from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from ..functional import GLOBAL_SCALES, Hadamard, ScaleMode
from ..reference import transform
from .description import Layer, Scheme, describe_layer
from .errors import CheckpointError
from .keys import is_set, refusal, unknown_keys
from .tensor_files import TensorFiles

METHOD = "fp_quant"
PACKED, SCALE = "qweight", "scales"
MATRIX = "forward_hadamard_matrix"
GLOBAL_SCALES_OF_LAYER = ("weight_global_scale", "act_global_scale")
BACKWARD = "backward_hadamard_matrix"
_EMPTY = ("weight", "dqweight")  # what Transformers may write, without elements, in place of nothing

_KEYS = {
    *("quant_method", "forward_dtype", "forward_method", "hadamard_group_size", "transform_init", "modules_to_not_convert"),
    *("pseudoquantization", "store_master_weights", "backward_dtype"),
}
_SCALE_MODES: dict[str, ScaleMode] = {"abs_max": "abs_max", "quest": "quest"}
_TRANSFORMS = ("hadamard", "identity")
_DTYPE = "mxfp4"


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """Returns what a `quantization_config` has that is left aside. Raises CheckpointError for keys that change a layer."""
    scheme_of(config, where)
    for key, stores in (("pseudoquantization", "dequantized (dqweight)"), ("store_master_weights", "unquantized (weight)")):
        if is_set(config.get(key)):
            raise CheckpointError(
                f"{where}.{key} is {config[key]!r}: weights are stored {stores}, expected packed ones ({PACKED})"
            )
    return unknown_keys(config, _KEYS)


def scheme_of(config: dict[str, Any], where: str) -> Scheme:
    """The scheme of all layers, but for those whose matrix is the identity. Raises CheckpointError if it is none of ours.

    Keys that are missing or null have Transformers' defaults.
    """
    dtype = config.get("forward_dtype") or "nvfp4"
    if dtype != _DTYPE:
        raise CheckpointError(f"{where}.forward_dtype is {dtype!r}, expected {_DTYPE!r}")
    method = config.get("forward_method") or "abs_max"
    if method not in _SCALE_MODES:
        raise CheckpointError(f"{where}.forward_method is {method!r}, expected one of {', '.join(_SCALE_MODES)}")
    kind = config.get("transform_init") or _TRANSFORMS[0]
    if kind not in _TRANSFORMS:
        raise refusal(f"{where}.transform_init {kind!r}", "turns the inputs of layers by another matrix than Sylvester's")
    size = group_size(config, where)
    mode = _SCALE_MODES[method]
    global_scale = GLOBAL_SCALES.get(mode, 1.0)
    return Scheme("w4a4", mode, hadamard=size if kind == "hadamard" else 0, weight_global_scale=global_scale)


def group_size(config: dict[str, Any], where: str) -> Hadamard:
    """The size of the matrices. Raises CheckpointError if it is none of 32, 64, 128."""
    size = config.get("hadamard_group_size")
    size = 32 if size is None else size
    if size == 0 or size not in get_args(Hadamard):
        raise CheckpointError(f"{where}.hadamard_group_size is {size!r}, expected 32, 64 or 128")
    return cast(Hadamard, size)


def kept_modules(config: dict[str, Any]) -> list[str]:
    """Returns what the names of modules end in that are not quantized."""
    kept: list[str] | None = config.get("modules_to_not_convert")
    return ["lm_head"] if kept is None else kept


def with_matrix(scheme: Scheme, matrix: Tensor | None, config: dict[str, Any], where: str) -> Scheme:
    """The scheme of a layer with this matrix [size, size] at its input; None: the one that the config says.

    FP-Quant's own exports do not say in the config which it is. Raises CheckpointError for a matrix that is neither Sylvester's
    nor the identity, or not the one that the config says. where: what an error's message begins with.
    """
    if matrix is None:
        return scheme
    size = group_size(config, where)
    with torch.device("cpu"):  # Transformers reads while it is another
        identity = torch.eye(size)
        kinds = {"hadamard": transform(identity, size).sign(), "identity": identity}
        given = matrix.float() if matrix.shape == identity.shape else torch.zeros(1, 1)
        factor = given[0, 0]  # rounded to any dtype
        kind = next((kind for kind, of in kinds.items() if factor > 0 and torch.equal(given / factor, of)), None)
    wanted = config.get("transform_init")
    if kind is None or wanted not in (None, kind):
        expected = "the matrix that its transform_init asks for" if wanted else "Sylvester's Hadamard matrix or the identity"
        raise CheckpointError(f"{where} {list(matrix.shape)} is not {expected}, [{size}, {size}]")
    return replace(scheme, hadamard=size if kind == "hadamard" else 0)


def check_global_scale(scheme: Scheme, value: Tensor, where: str) -> None:
    """Raises CheckpointError if a global scale is another than FP-Quant's kernels have for the scheme's rule."""
    if value.numel() != 1 or value.item() != scheme.weight_global_scale:
        found = value.flatten().tolist()[:4]
        raise CheckpointError(f"{where} is {found}, expected [{scheme.weight_global_scale:g}], as {scheme.scale_mode} has it")


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers, which are told by their tensors' names. Raises CheckpointError for any other scheme than MXFP4."""
    where = f"{files.folder}: quantization_config"
    scheme = scheme_of(config, where)
    layers = {}
    for tensor in files:
        module, _, kind = tensor.rpartition(".")
        if kind != PACKED:
            continue
        if excluded := [end for end in kept_modules(config) if module.endswith(end)]:
            raise CheckpointError(f"{files[tensor]} is packed, but {where}.modules_to_not_convert lists {excluded[0]}")
        layers[module] = _read_layer(config, files, module, scheme)
    return layers


def _read_layer(config: dict[str, Any], files: TensorFiles, module: str, scheme: Scheme) -> Layer:
    names = [f"{module}.{name}" for name in GLOBAL_SCALES_OF_LAYER]
    for name in names:
        if name not in files:
            raise CheckpointError(f"{files.folder} has no tensor {name}")
        check_global_scale(scheme, files.tensor(name), str(files[name]))
    matrix = f"{module}.{MATRIX}"
    has_matrix = matrix in files
    where = str(files[matrix]) if has_matrix else f"{files.folder}: quantization_config"
    scheme = with_matrix(scheme, files.tensor(matrix) if has_matrix else None, config, where)
    layer = describe_layer(files, module, scheme, f"{module}.{PACKED}", f"{module}.{SCALE}", f"{module}.bias")
    if scheme.hadamard and layer.in_features % scheme.hadamard != 0:
        k, size = layer.in_features, scheme.hadamard
        raise CheckpointError(f"{files[layer.packed]} is of K = {k}, expected a multiple of hadamard_group_size, {size}")
    matrices = [name for name in (matrix, f"{module}.{BACKWARD}") if name in files]
    empty = [name for end in _EMPTY if (name := f"{module}.{end}") in files and 0 in files[name].shape]
    return replace(layer, constants=(*names, *matrices, *empty))
