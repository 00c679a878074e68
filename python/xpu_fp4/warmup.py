# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels before they are needed."""

from collections.abc import Iterable

import torch

from ._library import ops
from .functional import Mode, check_mode


def warmup(
    shapes: Iterable[tuple[int, int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    mode: Mode = "w4a4",
    device: torch.device | str = "xpu",
) -> None:
    """Runs the linear layer of each shape once, on zeros, so that its kernels are compiled and loaded.

    Before a graph is captured, or a request is timed: afterwards a layer of these shapes neither compiles nor waits.

    Args:
        shapes: (M, N, K) of the layers: rows of x, out features, in features (a multiple of 32).
        dtype: of x and of the result: float32, float16 or bfloat16.
        mode: "w4a4" or "w4a16".
        device: where the layers will run.

    Raises:
        ValueError: mode is neither.
        RuntimeError: a shape that the layer does not take.
    """
    check_mode(mode)
    layer = ops.mxfp4_linear if mode == "w4a4" else ops.mxfp4_linear_w4a16
    for m, n, k in shapes:
        weight = torch.zeros(n, k // 2, dtype=torch.uint8, device=device)
        scale = torch.full((n, k // 32), 127, dtype=torch.uint8, device=device)
        layer(torch.zeros(m, k, dtype=dtype, device=device), weight, scale)
    if torch.device(device).type == "xpu":
        torch.xpu.synchronize()
