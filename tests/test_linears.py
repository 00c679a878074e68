# SPDX-License-Identifier: Apache-2.0
"""The linears: W4A4 is the quantizer and the product, W4A16 stays within its bound."""

import pytest
import torch
from helpers import (
    DTYPES,
    MODES,
    assert_same_bits,
    expected_gemm,
    linear_w4a4,
    linear_w4a16,
    normal,
    random_codes,
    random_scales,
    seeded,
)
from products import OPS, w4a16_error
from xpu_fp4 import ScaleMode, reference


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(160,), (7, 160), (2, 3, 160), (2, 1, 3, 160), (0, 160)])
def test_linear_is_quantize_then_gemm(backend: str, shape: tuple[int, ...], dtype: torch.dtype, mode: ScaleMode) -> None:
    n = 21
    x, bias = normal(*shape, dtype=dtype), normal(n, dtype=dtype)
    w, w_scale = random_codes(n, 160, seeded(61)), random_scales(n, 160, seeded(62), 117, 137)
    q, scale = reference.quantize(x.reshape(-1, 160), mode)
    for b in (None, bias):
        expected = expected_gemm(q, scale, w, w_scale, dtype, b).reshape(*shape[:-1], n)
        assert_same_bits(linear_w4a4(x, w, w_scale, b, mode), expected)


def test_linear_takes_any_strides(backend: str) -> None:
    x = normal(160, 9).t()
    w, w_scale = random_codes(21, 160, seeded(63)), random_scales(21, 160, seeded(64), 117, 137)
    for linear in OPS.values():
        assert_same_bits(linear(x, w, w_scale), linear(x.contiguous(), w, w_scale))
        assert_same_bits(linear(x[::2], w, w_scale), linear(x[::2].contiguous(), w, w_scale))


@pytest.mark.parametrize("k", [32, 96, 128, 416, 4128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a16_is_within_its_bound(backend: str, dtype: torch.dtype, k: int) -> None:
    x = normal(9, k, dtype=dtype, seed=k)
    w, w_scale = random_codes(35, k, seeded(65)), random_scales(35, k, seeded(66), 112, 122)
    bias = 64 * normal(35, dtype=dtype)
    for b in (None, bias):
        y = linear_w4a16(x, w, w_scale, b)
        assert y.dtype == dtype
        assert w4a16_error(y, x, w, w_scale, b).max() <= 1
    if dtype == torch.float32:
        # The bound is tight enough to notice activations that were rounded to bfloat16, and a missing bias.
        rounded = linear_w4a16(x.bfloat16().float(), w, w_scale)
        assert w4a16_error(rounded, x, w, w_scale).max() > 1
    assert w4a16_error(linear_w4a16(x, w, w_scale), x, w, w_scale, bias).max() > 1
    assert w4a16_error(torch.zeros_like(y), x, w, w_scale).max() > 1


@pytest.mark.parametrize("shape", [(160,), (7, 160), (2, 3, 160), (2, 1, 3, 160), (0, 160)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a16_takes_any_number_of_dimensions(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = normal(*shape, dtype=dtype)
    w, w_scale = random_codes(21, 160, seeded(67)), random_scales(21, 160, seeded(68), 117, 137)
    expected = linear_w4a16(x.reshape(-1, 160), w, w_scale).reshape(*shape[:-1], 21)
    assert_same_bits(linear_w4a16(x, w, w_scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_w4a16_spreads_nan_and_inf_as_arithmetic_does(backend: str, dtype: torch.dtype) -> None:
    x = normal(4, 64, dtype=dtype)
    w, w_scale = random_codes(8, 64, seeded(69)), random_scales(8, 64, seeded(70), 117, 137)
    w[:, 5] = 0x22  # ones at elements 10 and 11
    w_scale[2, 1] = 255
    x[1, 10], x[2, 10], x[3, 10], x[3, 11] = torch.nan, torch.inf, torch.inf, -torch.inf
    y = linear_w4a16(x, w, w_scale)
    assert_same_bits(y, reference.canonical_nan(y))
    assert y[:, 2].isnan().all()
    kept = [0, 1, 3, 4, 5, 6, 7]
    assert y[0, kept].isfinite().all()
    assert y[1].isnan().all()
    assert (y[2, kept] == torch.inf).all()
    assert y[3].isnan().all()
