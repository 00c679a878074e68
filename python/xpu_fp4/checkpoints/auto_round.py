# SPDX-License-Identifier: Apache-2.0
"""AutoRound's own `quant_method`, `auto-round`, with MXFP4: the tensors of compressed-tensors' `mxfp4-pack-quantized`.

The scheme of weights and activations stands at the top, and in `extra_config` for layers that differ, by name or regex.
"""

from typing import Any

from .._library import BLOCK
from ..functional import ScaleMode
from .compressed_tensors import PACKED, SCALE
from .description import Layer, Scheme, describe_layer
from .errors import CheckpointError
from .keys import is_set, refusal, require_object, unknown_keys
from .patterns import Patterns
from .tensor_files import TensorFiles

METHOD = "auto-round"

_WEIGHTS = {"bits": 4, "data_type": "mx_fp", "group_size": BLOCK, "sym": True}
_ACTIVATIONS = {"act_bits": 4, "act_group_size": BLOCK, "act_sym": True, "act_dynamic": True}
_SCALE_MODES: dict[Any, ScaleMode] = {"mx_fp": "floor", "mx_fp_rceil": "rceil"}
"""The rule for the scales of activations, by act_data_type."""
_KEYS = {
    *("quant_method", "packing_format", "block_name_to_quantize", "extra_config", "autoround_version", "act_data_type"),
    *(*_WEIGHTS, *_ACTIVATIONS, "static_kv_dtype", "static_kv_granularity"),
    # How it was tuned.
    *("amp", "batch_size", "dataset", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input"),
    *("gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr", "minmax_lr", "nsamples", "scale_dtype", "seqlen"),
}
_ROTATIONS = ("rotation_config", "spinquant_config")


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """Returns what a `quantization_config` has that is left aside. Raises CheckpointError for keys that change a layer."""
    places = {where: config} | {f"{where}.extra_config.{name}": of for name, of in _extra(config, where).items()}
    for place, found in places.items():
        for key in _ROTATIONS:
            if is_set(found.get(key)):
                raise refusal(f"{place}.{key}", "rotates the inputs of layers before they are quantized")
    if is_set(config.get("static_attention_dtype")):
        raise refusal(f"{where}.static_attention_dtype", "quantizes attention")
    notes = unknown_keys(config, _KEYS)
    if is_set(config.get("static_kv_dtype")):
        notes.append("static_kv_dtype (the KV cache is not quantized)")
    return notes


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers under a `quantization_config` of config.json. Raises CheckpointError for any other scheme than MXFP4."""
    where = f"{files.folder}: quantization_config"
    patterns, extra = Patterns(f"{where}.extra_config"), _extra(config, where)
    layers = {}
    for tensor in files:
        module, _, kind = tensor.rpartition(".")
        if kind != PACKED:
            continue
        names = [module] if module in extra else [name for name in extra if patterns.matches(module, name)]
        found = [_read_scheme(config | extra[name], f"{where}.extra_config.{name}") for name in names]
        if len(set(found)) > 1:
            raise CheckpointError(f"{where}.extra_config has several schemes for {module}, by {', '.join(names)}")
        scheme = found[0] if found else _read_scheme(config, where)
        layers[module] = describe_layer(files, module, scheme, tensor, f"{module}.{SCALE}", f"{module}.bias")
    return layers


def _extra(config: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    extra = require_object(config.get("extra_config"), f"{where}.extra_config")
    return {name: require_object(of, f"{where}.extra_config.{name}") for name, of in extra.items()}


def _read_scheme(found: dict[str, Any], where: str) -> Scheme:
    _check(found, _WEIGHTS, where)
    if (found.get("act_bits") or 16) == 16:
        return Scheme("w4a16")
    _check(found, _ACTIVATIONS, where)
    rule = found.get("act_data_type")
    if not isinstance(rule, str) or rule not in _SCALE_MODES:
        raise CheckpointError(f"{where}.act_data_type is {rule!r}, expected one of {', '.join(_SCALE_MODES)}")
    return Scheme("w4a4", _SCALE_MODES[rule])


def _check(found: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    wrong = [f"{key} {found.get(key)!r}, expected {value!r}" for key, value in expected.items() if found.get(key) != value]
    if wrong:
        raise CheckpointError(f"{where} is not MXFP4: {'; '.join(wrong)}")
