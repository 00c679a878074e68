# SPDX-License-Identifier: Apache-2.0
"""Quantize and dequantize give the reference's bits for every element, scale, layout and size."""

from collections.abc import Callable
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
import xpu_fp4
from helpers import (
    ALL_PATTERNS,
    DTYPES,
    HALF_DTYPES,
    LAYOUTS,
    MODES,
    as_numpy,
    assert_quantizes,
    assert_same_bits,
    bits,
    from_bits,
    gemm,
    normal,
    random_codes,
    random_scales,
    seeded,
)
from torch import Tensor
from xpu_fp4 import ScaleMode, reference

Quantized = tuple[Tensor, Tensor]


def blocks_of(elements: Tensor, amax: Tensor | float) -> Tensor:
    """[rows, 32]: 31 of the elements each, padded with -0, and amax at a place that moves from row to row."""
    padding = -torch.zeros(-len(elements) % 31, dtype=elements.dtype)
    others = torch.cat([elements, padding]).reshape(-1, 31)
    amaxes = torch.as_tensor(amax, dtype=elements.dtype).expand(len(others), 1)
    x = torch.cat([others, amaxes], 1)
    place = (torch.arange(32) + torch.arange(len(x))[:, None]) % 32
    return x.gather(1, place)


@cache
def every_element(dtype: torch.dtype) -> Tensor:
    """Every bit pattern as an element, under scales from the smallest to the largest."""
    top = torch.finfo(dtype).max
    amaxes = [0.0, torch.finfo(dtype).smallest_normal, 0.0117, 1.0, 6.0, 7.5, 448.0, top]
    return torch.cat([blocks_of(from_bits(ALL_PATTERNS, dtype), amax) for amax in amaxes])


@cache
def every_amax(dtype: torch.dtype) -> Tensor:
    """Every bit pattern as the largest magnitude of its block, at a place that moves, among random smaller ones."""
    pattern = ALL_PATTERNS.int() & 0xFFFF
    magnitude, sign = pattern & 0x7FFF, pattern & 0x8000
    smaller = (torch.rand(len(pattern), 31, generator=seeded(3)) * magnitude[:, None]).int()
    signs = torch.randint(0, 2, smaller.shape, generator=seeded(4), dtype=torch.int32) << 15
    x = torch.cat([smaller | signs, (magnitude | sign)[:, None]], 1)
    return from_bits(x.gather(1, (torch.arange(32) + torch.arange(len(x))[:, None]) % 32), dtype)


@cache
def expected_of(make: Callable[[torch.dtype], Tensor], dtype: torch.dtype, mode: ScaleMode) -> Quantized:
    return reference.quantize(make(dtype), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("make", [every_element, every_amax])
def test_every_16_bit_pattern(backend: str, make: Callable[[torch.dtype], Tensor], dtype: torch.dtype, mode: ScaleMode) -> None:
    assert_quantizes(make(dtype), mode, expected_of(make, dtype, mode))


def with_neighbours(values: Tensor) -> Tensor:
    """Positive float32 values and those one ulp below and above, both signs."""
    pattern = (bits(values)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)).flatten()
    return from_bits(torch.cat([pattern, pattern | -(1 << 31)]), torch.float32)


@cache
def float32_ties(amax_over_scale: float) -> Tensor:
    """Every tie point +-1 ulp under every scale, subnormal ties included."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    ties = ties[ties < amax_over_scale]  # so that amax stays what it is called
    rows = []
    for e in range(-127, 126):
        scale = torch.tensor(2.0**e, dtype=torch.float64)
        rows.append(blocks_of(with_neighbours((ties * scale).float()), (amax_over_scale * scale).float()))
    x = torch.cat(rows)
    assert x.isfinite().all()
    return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("amax_over_scale", [4.0, 5.5, 6.0, 7.75])
def test_float32_ties_under_every_scale(backend: str, amax_over_scale: float, mode: ScaleMode) -> None:
    x = float32_ties(amax_over_scale)
    q, scale = reference.quantize(x, mode)
    assert_quantizes(x, mode, (q, scale))
    if amax_over_scale == 4.0:  # every finite scale that an amax gives, but for the largest
        assert set(range(253)) <= set(scale.flatten().tolist())


@cache
def float32_amaxes() -> Tensor:
    """Every exponent, subnormals and Inf and NaN included, with mantissas at and around the thresholds of the modes."""
    thresholds = torch.tensor([0, 0x200000, 0x400000, 0x600000, 0x7FFFFE], dtype=torch.int32)
    mantissa = (thresholds[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)).flatten().clamp(min=0)
    mantissa = torch.cat([mantissa, 1 << torch.arange(23, dtype=torch.int32)])
    pattern = ((torch.arange(256, dtype=torch.int32)[:, None] << 23) | mantissa).flatten()
    smaller = (torch.rand(len(pattern), 31, dtype=torch.float64, generator=seeded(5)) * pattern[:, None]).int()
    x = torch.cat([smaller, pattern[:, None]], 1)
    return from_bits(x.gather(1, (torch.arange(32) + torch.arange(len(x))[:, None]) % 32), torch.float32)


@pytest.mark.parametrize("mode", MODES)
def test_float32_amax_at_every_threshold_and_exponent(backend: str, mode: ScaleMode) -> None:
    assert_quantizes(float32_amaxes(), mode)


@pytest.mark.parametrize("mode", MODES)
def test_random_float32_patterns(backend: str, mode: ScaleMode) -> None:
    # Exponents of one block close together, so that all codes occur.
    exponent = torch.randint(0, 250, (4096, 1), generator=seeded(6))
    exponent = exponent + torch.randint(0, 5, (4096, 32), generator=seeded(7))
    mantissa = torch.randint(0, 1 << 23, (4096, 32), generator=seeded(8))
    sign = torch.randint(-1, 1, (4096, 32), generator=seeded(9)) << 31
    x = from_bits(sign | (exponent << 23) | mantissa, torch.float32).reshape(512, 256)
    q, scale = reference.quantize(x, mode)
    largest = 6 if mode == "ceil" else 7  # ceil leaves no magnitude above 4
    assert set((reference.unpack(q) & 7).flatten().tolist()) == set(range(largest + 1))
    assert_quantizes(x, mode, (q, scale))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_block_has_scale_byte_0_and_keeps_its_signs(backend: str, dtype: torch.dtype, mode: ScaleMode) -> None:
    x = torch.zeros(3, 64, dtype=dtype)
    x[1] = -0.0
    x[2, ::3] = -0.0
    q, scale = xpu_fp4.quantize(x, mode)
    assert not bits(scale).any()
    assert torch.equal(reference.unpack(q), 8 * torch.signbit(x).to(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_negative_that_rounds_to_zero_keeps_its_sign(backend: str, dtype: torch.dtype) -> None:
    x = torch.full((1, 32), -0.0625, dtype=dtype)
    x[0, 0], x[0, 1] = 4, 0.0625
    q, _ = xpu_fp4.quantize(x)
    assert reference.unpack(q).tolist() == [[6, 0] + [8] * 30]


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_or_inf_poisons_its_block_and_no_other(backend: str, dtype: torch.dtype, bad: float) -> None:
    clean = torch.randn(32, 3, 32, generator=seeded(10)).to(dtype)
    x = clean.clone()
    x[torch.arange(32), 1, torch.arange(32)] = bad  # every place of the middle block
    want_q, want_scale = reference.quantize(clean.flatten(1))
    want_q[:, 16:32] = 0
    want_scale[:, 1] = 0xFF
    assert_quantizes(x.flatten(1), "even", (want_q, want_scale))


def test_every_nan_pattern_poisons(backend: str) -> None:
    mantissa = torch.cat([1 << torch.arange(23), torch.tensor([0x7FFFFF, 0x400001])])
    x = torch.ones(50, 32)
    x[:, 17] = from_bits(torch.cat([0x7F800000 + mantissa, -0x800000 + mantissa]), torch.float32)
    assert x[:, 17].isnan().all()
    q, scale = xpu_fp4.quantize(x)
    assert (bits(scale) == 0xFF).all()
    assert not bits(q).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_quantizes_like_its_contiguous_copy(backend: str, dtype: torch.dtype, layout: str) -> None:
    x = LAYOUTS[layout](dtype)
    before = x.clone()
    want_q, want_scale = reference.quantize(x.contiguous())
    assert want_q.shape == (*x.shape[:-1], x.shape[-1] // 2)
    assert_quantizes(x, "even", (want_q, want_scale))
    assert_same_bits(x, before)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (0,), (2, 0, 32), (2, 3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_quantizes_and_dequantizes_to_nothing(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, scale = xpu_fp4.quantize(torch.empty(shape, dtype=dtype))
    assert q.shape == (*shape[:-1], shape[-1] // 2)
    assert scale.shape == (*shape[:-1], shape[-1] // 32)
    x = xpu_fp4.dequantize(q, scale, dtype)
    assert x.shape == shape
    assert x.dtype == dtype


@pytest.mark.parametrize("k", [32, 96])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows(backend: str, dtype: torch.dtype, k: int) -> None:
    x = normal(70, k, dtype=dtype)
    q, scale = reference.quantize(x)
    values = reference.values(q, scale).to(dtype)
    for rows in range(1, 71):
        assert_quantizes(x[:rows], "even", (q[:rows], scale[:rows]))
        assert_same_bits(xpu_fp4.dequantize(q[:rows], scale[:rows], dtype), values[:rows])


def test_rows_spread_over_tasks_and_threads_as_one(backend: str) -> None:
    x = normal(301, 4128, dtype=torch.bfloat16)
    assert_quantizes(x, "even")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_every_scale_dequantizes_with_one_rounding(backend: str, dtype: torch.dtype) -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    codes = torch.cat([codes, codes.flip(0)]).expand(256, 32)  # each code in a low and in a high nibble
    scale = torch.arange(256, dtype=torch.uint8)[:, None]
    exact = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale.numpy().view(
        ml_dtypes.float8_e8m0fnu
    ).astype(np.float64)
    expected = as_numpy(exact, dtype)
    q = reference.pack(codes)
    actual = xpu_fp4.dequantize(q, scale, dtype)
    assert_same_bits(actual, expected)
    # The dtypes of the ops give the same, and so does a block that is not the only one of its row.
    typed = xpu_fp4.dequantize(q.view(torch.float4_e2m1fn_x2), scale.view(torch.float8_e8m0fnu), dtype)
    assert_same_bits(typed, expected)
    wide = xpu_fp4.dequantize(q.reshape(16, 256), scale.reshape(16, 16), dtype)
    assert_same_bits(wide, expected.reshape(16, 512))
    if dtype == torch.float16:  # the data has every kind of result
        magnitude = expected.abs()
        assert ((magnitude > 0) & (magnitude < 2.0**-14)).any()
        assert magnitude.isinf().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_dequantizes_like_its_contiguous_copy(backend: str, dtype: torch.dtype) -> None:
    q, scale = random_codes(12, 128, seeded(13)), random_scales(12, 128, seeded(14))
    expected = xpu_fp4.dequantize(q, scale, dtype)
    views = {
        "transposed": (q.t().contiguous().t(), scale.t().contiguous().t()),
        "off by one byte": (torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape), scale),
        "scale off by one byte": (q, torch.cat([scale.new_zeros(1), scale.flatten()])[1:].view(scale.shape)),
        "column slice": (torch.cat([q, q], 1)[:, 64:], torch.cat([scale, scale], 1)[:, 4:]),
    }
    for q_view, scale_view in views.values():
        assert_same_bits(xpu_fp4.dequantize(q_view, scale_view, dtype), expected)
    three = xpu_fp4.dequantize(q.view(3, 4, 64), scale.view(3, 4, 4), dtype)
    assert_same_bits(three, expected.view(3, 4, 128))
    assert_same_bits(xpu_fp4.dequantize(q[0], scale[0], dtype), expected[0])


@pytest.mark.parametrize("mode", ["floor", "even", "rceil"])  # ceil doubles the scale of a block with a 6
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_dequantized_quantizes_without_loss(backend: str, dtype: torch.dtype, mode: ScaleMode) -> None:
    x = normal(64, 256, dtype=dtype) * torch.exp2(torch.arange(-6, 2).repeat(8))[:, None].to(dtype)
    once = xpu_fp4.dequantize(*xpu_fp4.quantize(x, mode), dtype)
    twice = xpu_fp4.dequantize(*xpu_fp4.quantize(once, mode), dtype)
    assert_same_bits(twice, once)


@pytest.mark.parametrize("mode", MODES)
def test_the_error_is_at_most_half_a_step(backend: str, mode: ScaleMode) -> None:
    x = normal(64, 256, dtype=torch.float32)
    q, scale = xpu_fp4.quantize(x, mode)
    unit = torch.exp2(bits(scale).float() - 127).repeat_interleave(32, -1)
    y, back = x / unit, xpu_fp4.dequantize(q, scale) / unit
    half_step = torch.where(y.abs() < 2, 0.25, torch.where(y.abs() < 4, 0.5, 1.0))
    inside = y.abs() <= 6
    assert ((y - back).abs() <= half_step)[inside].all()
    assert (back.abs() == 6)[~inside].all()
    assert (torch.signbit(back) == torch.signbit(x)).all()
    assert inside.all() == (mode in ("ceil", "rceil"))  # only these two never saturate


def test_scaling_by_a_power_of_two_changes_only_the_scales(backend: str) -> None:
    x = normal(16, 128, dtype=torch.float32)
    q, scale = xpu_fp4.quantize(x)
    q_up, scale_up = xpu_fp4.quantize(x * 2.0**40)
    assert_same_bits(q_up, q)
    assert torch.equal(bits(scale_up), bits(scale) + 40)


def test_codes_and_scales_feed_the_product(backend: str) -> None:
    # A product with the identity is the dequantized tensor.
    x = normal(5, 32, dtype=torch.float32)
    q, scale = xpu_fp4.quantize(x)
    eye_q, eye_scale = xpu_fp4.quantize(torch.eye(32))
    assert torch.equal(gemm(q, scale, eye_q, eye_scale), xpu_fp4.dequantize(q, scale))


def test_quantizes_where_algorithms_are_to_be_deterministic(backend: str) -> None:
    """torch fills empty tensors then, and cannot fill one of codes."""
    x = normal(3, 64)
    expected = xpu_fp4.quantize(x)
    torch.use_deterministic_algorithms(True)
    try:
        given = xpu_fp4.quantize(x)
    finally:
        torch.use_deterministic_algorithms(False)
    for got, want in zip(given, expected, strict=True):
        assert_same_bits(got, want)
