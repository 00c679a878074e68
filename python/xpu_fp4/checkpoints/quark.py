# SPDX-License-Identifier: Apache-2.0
"""AMD Quark's MXFP4: `weight` uint8 [N, K/2] and `weight_scale` uint8 [N, K/32] per module, packed as in compressed-tensors.

`global_quant_config` is the scheme, `layer_quant_config` has others for shell patterns of names, `layer_type_quant_config` for
classes. A scheme with `input_tensors` is W4A4, without W4A16.
"""

from typing import Any

from .._library import BLOCK
from .description import Layer, Scheme, describe_layer, get_scale_mode
from .errors import CheckpointError
from .keys import is_set, refusal, require_object, unknown_keys
from .patterns import ShellPatterns
from .tensor_files import TensorFiles

METHOD = "quark"
PACKED, SCALE = "weight", "weight_scale"

# What is read here, and what is known to change nothing.
_KEYS = {
    *("quant_method", "global_quant_config", "layer_quant_config", "layer_type_quant_config", "exclude", "algo_config"),
    *("softmax_quant_spec", "kv_cache_quant_config", "kv_cache_post_rope", "export"),
    *("quant_mode", "version", "log_severity_level"),
}
_SCHEME_KEYS = {"weight", "input_tensors", "output_tensors", "bias", "target_device"}
_SPEC_KEYS = {
    *("dtype", "qscheme", "group_size", "ch_axis", "scale_format", "is_dynamic", "scale_calculation_mode", "round_method"),
    *("symmetric", "observer_cls", "scale_type", "mx_element_dtype", "is_scale_quant"),
}
# Rotations that Quark does while the model runs; r1 and r2 are in the stored weights, r3 cancels but for the KV cache.
_ONLINE_ROTATIONS = ("r4", "online_r1_rotation")


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """Returns what a `quantization_config` has that is left aside. Raises CheckpointError for keys that change a layer."""
    algorithms = config.get("algo_config") or []
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        for key in _ONLINE_ROTATIONS:
            if is_set(require_object(algorithm, f"{where}.algo_config").get(key)):
                raise refusal(f"{where}.algo_config.{key}", "rotates the inputs of layers before they are quantized")
    if is_set(config.get("softmax_quant_spec")):
        raise refusal(f"{where}.softmax_quant_spec", "quantizes the softmax of attention")
    notes = unknown_keys(config, _KEYS)
    if _kv_cache_patterns(config):
        notes.append("kv_cache_quant_config (the KV cache is not quantized)")
    for name, scheme in _schemes(config, where):
        notes += unknown_keys(scheme, _SCHEME_KEYS, f"{name}.")
        if is_set(scheme.get("bias")):
            raise refusal(f"{where}.{name}.bias", "quantizes biases")
        for key in ("weight", "input_tensors"):
            specs = scheme.get(key) or []
            for spec in specs if isinstance(specs, list) else [specs]:
                spec = require_object(spec, f"{where}.{name}.{key}")
                notes += unknown_keys(spec, _SPEC_KEYS, f"{name}.{key}.")
                if key == "input_tensors" and spec.get("round_method") not in (None, "half_even"):
                    raise refusal(f"{where}.{name}.{key}.round_method", f"rounds inputs by {spec['round_method']!r}")
    return notes


def _schemes(config: dict[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """All schemes, by where they stand in the `quantization_config`."""
    found = {"global_quant_config": config.get("global_quant_config")}
    for table in ("layer_quant_config", "layer_type_quant_config"):
        schemes = require_object(config.get(table), f"{where}.{table}")
        found |= {f"{table}.{name}": scheme for name, scheme in schemes.items()}
    return [(name, require_object(scheme, f"{where}.{name}")) for name, scheme in found.items()]


def _kv_cache_patterns(config: dict[str, Any]) -> set[str]:
    """Patterns of the layers whose outputs are quantized for the KV cache alone."""
    return {*(config.get("kv_cache_quant_config") or {}), *((config.get("export") or {}).get("kv_cache_group") or [])}


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers under a `quantization_config` of config.json. Raises CheckpointError for any other scheme than MXFP4."""
    where = f"{files.folder}: quantization_config"
    kv_cache = _kv_cache_patterns(config)
    by_name = {
        pattern: _read_scheme(scheme, f"{where}.layer_quant_config.{pattern}", of_kv_cache=pattern in kv_cache)
        for pattern, scheme in (config.get("layer_quant_config") or {}).items()
    }
    by_type = (config.get("layer_type_quant_config") or {}).get("Linear")
    default_where = f"{where}.{'layer_type_quant_config.Linear' if by_type else 'global_quant_config'}"
    default = _read_scheme(by_type or config.get("global_quant_config"), default_where)
    layers = {}
    excluded = ShellPatterns(config.get("exclude") or [], f"{where}.exclude")
    patterns = ShellPatterns(by_name, f"{where}.layer_quant_config")
    for tensor, info in files.items():
        module, _, kind = tensor.rpartition(".")
        if kind != PACKED or info.dtype != "U8":
            continue
        if excluded.find(module) is not None:
            raise CheckpointError(f"{info} is packed, but quantization_config.exclude lists {module}")
        named = patterns.find(module)
        scheme = default if named is None else by_name[named]
        if scheme is None:
            raise CheckpointError(f"{info} is packed, but quantization_config has no weight scheme for {module}")
        layers[module] = describe_layer(files, module, scheme, tensor, f"{module}.{SCALE}", f"{module}.bias")
    return layers


def _read_scheme(scheme: Any, where: str, *, of_kv_cache: bool = False) -> Scheme | None:
    """None: not quantized."""
    if not isinstance(scheme, dict):
        raise CheckpointError(f"{where} is {scheme!r}, expected an object")
    if scheme.get("output_tensors") is not None and not of_kv_cache:
        raise CheckpointError(f"{where}.output_tensors is set, expected null: only inputs of a layer are quantized")
    activations = scheme.get("input_tensors")
    if scheme.get("weight") is None and activations is None:
        return None
    _check_spec(scheme.get("weight"), False, f"{where}.weight")
    if activations is None:
        return Scheme("w4a16")
    spec = _check_spec(activations, True, f"{where}.input_tensors")
    return Scheme("w4a4", get_scale_mode(spec.get("scale_calculation_mode") or "even", f"{where}.input_tensors"))


def _check_spec(spec: Any, dynamic: bool, where: str) -> dict[str, Any]:
    if isinstance(spec, list) and len(spec) == 1:
        spec = spec[0]
    if not isinstance(spec, dict):
        raise CheckpointError(f"{where} is {spec!r}, expected one object")
    if spec.get("dtype") == "mx":
        raise CheckpointError(
            f'{where} has the legacy dtype "mx" (17-byte blocks with a signed exponent), which is another packing: export the '
            'model again with dtype "fp4", qscheme "per_group", scale_format "e8m0"'
        )
    expected = {"dtype": "fp4", "qscheme": "per_group", "group_size": BLOCK, "scale_format": "e8m0", "is_dynamic": dynamic}
    wrong = [f"{key} {spec.get(key)!r}, expected {value!r}" for key, value in expected.items() if spec.get(key) != value]
    if wrong:
        raise CheckpointError(f"{where} is not MXFP4: {'; '.join(wrong)}")
    return spec
