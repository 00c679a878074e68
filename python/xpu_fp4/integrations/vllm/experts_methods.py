# SPDX-License-Identifier: Apache-2.0
"""vLLM's methods for experts of gpt-oss, compressed-tensors and Quark, with our class in the place of what they select.

Parameters, their names and their loading stay vLLM's; what is made of them after loading, and the kernel, are ours.
"""

from typing import Any

from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
    mxfp4_w4a16_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend, make_mxfp4_moe_kernel
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_mxfp4 as compressed_tensors,
)
from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, GptOssMxfp4MoEMethod
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkOCP_MX_MoEMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp4Static
from vllm.model_executor.utils import replace_parameter

from ..._library import BLOCK
from ...checkpoints.description import Scheme
from ...weight import PackedExperts
from .experts import XpuFp4Experts, are_ours
from .kernel import SCHEMES, refusal_of_checkpoint, served_scheme


class _Method(FusedMoEMethodBase):
    """What the three have in common, before vLLM's class of each."""

    weight_dtype = "mxfp4"  # loaders ask for it
    mxfp4_backend = Mxfp4MoeBackend.XPU  # whose layout is that of the checkpoint
    experts_cls = XpuFp4Experts
    pads_shards = False

    def __init__(self, moe: FusedMoEConfig, scheme: Scheme, name: str) -> None:
        """name: of the layer, for errors. ValueError if the checkpoint does more than this."""
        FusedMoEMethodBase.__init__(self, moe)  # vLLM's class would select a kernel
        refusal = refusal_of_checkpoint()
        if refusal is not None:
            raise ValueError(f"{name}: {refusal}")
        self.scheme, self.name = served_scheme(scheme), name

    @property
    def supports_eplb(self) -> bool:
        return False

    @property
    def is_monolithic(self) -> bool:
        return False

    def maybe_roundup_sizes(
        self, hidden_size: int, intermediate_size_per_partition: int, act_dtype: Any, moe_parallel_config: Any
    ) -> tuple[int, int]:
        # vLLM's class is passed over: it knows what its own kernels need.
        hidden_size, inner = FusedMoEMethodBase.maybe_roundup_sizes(
            self, hidden_size, intermediate_size_per_partition, act_dtype, moe_parallel_config
        )
        if self.pads_shards:
            return hidden_size, -(-inner // BLOCK) * BLOCK
        # vLLM rounds the shard's number of scales down, and would pair weights with the scales of other blocks.
        for multiple in (BLOCK, self.scheme.hadamard):
            if multiple and inner % multiple != 0:
                raise ValueError(
                    f"{self.name}: a shard of the experts has {inner} intermediate columns, expected a multiple of {multiple}: "
                    "choose another tensor parallel size, or expert parallelism"
                )
        return hidden_size, inner

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Prepacks the weights where the backend can, and makes the kernel. ValueError if vLLM asks for what ours cannot do."""
        if layer.activation == MoEActivation.SILU and layer.swiglu_limit is not None:
            raise ValueError(f"{self.name}: silu with a limit, {layer.swiglu_limit}, is not among xpu_fp4's activations")
        names = ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
        weights = PackedExperts.stored(*(getattr(layer, name).data for name in names)).best()
        if weights.form == "prepacked":  # the scales are in the weights
            del layer.w13_weight_scale, layer.w2_weight_scale
            for name, tensor in zip(("w13_weight", "w2_weight"), weights.tensors, strict=True):
                replace_parameter(layer, name, tensor)
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.moe_kernel = make_mxfp4_moe_kernel(
            moe_quant_config=self.moe_quant_config,
            moe_config=self.moe,
            experts_cls=self.experts_cls,
            mxfp4_backend=self.mxfp4_backend,
            routing_tables=layer._expert_routing_tables(),
        )
        self.moe_kernel.fused_experts.serve(weights, self.scheme)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Has the scales and biases. It leaves activations alone: our class quantizes them."""
        return mxfp4_w4a16_moe_quant_config(
            w1_scale=getattr(layer, "w13_weight_scale", None),
            w2_scale=getattr(layer, "w2_weight_scale", None),
            w1_bias=getattr(layer, "w13_bias", None),
            w2_bias=getattr(layer, "w2_bias", None),
        )


class GptOssExperts(_Method, GptOssMxfp4MoEMethod):
    """gpt-oss' own checkpoints, whose loader cuts between blocks and leaves the rest of the last shard zeros."""

    weight_dtype = "gpt_oss_mxfp4"
    pads_shards = True


class CompressedTensorsExperts(_Method, compressed_tensors.CompressedTensorsW4A4Mxfp4MoEMethod):
    group_size = BLOCK

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        for name in ("w13_weight", "w2_weight"):
            setattr(layer, name, nn.Parameter(layer._parameters.pop(f"{name}_packed").data, requires_grad=False))
        super().process_weights_after_loading(layer)


class QuarkExperts(_Method, QuarkOCP_MX_MoEMethod):
    static_input_scales = False

    def __init__(self, moe: FusedMoEConfig, scheme: Scheme, name: str) -> None:
        super().__init__(moe, scheme, name)
        self.has_bias = moe.has_bias


class GptOssConfig(GptOssMxfp4Config):
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        scheme = SCHEMES[None]
        if isinstance(layer, RoutedExperts) and are_ours(layer.moe_config, scheme):
            return GptOssExperts(layer.moe_config, scheme, prefix)
        return super().get_quant_method(layer, prefix)


class QuarkWithExpertsConfig(QuarkConfig):
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            weights, activations, method = self.get_quant_method_target(prefix, type(layer))
            scheme = SCHEMES.get(activations)
            is_mxfp4 = method is QuarkOCP_MX_MoEMethod and weights == kMxfp4Static
            if is_mxfp4 and scheme is not None and are_ours(layer.moe_config, scheme):
                return QuarkExperts(layer.moe_config, scheme, prefix)
        return super().get_quant_method(layer, prefix)
