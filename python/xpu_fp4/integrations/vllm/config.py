# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors checkpoints with MXFP4 weights and what vLLM alone does not compute for them, or not here.

vLLM gives every layer with MXFP4 weights its W4A4 scheme, so it would quantize activations to MXFP4 in any case. A layer's own
configuration says which they are, and our key of the `quantization_config`, which vLLM keeps. Both are read here, layer by
layer, as `checkpoints` reads them. A Hadamard transform at a layer's input, which vLLM would compute around the layer and on
CUDA alone, goes into our kernel, and so does an input offset, whose tensors vLLM does not know. Quark's checkpoints need none
of this: vLLM passes on what they say.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from vllm.model_executor.kernels.linear import init_mxfp4_linear_kernel
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsW4A4Mxfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import (
    CompressedTensorsLinearTransformMethod,
    get_layer_partition_names,
    get_linear_transform_schemes,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import ChannelQuantScaleParameter, RowvLLMParameter

from ..._library import BLOCK
from ...checkpoints.compressed_tensors import activations_scheme, names_of, weight_only_scheme
from ...checkpoints.description import Scheme
from ...checkpoints.errors import CheckpointError
from ...checkpoints.patterns import PREFIX
from ...checkpoints.transforms import InputTransforms
from ...functional import Hadamard
from .experts import are_ours
from .experts_methods import CompressedTensorsExperts
from .kernel import XpuFp4LinearKernel, key_of
from .loading import load_the_same

_ORDINARY = names_of(Scheme("w4a4"))
_PROJECTION = nn.Linear(1, 1, device="meta")
"""Stands for an expert's, of which vLLM has no module: targets may name the class."""
_GROUP = "xpu_fp4_group"
"""A key of vLLM's dictionaries of targets: the entry of config_groups that a target is of."""


class CompressedTensorsMxfp4(CompressedTensorsW4A4Mxfp4):
    """vLLM's scheme, its kernel selected for the activations of `scheme`, or ours if these are transformed."""

    def __init__(self, scheme: Scheme) -> None:
        # The parent's is not called: it selects a kernel for W4A4.
        self.group_size = BLOCK
        self.scheme = scheme
        transforms = scheme.hadamard or scheme.input_offset
        self.kernel = XpuFp4LinearKernel.of(scheme) if transforms else init_mxfp4_linear_kernel(key_of(scheme))

    def create_weights(
        self,
        layer: Any,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        super().create_weights(
            layer=layer,
            output_partition_sizes=output_partition_sizes,
            input_size_per_partition=input_size_per_partition,
            params_dtype=params_dtype,
            weight_loader=weight_loader,
            **kwargs,
        )
        if not self.scheme.input_offset:
            return
        names = names_of(self.scheme)
        for ordinary, name in ((_ORDINARY.packed, names.packed), (_ORDINARY.scale, names.scale)):
            layer.register_parameter(name, layer._parameters.pop(ordinary))
        bias = torch.empty(sum(output_partition_sizes), dtype=params_dtype)
        layer.register_parameter(names.bias, ChannelQuantScaleParameter(data=bias, output_dim=0, weight_loader=weight_loader))
        offset = torch.full((input_size_per_partition,), torch.nan, dtype=torch.float32)
        loader = load_the_same(weight_loader, getattr(layer, "prefix", type(layer).__name__), "input offsets")
        layer.register_parameter(names.input_offset, RowvLLMParameter(data=offset, input_dim=0, weight_loader=loader))

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.scheme.input_offset:
            found, ordinary = names_of(self.scheme), _ORDINARY
            for name, before in ((ordinary.packed, found.packed), (ordinary.scale, found.scale), (ordinary.bias, found.bias)):
                # A bias of the model itself is in it.
                layer._parameters[name] = nn.Parameter(layer._parameters.pop(before).data, requires_grad=False)
        super().process_weights_after_loading(layer)


class ActivationsAwareConfig(CompressedTensorsConfig):
    """vLLM's configuration, but layers with MXFP4 weights get the scheme that the checkpoint says, transforms included."""

    @classmethod
    def _quantization_scheme_map_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        schemes: dict[str, Any] = super()._quantization_scheme_map_from_config(config)
        for name, group in config.get("config_groups", {}).items():
            for target in group.get("targets") or []:
                schemes[target][_GROUP] = name
        return schemes

    def get_scheme(self, layer: nn.Module, layer_name: str | None = None) -> CompressedTensorsScheme | None:
        args = self.get_scheme_dict(layer, layer_name)
        if args and self._is_mxfp4(args["weights"]):
            weight_only = weight_only_scheme(self.config or {}, args[_GROUP], "quantization_config")
            size = self._hadamard(layer, layer_name or "")
            if size or weight_only.input_offset or _are_unquantized_or_int(args["input_activations"]):
                return CompressedTensorsMxfp4(replace(self._scheme(args, layer_name or ""), hadamard=size))
        return super().get_scheme(layer, layer_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            scheme = self._experts_scheme(layer, prefix)
            if scheme is not None and are_ours(layer.moe_config, scheme, vllm_has_cpu_class=False):
                return CompressedTensorsExperts(layer.moe_config, scheme, prefix)
        method = super().get_quant_method(layer, prefix)
        if isinstance(layer, ParallelLMHead):  # whose transforms vLLM skips
            where = "quantization_config.transform_config"
            InputTransforms((self.config or {}).get("transform_config"), where).refuse_at(prefix, ["Linear"])
        if not isinstance(method, CompressedTensorsLinearTransformMethod):
            return method
        if not isinstance(getattr(layer, "scheme", None), CompressedTensorsMxfp4):
            raise CheckpointError(
                f"quantization_config.transform_config transforms the input of {prefix}, whose weight is not MXFP4, which "
                "neither xpu_fp4 nor vLLM can do here"
            )
        return method.quant_method  # our kernel does what the other would do around it

    def get_checkpoint_weight_mapper(self) -> Any:  # vLLM's is a static method
        """Leaves out the matrices of transforms, which are known without the files."""
        from vllm.model_executor.models.utils import WeightsMapper  # which imports this vLLM's layers

        transforms = self.transform_config.config_groups if self.transform_config else ()
        matrices = WeightsMapper(orig_to_new_suffix={f".{name}_input.weight": None for name in transforms})
        return super().get_checkpoint_weight_mapper() | matrices

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Gives transforms vLLM's names of layers too."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        for scheme in self.transform_config.config_groups.values() if self.transform_config else ():
            for apply in scheme.apply:
                apply.targets = _renamed(apply.targets, hf_to_vllm_mapper)
                apply.ignore = _renamed(apply.ignore, hf_to_vllm_mapper)

    def _scheme(self, args: dict[str, Any], name: str) -> Scheme:
        """Returns what the entries of a layer with MXFP4 weights say, but for its transform."""
        weight_only = weight_only_scheme(self.config or {}, args[_GROUP], "quantization_config")
        activations = args["input_activations"] and args["input_activations"].model_dump(mode="json")
        return activations_scheme(activations, weight_only, f"input_activations of {name}")

    def _experts_scheme(self, layer: RoutedExperts, name: str) -> Scheme | None:
        """The scheme of a layer of MXFP4 experts, None if they are none or vLLM has a method for their activations alone.

        CheckpointError if they have an input offset, ValueError if their projections' transforms differ.
        """
        self._add_fused_moe_to_target_scheme_map()
        projections = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        names = [f"{name}.0.{projection}" for projection in projections]
        args, *others = (self.get_scheme_dict(layer, projection) for projection in names)
        if not args or any(other != args for other in others) or not self._is_mxfp4(args["weights"]):
            return None  # vLLM refuses those that differ
        if self._is_mxfp4_w4a8_fp8(args["weights"], args["input_activations"]):
            return None
        scheme = self._scheme(args, name)
        if scheme.input_offset:
            raise CheckpointError(
                f"{name} has input offsets, which checkpoints of xpu_fp4 have for linear layers and not for experts"
            )
        sizes = {self._hadamard(_PROJECTION, projection) for projection in names}
        if len(sizes) > 1:
            raise ValueError(f"{name}: its projections have different transforms, expected one for all of the experts")
        return replace(scheme, hadamard=sizes.pop())

    def _hadamard(self, layer: nn.Module, name: str) -> Hadamard:
        """The size of the transform at a layer's input, 0 if there is none. ValueError if parts that are fused differ in it."""
        inputs, _ = get_linear_transform_schemes(layer, name, self.transform_config, self.packed_modules_mapping)
        parts = get_layer_partition_names(name, self.packed_modules_mapping)
        sizes = {inputs[part].scheme.head_dim or 0 if part in inputs else 0 for part in range(len(parts))}
        if len(sizes) > 1:
            raise ValueError(f"{name}: its parts have different transforms, expected one for all of a fused layer")
        return cast(Hadamard, sizes.pop())


def _renamed(entries: list[str], mapper: Any) -> list[str]:
    """Names of layers as vLLM has them; patterns and classes stay."""
    renamed = (mapper.map_name(entry) if "." in entry and not entry.startswith(PREFIX) else entry for entry in entries)
    return [entry for entry in renamed if entry is not None]


def _are_unquantized_or_int(activations: Any) -> bool:
    return activations is None or activations.type == "int"
