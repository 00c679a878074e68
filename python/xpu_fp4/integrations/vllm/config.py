# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints with MXFP4 weights and other activations than MXFP4: unquantized (W4A16) or MXINT8 (W4A8).

vLLM gives every layer with MXFP4 weights its W4A4 scheme, so it would quantize activations to MXFP4 in any case. A layer's own
configuration says which they are, and our key of the `quantization_config`, which vLLM keeps. Both are read here, layer by
layer, as `checkpoints` reads them. Quark's checkpoints need nothing: vLLM passes on what they say.
"""

from typing import Any

from torch import nn
from vllm.model_executor.kernels.linear import init_mxfp4_linear_kernel
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsW4A4Mxfp4,
)

from ..._library import BLOCK
from ...checkpoints.compressed_tensors import activations_scheme, weight_only_scheme
from ...checkpoints.description import Scheme
from .kernel import key_of


class CompressedTensorsMxfp4(CompressedTensorsW4A4Mxfp4):
    """vLLM's scheme, its kernel selected for the activations of `scheme`."""

    def __init__(self, scheme: Scheme) -> None:
        # Not the parent's, which selects one for W4A4.
        self.group_size = BLOCK
        self.kernel = init_mxfp4_linear_kernel(activation_quant_key=key_of(scheme))


class ActivationsAwareConfig(CompressedTensorsConfig):
    """vLLM's configuration, but layers with MXFP4 weights and unquantized or int8 activations get the scheme for these."""

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> CompressedTensorsScheme | None:
        args = self.get_scheme_dict(layer, layer_name)
        if args and self._is_mxfp4(args["weights"]) and _are_unquantized_or_int(args["input_activations"]):
            activations = args["input_activations"] and args["input_activations"].model_dump(mode="json")
            weight_only = weight_only_scheme(self.config or {}, "quantization_config")
            return CompressedTensorsMxfp4(activations_scheme(activations, weight_only, f"input_activations of {layer_name}"))
        return super().get_scheme(layer, layer_name)


def _are_unquantized_or_int(activations: Any) -> bool:
    return activations is None or activations.type == "int"
