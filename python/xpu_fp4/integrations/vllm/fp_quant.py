# SPDX-License-Identifier: Apache-2.0
"""FP-Quant's checkpoints with MXFP4, which vLLM alone runs on Blackwell GPUs only: vLLM's reader, our kernel.

What the configuration says is read as `checkpoints` reads it. The matrix of a layer's transform and its global scales are
parameters until they are loaded, and only checked then.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.fp_quant import FPQuantConfig, FPQuantLinearMethod

from ...checkpoints.fp_quant import (
    BACKWARD,
    GLOBAL_SCALES_OF_LAYER,
    MATRIX,
    PACKED,
    SCALE,
    check_global_scale,
    group_size,
    kept_modules,
    scheme_of,
    with_matrix,
)
from .kernel import XpuFp4LinearKernel
from .loading import load_the_same

_WHERE = "quantization_config"


class XpuFp4FPQuantConfig(FPQuantConfig):
    """vLLM's configuration, whose layers run in our kernel, in any dtype."""

    def __init__(self, config: dict[str, Any]) -> None:
        scheme = scheme_of(config, _WHERE)
        super().__init__(group_size(config, _WHERE), "mxfp4", scheme.scale_mode, kept_modules(config))
        self.config = config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "XpuFp4FPQuantConfig":
        return cls(config)

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        parts = _parts(prefix, self.packed_modules_mapping)
        kept = {part.endswith(tuple(self.modules_to_not_convert or ())) for part in parts}
        if len(kept) > 1:
            raise ValueError(f"{prefix}: modules_to_not_convert has some of its parts, expected all of a fused layer or none")
        return UnquantizedLinearMethod() if kept.pop() else XpuFp4FPQuantMethod(self)

    def get_checkpoint_weight_mapper(self) -> Any:  # vLLM's is a static method
        """Leaves out the matrix of training."""
        from vllm.model_executor.models.utils import WeightsMapper  # which imports this vLLM's layers

        return super().get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_suffix={f".{BACKWARD}": None})


def _parts(name: str, fused: dict[str, list[str]]) -> list[str]:
    """The names in the files of the layers that vLLM makes one of."""
    found = next((suffix for suffix in fused if name.endswith(suffix)), "")
    return [name.removesuffix(found) + part for part in fused.get(found, [""])]


class XpuFp4FPQuantMethod(FPQuantLinearMethod):
    """vLLM's parameters, our kernel."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **extra_weight_attrs: Any,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            torch.bfloat16,  # of the matrix; the parent takes no other
            weight_loader=weight_loader,
            **extra_weight_attrs,
        )
        for name in (MATRIX, *GLOBAL_SCALES_OF_LAYER):
            parameter = getattr(layer, name)
            parameter.data.fill_(torch.nan)
            parameter.weight_loader = load_the_same(weight_loader, getattr(layer, "prefix", type(layer).__name__), name)

    def process_weights_after_loading(self, layer: Any) -> None:
        name = getattr(layer, "prefix", type(layer).__name__)
        config = self.quant_config.config
        scheme = scheme_of(config, _WHERE)
        for of in GLOBAL_SCALES_OF_LAYER:
            check_global_scale(scheme, layer._parameters.pop(of).data, f"{name}.{of}")
        matrix = layer._parameters.pop(MATRIX).data
        scheme = with_matrix(scheme, None if matrix.isnan().all() else matrix, config, f"{name}.{MATRIX}")
        layer.weight = nn.Parameter(layer._parameters.pop(PACKED).data, requires_grad=False)
        layer.weight_scale = nn.Parameter(layer._parameters.pop(SCALE).data, requires_grad=False)
        self.kernel = XpuFp4LinearKernel.of(scheme)
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.kernel.apply_weights(layer, x, bias)
