# SPDX-License-Identifier: Apache-2.0
"""Experts that Transformers fuses, as linear layers of their own while they are calibrated."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..checkpoints.description import Scheme
from ..checkpoints.fused import stack
from ..checkpoints.quantized import QuantizedLinear
from ..modules import MXFP4Linear
from ..moe import PROJECTIONS, MXFP4Experts, experts_kind, put
from ..packed_module import frozen
from ..reference import gate


class UnfusedExperts(nn.Module):
    """An experts module of Transformers as `0.gate_up_proj`, `0.down_proj`, `1.gate_up_proj` ...: nn.Linear of its memory."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.source = (source,)  # in a tuple, so that it is no submodule
        kind = experts_kind(source)
        self.gate, self.router_on_input = kind.gate, kind.router_on_input
        weights = {name: source.get_parameter(name).detach() for name in PROJECTIONS}
        biases = {name: source._parameters.get(f"{name}_bias") for name in PROJECTIONS}
        for expert in range(len(weights[PROJECTIONS[0]])):
            linears = {}
            for name, weight in weights.items():
                matrix, bias = weight[expert].t() if kind.is_transposed else weight[expert], biases[name]
                linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
                linear.weight = frozen(matrix)
                linear.bias = None if bias is None else frozen(bias.detach()[expert])  # type: ignore[assignment]
                linears[name] = linear
            self.add_module(str(expert), nn.ModuleDict(linears))
        self.train(source.training)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As MXFP4Experts', but that what an expert gives is rounded to x's dtype before it is weighted."""
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert in ids.unique().tolist():
            if not 0 <= expert < len(self._modules):
                continue
            token, slot = torch.where(ids == expert)
            weight = weights[token, slot, None].float()
            given = (weight * x[token].float()).to(x.dtype) if self.router_on_input else x[token]
            gate_up, down = (self.get_submodule(f"{expert}.{name}") for name in PROJECTIONS)
            v = down(gate(gate_up(given), **self.gate.options())).float()
            out.index_add_(0, token, v if self.router_on_input else weight * v)
        return out.to(x.dtype)

    def fused(self, scheme: Scheme) -> MXFP4Experts:
        """All experts together, once each is an MXFP4Linear."""
        made = MXFP4Experts.like(self.source[0], **scheme.arguments_of_experts())
        for name in PROJECTIONS:
            found = [self.get_submodule(f"{expert}.{name}") for expert in range(len(self._modules))]
            linears = [linear for linear in found if isinstance(linear, MXFP4Linear)]
            layers = (QuantizedLinear(scheme, linear.weight_packed.data, linear.weight_scale.data) for linear in linears)
            blocks, scales = stack(layers, len(found))
            made.register_parameter(f"{name}_blocks", frozen(blocks))
            made.register_parameter(f"{name}_scales", frozen(scales))
            if linears[0].bias is not None:
                bias = torch.stack([linear.bias.detach() for linear in linears if linear.bias is not None])
                made.register_parameter(f"{name}_bias", frozen(bias))
        return made


def unfuse(model: nn.Module, names: Iterable[str]) -> None:
    """Puts UnfusedExperts in the place of experts modules of these names."""
    for name in names:
        put(model, name, UnfusedExperts(model.get_submodule(name)))


def fuse(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Puts MXFP4Experts in the place of UnfusedExperts, by their names."""
    for name, scheme in schemes.items():
        unfused = model.get_submodule(name)
        assert isinstance(unfused, UnfusedExperts)
        put(model, name, unfused.fused(scheme))


def schemes_of_each(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes of the linear layers in UnfusedExperts, out of those of the latter. Each expert's
    inputs have another mean, but all share an input offset: they get none."""
    return {
        f"{name}.{layer}": replace(scheme, input_offset=False)
        for name, scheme in schemes.items()
        for layer, module in model.get_submodule(name).named_modules()
        if isinstance(module, nn.Linear)
    }
