# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' `mxfp4-pack-quantized`: `weight_packed` uint8 [N, K/2] and `weight_scale` uint8 [N, K/32] per module.

llm-compressor writes it; vLLM and Transformers read it. A group's `input_activations` make it W4A4, their absence W4A16.
"""

import re
from collections.abc import Iterable
from typing import Any

from .._library import BLOCK
from ..functional import Mode, ScaleMode
from .description import Layer, Scheme, describe_layer, get_scale_mode
from .errors import CheckpointError
from .tensor_files import TensorFiles

METHOD = "compressed-tensors"
FORMAT = "mxfp4-pack-quantized"
PACKED, SCALE = "weight_packed", "weight_scale"
EXTENSION = "xpu_fp4"
"""A key of quantization_config that other readers skip: {"scale_mode": ...}, for activations by another rule than `even`."""

_MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True}


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers under a `quantization_config` of config.json. Raises CheckpointError for any other scheme than MXFP4."""
    extension = config.get(EXTENSION) or {}
    scale_mode = get_scale_mode(extension.get("scale_mode", "even"), f"{files.folder}: quantization_config.{EXTENSION}")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{files.folder}: quantization_config has no config_groups")
    schemes: dict[str, Scheme] = {}
    for name, group in groups.items():
        where = f"{files.folder}: quantization_config.config_groups.{name}"
        scheme = _read_group(group, config.get("format"), scale_mode, where)
        schemes |= {target: scheme for target in group.get("targets") or []}
    layers = {}
    for tensor in files:
        module, _, kind = tensor.rpartition(".")
        if kind != PACKED:
            continue
        if any(matches(module, pattern) for pattern in config.get("ignore") or []):
            raise CheckpointError(f"{files[tensor]} is packed, but quantization_config.ignore lists {module}")
        scheme = _scheme_of(module, schemes, files, tensor)
        layers[module] = describe_layer(files, module, scheme, tensor, f"{module}.{SCALE}", f"{module}.bias")
    return layers


def write_config(mode: Mode, scale_mode: ScaleMode, ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers, but the ones in `ignore`, are all in one scheme."""
    # scale_dtype is a field of compressed-tensors' own output, and vLLM's reader of older versions asks for it.
    weights = {**_MXFP4, "dynamic": False, "scale_dtype": "torch.uint8"}
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": FORMAT,
                "weights": weights,
                "input_activations": {**weights, "dynamic": True} if mode == "w4a4" else None,
                "output_activations": None,
            }
        },
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if scale_mode != "even":
        config[EXTENSION] = {"scale_mode": scale_mode}
    return config


def matches(module: str, pattern: str) -> bool:
    """Whether a target or an ignored name means this module: the name itself, or `re:` and a regex from its beginning."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return pattern == module


def _read_group(group: dict[str, Any], outer_format: str | None, scale_mode: ScaleMode, where: str) -> Scheme:
    format = group.get("format") or outer_format
    if format != FORMAT:
        raise CheckpointError(f"{where} has the format {format!r}, expected {FORMAT!r}")
    _check_arguments(group.get("weights"), False, f"{where}.weights")
    if group.get("output_activations") is not None:
        raise CheckpointError(f"{where}.output_activations is set, expected null: only inputs of a layer are quantized")
    activations = group.get("input_activations")
    if activations is None:
        return Scheme("w4a16")
    _check_arguments(activations, True, f"{where}.input_activations")
    return Scheme("w4a4", scale_mode)


def _check_arguments(arguments: Any, dynamic: bool, where: str) -> None:
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{where} is {arguments!r}, expected an object")
    expected = {**_MXFP4, "dynamic": dynamic}
    found = {key: arguments.get(key, value if key in ("symmetric", "strategy") else None) for key, value in expected.items()}
    wrong = [f"{key} {found[key]!r}, expected {value!r}" for key, value in expected.items() if found[key] != value]
    if arguments.get("scale_dtype") not in (None, "torch.uint8"):
        wrong.append(f"scale_dtype {arguments['scale_dtype']!r}, expected 'torch.uint8'")
    if wrong:
        raise CheckpointError(f"{where} is not MXFP4: {'; '.join(wrong)}")


def _scheme_of(module: str, schemes: dict[str, Scheme], files: TensorFiles, tensor: str) -> Scheme:
    """An exact name goes before a regex, and a regex before the class, as in compressed-tensors."""
    named = sorted((target for target in schemes if matches(module, target)), key=lambda target: target.startswith("re:"))
    # The class of what is packed cannot be seen in the files; it is Linear for all that these layers can be.
    for target in [*named, "Linear"]:
        if target in schemes:
            return schemes[target]
    raise CheckpointError(f"{files[tensor]} is packed, but no target in quantization_config matches {module}: {list(schemes)}")
