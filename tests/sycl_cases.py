# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels are tested with: variants with their shapes, operands of every spread of scales, and the native bits.

The architectures cover every program that is built: `pvc`, `lnl-m`, `ptl` and `cri` share bmg's.
"""

from collections.abc import Iterator
from itertools import product
from typing import Literal, get_args

import torch
import xpu_fp4
from helpers import (
    SPREADS,
    assert_same_bits,
    gemm,
    linear_w4a4,
    linear_w4a8,
    random_codes,
    random_int8,
    spread_scales,
)
from products import CENTRES, Operands
from torch import Tensor
from xpu_fp4 import Hadamard, reference

LARGE = {"bmg:large": (50, 40), "dg2:large": (17, 40)}
TILE_ROWS = {"bmg:large": 48, "dg2:large": 16}
MEDIUM = {"bmg:medium": (33, 20), "dg2:medium": (9, 20)}
SMALL = {"bmg:small": (1, 3, 8, 13, 37), "dg2:small": (1, 8, 37)}
# One shape for each variant: with tails, of its large tile, or of eight rows.
SHAPES = LARGE | dict.fromkeys(SMALL, (8, 35))
own = torch.ops.xpu_fp4

Format = Literal["mxfp4", "mxint8"]
FORMATS: tuple[Format, ...] = get_args(Format)  # of the activations: W4A4 and W4A8
# Each variant, number of rows and kind of weight is a program to compile: W4A8 takes fewer, with the same data.
SMALL_ROWS = [("mxfp4", variant, m) for variant, rows in SMALL.items() for m in rows]
SMALL_ROWS += [
    ("mxint8", variant, m) for variant, rows in {"bmg:small": (1, 13, 37), "dg2:small": (8, 37)}.items() for m in rows
]
OF_ALL_DTYPES = [("mxfp4", variant) for variant in SHAPES] + [("mxint8", "bmg:large"), ("mxint8", "dg2:small")]
# A Hadamard ends within a row's last quad, or is all of it.
SIZES_AND_K: list[tuple[Hadamard, int]] = [(0, 96), (32, 64), (64, 64), (32, 160), (64, 192), (128, 128), (128, 1152)]


def random_activations(format: Format, m: int, k: int, generator: torch.Generator) -> Tensor:
    """Codes: packed MXFP4 uint8 [m, k/2], or MXINT8 int8 [m, k] with -128 among them."""
    return random_codes(m, k, generator) if format == "mxfp4" else random_int8(m, k, generator)


def blocks_of(codes: Tensor, scale: Tensor) -> Tensor:
    """[rows, blocks, bytes], the same memory."""
    return codes.view(len(codes), scale.shape[1], -1)


def with_special_blocks(operands: Operands, generator: torch.Generator) -> Operands:
    """Blocks and whole rows of zeros (under an extreme scale, which must not matter), NaN scales in both operands."""
    a, a_scale, w, w_scale = (tensor.clone() for tensor in operands)
    for codes, scale in ((a, a_scale), (w, w_scale)):
        signs = 0 if codes.dtype == torch.int8 else 0x88  # MXFP4 has a -0
        zero = torch.rand(scale.shape, generator=generator) < 0.2
        blocks_of(codes, scale)[zero] &= signs
        scale[zero] = torch.randint(0, 255, (int(zero.sum()),), generator=generator, dtype=torch.uint8)
        scale[torch.rand(scale.shape, generator=generator) < 0.01] = 0xFF
        codes[-1] &= signs
    return a, a_scale, w, w_scale


def shared(scale: Tensor, blocks: int) -> Tensor:
    """The first scale of so many neighbouring blocks for all of them: four, as a group of 128 has."""
    return scale[:, torch.arange(scale.shape[1]) // blocks * blocks]


def spread_operands(
    spread: str, centre: str, m: int, n: int, k: int, generator: torch.Generator, format: Format = "mxfp4"
) -> Operands:
    a_seed, w_seed = torch.randint(1 << 31, (2,), generator=generator).tolist()
    a_centre, w_centre = CENTRES[centre]
    a_scale = spread_scales(spread, m, k // 32, a_centre, a_seed)
    w_scale = spread_scales(spread, n, k // 32, w_centre, w_seed)
    return random_activations(format, m, k, generator), a_scale, random_codes(n, k, generator), w_scale


def assert_native_bits(operands: Operands, dtype: torch.dtype = torch.float32, bias: Tensor | None = None) -> None:
    with xpu_fp4.cpu_backend("native"):
        expected = gemm(*operands, dtype, bias)
    with xpu_fp4.cpu_backend("sycl"):
        assert_same_bits(gemm(*operands, dtype, bias), expected)


def linear_of_values(operands: Operands) -> Tensor:
    """A linear whose x are A's values."""
    a, a_scale, w, w_scale = operands
    if a.dtype == torch.int8:
        return linear_w4a8(own.mxint8_dequantize(a, a_scale, torch.float32), w, w_scale)
    return linear_w4a4(reference.values(a, a_scale).float(), w, w_scale)


def assert_native_bits_with_scales_together(operands: Operands) -> None:
    """A row's scales of W side by side, as a linear passes them."""
    with xpu_fp4.cpu_backend("native"):
        expected = linear_of_values(operands)
    with xpu_fp4.cpu_backend("sycl"):
        assert_same_bits(linear_of_values(operands), expected)


def assert_every_spread(m: int, n: int, k: int, generator: torch.Generator, format: Format = "mxfp4") -> None:
    for i, (spread, centre) in enumerate(product(SPREADS, CENTRES)):
        a, a_scale, w, w_scale = spread_operands(spread, centre, m, n, k, generator, format)
        if format == "mxint8":  # with W's own spread: every level
            a_scale = shared(a_scale, (4, 2, 1)[i % 3])
        assert_native_bits((a, a_scale, w, w_scale))
        if spread == "mixed":
            assert_native_bits(with_special_blocks((a, a_scale, w, w_scale), generator))


def biases(m: int, n: int, generator: torch.Generator) -> Iterator[Tensor | None]:
    for shape in ((n,), (m, n), (m, 1), (1,)):
        yield torch.randn(shape, generator=generator)
