# SPDX-License-Identifier: Apache-2.0
"""Layers of MXFP4 experts: the class that vLLM calls, and where it stands beside vLLM's own."""

from dataclasses import replace
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm import envs
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend, backend_to_kernel_cls
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey, kMxfp4Dynamic, kMxfp4Static
from vllm.platforms import current_platform

from ..._library import BLOCK
from ...checkpoints.description import Scheme
from ...weight import Gate, PackedExperts
from .kernel import platform_backend, requested_scheme

_GATES = {
    MoEActivation.SILU: Gate(),
    MoEActivation.SWIGLUOAI: Gate("swiglu_oai", interleaved=True),  # vLLM fixes alpha and limit of this one too
}


class XpuFp4Experts(mk.FusedMoEExpertsModular):
    """Computes both products of each expert, the activation between them, and their weighted sum: x [T, H] -> [T, H].

    Weights are those of a `PackedExperts`. Experts of other ranks, which the expert map gives as -1, add nothing. W4A4 and W4A8
    have the same bits whatever tokens come together, W4A16 on one backend.
    """

    def __init__(self, moe_config: FusedMoEConfig, quant_config: FusedMoEQuantConfig, **more: Any) -> None:
        super().__init__(moe_config, quant_config, **more)
        self._weights: PackedExperts | None = None
        self._scheme = Scheme("w4a16")

    def serve(self, weights: PackedExperts, scheme: Scheme) -> None:
        """Must be called once the layer has these weights. Their tensors then come with each call, as vLLM has it."""
        self._weights, self._scheme = replace(weights, tensors=()), scheme

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        state = platform_backend()
        return state is not None and state.available

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
        return weight_key == kMxfp4Static and activation_key in (None, kMxfp4Dynamic)

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation in _GATES

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    @staticmethod
    def _supports_shape(hidden_dim: int) -> bool:
        return hidden_dim % BLOCK == 0

    @staticmethod
    def _supports_batch_invariance() -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        activation: MoEActivation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)  # the op has memory of its own

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        assert self._weights is not None, "serve comes first"
        form, sizes = self._weights.form, (self._weights.experts, self._weights.hidden, self._weights.intermediate)
        tensors = (w1, w2) if form == "prepacked" else (w1, self.w1_scale, w2, self.w2_scale)
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)  # vLLM has multiplied the input by them
        y = PackedExperts(form, *sizes, tensors).layer(
            hidden_states,
            topk_ids,
            topk_weights,
            self.w1_bias,
            self.w2_bias,
            gate=_GATES[activation],
            expert_map=expert_map,
            **self._scheme.arguments_of_experts(),
        )
        output.copy_(y)


def are_ours(moe: FusedMoEConfig, scheme: Scheme, *, vllm_has_cpu_class: bool = True) -> bool:
    """Whether our class computes these experts: where it can, unless vLLM has a class of its own that is not to be passed over.

    vLLM's, on XPU and on CPUs with AMX, come first, because ours have not run there. They know no MXINT8 activations and no
    transforms, that for CPUs no MXFP4 activations either, and VLLM_DISABLED_KERNELS passes over classes by their names.
    """
    request = requested_scheme()
    if moe.moe_backend != "auto" or _is_disabled(XpuFp4Experts) or not XpuFp4Experts._supports_current_device():
        return False
    if (request or scheme).mode == "w4a8" or scheme.hadamard:
        return True
    if current_platform.is_xpu():
        return _is_disabled(_class_of(Mxfp4MoeBackend.XPU)) or not _is_xe2_or_xe3()
    vllms = _class_of(Mxfp4MoeBackend.CPU)
    can_run = vllm_has_cpu_class and scheme.mode == "w4a16" and vllms._supports_current_device()
    return not can_run or _is_disabled(vllms)


def _class_of(backend: Mxfp4MoeBackend) -> Any:
    return backend_to_kernel_cls(backend)[0]


def _is_disabled(experts: type) -> bool:
    return experts.__name__ in envs.VLLM_DISABLED_KERNELS


def _is_xe2_or_xe3() -> bool:
    """Whether vLLM's class for XPU runs on this one, as it asks itself."""
    return bool(torch.ops._xpu_C.is_xe2_arch() or torch.ops._xpu_C.is_xe3_arch())
