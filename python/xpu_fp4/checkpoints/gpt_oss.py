# SPDX-License-Identifier: Apache-2.0
"""gpt-oss, Transformers' quant_method `mxfp4`: the experts' weights, all experts of a layer in one tensor.

`NAME_blocks` uint8 [E, N, K/32, 16] and `NAME_scales` uint8 [E, N, K/32], so the bytes of [E, N, K/2]; `NAME_bias` [E, N].
NAME is `...experts.gate_up_proj`, whose rows alternate between gate and up, and `...experts.down_proj`. W4A16.
"""

from itertools import accumulate
from typing import Any

from .description import Layer, Scheme, describe_layer
from .errors import CheckpointError
from .keys import unknown_keys
from .tensor_files import TensorFiles

METHOD = "mxfp4"
PACKED, SCALE = "_blocks", "_scales"


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """What is left aside of a `quantization_config`, which has no key that changes what a layer computes."""
    return unknown_keys(config, {"quant_method", "modules_to_not_convert", "dequantize"})


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers, which are told by their tensors' names; `quantization_config` says no more than the method."""
    layers = {}
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
        layers[name] = describe_layer(files, name, Scheme("w4a16"), tensor, f"{name}{SCALE}", f"{name}_bias", experts=True)
    return layers
