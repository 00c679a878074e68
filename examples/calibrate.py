# SPDX-License-Identifier: Apache-2.0
"""Calibrates a model of your own: weights that are rounded on what layers are given (GPTQ) lose less than to nearest.

.venv/bin/python examples/calibrate.py
"""

import copy

import torch
import xpu_fp4
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(128), nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.silu(self.up(self.norm(x))))
        return y


class Model(nn.Module):
    """What `calibrate_` goes by: blocks in a ModuleList, called one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def inputs(count: int, seed: int) -> Tensor:
    """Float32 [count, 16, 128] with correlated channels, as in real models; GPTQ lives on the correlation."""
    noise = torch.randn(count, 16, 24, generator=torch.Generator().manual_seed(seed))
    mix = torch.randn(24, 128, generator=torch.Generator().manual_seed(0))
    return noise @ mix


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    nearest = xpu_fp4.quantize_(copy.deepcopy(model), mode="w4a8")
    calibrated = xpu_fp4.calibrate_(copy.deepcopy(model), list(inputs(32, seed=1).split(8)), mode="w4a8")
    x = inputs(16, seed=2)  # not what it was calibrated on
    errors = [((quantized(x) - model(x)).norm() / model(x).norm()).item() for quantized in (nearest, calibrated)]
    print(f"relative error of W4A8: {errors[0]:.4f} rounded to nearest, {errors[1]:.4f} calibrated")
    if errors[1] >= errors[0]:
        raise SystemExit("calibration did not help")


if __name__ == "__main__":
    main()
