# SPDX-License-Identifier: Apache-2.0
"""Compiling kernels before they are needed."""

import warnings
from collections.abc import Iterable

import torch

from ._library import BLOCK
from .backends import kernel_cache_doubt
from .functional import Mode, check_mode
from .weight import PackedWeight


def warmup(
    shapes: Iterable[tuple[int, int, int]],
    *,
    dtype: torch.dtype = torch.bfloat16,
    mode: Mode = "w4a4",
    device: torch.device | str = "xpu",
    expanded: bool = False,
) -> None:
    """Runs the linear layer of each shape once, on zeros, so that its kernels are compiled and loaded.

    Before a graph is captured, or a request is timed: afterwards a layer of these shapes neither compiles nor waits. Warns
    where the next process may have to compile them again, because torch used the XPU before xpu_fp4 was imported.

    Args:
        shapes: (M, N, K) of the layers: rows of x, out features, in features (a multiple of 32).
        dtype: of x and of the result: float32, float16 or bfloat16.
        mode: "w4a4", "w4a8" or "w4a16".
        device: where the layers will run.
        expanded: whether their weights will be expanded (`xpu_fp4.expand`), which can mean other kernels.

    Raises:
        ValueError: there is no such mode, or it is `w4a16` with expanded weights.
        RuntimeError: a shape that the layer does not take.
    """
    check_mode(mode)
    if torch.device(device).type == "xpu" and (doubt := kernel_cache_doubt()):
        warnings.warn(f"xpu_fp4: {doubt}", stacklevel=2)
    for m, n, k in shapes:
        codes = torch.zeros(n, k // 2, dtype=torch.uint8, device=device)
        scale = torch.full((n, k // BLOCK), 127, dtype=torch.uint8, device=device)
        weight = PackedWeight.stored(codes, scale)
        if expanded:
            weight = weight.expanded()
        weight.linear(torch.zeros(m, k, dtype=dtype, device=device), mode=mode)
    if torch.device(device).type == "xpu":
        torch.xpu.synchronize()
