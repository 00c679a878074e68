# SPDX-License-Identifier: Apache-2.0
"""The W4A8 linears are the quantizer and the product, in every form of a weight. What all linears promise: test_linears.py."""

import math

import pytest
import torch
import xpu_fp4
from helpers import (
    DTYPES,
    ENVIRONMENTS,
    GROUPS,
    Environment,
    assert_same_bits,
    environment_is,
    expected_gemm,
    float_environment,
    gemm,
    linear_w4a8,
    normal,
    random_codes,
    random_int8,
    random_scales,
    seeded,
    spread_scales,
)
from torch import Tensor
from xpu_fp4 import Group, reference


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    return random_codes(n, k, seeded(1)), random_scales(n, k, seeded(2), 117, 137)


def uneven(*shape: int, dtype: torch.dtype) -> Tensor:
    """Activations whose blocks differ in size, so that groups of 32 and 128 do not give the same codes."""
    blocks = torch.arange(shape[-1] // 32).repeat_interleave(32)
    return normal(*shape, dtype=dtype) * torch.exp2(blocks * 5 % 7).to(dtype)


def expected_linear(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    q, scale = reference.mxint8_quantize(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), group)
    return expected_gemm(q, scale, w, w_scale, x.dtype, bias).reshape(*x.shape[:-1], len(w))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(160,), (7, 160), (2, 3, 160), (2, 1, 3, 160), (0, 160), (2, 0, 160)])
def test_linear_is_quantize_then_gemm(backend: str, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> None:
    x, (w, w_scale) = uneven(*shape, dtype=dtype), weight(21, 160)
    q, scale = xpu_fp4.mxint8_quantize(x, group)
    for bias in (None, normal(21, dtype=dtype), normal(21)):
        y = linear_w4a8(x, w, w_scale, bias, group)
        assert_same_bits(y, expected_linear(x, w, w_scale, bias, group))
        assert_same_bits(gemm(q, scale, w, w_scale, dtype, bias), y)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("k", [32, 96, 128, 288, 416, 1056, 8192])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 15, 16, 17, 33])
def test_any_number_of_rows_and_blocks(backend: str, m: int, k: int, group: Group) -> None:
    x, (w, w_scale), bias = uneven(m, k, dtype=torch.bfloat16), weight(35, k), normal(35)
    assert_same_bits(linear_w4a8(x, w, w_scale, bias, group), expected_linear(x, w, w_scale, bias, group))


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_magnitude(backend: str, dtype: torch.dtype, group: Group, m: int) -> None:
    # Scales of activations from the least to the largest that x's dtype has, in one product.
    largest = {torch.float32: 126, torch.float16: 13, torch.bfloat16: 126}[dtype]
    least = {torch.float32: -150, torch.float16: -25, torch.bfloat16: -134}[dtype]
    x = (normal(m, 416) * torch.exp2(torch.linspace(least, largest, m))[:, None]).clamp(max=3e38).to(dtype)
    w, w_scale = random_codes(36, 416, seeded(3)), spread_scales("mixed", 36, 13, 110, 4)
    assert_same_bits(linear_w4a8(x, w, w_scale, None, group), expected_linear(x, w, w_scale, None, group))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_a_nan_or_inf_makes_its_row_nan(backend: str, group: Group, dtype: torch.dtype) -> None:
    x, (w, w_scale) = uneven(9, 288, dtype=dtype), weight(21, 288)
    clean = linear_w4a8(x, w, w_scale, None, group)
    x[1, 0], x[3, 287], x[5, 130], x[5, 131] = torch.nan, torch.inf, torch.inf, -torch.inf
    y = linear_w4a8(x, w, w_scale, None, group)
    assert_same_bits(y, expected_linear(x, w, w_scale, None, group))
    assert y[[1, 3, 5]].isnan().all()
    kept = [0, 2, 4, 6, 7, 8]
    assert_same_bits(y[kept], clean[kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 32), (3, 17, 160), (40, 50, 416), (5, 16, 4096), (0, 5, 64), (4, 7, 0)])
def test_a_prepacked_weight_gives_the_same_bits(backend: str, m: int, n: int, k: int, group: Group, dtype: torch.dtype) -> None:
    x, (w, w_scale), bias = uneven(m, k, dtype=dtype), weight(n, k), normal(n, dtype=dtype)
    y = linear_w4a8(x, w, w_scale, bias, group)
    assert_same_bits(y, expected_linear(x, w, w_scale, bias, group))
    packed = xpu_fp4.prepack(w, w_scale)
    assert_same_bits(torch.ops.xpu_fp4.mxfp4_linear_w4a8_prepacked(x, packed, n, bias, group), y)


@pytest.mark.parametrize("group", GROUPS)
def test_the_typed_functions_are_the_ops(backend: str, group: Group) -> None:
    x, (w, w_scale), bias = uneven(4, 160, dtype=torch.float32), weight(21, 160), normal(21)
    y = expected_linear(x, w, w_scale, bias, group)
    assert_same_bits(xpu_fp4.linear(x, w, w_scale, bias, mode="w4a8", group=group), y)
    packed = xpu_fp4.prepack(w, w_scale)
    assert_same_bits(xpu_fp4.linear_prepacked(x, packed, 21, bias, mode="w4a8", group=group), y)


def test_the_default_group_is_128(backend: str) -> None:
    x, (w, w_scale) = uneven(4, 288, dtype=torch.float32), weight(21, 288)
    y = expected_linear(x, w, w_scale, None, 128)
    assert not torch.equal(y, expected_linear(x, w, w_scale, None, 32))
    packed = xpu_fp4.prepack(w, w_scale)
    for actual in (
        torch.ops.xpu_fp4.mxfp4_linear_w4a8(x, w, w_scale),
        torch.ops.xpu_fp4.mxfp4_linear_w4a8_prepacked(x, packed, 21),
        xpu_fp4.linear(x, w, w_scale, mode="w4a8"),
        xpu_fp4.linear_prepacked(x, packed, 21, mode="w4a8"),
    ):
        assert_same_bits(actual, y)


@pytest.mark.parametrize("group", GROUPS)
def test_batch_neighbours_of_any_size_do_not_change_a_row(backend: str, group: Group) -> None:
    # A row's own scales decide how a tile is computed, for its neighbours too.
    w, w_scale = random_codes(45, 416, seeded(5)), spread_scales("mixed", 45, 13, 120, 6)
    x = uneven(33, 416, dtype=torch.float32)
    expected = expected_linear(x, w, w_scale, None, group)
    for value in (1e30, 1e-40, 1e-20, 0.0, torch.inf, torch.nan):
        mixed = x.clone()
        mixed[1::2] = value
        assert_same_bits(linear_w4a8(mixed, w, w_scale, None, group)[::2].contiguous(), expected[::2].contiguous())
    for rows in ([4], [32, 0], list(range(15)), list(range(32, -1, -1))):
        assert_same_bits(linear_w4a8(x[rows], w, w_scale, None, group), expected[rows])


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_callers_float_environment_reaches_no_bit(backend: str, environment: Environment) -> None:
    (w, w_scale), m, k = weight(40, 416), 20, 416
    x = normal(m, k) * torch.exp2(torch.linspace(-149, 0, m))[:, None]
    a, scale = random_int8(m, k, seeded(7)), spread_scales("unaligned", m, 13, 45, 8)
    low, far = spread_scales("quad-aligned", 40, 13, 60, 9), spread_scales("unaligned", 40, 13, 110, 10)
    with float_environment(environment):
        results = [
            linear_w4a8(x, w, w_scale),
            *[gemm(a, scale, w, low, dtype) for dtype in DTYPES],
            *[gemm(a, scale + 70, w, far, dtype) for dtype in DTYPES],
        ]
        assert environment_is(environment)
    expected = [
        expected_linear(x, w, w_scale, None, 128),
        *[expected_gemm(a, scale, w, low, dtype) for dtype in DTYPES],
        *[expected_gemm(a, scale + 70, w, far, dtype) for dtype in DTYPES],
    ]
    for actual, wanted in zip(results, expected, strict=True):
        assert_same_bits(actual, wanted)
