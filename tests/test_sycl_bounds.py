# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels that no bits are defined for: W4A16, and Xe3P's own FP4 instruction."""

import pytest
import torch
import xpu_fp4
from helpers import (
    HALF_DTYPES,
    assert_same_bits,
    gemm,
    linear_w4a16,
    random_codes,
    random_scales,
    seeded,
)
from products import w4a16_error
from sycl_cases import SIZES_AND_K, assert_native_bits, spread_operands
from torch import Tensor
from xpu_fp4 import reference

pytestmark = pytest.mark.usefixtures("requires_sycl")


# ---- W4A16 on the matrix unit: within the bound, and each row the same whatever surrounds it ----


def w4a16_operands(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    weight, scale = random_codes(n, k, generator), random_scales(n, k, generator, 117, 137)
    return (torch.randn(m, k, generator=generator) * 2.0**-5).to(dtype), weight, scale


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(
    ("variant", "m", "k"),
    [("bmg:large", 70, 544), ("pvc:large", 130, 160), ("dg2:large", 70, 160), ("bmg:small", 5, 8192), ("dg2:small", 19, 416)],
)
def test_w4a16_stays_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str, m: int, k: int, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    x, weight, scale = w4a16_operands(m, 37, k, dtype, generator)
    bias = torch.randn(37, generator=seeded(1)).to(dtype)
    with xpu_fp4.cpu_backend("sycl"):
        y = linear_w4a16(x, weight, scale, bias)
        head = linear_w4a16(x[: m // 2], weight, scale, bias)
    assert w4a16_error(y, x, weight, scale, bias).max() <= 1
    if variant.endswith("large"):
        assert_same_bits(head, y[: m // 2])


@pytest.mark.parametrize("variant", ["bmg:large", "bmg:small"])
def test_w4a16_scales_are_exact(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """One element of X at a time: the result is the exactly scaled weight. All codes, all scales, NaN among them."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    n, k = 256, 64
    scale = torch.arange(n, dtype=torch.uint8)[:, None].expand(n, 2).contiguous()
    codes = (torch.arange(k // 2, dtype=torch.uint8) * 17 + 0x10).expand(n, k // 2).contiguous()
    x = torch.eye(k, dtype=torch.bfloat16)[: 70 if variant == "bmg:large" else 8]
    with xpu_fp4.cpu_backend("sycl"):
        y = linear_w4a16(x, codes, scale)
    expected = reference.values(codes, scale).t()[: len(x)].bfloat16() + 0.0  # -0 becomes 0, as a sum does
    expected[expected.isnan()] = torch.nan  # the canonical one
    assert_same_bits(y, expected)


@pytest.mark.parametrize(("variant", "m", "dtype"), [("bmg:small", 5, torch.bfloat16), ("dg2:small", 19, torch.float16)])
def test_w4a16_multiplies_what_the_transform_rounds_to(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str, m: int, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    for size, k in SIZES_AND_K:
        x, weight, scale = w4a16_operands(m, 37, k, dtype, generator)
        offset = torch.randn(k, generator=generator)
        with xpu_fp4.cpu_backend("sycl"):
            y = xpu_fp4.linear(x, weight, scale, mode="w4a16", hadamard=size, input_offset=offset)
            assert_same_bits(y, linear_w4a16(reference.transform(x, size, offset).to(dtype), weight, scale))


@pytest.mark.parametrize("variant", ["bmg:small", "dg2:small"])
def test_w4a16_operands_that_are_not_aligned(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    x, weight, scale = w4a16_operands(5, 20, 96, torch.bfloat16, generator)
    shifted_x = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    shifted = torch.empty(weight.numel() + 1, dtype=torch.uint8)[1:].view(weight.shape).copy_(weight)
    with xpu_fp4.cpu_backend("sycl"):
        assert_same_bits(linear_w4a16(shifted_x, shifted, scale), linear_w4a16(x, weight, scale))


# ---- Xe3P's own FP4 instruction ----


@pytest.mark.parametrize(("m", "n", "k"), [(33, 70, 128), (5, 9, 416), (5, 9, 8192)])
def test_bdpas_stays_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, m: int, n: int, k: int
) -> None:
    """Its hardware rounds in its own way, so this is not the definition; K with a started quad, tails in M and N."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "cri:bdpas")
    a, a_scale, w, w_scale = spread_operands("mixed", "ordinary", m, n, k, generator)
    bias = torch.randn(n, generator=seeded(3))
    with xpu_fp4.cpu_backend("sycl"):
        y = gemm(a, a_scale, w, w_scale, torch.float32, bias)
        a_scale[0, 0], w_scale[1, -1] = 0xFF, 0xFF
        with_nan = gemm(a, a_scale, w, w_scale, torch.float32, bias)
    a_scale[0, 0] = 127
    assert w4a16_error(y[1:], reference.values(a, a_scale)[1:], w, w_scale.where(w_scale != 0xFF, 127), bias)[:, 2:].max() <= 1
    assert with_nan[0].isnan().all()
    assert with_nan[:, 1].isnan().all()
    assert_same_bits(with_nan[1:, 2:], y[1:, 2:])


def test_bdpas_leaves_what_it_cannot_load_and_mxint8_to_the_exact_kernels(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "cri:bdpas")
    assert_native_bits(spread_operands("mixed", "ordinary", 5, 9, 96, generator))
    assert_native_bits(spread_operands("mixed", "ordinary", 5, 9, 160, generator, "mxint8"))
