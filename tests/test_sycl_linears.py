# SPDX-License-Identifier: Apache-2.0
"""Linears on the GPU kernels quantize and transform x as the ops by themselves do."""

from itertools import product
from typing import get_args

import pytest
import torch
import xpu_fp4
from helpers import (
    DTYPES,
    MODES,
    assert_same_bits,
    linear_w4a4,
    linear_w4a8,
    random_codes,
    random_scales,
)
from sycl_cases import SHAPES, SIZES_AND_K, own
from torch import Tensor
from xpu_fp4 import Group, Mode, ScaleMode

pytestmark = pytest.mark.usefixtures("requires_sycl")


def difficult_floats(m: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Channels of very different size; zeros, Inf, NaN, and a row of what is small."""
    x = (torch.randn(m, k, generator=generator) * torch.randn(k, generator=generator).exp2().pow(3)).to(dtype)
    x[1, :40], x[2, 3], x[3, 40], x[-1] = 0.0, torch.inf, torch.nan, 1e-30
    return x


@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_linear_quantizes_like_quantize(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES[variant]
    weight, scale = random_codes(n, 160, generator), random_scales(n, 160, generator)
    x = difficult_floats(m, 160, dtype, generator)
    modes: tuple[ScaleMode, ...] = MODES
    for mode in modes:
        with xpu_fp4.cpu_backend("native"):
            expected = linear_w4a4(x, weight, scale, None, mode)
        with xpu_fp4.cpu_backend("sycl"):
            assert_same_bits(linear_w4a4(x, weight, scale, None, mode), expected)


@pytest.mark.parametrize("variant", ["bmg:large", "dg2:small", "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_linear_quantizes_to_mxint8(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str, dtype: torch.dtype
) -> None:
    """Whole groups of 128, a last one of 32 and of 96; amax at 255/128 of a power of two and just below; the least floats."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES.get(variant, (18, 20))
    groups: tuple[Group, ...] = get_args(Group)
    for k, group in product((160, 224), groups):
        weight, scale = random_codes(n, k, generator), random_scales(n, k, generator)
        x = difficult_floats(m, k, dtype, generator)
        x[0] = x[0].clamp(-0.9, 0.9)
        x[0, ::32] = 255 / 128
        x[4] = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * torch.randint(-300, 300, (k,), generator=generator)
        with xpu_fp4.cpu_backend("native"):
            codes, bytes_of = own.mxint8_quantize(x, group)
            expected = linear_w4a8(x, weight, scale, None, group)
        with xpu_fp4.cpu_backend("sycl"):
            got, got_bytes = own.mxint8_quantize(x, group)
            assert_same_bits(got_bytes, bytes_of)
            assert_same_bits(got, codes)
            assert_same_bits(
                own.mxint8_dequantize(got, got_bytes, dtype)[4:5], own.mxint8_dequantize(codes, bytes_of, dtype)[4:5]
            )
            assert_same_bits(linear_w4a8(x, weight, scale, None, group), expected)


# A row's quad is transformed by one lane: sub-groups of both sizes, each arrangement and order of what it writes, each dtype.
TRANSFORMED = [
    ("w4a4", "bmg:large", torch.bfloat16),
    ("w4a8", "bmg:large", torch.float16),
    ("w4a4", "dg2:large", torch.float16),
    ("w4a4", "dg2:small", torch.float32),
    ("w4a8", "dg2:small", torch.float32),
]


@pytest.mark.parametrize(("mode", "variant", "dtype"), TRANSFORMED)
def test_the_fused_linear_transforms_x(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, mode: Mode, variant: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES.get(variant, (17, 40))
    for size, k in SIZES_AND_K:
        weight, scale = random_codes(n, k, generator), random_scales(n, k, generator)
        x, some = difficult_floats(m, k, dtype, generator), torch.randn(k, generator=generator)
        for offset in (some, None) if size != 0 else (some,):
            for group in get_args(Group) if mode == "w4a8" else (128,):
                results = []
                for backend in ("native", "sycl"):
                    with xpu_fp4.cpu_backend(backend):
                        results.append(
                            xpu_fp4.linear(x, weight, scale, mode=mode, group=group, hadamard=size, input_offset=offset)
                        )
                assert_same_bits(results[1], results[0])
