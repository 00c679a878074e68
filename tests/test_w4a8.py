# SPDX-License-Identifier: Apache-2.0
"""The W4A8 product of codes gives the reference's bits: integers, sizes, outputs, biases. Scales: test_w4a8_scales.py."""

import math

import pytest
import torch
import xpu_fp4
from helpers import (
    BIASES,
    DTYPES,
    assert_same_bits,
    expected_gemm,
    gemm,
    off_by,
    random_codes,
    random_int8,
    random_scales,
    seeded,
    spread_scales,
)
from torch import Tensor
from xpu_fp4 import reference

Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # A's codes and scales, W's codes and scales
LARGEST_W, MOST_NEGATIVE_W = 0x77, 0xFF  # bytes of two codes: 6 and -6


def grouped_scales(rows: int, k: int, generator: torch.Generator, low: int = 117, high: int = 137) -> Tensor:
    """Scales of A as group 128 gives them: one for the blocks of a quad."""
    return random_scales(rows, -(-k // 128) * 32, generator, low, high).repeat_interleave(4, 1)[:, : k // 32].contiguous()


def random_operands(m: int, n: int, k: int, seed: int = 0, low: int = 117, high: int = 137) -> Operands:
    generator = seeded(seed)
    a, w = random_int8(m, k, generator), random_codes(n, k, generator)
    return a, grouped_scales(m, k, generator, low, high), w, random_scales(n, k, generator, low, high)


# ---- integers: the largest, ties, cancellation, zeros ----


@pytest.mark.parametrize(("m", "n"), [(1, 16), (5, 33), (40, 70)])
def test_the_largest_integers(backend: str, m: int, n: int) -> None:
    k = 416
    a, w = torch.full((m, k), -128, dtype=torch.int8), torch.full((n, k // 2), LARGEST_W, dtype=torch.uint8)
    w[1::2] = MOST_NEGATIVE_W
    one = torch.full((max(m, n), k // 32), 127, dtype=torch.uint8)
    y = gemm(a, one[:m], w, one[:n])
    assert y[:, ::2].eq(-2.0 * 6 * k).all()
    assert y[:, 1::2].eq(2.0 * 6 * k).all()
    shifted = spread_scales("quad-aligned", n, k // 32, 120, 31)  # integers of up to 96
    for codes in (a, torch.full_like(a, 127), random_int8(m, k, seeded(32))):
        assert_same_bits(gemm(codes, one[:m], w, shifted), expected_gemm(codes, one[:m], w, shifted))


@pytest.mark.parametrize("code", range(16))
def test_every_pair_of_codes(backend: str, code: int) -> None:
    # Row i holds the int8 code i - 128 in one place: its product with the column's code is exact.
    a = torch.zeros(256, 64, dtype=torch.int8)
    a[torch.arange(256), torch.arange(256) % 64] = torch.arange(-128, 128, dtype=torch.int8)
    w = torch.full((17, 32), code * 17, dtype=torch.uint8)
    one = torch.full((256, 2), 127, dtype=torch.uint8)
    value = reference.MAGNITUDES[code & 7] * (-1 if code & 8 else 1)
    expected = (torch.arange(-128, 128) / 64 * value).float()[:, None].expand(256, 17)
    assert torch.equal(gemm(a, one, w, one[:17]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_cancellation(backend: str, dtype: torch.dtype) -> None:
    # Blocks that cancel or leave half an ulp of what is there: sums that depend on order and on one rounding each.
    m, n, k = 24, 40, 512
    a, w = random_int8(m, k, seeded(33)), random_codes(n, k, seeded(34))
    a[:, 128:256] = -a[:, :128].clamp(min=-127)
    w[:, 64:128] = w[:, :64]
    a_scale = torch.full((m, 16), 127, dtype=torch.uint8)
    for distance in (0, 3, 8, 16, 24):
        w_scale = torch.full((n, 16), 127, dtype=torch.uint8)
        w_scale[:, 8:] -= distance
        w_scale[:, 2::4] += 3
        operands = a, a_scale, w, w_scale
        assert_same_bits(gemm(*operands, dtype), expected_gemm(*operands, dtype))


def test_outputs_at_ties_round_to_even(backend: str) -> None:
    # 128 + 1/2 ulp and 128 + 3/2 ulp of float16 and bfloat16, from products of 64 * 2 and one small block.
    for dtype, ulp in ((torch.float16, 2.0**-3), (torch.bfloat16, 1.0)):
        a = torch.zeros(4, 64, dtype=torch.int8)
        a[:, 0] = 64
        a[:, 32] = torch.tensor([1, 3, -1, 5])
        w = torch.zeros(1, 32, dtype=torch.uint8)
        w[0, 0], w[0, 16] = 4, 2  # 2 and 1
        a_scale = torch.full((4, 2), 127, dtype=torch.uint8)
        a_scale[:, 0] += 6
        a_scale[:, 1] = 127 + 6 + int(math.log2(ulp)) - 1  # units of half an ulp
        operands = a, a_scale, w, torch.full((1, 2), 127, dtype=torch.uint8)
        y = gemm(*operands, dtype)
        assert y.flatten().tolist() == [128.0, 128 + 2 * ulp, 128.0 - ulp / 2, 128 + 2 * ulp]
        assert_same_bits(y, expected_gemm(*operands, dtype))


@pytest.mark.parametrize("scale", [0, 1, 40, 127, 200, 253, 254])
def test_zero_blocks_under_any_scale_add_nothing(backend: str, scale: int) -> None:
    # A zero block's scale may not decide how its neighbours are computed, nor lose a zero in Inf * 0.
    a, a_scale, w, w_scale = random_operands(20, 36, 416, seed=35)
    a.view(20, 13, 32)[:, 1::3] = 0
    w.view(36, 13, 16)[:, 2::3] = 0x80
    a_scale[:, 1::3], w_scale[:, 2::3] = scale, scale
    assert_same_bits(gemm(a, a_scale, w, w_scale), expected_gemm(a, a_scale, w, w_scale))
    zeros = torch.zeros_like(a)
    assert_same_bits(gemm(zeros, torch.full_like(a_scale, scale), w, w_scale), torch.zeros(20, 36))


def test_a_nan_scale_reaches_its_row_or_column_only(backend: str) -> None:
    a, a_scale, w, w_scale = random_operands(20, 36, 416, seed=36)
    clean = expected_gemm(a, a_scale, w, w_scale)
    a_scale[3], a_scale[7, 12], w_scale[5, 0], w_scale[30, 6] = 255, 255, 255, 255
    a.view(20, 13, 32)[7, 12] = 0  # of a zero block too
    y = gemm(a, a_scale, w, w_scale)
    assert_same_bits(y, expected_gemm(a, a_scale, w, w_scale))
    poisoned = torch.zeros(20, 36, dtype=torch.bool)
    poisoned[[3, 7]], poisoned[:, [5, 30]] = True, True
    assert y[poisoned].isnan().all()
    assert_same_bits(y[~poisoned], clean[~poisoned])


# ---- sizes ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [32, 64, 96, 128, 160, 256, 416, 1056, 4128, 8192])
def test_any_number_of_blocks(backend: str, k: int, dtype: torch.dtype) -> None:
    operands = random_operands(18, 35, k, seed=k)
    assert_same_bits(gemm(*operands, dtype), expected_gemm(*operands, dtype))


@pytest.mark.parametrize("m", range(34))
def test_any_number_of_rows_and_columns(backend: str, m: int) -> None:
    columns = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65)
    a, a_scale, w, w_scale = random_operands(m, max(columns), 160, seed=37)
    expected = expected_gemm(a, a_scale, w, w_scale)
    for n in columns:
        assert_same_bits(gemm(a, a_scale, w[:n], w_scale[:n]), expected[:, :n].contiguous())


def test_many_rows_and_columns(backend: str) -> None:
    operands = random_operands(300, 260, 288, seed=38)
    assert_same_bits(gemm(*operands), expected_gemm(*operands))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_k_the_output_is_the_bias(backend: str, dtype: torch.dtype) -> None:
    bias = torch.randn(5, 7, generator=seeded(39))
    bias[0, 0] = -0.0  # acc + bias = +0 + -0 = +0
    operands = random_operands(5, 7, 0)
    assert_same_bits(gemm(*operands, dtype, bias), (bias + 0.0).to(dtype))
    assert_same_bits(gemm(*operands, dtype), torch.zeros(5, 7, dtype=dtype))


# ---- outputs, biases, shapes ----


def test_no_output_dtype_means_float16(backend: str) -> None:
    operands = random_operands(3, 4, 64, seed=40)
    assert_same_bits(gemm(*operands, None), expected_gemm(*operands, torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_of_every_magnitude_round_once(backend: str, dtype: torch.dtype) -> None:
    a, _, w, w_scale = random_operands(254, 64, 96, seed=41, low=126, high=127)
    a_scale = torch.arange(254, dtype=torch.uint8)[:, None].expand(254, 3).contiguous()
    assert_same_bits(gemm(a, a_scale, w, w_scale, dtype), expected_gemm(a, a_scale, w, w_scale, dtype))


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_is_added_in_float32_before_the_output_is_rounded(backend: str, bias_dtype: torch.dtype, kind: str) -> None:
    operands = random_operands(19, 37, 96, seed=42)
    bias = BIASES[kind](19, 37).to(bias_dtype)
    for dtype in DTYPES:
        expected = expected_gemm(*operands, dtype, bias)
        assert_same_bits(gemm(*operands, dtype, bias), expected)
        assert not torch.equal(expected, expected_gemm(*operands, dtype))


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5), (3, 0), (0, 3)])
def test_a_batch_of_matrices_repeats_the_bias(backend: str, shape: tuple[int, ...], kind: str) -> None:
    n, k, rows = 37, 96, math.prod(shape)
    a, a_scale, w, w_scale = random_operands(rows, n, k, seed=43)
    bias = BIASES[kind](shape[-1], n)
    expected = expected_gemm(a, a_scale, w, w_scale, torch.float32, bias.expand(*shape, n).reshape(rows, n))
    y = gemm(a.view(*shape, k), a_scale.view(*shape, k // 32), w, w_scale, torch.float32, bias)
    assert_same_bits(y, expected.view(*shape, n))


def test_one_row_may_be_a_vector(backend: str) -> None:
    a, a_scale, w, w_scale = random_operands(1, 9, 96, seed=44)
    assert_same_bits(gemm(a[0], a_scale[0], w, w_scale), expected_gemm(a, a_scale, w, w_scale)[0])


def test_views_and_types_of_the_operands_do_not_matter(backend: str) -> None:
    a, a_scale, w, w_scale = random_operands(12, 21, 128, seed=45)
    expected = expected_gemm(a, a_scale, w, w_scale)
    for view in (a.t().contiguous().t(), torch.cat([a, a], 1)[:, 128:], a.repeat_interleave(2, 0)[::2], off_by(a)):
        assert_same_bits(gemm(view, a_scale, w, w_scale), expected)
    for view in (a_scale.t().contiguous().t(), off_by(a_scale), a_scale.view(torch.float8_e8m0fnu)):
        assert_same_bits(gemm(a, view, w, w_scale), expected)
    typed = w.view(torch.float4_e2m1fn_x2), w_scale.view(torch.float8_e8m0fnu)
    assert_same_bits(gemm(a, a_scale, *typed), expected)
    assert_same_bits(gemm(a, a_scale, off_by(w), off_by(w_scale)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vllms_name_takes_int8_too(backend: str, dtype: torch.dtype) -> None:
    a, a_scale, w, w_scale = random_operands(6, 10, 160, seed=46)
    bias = torch.randn(10, generator=seeded(47))
    y = torch.ops._xpu_C.fp4_gemm(a, w.t(), a_scale, w_scale.t().contiguous(), dtype, bias)
    assert_same_bits(y, expected_gemm(a, a_scale, w, w_scale, dtype, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 32), (3, 17, 160), (40, 50, 416), (5, 16, 4096), (0, 5, 64), (4, 7, 0)])
def test_a_prepacked_weight_gives_the_same_bits(backend: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    a, a_scale, w, w_scale = random_operands(m, n, k, seed=48)
    packed, bias = xpu_fp4.prepack(w, w_scale), torch.randn(n, generator=seeded(49))
    for scale in (a_scale, random_scales(m, k, seeded(50), 117, 137)):
        y = torch.ops.xpu_fp4.mxfp4_gemm_prepacked(a, scale, packed, n, dtype, bias)
        assert_same_bits(y, expected_gemm(a, scale, w, w_scale, dtype, bias))
