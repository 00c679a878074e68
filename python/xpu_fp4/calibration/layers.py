# SPDX-License-Identifier: Apache-2.0
"""Quantizes the linear layers of a block on the inputs that calibration data gives them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import functional
from ..checkpoints.description import Scheme
from ..checkpoints.errors import CheckpointError
from ..modules import MXFP4Linear
from ._emulation import Linear, transform
from .blocks import Call, feed_inputs, stages
from .gptq import Hessian, round_weight

TOO_FEW = 4
"""K / TOO_FEW tokens are the fewest that a layer with K inputs is calibrated on: of fewer, errors would go where none was seen."""
_NAN_SCALE = 255


@dataclass(frozen=True)
class QuantizedLinear:
    """What becomes of an nn.Linear."""

    scheme: Scheme
    codes: Tensor
    """uint8 [N, K/2]"""
    scale: Tensor
    """uint8 [N, K/32]"""
    bias: Tensor | None
    """[N], of the source's dtype; it has the offset's share of the output."""
    input_offset: Tensor | None
    """float32 [K]"""

    def module(self, source: nn.Linear) -> MXFP4Linear:
        """The layer that computes in place of the source."""
        made = Linear(
            source.in_features,
            source.out_features,
            self.bias is not None,
            **self.scheme.arguments(),
            input_offset=self.input_offset is not None,
            device="meta",
            dtype=source.weight.dtype,
        )
        parts = {"weight_packed": self.codes, "weight_scale": self.scale, "bias": self.bias, "input_offset": self.input_offset}
        for name, part in parts.items():
            if part is not None:
                setattr(made, name, nn.Parameter(part, requires_grad=False))
        return made.train(source.training)


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def put(model: nn.Module, name: str, result: QuantizedLinear) -> None:
    """Replaces the nn.Linear of that name in a model or in a part of one."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, result.module(linear_of(model, name)))


def round_to_nearest(weight: Tensor, bias: Tensor | None, scheme: Scheme, where: str) -> QuantizedLinear:
    """A layer quantized without data: in the scheme, but for an offset, which only data gives. where: its name, for errors."""
    codes, scale = functional.quantize(transform(weight.detach(), scheme.hadamard), scheme.scale_mode)
    bias = None if bias is None else bias.detach().clone()
    scheme = replace(scheme, input_offset=False)
    return QuantizedLinear(scheme, codes.view(torch.uint8), _finite(scale.view(torch.uint8), where), bias, None)


def quantize_block(
    block: nn.Module, calls: Sequence[Call], schemes: Mapping[str, Scheme], where: str
) -> tuple[dict[str, QuantizedLinear], list[str]]:
    """Quantizes the linears of a block, in place, each on what it gets from those before it, which are quantized by then.

    Args:
        calls: what the block is called with on the calibration data.
        schemes: of the linears to quantize, by their names in the block.
        where: the block's name, for errors.

    Returns what became of each, and the names of those that saw too few tokens, or none, and were rounded to nearest.
    """
    results: dict[str, QuantizedLinear] = {}
    rounded: list[str] = []
    for stage in stages(block, schemes, calls[0]):
        groups = [group for names in stage for group in _groups(block, names, schemes)]
        _gather(block, calls, groups)
        for group in groups:
            if group.hessian.tokens * TOO_FEW < group.hessian.k:
                rounded += group.names
                continue
            for name, result in _quantize_group(block, group, where).items():
                put(block, name, result)
                results[name] = result
    rounded += [name for name in schemes if name not in results and name not in rounded]
    for name in rounded:
        linear = linear_of(block, name)
        results[name] = round_to_nearest(linear.weight, linear.bias, schemes[name], f"{where}.{name}")
        put(block, name, results[name])
    return results, rounded


class _Mean:
    """Of the inputs [T, K] that a layer is given."""

    def __init__(self, k: int) -> None:
        self._sum = torch.zeros(k, dtype=torch.float64)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        self._sum += x.sum(0, dtype=torch.float64)
        self._tokens += len(x)

    def value(self) -> Tensor:
        """Float64 [K]; zeros if there was no input."""
        return self._sum / max(1, self._tokens)


class _Group:
    """Linears of one block that share an input and a scheme, and what is known of that input.

    If their bias makes up for the mean error, rounding only has to keep the error around it small.
    """

    def __init__(self, names: list[str], k: int, scheme: Scheme, *, has_bias: bool) -> None:
        self.names = names
        self.scheme = scheme
        self.corrects_mean = has_bias or scheme.input_offset
        self.given = _Mean(k)
        self.hessian = Hessian(k)
        self.offset: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """x [T, K], as the linears get it."""
        if not self.scheme.input_offset:
            self.given.add(x)
        self.hessian.add(multiplied_input(x, self.scheme, self.offset))


def _groups(block: nn.Module, names: list[str], schemes: Mapping[str, Scheme]) -> list[_Group]:
    """Of linears that share an input, those of one scheme each."""
    alike: defaultdict[tuple[Scheme, bool], list[str]] = defaultdict(list)
    for name in names:
        alike[schemes[name], linear_of(block, name).bias is not None].append(name)
    k = linear_of(block, names[0]).in_features
    return [_Group(members, k, scheme, has_bias=has_bias) for (scheme, has_bias), members in alike.items()]


def _gather(block: nn.Module, calls: Sequence[Call], groups: Sequence[_Group]) -> None:
    """Offsets first, since a Hessian is of inputs that have lost them."""
    centered = [group for group in groups if group.scheme.input_offset]
    if centered:
        feed_inputs(block, calls, _receivers((group, group.given.add) for group in centered))
        for group in centered:
            group.offset = group.given.value().float()
    feed_inputs(block, calls, _receivers((group, group.add) for group in groups))


def _receivers(pairs: Iterable[tuple[_Group, Callable[[Tensor], None]]]) -> dict[str, Callable[[Tensor], None]]:
    return {group.names[0]: receive for group, receive in pairs}


def multiplied_input(x: Tensor, scheme: Scheme, offset: Tensor | None) -> Tensor:
    """The values, float32 [T, K], that a layer of that scheme multiplies with its weight's when it gets x [T, K]."""
    transformed = transform(x, scheme.hadamard, offset)
    if scheme.mode == "w4a4":
        return functional.dequantize(*functional.quantize(transformed, scheme.scale_mode))
    if scheme.mode == "w4a8":
        return functional.mxint8_dequantize(*functional.mxint8_quantize(transformed, scheme.group))
    return transformed.to(x.dtype).float()


def _quantize_group(block: nn.Module, group: _Group, where: str) -> dict[str, QuantizedLinear]:
    where = f"{where}.{group.names[0]}"
    hessian = group.hessian.centered() if group.corrects_mean else group.hessian.squares
    if not hessian.isfinite().all():
        raise ValueError(f"the inputs of {where} hold NaN or Inf on the calibration data")
    linears = [linear_of(block, name) for name in group.names]
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    turned = transform(weight, group.scheme.hadamard)
    scale = _finite(functional.quantize(turned, group.scheme.scale_mode)[1].view(torch.uint8), where)
    codes = round_weight(turned, scale, hessian)
    correction = None
    if group.corrects_mean:
        values = functional.dequantize(codes, scale)
        correction = weight.double() @ group.given.value() - values.double() @ group.hessian.mean()
    results = {}
    begin = 0
    for name, linear in zip(group.names, linears, strict=True):
        rows = slice(begin, begin + linear.out_features)
        begin = rows.stop
        bias = None
        if correction is not None:
            own = 0 if linear.bias is None else linear.bias.detach().double()
            bias = (own + correction[rows]).to(linear.weight.dtype)
        results[name] = QuantizedLinear(group.scheme, codes[rows].clone(), scale[rows].clone(), bias, group.offset)
    return results


def _finite(scale: Tensor, where: str) -> Tensor:
    if (scale == _NAN_SCALE).any():
        raise CheckpointError(f"the weight of {where} holds NaN or Inf")
    return scale
