# SPDX-License-Identifier: Apache-2.0
"""The MXFP4 linear kernel that vLLM selects, for CPU and XPU."""

import functools
import os
from dataclasses import replace
from itertools import zip_longest
from typing import Any, get_args

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels.linear import MxFp4LinearKernel, MxFp4LinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape, QuantKey, ScaleDesc, kMxfp4Dynamic
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from ..._library import BLOCK
from ...backends import Backend, backend, cpu_backend_name
from ...checkpoints.description import Scheme
from ...checkpoints.errors import CheckpointError
from ...checkpoints.reader import CONFIG, check_keys
from ...functional import Group, modes_of
from ...weight import PackedWeight
from . import logger

SCHEMES: dict[QuantKey | None, Scheme] = {
    kMxfp4Dynamic: Scheme("w4a4"),
    **{
        QuantKey(torch.int8, ScaleDesc(torch.uint8, False, GroupShape(1, group))): Scheme("w4a8", group=group)
        for group in get_args(Group)
    },
    None: Scheme("w4a16"),
}
"""What vLLM calls the activations of each scheme."""

REQUEST = "XPU_FP4_ACTIVATIONS"
_BY_REQUEST = {"mxint8": Scheme("w4a8")}

_TENSORS = ("weight", "weight_scale", "xpu_fp4_expanded")
"""A layer has the tensors of its PackedWeight there, in that order; those that its form lacks are None."""


def key_of(scheme: Scheme) -> QuantKey | None:
    """Returns what vLLM calls the activations of a scheme."""
    plain = replace(scheme, scale_mode="even", hadamard=0, weight_global_scale=1.0).arguments()
    return next(key for key, known in SCHEMES.items() if known.arguments() == plain)


def requested_scheme() -> Scheme | None:
    """The scheme that XPU_FP4_ACTIVATIONS asks for in every layer, whatever the checkpoint says; None if it is not set."""
    request = os.environ.get(REQUEST)
    if not request:
        return None
    if request not in _BY_REQUEST:
        raise ValueError(f"{REQUEST} is {request!r}, expected {' or '.join(_BY_REQUEST)}")
    return _BY_REQUEST[request]


def served_scheme(stored: Scheme) -> Scheme:
    """Returns what a layer that is stored for that computes: that, or what every layer is asked for, which is logged once."""
    request = requested_scheme()
    if request is None:
        return stored
    _announce(request)
    return replace(request, hadamard=stored.hadamard)


@functools.cache
def _announce(request: Scheme) -> None:
    """Once in each process."""
    logger.info("%s=%s: every MXFP4 layer runs in %s, whatever the checkpoint says", REQUEST, os.environ[REQUEST], request)


@functools.cache
def platform_backend() -> Backend | None:
    """The backend that serves the tensors of vLLM's platform, None if the platform is neither CPU nor XPU."""
    if current_platform.is_xpu():
        return backend("xpu")
    if current_platform.is_cpu():
        return backend(cpu_backend_name())
    return None


def refusal_of_checkpoint() -> str | None:
    """Why the checkpoint that vLLM is loading would compute noise here, None if it would not or nothing is being loaded.

    vLLM skips some keys that change what a layer computes (Quark's rotations), and has no kernels for others on CPU.
    """
    loading = get_current_vllm_config_or_none()
    model = None if loading is None else loading.model_config
    if model is None:
        return None
    # It may stand with the language model, where a model has several parts.
    parts = (model.hf_config, model.hf_config.get_text_config())
    config = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    try:
        check_keys(config if isinstance(config, dict) else {}, f"{model.model}/{CONFIG}: quantization_config")
    except CheckpointError as error:
        return str(error)
    return None


class XpuFp4LinearKernel(MxFp4LinearKernel):
    """MXFP4 weights with activations quantized to MXFP4 (W4A4, scale rule `even`) or MXINT8 (W4A8), or left alone (W4A16).

    Weights are taken as checkpoints store them: uint8 [N, K/2] and scales uint8 [N, K/32]. Activations are float32, float16 or
    bfloat16 [..., K], with any number of leading dimensions. XPU_FP4_ACTIVATIONS=mxint8 makes each layer W4A8 in groups of 128.
    With XPU_FP4_EXPAND_WEIGHTS=1 a GPU keeps weights, but for W4A16, in the form of `xpu_fp4.expand` too: faster prefill for
    three times the memory of weights.
    """

    def __init__(self, config: MxFp4LinearLayerConfig) -> None:
        super().__init__(config)
        self._scheme = served_scheme(SCHEMES[config.activation_quant_key])

    @classmethod
    def of(cls, scheme: Scheme) -> "XpuFp4LinearKernel":
        """The kernel for a scheme that vLLM cannot ask for: transforms, FP-Quant's. ValueError if it cannot run here."""
        config = MxFp4LinearLayerConfig(key_of(scheme))
        for can, reason in (cls.is_supported(), cls.can_implement(config)):
            if not can:
                raise ValueError(f"{cls.__name__}, which alone computes {scheme}: {reason}")
        kernel = cls(config)
        asked_for = requested_scheme()
        kernel._scheme = scheme if asked_for is None else replace(scheme, mode=asked_for.mode, group=asked_for.group)
        return kernel

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        state = platform_backend()
        if state is None:
            return False, f"xpu_fp4 serves vLLM's platforms cpu and xpu, this one is {current_platform.device_type}"
        if not state.available:
            return False, f"xpu_fp4's {state.name} backend is off: {state.detail} (`xpu-fp4 doctor` shows more)"
        return True, None

    @classmethod
    def can_implement(cls, config: MxFp4LinearLayerConfig) -> tuple[bool, str | None]:
        key = config.activation_quant_key
        if key not in SCHEMES:
            return False, (
                f"the checkpoint asks for activations quantized as {key}; xpu_fp4 has dynamic MXFP4 activations (W4A4), "
                "dynamic MXINT8 ones (W4A8) and unquantized ones (W4A16): quantize the model to one of these"
            )
        refusal = refusal_of_checkpoint()
        return refusal is None, refusal

    def process_weights_after_loading(self, layer: Any) -> None:
        """Prepacks the weight where the backend can. Raises ValueError if its blocks and scales do not match."""
        codes, scale = layer.weight.data, layer.weight_scale.data
        _check_blocks(getattr(layer, "prefix", type(layer).__name__), codes, scale, self._scheme.hadamard)
        weight = PackedWeight.stored(codes, scale).best()
        can_expand = weight.form == "stored" and self._scheme.mode in modes_of("expanded")
        if can_expand and os.environ.get("XPU_FP4_EXPAND_WEIGHTS") == "1":
            weight = weight.expanded()
        layer.xpu_fp4_form = (weight.form, weight.n, weight.k)
        for name, tensor in zip_longest(_TENSORS, weight.tensors):
            if tensor is not None and name in layer._parameters:
                replace_parameter(layer, name, tensor)
            else:
                setattr(layer, name, tensor)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N] of x's dtype."""
        form, n, k = layer.xpu_fp4_form
        tensors = [getattr(layer, name) for name in _TENSORS]
        weight = PackedWeight(form, n, k, tuple(tensor for tensor in tensors if tensor is not None))
        return weight.linear(x, bias, **self._scheme.arguments(), input_offset=getattr(layer, "input_offset", None))


def _check_blocks(name: str, weight: Tensor, scale: Tensor, hadamard: int) -> None:
    # vLLM rounds the shard's number of scales down, and would pair weights with the scales of other blocks.
    if weight.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ValueError(f"{name}: weight is {weight.dtype} and weight_scale {scale.dtype}, expected uint8 for both")
    n, half_k = weight.shape
    if scale.shape != (n, half_k * 2 / BLOCK):
        raise ValueError(
            f"{name}: weight [{n}, K/2 = {half_k}] needs weight_scale [{n}, K/{BLOCK}], got {list(scale.shape)}. The K of a "
            f"tensor-parallel shard must be a multiple of {BLOCK}: choose another tensor parallel size"
        )
    if hadamard and half_k * 2 % hadamard != 0:
        raise ValueError(
            f"{name}: the input of a tensor-parallel shard has {half_k * 2} elements, expected a multiple of {hadamard}, the "
            "size of its Hadamard transform: choose another tensor parallel size"
        )
