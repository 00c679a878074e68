# SPDX-License-Identifier: Apache-2.0
"""MXINT8 quantize and dequantize give the reference's bits for every element, scale, group, layout and size."""

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
    ENVIRONMENTS,
    GROUPS,
    HALF_DTYPES,
    LAYOUTS,
    Environment,
    as_numpy,
    assert_same_bits,
    bits,
    float_environment,
    from_bits,
    normal,
    off_by,
    random_int8,
    random_scales,
    seeded,
)
from torch import Tensor
from xpu_fp4 import Group, reference

Quantized = tuple[Tensor, Tensor]


def assert_quantizes(x: Tensor, group: Group, expected: Quantized | None = None) -> None:
    """The op gives the expected codes and scales, those of the reference unless given."""
    want_q, want_scale = expected if expected is not None else reference.mxint8_quantize(x, group)
    q, scale = xpu_fp4.mxint8_quantize(x, group)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float8_e8m0fnu)
    assert_same_bits(scale, want_scale)
    assert_same_bits(q, want_q)


def with_amax(others: Tensor, amax: Tensor) -> Tensor:
    """Groups [rows, n + 1] of others [rows, n] and amax [rows, 1] at a place that moves from row to row."""
    x = torch.cat([others, amax], 1)
    return x.gather(1, (torch.arange(x.shape[1]) + torch.arange(len(x))[:, None]) % x.shape[1])


def rows_of(elements: Tensor, amax: float, k: int, group: Group) -> Tensor:
    """[rows, k] of the elements, filled up with -0; the groups of a row hold amax once each."""
    sizes = [min(group, k - first) for first in range(0, k, group)]
    each = k - len(sizes)
    others = torch.cat([elements, -elements.new_zeros(-len(elements) % each)]).view(-1, each)
    amaxes = torch.full_like(others[:, :1], amax)
    return torch.cat([with_amax(part, amaxes) for part in others.split([size - 1 for size in sizes], 1)], 1)


# ---- every element and every amax ----


@cache
def every_element(dtype: torch.dtype, k: int, group: Group) -> tuple[Tensor, Quantized]:
    """Every bit pattern as an element, under scales from the least to the largest, and what it quantizes to."""
    top, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    below = 255 / 128 - torch.finfo(dtype).eps  # rounds to 127 without another scale
    amaxes = [0.0, least, 0.0117, 1.0, below, 255 / 128, 448.0, top / 2, top]
    x = torch.cat([rows_of(from_bits(ALL_PATTERNS, dtype), amax, k, group) for amax in amaxes])
    return x, reference.mxint8_quantize(x, group)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("k", "group"), [(32, 32), (96, 32), (32, 128), (96, 128), (128, 128), (160, 128)])
def test_every_16_bit_element(backend: str, k: int, group: Group, dtype: torch.dtype) -> None:
    x, expected = every_element(dtype, k, group)
    assert set(range(-127, 128)) == set(expected[0].unique().tolist())
    assert_quantizes(x, group, expected)


@cache
def every_amax(dtype: torch.dtype, group: Group) -> tuple[Tensor, Quantized]:
    """Every magnitude as the largest of its group among random smaller ones."""
    magnitude = torch.arange(1 << 15, dtype=torch.int32)[:, None]
    smaller = (torch.rand(len(magnitude), group - 1, generator=seeded(3)) * magnitude).int()
    pattern = with_amax(smaller, magnitude)
    sign = torch.randint(0, 2, pattern.shape, generator=seeded(4), dtype=torch.int32) << 15
    x = from_bits(pattern | sign, dtype)
    return x, reference.mxint8_quantize(x, group)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_every_16_bit_amax(backend: str, group: Group, dtype: torch.dtype) -> None:
    assert_quantizes(*every_amax(dtype, group)[:1], group, every_amax(dtype, group)[1])


@cache
def float32_amaxes() -> Tensor:
    """Every exponent, subnormals, Inf and NaN included, with mantissas at and around 255/128, of 2^-127 too."""
    thresholds = torch.tensor([0, 0x400000, 0x7E0000, 0x7F0000, 0x7F4000, 0x7F8000, 0x7FFFFE], dtype=torch.int32)
    mantissa = (thresholds[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)).flatten().clamp(min=0)
    mantissa = torch.cat([mantissa, 1 << torch.arange(23, dtype=torch.int32), (255 << torch.arange(15)).int()])
    return ((torch.arange(256, dtype=torch.int32)[:, None] << 23) | mantissa).flatten()[:, None]


@pytest.mark.parametrize("group", GROUPS)
def test_float32_amax_at_every_threshold_and_exponent(backend: str, group: Group) -> None:
    amax = float32_amaxes()
    smaller = (torch.rand(len(amax), group - 1, dtype=torch.float64, generator=seeded(5)) * amax).int()
    pattern = with_amax(smaller, amax)
    x = from_bits(torch.cat([pattern, pattern | -(1 << 31)]), torch.float32)  # -127 is the least code, too
    expected = reference.mxint8_quantize(x, group)
    assert set(expected[1].flatten().tolist()) == set(range(256))
    assert_quantizes(x, group, expected)


def with_neighbours(values: Tensor) -> Tensor:
    """Positive float32 values and those one ulp below and above, both signs."""
    pattern = (bits(values)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)).flatten()
    return from_bits(torch.cat([pattern, pattern | -(1 << 31)]), torch.float32)


@cache
def float32_ties() -> Tensor:
    """Every tie +-1 ulp under every scale: codes up to 127, so amax leaves no room for another scale."""
    ties = torch.arange(127, dtype=torch.float64) + 0.5
    rows = []
    for e in range(-127, 128):
        unit = 2.0 ** (e - 6)
        rows.append(rows_of(with_neighbours((ties * unit).float()), 127 * unit, 160, 128))
    return torch.cat(rows)


@pytest.mark.parametrize("group", GROUPS)
def test_float32_ties_under_every_scale(backend: str, group: Group) -> None:
    x = float32_ties()
    expected = reference.mxint8_quantize(x, group)
    if group == 128:
        assert set(expected[1].flatten().tolist()) == set(range(255))
    assert_quantizes(x, group, expected)


@pytest.mark.parametrize("group", GROUPS)
def test_elements_below_the_least_scale(backend: str, group: Group) -> None:
    """Groups of subnormals: the scale is 2^-127 whatever amax is, and most codes are small."""
    pattern = torch.randint(0, 1 << 23, (512, 160), generator=seeded(6)) >> torch.arange(24).repeat(22)[:512, None]
    x = from_bits(pattern | torch.randint(-1, 1, pattern.shape, generator=seeded(7)) << 31, torch.float32)
    q, scale = reference.mxint8_quantize(x, group)
    assert set(scale.unique().tolist()) == {0, 1}
    assert len(q.unique()) > 200
    assert_quantizes(x, group, (q, scale))


@pytest.mark.parametrize("group", GROUPS)
def test_random_float32_patterns(backend: str, group: Group) -> None:
    exponent = torch.randint(0, 248, (512, 9, 1), generator=seeded(8))
    exponent = exponent + torch.randint(0, 7, (512, 9, 32), generator=seeded(9))
    mantissa = torch.randint(0, 1 << 23, exponent.shape, generator=seeded(10))
    sign = torch.randint(-1, 1, exponent.shape, generator=seeded(11)) << 31
    assert_quantizes(from_bits(sign | exponent << 23 | mantissa, torch.float32).flatten(1), group)


# ---- zeros and what is not finite ----


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_group_has_scale_byte_0_and_codes_0(backend: str, dtype: torch.dtype, group: Group) -> None:
    x = torch.zeros(3, 160, dtype=dtype)
    x[1], x[2, ::3] = -0.0, -0.0
    q, scale = xpu_fp4.mxint8_quantize(x, group)
    assert not q.any()
    assert not bits(scale).any()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_a_nan_or_inf_poisons_its_group_and_no_other(backend: str, group: Group, dtype: torch.dtype, bad: float) -> None:
    k = 288  # two groups of 128 and a shorter one
    clean = normal(k, k, dtype=dtype)
    x = clean.clone()
    x.diagonal()[:] = bad  # every place
    q, scale = reference.mxint8_quantize(clean, group)
    in_group = torch.arange(k)[:, None] // group == torch.arange(k) // group
    q[in_group], scale[in_group[:, ::32]] = 0, 0xFF
    assert_quantizes(x, group, (q, scale))


def test_every_nan_pattern_poisons(backend: str) -> None:
    mantissa = torch.cat([1 << torch.arange(23), torch.tensor([0x7FFFFF, 0x400001])])
    x = torch.ones(50, 128)
    x[:, 77] = from_bits(torch.cat([0x7F800000 + mantissa, -0x800000 + mantissa]), torch.float32)
    q, scale = xpu_fp4.mxint8_quantize(x)
    assert (bits(scale) == 0xFF).all()
    assert not q.any()


# ---- groups, layouts and sizes ----


def test_the_blocks_of_a_group_share_its_scale(backend: str) -> None:
    x = normal(5, 416) * torch.exp2(torch.arange(13).repeat_interleave(32).float())
    scale = bits(xpu_fp4.mxint8_quantize(x)[1])
    for first in range(0, 13, 4):
        assert (scale[:, first : first + 4] == scale[:, first : first + 1]).all()
    of_blocks = bits(xpu_fp4.mxint8_quantize(x, 32)[1])
    assert torch.equal(scale[:, ::4], torch.stack([part.amax(1) for part in of_blocks.split(4, 1)], 1))


def test_the_default_group_is_128(backend: str) -> None:
    x = normal(3, 160) * torch.exp2(torch.arange(5).repeat_interleave(32).float())
    for actual, expected in zip(torch.ops.xpu_fp4.mxint8_quantize(x), reference.mxint8_quantize(x, 128), strict=True):
        assert_same_bits(actual, expected)
    assert_quantizes(x, 32)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_quantizes_like_its_contiguous_copy(backend: str, dtype: torch.dtype, layout: str, group: Group) -> None:
    x = LAYOUTS[layout](dtype)
    before = x.clone()
    expected = reference.mxint8_quantize(x.contiguous(), group)
    assert expected[0].shape == x.shape
    assert_quantizes(x, group, expected)
    assert_same_bits(x, before)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (0,), (2, 0, 32), (2, 3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_quantizes_and_dequantizes_to_nothing(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, scale = xpu_fp4.mxint8_quantize(torch.empty(shape, dtype=dtype))
    assert q.shape == shape
    assert scale.shape == (*shape[:-1], shape[-1] // 32)
    x = xpu_fp4.mxint8_dequantize(q, scale, dtype)
    assert (x.shape, x.dtype) == (shape, dtype)


@pytest.mark.parametrize("k", [32, 160])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows(backend: str, dtype: torch.dtype, k: int) -> None:
    x = normal(40, k, dtype=dtype)
    q, scale = reference.mxint8_quantize(x)
    values = reference.values(q, scale).to(dtype)
    for rows in range(1, 41):
        assert_quantizes(x[:rows], 128, (q[:rows], scale[:rows]))
        assert_same_bits(xpu_fp4.mxint8_dequantize(q[:rows], scale[:rows], dtype), values[:rows])


@pytest.mark.parametrize("group", GROUPS)
def test_rows_spread_over_tasks_and_threads_as_one(backend: str, group: Group, threads: Callable[[int], None]) -> None:
    # A shorter last group in each row, wherever the work is cut.
    x = normal(301, 4128, dtype=torch.bfloat16) * torch.exp2(torch.arange(129).repeat_interleave(32) % 7).bfloat16()
    expected = reference.mxint8_quantize(x, group)
    for count in (1, 2, 3):
        threads(count)
        assert_quantizes(x, group, expected)


# ---- dequantize ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_every_scale_dequantizes_with_one_rounding(backend: str, dtype: torch.dtype) -> None:
    q = torch.arange(-128, 128, dtype=torch.int8).expand(256, 256).contiguous()
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8).contiguous()
    units = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, axis=1) / 64
    expected = as_numpy(q.numpy() * units, dtype)
    assert_same_bits(xpu_fp4.mxint8_dequantize(q, scale, dtype), expected)
    assert_same_bits(xpu_fp4.mxint8_dequantize(q, scale.view(torch.float8_e8m0fnu), dtype), expected)
    # Blocks of a row may have scales of their own.
    mixed = scale.t().contiguous().view(-1, 64)
    some = random_int8(32, 2048, seeded(12))
    wanted = reference.values(some, mixed).to(dtype)
    assert_same_bits(xpu_fp4.mxint8_dequantize(some, mixed, dtype), reference.canonical_nan(wanted))
    if dtype == torch.float16:  # the data has every kind of result
        magnitude = expected.abs()
        assert ((magnitude > 0) & (magnitude < 2.0**-14)).any()
        assert magnitude.isinf().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_dequantizes_like_its_contiguous_copy(backend: str, dtype: torch.dtype) -> None:
    q, scale = random_int8(12, 128, seeded(13)), random_scales(12, 128, seeded(14))
    expected = reference.values(q, scale).to(dtype)
    views = {
        "plain": (q, scale),
        "transposed": (q.t().contiguous().t(), scale.t().contiguous().t()),
        "off by one byte": (off_by(q), off_by(scale)),
        "column slice": (torch.cat([q, q], 1)[:, 128:], torch.cat([scale, scale], 1)[:, 4:]),
    }
    for q_view, scale_view in views.values():
        assert_same_bits(xpu_fp4.mxint8_dequantize(q_view, scale_view, dtype), expected)
    three = xpu_fp4.mxint8_dequantize(q.view(3, 4, 128), scale.view(3, 4, 4), dtype)
    assert_same_bits(three, expected.view(3, 4, 128))
    assert_same_bits(xpu_fp4.mxint8_dequantize(q[0], scale[0], dtype), expected[0])


@pytest.mark.parametrize("group", GROUPS)
def test_what_was_dequantized_quantizes_without_loss(backend: str, group: Group) -> None:
    x = normal(64, 288) * torch.exp2(torch.arange(-6, 2).repeat(8))[:, None]
    once = xpu_fp4.mxint8_dequantize(*xpu_fp4.mxint8_quantize(x, group))
    assert_same_bits(xpu_fp4.mxint8_dequantize(*xpu_fp4.mxint8_quantize(once, group)), once)


# ---- the caller's float environment ----


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_callers_float_environment_reaches_no_bit(backend: str, environment: Environment) -> None:
    subnormal = normal(24, 160) * torch.exp2(torch.arange(-149, -101, 2).float())[:, None]
    ties = float32_ties()[:200]
    q, scale = random_int8(64, 128, seeded(15)), torch.arange(256, dtype=torch.uint8).view(64, 4)

    def results() -> list[Tensor]:
        return [
            *xpu_fp4.mxint8_quantize(subnormal),
            *xpu_fp4.mxint8_quantize(ties, 32),
            *[xpu_fp4.mxint8_dequantize(q, scale, dtype) for dtype in DTYPES],
        ]

    before = results()
    with float_environment(environment):
        during = results()
    for actual, expected in zip(during, before, strict=True):
        assert_same_bits(actual, expected)
    assert_same_bits(before[0], reference.mxint8_quantize(subnormal)[0])
