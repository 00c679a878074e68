# SPDX-License-Identifier: Apache-2.0
"""Tensors whose offsets need more than 32 bits."""

import os

import numpy as np
import pytest
import torch
import xpu_fp4
from helpers import assert_same_bits, expected_gemm, gemm, linear_w4a16, normal, random_codes, random_scales, seeded
from products import w4a16_error
from torch import Tensor
from xpu_fp4 import reference


@pytest.fixture
def ten_gigabytes() -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 10 << 30:
        pytest.skip(f"needs 10 GB of free memory, {free / (1 << 30):.1f} GB are free")


def untouched_zeros(*shape: int) -> Tensor:
    """Zero bytes in pages that exist only once written; torch.zeros writes them all."""
    return torch.from_numpy(np.zeros(shape, np.uint8))


@pytest.mark.large
@pytest.mark.usefixtures("ten_gigabytes")
def test_quantize_more_than_2_31_elements(backend: str) -> None:
    rows, k = (1 << 16) + 1, 1 << 15
    x = untouched_zeros(rows, 2 * k).view(torch.bfloat16)
    x[-2:], x[0] = normal(2, k, dtype=torch.bfloat16), 1.0
    q, scale = xpu_fp4.quantize(x)
    for part in (slice(0, 2), slice(rows // 2 - 1, rows // 2 + 1), slice(rows - 3, rows)):
        want_q, want_scale = reference.quantize(x[part])
        assert_same_bits(q.view(torch.uint8)[part], want_q)
        assert_same_bits(scale.view(torch.uint8)[part], want_scale)


@pytest.mark.large
@pytest.mark.usefixtures("ten_gigabytes")
@pytest.mark.parametrize("op", ["gemm", "w4a16"])
def test_a_weight_of_more_than_2_31_bytes(backend: str, op: str) -> None:
    k, n = 1 << 17, (1 << 15) + 3
    w, w_scale = untouched_zeros(n, k // 2), untouched_zeros(n, k // 32)
    w[-4:], w_scale[-4:] = random_codes(4, k, seeded(90)), 127
    if op == "gemm":
        a, a_scale = random_codes(1, k, seeded(91)), random_scales(1, k, seeded(92), 117, 137)
        y = gemm(a, a_scale, w, w_scale)
        expected = expected_gemm(a, a_scale, w[-4:].clone(), w_scale[-4:].clone())
    else:
        x = normal(1, k)
        y, expected = linear_w4a16(x, w, w_scale), linear_w4a16(x, w[-4:].clone(), w_scale[-4:].clone())
        assert w4a16_error(y[:, -4:], x, w[-4:], w_scale[-4:]).max() <= 1
    assert_same_bits(y[:, -4:].contiguous(), expected)
    assert not y[:, :-4].any()


@pytest.mark.large
@pytest.mark.usefixtures("ten_gigabytes")
def test_more_than_2_31_outputs(backend: str) -> None:
    m, n = (1 << 15) + 1, (1 << 16) + 64
    nothing = torch.empty(m, 0, dtype=torch.uint8), torch.empty(m, 0, dtype=torch.uint8)
    weight = torch.empty(n, 0, dtype=torch.uint8), torch.empty(n, 0, dtype=torch.uint8)
    bias = torch.arange(1, n + 1).float() / n  # no zero: a fresh page's zeros are not taken for results
    y = gemm(*nothing, *weight, torch.float16, bias)
    for row in (0, m // 2 - 1, m // 2, m - 20, m - 2, m - 1):
        assert_same_bits(y[row], bias.half())
