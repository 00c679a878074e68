# SPDX-License-Identifier: Apache-2.0
"""AMD Quark's MXFP4: `weight` uint8 [N, K/2] and `weight_scale` uint8 [N, K/32] per module, packed as in compressed-tensors.

`global_quant_config` is the scheme, `layer_quant_config` has others for shell patterns of names, `layer_type_quant_config` for
classes. A scheme with `input_tensors` is W4A4, without W4A16.
"""

from fnmatch import fnmatchcase
from typing import Any

from .._library import BLOCK
from .description import Layer, Scheme, describe_layer, get_scale_mode
from .errors import CheckpointError
from .tensor_files import TensorFiles

METHOD = "quark"
PACKED, SCALE = "weight", "weight_scale"


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers under a `quantization_config` of config.json. Raises CheckpointError for any other scheme than MXFP4."""
    where = f"{files.folder}: quantization_config"
    by_name = {
        pattern: _read_scheme(scheme, f"{where}.layer_quant_config.{pattern}")
        for pattern, scheme in (config.get("layer_quant_config") or {}).items()
    }
    by_type = (config.get("layer_type_quant_config") or {}).get("Linear")
    default_where = f"{where}.{'layer_type_quant_config.Linear' if by_type else 'global_quant_config'}"
    default = _read_scheme(by_type or config.get("global_quant_config"), default_where)
    layers = {}
    for tensor, info in files.items():
        module, _, kind = tensor.rpartition(".")
        if kind != PACKED or info.dtype != "U8":
            continue
        if any(fnmatchcase(module, pattern) for pattern in config.get("exclude") or []):
            raise CheckpointError(f"{info} is packed, but quantization_config.exclude lists {module}")
        scheme = next((scheme for pattern, scheme in by_name.items() if fnmatchcase(module, pattern)), default)
        if scheme is None:
            raise CheckpointError(f"{info} is packed, but quantization_config has no weight scheme for {module}")
        layers[module] = describe_layer(files, module, scheme, tensor, f"{module}.{SCALE}", f"{module}.bias")
    return layers


def _read_scheme(scheme: Any, where: str) -> Scheme | None:
    """None: not quantized."""
    if not isinstance(scheme, dict):
        raise CheckpointError(f"{where} is {scheme!r}, expected an object")
    if scheme.get("output_tensors") is not None:
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
