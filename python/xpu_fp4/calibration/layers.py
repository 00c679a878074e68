# SPDX-License-Identifier: Apache-2.0
"""Quantizes the linear layers of a block on the inputs that calibration data gives them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import functional
from ..checkpoints.description import Scheme
from ..checkpoints.quantized import QuantizedLinear, round_to_nearest
from ..reference import transform
from .blocks import Call, feed_inputs, stages
from .gptq import Products, corrected, round_weight

TOO_FEW = 4
"""A layer with K inputs takes K / TOO_FEW tokens to be calibrated: of fewer, errors would go where no input was seen."""


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def put(model: nn.Module, name: str, result: QuantizedLinear) -> None:
    """Replaces the nn.Linear of that name in a model or in a part of one."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, result.module(linear_of(model, name)))


def quantize_block(
    block: nn.Module,
    calls: Sequence[Call],
    schemes: Mapping[str, Scheme],
    where: str,
    originals: Mapping[str, Sequence[Tensor]] | None = None,
) -> tuple[dict[str, QuantizedLinear], list[str]]:
    """Quantizes the linears of a block, in place, each on what it gets from those before it, which are quantized by then.

    Args:
        calls: what the block is called with on the calibration data.
        schemes: of the linears to quantize, by their names in the block.
        where: the block's name, for errors.
        originals: the inputs [T, K] that the original model gives each linear, call by call. If given, weights make up for a
            part of what the inputs have lost on the way, but for those of experts, which get other tokens than the original's.

    Returns what became of each, and the names of those that saw too few tokens, or none, and were rounded to nearest.
    """
    results: dict[str, QuantizedLinear] = {}
    rounded: list[str] = []
    for stage in stages(block, schemes, calls[0]):
        known = originals if len(stage) == 1 else None
        groups = [group for names in stage for group in _groups(block, names, schemes, known)]
        _gather(block, calls, groups)
        for group in groups:
            if group.hessian.tokens * TOO_FEW < group.k:
                rounded += group.names
                continue
            for name, result in _quantize_group(block, group, where).items():
                put(block, name, result)
                results[name] = result
    rounded += [name for name in schemes if name not in results and name not in rounded]
    for name in rounded:
        results[name] = round_to_nearest(linear_of(block, name).weight, schemes[name], f"{where}.{name}")
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

    def __init__(self, names: list[str], k: int, scheme: Scheme, originals: Sequence[Tensor] | None, *, has_bias: bool) -> None:
        self.names = names
        self.k = k
        self.scheme = scheme
        self.corrects_mean = has_bias or scheme.input_offset
        self.given = _Mean(k)
        self.hessian = Products(k)
        self.lag = None if originals is None else Products(k)
        self.offset: Tensor | None = None
        self._originals = iter(originals or ())

    def add(self, x: Tensor) -> None:
        """x [T, K], as the linears get it."""
        if not self.scheme.input_offset:
            self.given.add(x)
        multiplied = multiplied_input(x, self.scheme, self.offset)
        self.hessian.add(multiplied, multiplied)
        if self.lag is not None:
            wanted = transform(next(self._originals), self.scheme.hadamard, self.offset)
            self.lag.add(wanted - multiplied, multiplied)

    def value(self, products: Products) -> Tensor:
        """As rounding has to see them."""
        return products.centered() if self.corrects_mean else products.sum


def _groups(
    block: nn.Module,
    names: list[str],
    schemes: Mapping[str, Scheme],
    originals: Mapping[str, Sequence[Tensor]] | None,
) -> list[_Group]:
    """Of linears that share an input, those of one scheme each."""
    alike: defaultdict[tuple[Scheme, bool], list[str]] = defaultdict(list)
    for name in names:
        alike[schemes[name], linear_of(block, name).bias is not None].append(name)
    k = linear_of(block, names[0]).in_features
    return [
        _Group(members, k, scheme, originals[members[0]] if originals else None, has_bias=has_bias)
        for (scheme, has_bias), members in alike.items()
    ]


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
    hadamard = scheme.hadamard
    if scheme.mode == "w4a4":
        codes = functional.quantize(x, scheme.scale_mode, hadamard=hadamard, input_offset=offset)
        return functional.dequantize(*codes)
    if scheme.mode == "w4a8":
        integers = functional.mxint8_quantize(x, scheme.group, hadamard=hadamard, input_offset=offset)
        return functional.mxint8_dequantize(*integers)
    return transform(x, hadamard, offset).to(x.dtype).float()


def _quantize_group(block: nn.Module, group: _Group, where: str) -> dict[str, QuantizedLinear]:
    where = f"{where}.{group.names[0]}"
    hessian = group.value(group.hessian)
    if not hessian.isfinite().all():
        raise ValueError(f"the inputs of {where} hold NaN or Inf on the calibration data")
    linears = [linear_of(block, name) for name in group.names]
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    turned = transform(weight, group.scheme.hadamard)
    scale = round_to_nearest(weight, group.scheme, f"the weight of {where}").scale
    if group.lag is not None:
        turned = corrected(turned, hessian, group.value(group.lag))
        scale = functional.quantize(turned, group.scheme.scale_mode)[1].view(torch.uint8)
    codes = round_weight(turned, scale, hessian)
    missing = None
    if group.corrects_mean:
        values = functional.dequantize(codes, scale).double()
        missing = weight.double() @ group.given.value() - values @ group.hessian.mean()
    results = {}
    begin = 0
    for name, linear in zip(group.names, linears, strict=True):
        rows = slice(begin, begin + linear.out_features)
        begin = rows.stop
        bias = None
        if missing is not None:
            bias = missing[rows] if linear.bias is None else missing[rows] + linear.bias.detach()
            bias = bias.to(linear.weight.dtype)
        offset = None if group.offset is None else group.offset.clone()
        results[name] = QuantizedLinear(group.scheme, codes[rows].clone(), scale[rows].clone(), bias, offset)
    return results
