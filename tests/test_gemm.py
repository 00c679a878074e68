# SPDX-License-Identifier: Apache-2.0
"""The product of codes: the definition's bits for all scales, orders, sizes and dtypes; bias, shapes, views."""

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from helpers import (
    BIASES,
    DTYPES,
    SPREADS,
    assert_same_bits,
    bits,
    expected_gemm,
    gemm,
    off_by,
    random_codes,
    seeded,
    spread_scales,
)
from products import CENTRES, OPS, Operands, block_products, in_pairs, order_operands, quads, random_operands
from torch import Tensor
from xpu_fp4 import reference

# ---- the definition: scales, order, sizes, output dtypes ----


@cache
def every_scale_pair() -> tuple[Operands, Tensor]:
    generator = seeded(20)
    scale = torch.arange(256, dtype=torch.uint8)[:, None]
    operands = random_codes(256, 32, generator), scale, random_codes(256, 32, generator), scale.flip(0)
    return operands, expected_gemm(*operands)


def test_every_pair_of_scales(backend: str) -> None:
    operands, expected = every_scale_pair()
    magnitude = expected.abs()
    assert ((magnitude > 0) & (magnitude < 2.0**-126)).any(), "no subnormal product"
    assert magnitude.isinf().any(), "no overflow"
    assert expected[255].isnan().all()
    assert expected[:, 0].isnan().all()
    assert_same_bits(gemm(*operands), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_scales_beside_other_blocks(backend: str, dtype: torch.dtype) -> None:
    # Row i, block b has the scale i + 64 b: all pairs meet in every place of the quad, and in a started second one.
    generator = seeded(21)
    scale = ((torch.arange(256)[:, None] + 64 * torch.arange(5)) % 256).to(torch.uint8)
    operands = random_codes(256, 160, generator), scale, random_codes(256, 160, generator), scale.flip(0)
    assert_same_bits(gemm(*operands, dtype), expected_gemm(*operands, dtype))


@pytest.mark.parametrize("centre", CENTRES)
@pytest.mark.parametrize("spread", SPREADS)
def test_aligned_and_unaligned_quads_give_the_same_definition(backend: str, spread: str, centre: str) -> None:
    m, n, k = 20, 36, 416
    a_centre, w_centre = CENTRES[centre]
    a, w = random_codes(m, k, seeded(22)), random_codes(n, k, seeded(23))
    for a_kind, w_kind in [(spread, spread), (spread, "equal"), ("equal", spread)]:
        a_scale = spread_scales(a_kind, m, k // 32, a_centre, 24)
        w_scale = spread_scales(w_kind, n, k // 32, w_centre, 25)
        operands = a, a_scale, w, w_scale
        assert_same_bits(gemm(*operands), expected_gemm(*operands))


def _sequential(p: Tensor) -> Tensor:
    acc = torch.zeros_like(p[0])
    for block in p:
        acc = acc + block
    return acc


WRONG_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "one after the other": _sequential,
    "other pairs": lambda p: quads(p, lambda t: (t[0] + t[2]) + (t[1] + t[3])),
    "no pairs": lambda p: quads(p, lambda t: ((t[0] + t[1]) + t[2]) + t[3]),
    "last quad first": lambda p: quads(p.reshape(-1, 4, *p.shape[1:]).flip(0).reshape(p.shape), in_pairs),
    "pairs straight into the sum": lambda p: _sequential(p[0::2] + p[1::2]),
    "two halves": lambda p: quads(p[: len(p) // 2], in_pairs) + quads(p[len(p) // 2 :], in_pairs),
    "rounded once": lambda p: p.double().sum(0).float(),
    "quads rounded once": lambda p: quads(p, lambda t: t.double().sum(0).float()),
}


@pytest.mark.parametrize("order", WRONG_ORDERS)
def test_the_data_tells_a_wrong_order_of_adds(order: str) -> None:
    operands = order_operands()
    right, wrong = expected_gemm(*operands), WRONG_ORDERS[order](block_products(*operands))
    differing = (bits(right) != bits(wrong)).double().mean().item()
    assert differing > 0.02, f"only {differing:.2%} of the outputs differ"


def test_products_are_added_in_the_defined_order(backend: str) -> None:
    operands = order_operands()
    p = block_products(*operands)
    by_hand = quads(p, in_pairs)
    assert_same_bits(expected_gemm(*operands), by_hand)
    assert_same_bits(gemm(*operands), by_hand)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [32, 64, 96, 128, 160, 256, 416, 4128, 8192])
def test_any_number_of_blocks(backend: str, k: int, dtype: torch.dtype) -> None:
    operands = random_operands(18, 35, k, seed=k)
    assert_same_bits(gemm(*operands, dtype), expected_gemm(*operands, dtype))


TAILS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129)


@pytest.mark.parametrize("m", TAILS)
def test_any_number_of_rows_and_columns(backend: str, m: int) -> None:
    a, a_scale, w, w_scale = random_operands(m, max(TAILS), 160, seed=30)
    expected = expected_gemm(a, a_scale, w, w_scale)
    for n in TAILS:
        assert_same_bits(gemm(a, a_scale, w[:n], w_scale[:n]), expected[:, :n].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_of_every_magnitude_round_once(backend: str, dtype: torch.dtype) -> None:
    a, a_scale, w, w_scale = random_operands(254, 64, 96, seed=31, low=126, high=127)
    a_scale = torch.arange(254, dtype=torch.uint8)[:, None].expand(254, 3)
    expected = expected_gemm(a, a_scale, w, w_scale, dtype)
    magnitude = expected.abs().double()
    smallest, info = magnitude[magnitude > 0].min().item(), torch.finfo(dtype)
    if dtype == torch.float16:
        assert smallest < info.smallest_normal
        assert magnitude.isinf().any()
    assert (torch.signbit(expected) & (expected == 0)).any() == (dtype == torch.float16)  # underflow keeps the sign
    assert_same_bits(gemm(a, a_scale, w, w_scale, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_ties_round_to_even(backend: str, dtype: torch.dtype) -> None:
    # A sum of powers of two, 1, a half ulp, and an ulp or not: exactly between two outputs.
    bits_kept = 11 if dtype == torch.float16 else 8
    codes = torch.zeros(8, 96, dtype=torch.uint8)
    codes[:, [0, 32, 64]] = 2
    scale = torch.tensor([[127, 127 - bits_kept, 127 - bits_kept + 1 - i] for i in range(8)], dtype=torch.uint8)
    codes[0, 64] = 0  # row 0: the tie itself; row 1: 1.5 ulp, rows below: slightly above the tie
    scale[1, 2] = 127 - bits_kept + 1
    one = torch.zeros(2, 96, dtype=torch.uint8)
    one[0, ::32], one[1, ::32] = 2, 10
    operands = reference.pack(codes), scale, reference.pack(one), torch.full((2, 3), 127, dtype=torch.uint8)
    y = gemm(*operands, dtype)
    assert_same_bits(y, expected_gemm(*operands, dtype))
    ulp = 2.0 ** (1 - bits_kept)
    assert y[:2].double().tolist() == [[1, -1], [1 + 2 * ulp, -1 - 2 * ulp]]
    assert y[2].double().tolist() == [1 + ulp, -1 - ulp]


def test_opposite_infinities_give_the_one_nan(backend: str) -> None:
    # The processor's Inf - Inf has its sign bit set.
    codes = torch.full((1, 64), 7, dtype=torch.uint8)
    negative = codes.clone()
    negative[:, 32:] |= 8
    scale = torch.full((1, 2), 220, dtype=torch.uint8)
    for dtype in DTYPES:
        y = gemm(reference.pack(codes), scale, reference.pack(negative), scale, dtype)
        assert y.isnan().all()
        assert_same_bits(y, reference.canonical_nan(y))


def test_no_output_dtype_means_float16(backend: str) -> None:
    operands = random_operands(3, 4, 64, seed=32)
    assert_same_bits(gemm(*operands, None), expected_gemm(*operands, torch.float16))


# ---- bias and shapes ----


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_is_added_in_float32_before_the_output_is_rounded(backend: str, bias_dtype: torch.dtype, kind: str) -> None:
    m, n = 19, 37
    operands = random_operands(m, n, 96, seed=41)
    bias = BIASES[kind](m, n).to(bias_dtype)
    for dtype in DTYPES:
        expected = expected_gemm(*operands, dtype, bias)
        assert_same_bits(gemm(*operands, dtype, bias), expected)
        assert not torch.equal(expected, expected_gemm(*operands, dtype))


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 5), (4, 1), (1, 1), (3, 0), (0, 3)])
@pytest.mark.parametrize("kind", BIASES)
def test_a_batch_of_matrices_repeats_the_bias(backend: str, kind: str, shape: tuple[int, ...]) -> None:
    n, k, rows = 37, 96, math.prod(shape)
    a, a_scale, w, w_scale = random_operands(rows, n, k, seed=42)
    bias = BIASES[kind](shape[-1], n)
    spread = bias.expand(*shape, n).reshape(rows, n)
    expected = expected_gemm(a, a_scale, w, w_scale, torch.float32, spread).reshape(*shape, n)
    y = gemm(a.reshape(*shape, k // 2), a_scale.reshape(*shape, k // 32), w, w_scale, torch.float32, bias)
    assert_same_bits(y, expected)


def test_one_row_may_be_a_vector(backend: str) -> None:
    a, a_scale, w, w_scale = random_operands(1, 9, 96, seed=43)
    bias = torch.randn(9, generator=seeded(44))
    expected = expected_gemm(a, a_scale, w, w_scale, torch.float32, bias)
    assert_same_bits(gemm(a[0], a_scale[0], w, w_scale, torch.float32, bias), expected[0])


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_non_finite_and_zero_biases(backend: str, bias_dtype: torch.dtype) -> None:
    a, a_scale, w, w_scale = random_operands(3, 6, 96, seed=45)
    a[0] = 0x88  # every product is a zero, some of them negative
    bias = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 0.0], dtype=bias_dtype)
    for dtype in DTYPES:
        y = gemm(a, a_scale, w, w_scale, dtype, bias)
        assert_same_bits(y, expected_gemm(a, a_scale, w, w_scale, dtype, bias))
        assert not torch.signbit(y[0, 4:]).any()  # the sum starts at +0, and +0 + -0 = +0


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_k_the_output_is_the_bias(backend: str, dtype: torch.dtype) -> None:
    m, n = 5, 7
    bias = torch.randn(m, n, generator=seeded(46))
    bias[0, 0] = -0.0  # acc + bias = +0 + -0 = +0
    empty = torch.empty(m, 0, dtype=torch.uint8), torch.empty(m, 0, dtype=torch.uint8)
    weight = torch.empty(n, 0, dtype=torch.uint8), torch.empty(n, 0, dtype=torch.uint8)
    assert_same_bits(gemm(*empty, *weight, dtype, bias), (bias + 0.0).to(dtype))
    assert_same_bits(gemm(*empty, *weight, dtype), torch.zeros(m, n, dtype=dtype))
    x = torch.empty(m, 0, dtype=dtype)
    for linear in OPS.values():
        assert_same_bits(linear(x, *weight, bias[1]), bias[1].expand(m, n).to(dtype).contiguous())
        assert_same_bits(linear(x, *weight), torch.zeros(m, n, dtype=dtype))


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows_or_no_columns_give_an_empty_output(backend: str, m: int, n: int) -> None:
    a, a_scale, w, w_scale = random_operands(m, n, 64, seed=47)
    for bias in (None, torch.zeros(n), torch.zeros(m, 1), torch.zeros(m, n)):
        assert gemm(a, a_scale, w, w_scale, torch.float32, bias).shape == (m, n)
    for linear in OPS.values():
        assert linear(torch.zeros(m, 64), w, w_scale, torch.zeros(n)).shape == (m, n)


def test_views_of_a_multiply_like_their_contiguous_copies(backend: str) -> None:
    a, a_scale, w, w_scale = random_operands(12, 21, 128, seed=48)
    expected = expected_gemm(a, a_scale, w, w_scale)
    a_views = (a.t().contiguous().t(), torch.cat([a, a], 1)[:, 64:], a.repeat_interleave(2, 0)[::2], off_by(a))
    s_views = (a_scale.t().contiguous().t(), torch.cat([a_scale, a_scale], 1)[:, 4:], off_by(a_scale))
    for a_view in a_views:
        assert_same_bits(gemm(a_view, a_scale, w, w_scale), expected)
    for s_view in s_views:
        assert_same_bits(gemm(a, s_view, w, w_scale), expected)
    batch = a.view(3, 4, 64).transpose(0, 1), a_scale.view(3, 4, 4).transpose(0, 1)
    assert_same_bits(gemm(*batch, w, w_scale), expected.view(3, 4, 21).transpose(0, 1).contiguous())


def test_unaligned_weights_multiply_like_aligned_ones(backend: str) -> None:
    a, a_scale, w, w_scale = random_operands(12, 21, 128, seed=49)
    expected = expected_gemm(a, a_scale, w, w_scale)
    assert_same_bits(gemm(a, a_scale, off_by(w), w_scale), expected)
    shifted_scale = off_by(w_scale.t().contiguous())
    y = torch.ops.xpu_fp4.mxfp4_gemm(a, off_by(w).t(), a_scale, shifted_scale, torch.float32, None)
    assert_same_bits(y, expected)
    x = torch.randn(12, 128, generator=seeded(50))
    for linear in OPS.values():
        assert_same_bits(linear(off_by(x), off_by(w), off_by(w_scale)), linear(x, w, w_scale))


def test_the_typed_codes_are_the_bytes(backend: str) -> None:
    a, a_scale, w, w_scale = random_operands(5, 6, 64, seed=51)
    typed_a, typed_w = a.view(torch.float4_e2m1fn_x2), w.view(torch.float4_e2m1fn_x2)
    typed = typed_a, a_scale.view(torch.float8_e8m0fnu), typed_w, w_scale.view(torch.float8_e8m0fnu)
    assert_same_bits(gemm(*typed), gemm(a, a_scale, w, w_scale))
