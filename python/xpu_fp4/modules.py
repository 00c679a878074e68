# SPDX-License-Identifier: Apache-2.0
"""A drop-in for nn.Linear whose weight is MXFP4."""

import torch
from torch import Tensor, nn

from .functional import Mode, ScaleMode, check_mode, dequantize, linear, quantize


class MXFP4Linear(nn.Module):
    """y = x @ W^T + bias with W in MXFP4 and, in mode `w4a4`, x quantized to MXFP4 on the way in.

    Parameters carry the names and the layout of compressed-tensors' `mxfp4-pack-quantized`, so a state_dict is that checkpoint
    format: `weight_packed` uint8 [N, K/2], `weight_scale` uint8 [N, K/32] (2^(byte - 127)), `bias` [N]. A new module is all
    zeros.

    Args:
        in_features, out_features: K (a multiple of 32) and N.
        bias: whether there is one.
        mode: `w4a4` or `w4a16`.
        scale_mode: the scale rule for x in mode `w4a4`.
        device, dtype: of the parameters; dtype is the bias's.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features % 32 != 0:
            raise ValueError(f"in_features is {in_features}, expected a multiple of 32")
        check_mode(mode)
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        self.scale_mode = scale_mode
        self.weight_packed = _frozen(torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.weight_scale = _frozen(torch.zeros(out_features, in_features // 32, dtype=torch.uint8, device=device))
        self.bias = _frozen(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(
        cls,
        source: nn.Linear,
        *,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
    ) -> "MXFP4Linear":
        """Quantizes the weight of an nn.Linear (round to nearest, scale_mode for its scales too). Copies the bias."""
        module = cls(
            source.in_features,
            source.out_features,
            source.bias is not None,
            mode=mode,
            scale_mode=scale_mode,
            device="meta",
        )
        codes, scale = quantize(source.weight.detach(), scale_mode)
        module.weight_packed = _frozen(codes.view(torch.uint8))
        module.weight_scale = _frozen(scale.view(torch.uint8))
        if source.bias is not None:
            module.bias = _frozen(source.bias.detach().clone())
        return module.train(source.training)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes and scales stand for."""
        return dequantize(self.weight_packed, self.weight_scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32, float16 or bfloat16 -> [..., N] of the same dtype."""
        return linear(x, self.weight_packed, self.weight_scale, self.bias, mode=self.mode, scale_mode=self.scale_mode)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"mode={self.mode}, scale_mode={self.scale_mode}"
        )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
