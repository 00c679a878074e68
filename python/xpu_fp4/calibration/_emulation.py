# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the transform until the kernels have it."""

import torch
from torch import Tensor

from .. import functional as F
from ..modules import MXFP4Linear


def transform(x: Tensor, hadamard: int, input_offset: Tensor | None = None) -> Tensor:
    x = x.float()
    if input_offset is not None:
        x = x - input_offset
    if not hadamard:
        return x
    h = torch.ones(1, 1)
    while len(h) < hadamard:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (x.reshape(-1, hadamard) @ (h * hadamard**-0.5)).view(x.shape)


class Linear(MXFP4Linear):
    def __init__(self, *args, hadamard=0, input_offset=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.hadamard = hadamard
        self.input_offset = torch.nn.Parameter(torch.zeros(self.in_features), requires_grad=False) if input_offset else None

    def forward(self, x):
        if not self.hadamard and self.input_offset is None:
            return super().forward(x)
        t = transform(x, self.hadamard, self.input_offset)
        if self.mode == "w4a16":
            return super().forward(t.to(x.dtype))
        return super().forward(t).to(x.dtype)
