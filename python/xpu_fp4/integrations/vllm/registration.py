# SPDX-License-Identifier: Apache-2.0
"""What `register` does where vLLM is one that we know. All that can fail with another vLLM comes before the first change."""

import dataclasses
import inspect
import os

import vllm.model_executor.kernels.linear as linear_kernels
from vllm.model_executor.kernels.linear import MxFp4LinearLayerConfig, register_linear_kernel
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.platforms import PlatformEnum, current_platform

from .config import ActivationsAwareConfig
from .experts import XpuFp4Experts
from .experts_methods import GptOssConfig, QuarkWithExpertsConfig
from .fp_quant import XpuFp4FPQuantConfig
from .kernel import REQUEST, XpuFp4LinearKernel

_CONFIGS = {
    "compressed-tensors": ActivationsAwareConfig,
    "fp_quant": XpuFp4FPQuantConfig,
    "gpt_oss_mxfp4": GptOssConfig,
    "quark": QuarkWithExpertsConfig,
}
"""Ours in the place of vLLM's configurations of that name."""


def register_kernel_and_config() -> None:
    """Raises NotImplementedError if vLLM's kernel interface asks for more than we know of."""
    unknown = {field.name for field in dataclasses.fields(MxFp4LinearLayerConfig)} - {"activation_quant_key"}
    if unknown:
        raise NotImplementedError(f"MxFp4LinearLayerConfig has unknown fields: {', '.join(sorted(unknown))}")
    for ours in (XpuFp4LinearKernel, XpuFp4Experts):
        if inspect.isabstract(ours):
            abstract = ", ".join(sorted(ours.__abstractmethods__))
            raise NotImplementedError(f"{ours.__base__.__name__} has unknown abstract methods: {abstract}")
    runs_here, _ = XpuFp4LinearKernel.is_supported()
    # Behind what is registered already: on XPU vLLM's own kernel stays first, and ours takes what it refuses.
    for platform in (PlatformEnum.CPU, PlatformEnum.XPU):
        register_linear_kernel(XpuFp4LinearKernel, platform, "mxfp4")
        if os.environ.get(REQUEST):
            # But not where other activations are asked for, of which vLLM's knows nothing.
            kernels = linear_kernels._POSSIBLE_MXFP4_KERNELS[platform]
            kernels.insert(0, kernels.pop())
    if not runs_here:
        return
    for name, config in _CONFIGS.items():
        register_quantization_config(name)(config)
        # vLLM does this for methods that are new to it; its list for XPU lacks Quark. An empty list, as on CPU, stands for all.
        supported = current_platform.supported_quantization
        if supported and name not in supported:
            supported.append(name)
