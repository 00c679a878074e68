# SPDX-License-Identifier: Apache-2.0
"""A linear layer once it is quantized: what rounding gives, checkpoints store and models hold."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..functional import quantize
from ..modules import MXFP4Linear
from .description import Scheme
from .errors import CheckpointError
from .patterns import PREFIX, NameSet, Patterns

_NAN_SCALE = 255


@dataclass(frozen=True)
class QuantizedLinear:
    """What becomes of an nn.Linear."""

    scheme: Scheme
    codes: Tensor
    """uint8 [N, K/2]"""
    scale: Tensor
    """uint8 [N, K/32]"""
    bias: Tensor | None = None
    """[N], in place of the linear's; None: it keeps its own. With an offset, that one's share of the output is in it."""
    input_offset: Tensor | None = None
    """float32 [K]"""

    def module(self, source: nn.Linear) -> MXFP4Linear:
        """The layer that takes the linear's place."""
        bias = source.bias if self.bias is None else self.bias
        made = MXFP4Linear(
            source.in_features,
            source.out_features,
            bias is not None,
            **self.scheme.arguments(),
            input_offset=self.input_offset is not None,
            device="meta",
            dtype=source.weight.dtype,
        )
        parts = {"weight_packed": self.codes, "weight_scale": self.scale, "bias": bias, "input_offset": self.input_offset}
        for name, part in parts.items():
            if part is not None:
                setattr(made, name, nn.Parameter(part.detach(), requires_grad=False))
        return made.train(source.training)


def round_to_nearest(weight: Tensor, scheme: Scheme, where: str) -> QuantizedLinear:
    """A weight [N, K] rounded without data, so without an offset.

    where: what an error's message begins with. Raises CheckpointError: the weight holds NaN or Inf.
    """
    codes, scale = (t.view(torch.uint8) for t in quantize(weight.detach(), scheme.scale_mode, hadamard=scheme.hadamard))
    if (scale == _NAN_SCALE).any():
        raise CheckpointError(f"{where} holds NaN or Inf")
    return QuantizedLinear(replace(scheme, input_offset=False), codes, scale)


def schemes_of(names: Collection[str], scheme: Scheme, keep_high: Sequence[str] = ()) -> dict[str, Scheme]:
    """The scheme of each layer: W4A16 for those that keep_high has, by their names' last part, the whole or `re:` and a regex.

    Raises ValueError: an entry of keep_high that names none.
    """
    schemes = dict.fromkeys(names, scheme)
    patterns = Patterns("keep_high")
    for entry in keep_high:
        high = NameSet([entry], patterns)
        found = [name for name in names if name in high or name.rpartition(".")[2] == entry]
        if not found:
            raise ValueError(
                f"keep_high has {entry!r}, which is no layer's name, nor its last part; a regex starts with {PREFIX}"
            )
        schemes |= dict.fromkeys(found, replace(scheme, mode="w4a16"))
    return schemes
