# SPDX-License-Identifier: Apache-2.0
"""Operands of products that several test files share, and the bound of W4A16."""

import math
from collections.abc import Callable

import torch
from helpers import linear_w4a4, linear_w4a8, linear_w4a16, random_codes, random_scales, seeded, spread_scales
from torch import Tensor
from xpu_fp4 import reference

Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # A's codes and scales, W's codes and scales
OPS: dict[str, Callable[..., Tensor]] = {"w4a4": linear_w4a4, "w4a8": linear_w4a8, "w4a16": linear_w4a16}


def random_operands(m: int, n: int, k: int, seed: int = 0, low: int = 117, high: int = 137) -> Operands:
    generator = seeded(seed)
    a, w = random_codes(m, k, generator), random_codes(n, k, generator)
    return a, random_scales(m, k, generator, low, high), w, random_scales(n, k, generator, low, high)


def block_products(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """Each block's product rounded to float32, [blocks, M, N]."""
    a_values = reference.values(a, a_scale).reshape(len(a), -1, 32)
    w_values = reference.values(w, w_scale).reshape(len(w), -1, 32)
    # Within a block one exponent: the float64 sum is exact.
    return torch.einsum("mbk,nbk->bmn", a_values, w_values).float()


# Sums of the two bytes around 254 are ordinary; the ends of the range defeat a kernel's shortcuts.
CENTRES = {
    "ordinary": (120, 125),
    "subnormal": (40, 64),
    "least": (0, 90),
    "least weights": (100, 0),
    "overflow": (180, 185),
    "largest": (240, 8),
    "largest weights": (8, 240),
}


def quads(p: Tensor, quad: Callable[[Tensor], Tensor]) -> Tensor:
    """The products of blocks [blocks, M, N], added up by fours, each four by `quad`."""
    acc = torch.zeros_like(p[0])
    for q in range(0, len(p), 4):
        acc = acc + quad(p[q : q + 4])
    return acc


def in_pairs(t: Tensor) -> Tensor:
    """The sum of four products, in the defined order."""
    return (t[0] + t[1]) + (t[2] + t[3])


def order_operands() -> Operands:
    """Operands whose sums tell the order of the adds."""
    m, n, k = 33, 40, 1024
    a, w = random_codes(m, k, seeded(26)), random_codes(n, k, seeded(27))
    return a, spread_scales("unaligned", m, k // 32, 110, 28), w, spread_scales("equal", n, k // 32, 127, 29)


def w4a16_error(y: Tensor, x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """|y - y64| over the bound of section 4, with an ulp for the output's rounding and one for the bias: at most 1."""
    values = reference.values(w, w_scale)
    exact = x.double() @ values.t()
    bound = 2.0**-22 * math.sqrt(x.shape[-1]) * (x.double().abs() @ values.t().abs())
    if bias is not None:
        exact = exact + bias.double()
        bound = bound + 2.0**-24 * (exact.abs() + bound)
    if y.dtype != torch.float32:
        info = torch.finfo(y.dtype)
        bound = bound + info.eps / 2 * (exact.abs() + bound) + info.smallest_normal * info.eps / 2
    return (y.double() - exact).abs() / bound
