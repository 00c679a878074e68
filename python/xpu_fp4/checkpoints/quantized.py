# SPDX-License-Identifier: Apache-2.0
"""A linear layer's weight, quantized: what calibration and rounding to nearest give, models hold and checkpoints store."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..functional import dequantize, quantize
from ..modules import MXFP4Linear
from .description import Scheme
from .errors import CheckpointError
from .patterns import NameSet, Patterns

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
    """[N]; None: as the source has it. With an offset, that one's share of the output is in it."""
    input_offset: Tensor | None = None
    """float32 [K]"""


def round_to_nearest(weight: Tensor, scheme: Scheme, where: str) -> QuantizedLinear:
    """A weight [N, K] rounded without data, so without an offset.

    where: what an error's message begins with. Raises CheckpointError: the weight holds NaN or Inf.
    """
    codes, _ = quantize(weight.detach(), scheme.scale_mode, hadamard=scheme.hadamard)
    scale = scales(weight, scheme, where)
    return QuantizedLinear(replace(scheme, input_offset=False), codes.view(torch.uint8), scale)
