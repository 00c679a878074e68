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
from .keys import is_set, refusal, require_object, unknown_keys
from .tensor_files import TensorFiles

METHOD = "compressed-tensors"
FORMAT = "mxfp4-pack-quantized"
PACKED, SCALE = "weight_packed", "weight_scale"
EXTENSION = "xpu_fp4"
"""A key of quantization_config that other readers skip: {"scale_mode": ...}, for activations by another rule than `even`."""

_MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True}

# What is read here, and what is known to change nothing.
_KEYS = {
    *("quant_method", "format", "config_groups", "ignore", EXTENSION, "transform_config", "kv_cache_scheme", "sparsity_config"),
    *("quantization_status", "global_compression_ratio", "version", "provider"),
    *("run_compressed", "dequantize", "use_optimized_inference"),  # how Transformers loads it
}
_GROUP_KEYS = {"targets", "format", "weights", "input_activations", "output_activations"}
_ARGUMENT_KEYS = {*_MXFP4, "dynamic", "scale_dtype", "zp_dtype", "block_structure", "actorder", "observer", "observer_kwargs"}
# Transforms at these locations are in the stored weights already.
_OFFLINE = {"weight_input", "weight_output"}


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """What is left aside of a `quantization_config`. Raises CheckpointError for keys that change what a layer computes."""
    _refuse_transforms(config.get("transform_config"), f"{where}.transform_config")
    sparsity = require_object(config.get("sparsity_config"), f"{where}.sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise refusal(f"{where}.sparsity_config", f"stores sparse weights ({sparsity['format']})")
    if is_set(config.get("moe_sparsity_config")):
        raise refusal(f"{where}.moe_sparsity_config", "gives layers different numbers or kinds of experts")
    notes = unknown_keys(config, _KEYS)
    if is_set(config.get("kv_cache_scheme")):
        notes.append("kv_cache_scheme (the KV cache is not quantized)")
    for name, group in require_object(config.get("config_groups"), f"{where}.config_groups").items():
        group = require_object(group, f"{where}.config_groups.{name}")
        notes += unknown_keys(group, _GROUP_KEYS, f"config_groups.{name}.")
        for key in ("weights", "input_activations"):
            arguments = require_object(group.get(key), f"{where}.config_groups.{name}.{key}")
            if arguments.get("actorder") in ("group", "dynamic"):
                raise refusal(f"{where}.config_groups.{name}.{key}.actorder", "reorders the columns of weights")
            notes += unknown_keys(arguments, _ARGUMENT_KEYS, f"config_groups.{name}.{key}.")
    return notes


def _refuse_transforms(config: Any, where: str) -> None:
    for name, scheme in require_object(require_object(config, where).get("config_groups"), f"{where}.config_groups").items():
        scheme = require_object(scheme, f"{where}.config_groups.{name}")
        for apply in scheme.get("apply") or []:
            location = require_object(apply, f"{where}.config_groups.{name}.apply").get("location")
            if location not in _OFFLINE:
                what = f"applies a {scheme.get('type')} transform (a rotation) at every {location} of {apply.get('targets')}"
                raise refusal(f"{where}.config_groups.{name}", what)


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
