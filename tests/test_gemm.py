# SPDX-License-Identifier: Apache-2.0
"""The products: W4A4 gives the reference's bits whatever surrounds it, W4A16 stays within its bound; all are reproducible."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import xpu_fp4
from helpers import (
    BIASES,
    DTYPES,
    ENVIRONMENTS,
    MODES,
    SPREADS,
    Environment,
    assert_same_bits,
    bits,
    environment_is,
    expected_gemm,
    float_environment,
    gemm,
    linear_w4a4,
    linear_w4a8,
    linear_w4a16,
    normal,
    off_by,
    random_codes,
    random_scales,
    seeded,
    spread_scales,
)
from torch import Tensor
from xpu_fp4 import ScaleMode, reference

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


def _quads(p: Tensor, quad: Callable[[Tensor], Tensor]) -> Tensor:
    acc = torch.zeros_like(p[0])
    for q in range(0, len(p), 4):
        acc = acc + quad(p[q : q + 4])
    return acc


def _in_pairs(t: Tensor) -> Tensor:
    return (t[0] + t[1]) + (t[2] + t[3])


WRONG_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "one after the other": _sequential,
    "other pairs": lambda p: _quads(p, lambda t: (t[0] + t[2]) + (t[1] + t[3])),
    "no pairs": lambda p: _quads(p, lambda t: ((t[0] + t[1]) + t[2]) + t[3]),
    "last quad first": lambda p: _quads(p.reshape(-1, 4, *p.shape[1:]).flip(0).reshape(p.shape), _in_pairs),
    "pairs straight into the sum": lambda p: _sequential(p[0::2] + p[1::2]),
    "two halves": lambda p: _quads(p[: len(p) // 2], _in_pairs) + _quads(p[len(p) // 2 :], _in_pairs),
    "rounded once": lambda p: p.double().sum(0).float(),
    "quads rounded once": lambda p: _quads(p, lambda t: t.double().sum(0).float()),
}


def order_operands() -> Operands:
    m, n, k = 33, 40, 1024
    a, w = random_codes(m, k, seeded(26)), random_codes(n, k, seeded(27))
    return a, spread_scales("unaligned", m, k // 32, 110, 28), w, spread_scales("equal", n, k // 32, 127, 29)


@pytest.mark.parametrize("order", WRONG_ORDERS)
def test_the_data_tells_a_wrong_order_of_adds(order: str) -> None:
    operands = order_operands()
    right, wrong = expected_gemm(*operands), WRONG_ORDERS[order](block_products(*operands))
    differing = (bits(right) != bits(wrong)).double().mean().item()
    assert differing > 0.02, f"only {differing:.2%} of the outputs differ"


def test_products_are_added_in_the_defined_order(backend: str) -> None:
    operands = order_operands()
    p = block_products(*operands)
    by_hand = _quads(p, _in_pairs)
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


# ---- the linears ----


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


# ---- reproducible: backends, repetition, batch, threads ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(70, 1056), (1, 8192), (5, 8192), (16, 8192), (33, 8192)])
def test_every_backend_gives_the_bits_of_native(backend: str, n: int, k: int, dtype: torch.dtype) -> None:
    # A long K and a last sub-group with few columns: what a device compiler may turn into another loop.
    operands = random_operands(33, n, k, seed=71)
    x, bias = normal(33, k, dtype=dtype), normal(n, dtype=dtype)
    x[3, 100] = torch.nan
    calls: list[Callable[[], Tensor]] = [
        lambda: gemm(*operands, dtype, bias),
        lambda: linear_w4a4(x, *operands[2:], bias),
        lambda: linear_w4a8(x, *operands[2:], bias),
    ]
    for call in calls:
        with xpu_fp4.cpu_backend("native"):
            native = call()
        assert_same_bits(call(), native)
        assert_same_bits(call(), native)  # and again
    # W4A16 has an order of its own in each backend.
    assert_same_bits(linear_w4a16(x, *operands[2:], bias), linear_w4a16(x, *operands[2:], bias))


@pytest.mark.parametrize("n", [1, 5, 16, 17])
@pytest.mark.parametrize("op", OPS)
def test_quads_are_added_one_after_the_other(backend: str, op: str, n: int) -> None:
    # 2^24 + 1 + 1 + ... stays 2^24 in that order only: a sum kept in several parts gives more.
    k = 16384
    x = torch.zeros(3, k)
    x[:, ::128] = 1.0
    x[:, 0] = 2.0**24
    w, w_scale = xpu_fp4.quantize(torch.ones(n, k))
    assert (OPS[op](x, w, w_scale) == 2.0**24).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n", [1, 21, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_column_does_not_depend_on_its_place(backend: str, dtype: torch.dtype, n: int, op: str) -> None:
    linear, k = OPS[op], 8192
    x = normal(2, k, dtype=dtype)
    w, w_scale = random_codes(1, k, seeded(93)), random_scales(1, k, seeded(94), 117, 122)
    y = linear(x, w.expand(n, -1).contiguous(), w_scale.expand(n, -1).contiguous())
    assert_same_bits(y, linear(x, w, w_scale).expand(2, n).contiguous())


@pytest.mark.parametrize("op", OPS)
def test_batch_neighbours_do_not_change_a_row(backend: str, op: str) -> None:
    linear, m = OPS[op], 67
    x = normal(m, 416)
    w, w_scale = random_codes(45, 416, seeded(72)), spread_scales("unaligned", 45, 13, 110, 73)
    alone = torch.cat([linear(x[i : i + 1], w, w_scale) for i in range(m)])
    for rows in (m, 2, 8, 9, 16, 33):
        assert_same_bits(linear(x[:rows], w, w_scale), alone[:rows])
    order = torch.randperm(m, generator=seeded(74))
    assert_same_bits(linear(x[order], w, w_scale), alone[order])
    # Neighbours of another size, and ones that are not finite.
    for value in (1e30, 1e-40, torch.inf, torch.nan):
        mixed = x.clone()
        mixed[1::2] = value
        assert_same_bits(linear(mixed, w, w_scale)[::2].contiguous(), alone[::2].contiguous())


def test_the_neighbours_scales_do_not_change_a_row(backend: str) -> None:
    # Unaligned rows beside aligned ones: a tile's way through the kernel depends on all of its rows.
    a, _, w, _ = random_operands(64, 45, 416, seed=75)
    a_scale = torch.cat([spread_scales(kind, 16, 13, 115, 76) for kind in SPREADS[:4]])
    w_scale = torch.cat([spread_scales(kind, 9, 13, 120, 77) for kind in SPREADS[:5]])
    expected = expected_gemm(a, a_scale, w, w_scale)
    for seed in range(4):
        rows, columns = torch.randperm(64, generator=seeded(seed)), torch.randperm(45, generator=seeded(seed))
        y = gemm(a[rows], a_scale[rows], w[columns], w_scale[columns])
        assert_same_bits(y, expected[rows][:, columns])
    a_scale[5], a_scale[40, 3] = 255, 255
    y = gemm(a, a_scale, w, w_scale)
    kept = [i for i in range(64) if i not in (5, 40)]
    assert_same_bits(y[kept], expected[kept])
    assert y[[5, 40]].isnan().all()


def test_the_number_of_threads_does_not_change_a_bit(backend: str, threads: Callable[[int], None]) -> None:
    operands = random_operands(150, 100, 416, seed=78)
    x = normal(150, 4128)
    w, w_scale = random_codes(100, 4128, seeded(79)), random_scales(100, 4128, seeded(80), 117, 137)
    results = []
    for count in (1, 2, 3):
        threads(count)
        q, scale = xpu_fp4.quantize(x)
        linears = [linear(x, w, w_scale) for linear in OPS.values()]
        results.append((gemm(*operands), *linears, bits(q), bits(scale)))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_same_bits(actual, expected)


# ---- the caller's float environment ----


def subnormal_operands() -> Operands:
    return random_operands(20, 40, 416, seed=81, low=48, high=66)


def subnormal_elements() -> Tensor:
    return normal(20, 416) * torch.exp2(torch.arange(-149, -109, 2).float())[:, None]


def environment_calls() -> dict[str, Callable[[], Tensor]]:
    """Calls whose results a foreign environment would change, and the inputs of which lie ready."""
    subnormal, ordered = subnormal_operands(), order_operands()
    x = subnormal_elements()
    large = normal(20, 416)
    codes, scales = random_codes(64, 128, seeded(82)), torch.arange(256, dtype=torch.uint8).view(64, 4)
    w, w_scale = random_codes(40, 416, seeded(83)), random_scales(40, 416, seeded(84), 117, 137)
    small_scale = random_scales(40, 416, seeded(85), 0, 20)
    output = torch.empty(20, 208, dtype=torch.uint8)

    def group_quant() -> Tensor:
        group_scale = torch.empty(20, 13)
        torch.ops._C.per_token_group_quant_mxfp4(x, output, group_scale, 32, 2.0**-126)
        return torch.cat([output.flatten(), group_scale.view(torch.uint8).flatten()])

    return {
        "quantize codes": lambda: bits(xpu_fp4.quantize(x)[0]),
        "quantize scales": lambda: bits(xpu_fp4.quantize(x)[1]),
        "group quantize": group_quant,
        "dequantize to float32": lambda: xpu_fp4.dequantize(codes, scales, torch.float32),
        "dequantize to float16": lambda: xpu_fp4.dequantize(codes, scales, torch.float16),
        "dequantize to bfloat16": lambda: xpu_fp4.dequantize(codes, scales, torch.bfloat16),
        "gemm of subnormal products": lambda: gemm(*subnormal),
        "gemm with rounded sums": lambda: gemm(*ordered),
        "gemm to float16": lambda: gemm(*ordered, torch.float16),
        "gemm to bfloat16": lambda: gemm(*ordered, torch.bfloat16),
        "w4a4": lambda: linear_w4a4(large, w, w_scale),
        "w4a16": lambda: linear_w4a16(large, w, w_scale),
        "w4a16 of subnormal elements": lambda: linear_w4a16(x, w, w_scale),
        "w4a16 of subnormal products": lambda: linear_w4a16(large, w, small_scale),
    }


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_callers_float_environment_reaches_no_bit(backend: str, environment: Environment) -> None:
    calls = environment_calls()
    before = {name: call() for name, call in calls.items()}
    with float_environment(environment):
        during = {}
        for name, call in calls.items():
            during[name] = call()
            assert environment_is(environment), f"{name} changed the caller's environment"
    for name, expected in before.items():
        assert_same_bits(during[name], expected)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_environment_would_matter_to_that_data(environment: Environment) -> None:
    # torch's own arithmetic on the same operands, in this thread only: those of its pool have their own environment.
    products, addends = block_products(*subnormal_operands()), block_products(*order_operands())
    elements = subnormal_elements()
    least_scale = bits(torch.tensor([1 << 22], dtype=torch.int32)).view(torch.float32)

    def plain() -> dict[str, Tensor]:
        return {
            "quantize": elements * 2.0**120,
            "dequantize": least_scale * 6.0,
            "gemm": products * 1.0,
            "gemm sums": _quads(addends, _in_pairs),
        }

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        default = plain()
        with float_environment(environment):
            foreign = plain()
    finally:
        torch.set_num_threads(threads_before)
    changed = {name for name in default if not torch.equal(bits(default[name]), bits(foreign[name]))}
    assert changed == ({"quantize", "dequantize", "gemm"} if environment == "flush" else {"gemm sums"})


FLUSH_FIRST = """
import sys, torch
torch.set_flush_denormal(True)  # before any thread of torch's or SYCL's pool exists
import xpu_fp4
x, a, a_scale, w, w_scale = torch.load(sys.argv[2])
with xpu_fp4.cpu_backend(sys.argv[1]):
    q, scale = xpu_fp4.quantize(x)
    y = torch.ops.xpu_fp4.mxfp4_gemm(a, w.t(), a_scale, w_scale.t().contiguous(), torch.float32)
    torch.save([q.view(torch.uint8), scale.view(torch.uint8), y], sys.argv[3])
"""


def test_flushing_from_the_start_of_the_process_reaches_no_bit(backend: str, tmp_path: Path) -> None:
    # Threads inherit the environment of the thread that starts them.
    x = normal(256, 4096) * torch.exp2(torch.linspace(-148, -110, 256))[:, None]
    operands = random_operands(150, 200, 416, seed=86, low=48, high=66)
    source, result = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save([x, *operands], source)
    subprocess.run([sys.executable, "-c", FLUSH_FIRST, backend, str(source), str(result)], check=True, timeout=120)
    q, scale = reference.quantize(x)
    for actual, expected in zip(torch.load(result), (q, scale, expected_gemm(*operands)), strict=True):
        assert_same_bits(actual, expected)


# ---- sizes beyond 32-bit offsets ----


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
