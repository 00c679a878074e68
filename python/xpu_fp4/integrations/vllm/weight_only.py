# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints with MXFP4 weights and unquantized activations (W4A16).

vLLM gives every layer with MXFP4 weights its W4A4 scheme, so it would quantize activations that the checkpoint leaves alone. A
layer's own configuration says which it is; this reads it, layer by layer. Quark's checkpoints need nothing: vLLM passes it on.
"""

from torch import nn
from vllm.model_executor.kernels.linear import init_mxfp4_linear_kernel
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsW4A4Mxfp4,
)

from ..._library import BLOCK


class CompressedTensorsW4A16Mxfp4(CompressedTensorsW4A4Mxfp4):
    """vLLM's scheme, its kernel selected for unquantized activations."""

    def __init__(self) -> None:
        # Not the parent's, which selects one for W4A4.
        self.group_size = BLOCK
        self.kernel = init_mxfp4_linear_kernel(activation_quant_key=None)


class WeightOnlyAwareConfig(CompressedTensorsConfig):
    """vLLM's configuration, but layers with MXFP4 weights and no activation quantization get the W4A16 scheme."""

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> CompressedTensorsScheme | None:
        args = self.get_scheme_dict(layer, layer_name)
        if args and args["input_activations"] is None and self._is_mxfp4(args["weights"]):
            return CompressedTensorsW4A16Mxfp4()
        return super().get_scheme(layer, layer_name)
