# SPDX-License-Identifier: Apache-2.0
"""gpt-oss, Transformers' quant_method `mxfp4`: the experts' weights, all experts of a layer in one tensor.

`NAME_blocks` uint8 [E, N, K/32, 16] and `NAME_scales` uint8 [E, N, K/32], so the bytes of [E, N, K/2]; `NAME_bias` [E, N].
NAME is `...experts.gate_up_proj`, whose rows alternate between gate and up, and `...experts.down_proj`. W4A16 or, where our own
key of the `quantization_config` says so, which other readers skip, W4A4 or W4A8.
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from ..functional import Mode
from .compressed_tensors import EXTENSION
from .description import Layer, Scheme, describe_layer, get_scale_mode
from .errors import CheckpointError
from .keys import require_object, unknown_keys
from .tensor_files import TensorFiles

METHOD = "mxfp4"
PACKED, SCALE = "_blocks", "_scales"
_ACTIVATIONS: dict[Mode, dict[str, Any]] = {
    "w4a4": {"activations": "mxfp4"},
    "w4a8": {"activations": "mxint8", "group": 128},
    "w4a16": {},
}
"""What our own key says of a mode, beside `scale_mode` if that is not `even`."""


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """Returns what is left aside of a `quantization_config`, which has no key that changes what a layer computes."""
    _scheme(config, where)
    return unknown_keys(config, {"quant_method", "modules_to_not_convert", "dequantize", EXTENSION})


def write_config(scheme: Scheme, ignore: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose experts are in that scheme; ignore: the modules that are not quantized."""
    hint = _ACTIVATIONS[scheme.mode] | ({} if scheme.scale_mode == "even" else {"scale_mode": scheme.scale_mode})
    return {"quant_method": METHOD, "modules_to_not_convert": sorted(ignore), **({EXTENSION: hint} if hint else {})}


def _scheme(config: dict[str, Any], where: str) -> Scheme:
    where = f"{where}.{EXTENSION}"
    hint = dict(require_object(config.get(EXTENSION), where))
    scale_mode = get_scale_mode(hint.pop("scale_mode", "even"), where)
    mode = next((mode for mode, known in _ACTIVATIONS.items() if known == hint), None)
    if mode is None:
        raise CheckpointError(
            f"{where} is {hint}, expected one of {list(_ACTIVATIONS.values())}: a newer xpu_fp4 may know more"
        )
    return Scheme(mode, scale_mode)


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers, which are told by their tensors' names."""
    layers = {}
    scheme = _scheme(config, f"{files.folder}: quantization_config")
    kept = set(config.get("modules_to_not_convert") or [])
    for tensor in files:
        if not tensor.endswith(PACKED):
            continue
        name = tensor.removesuffix(PACKED)
        owners = accumulate(name.split("."), "{}.{}".format)  # of the module, and itself
        excluded = [owner for owner in owners if owner in kept]
        if excluded:
            raise CheckpointError(
                f"{files[tensor]} is packed, but quantization_config.modules_to_not_convert lists {excluded[0]}"
            )
        layers[name] = describe_layer(files, name, scheme, tensor, f"{name}{SCALE}", f"{name}_bias", experts=True)
    return layers
