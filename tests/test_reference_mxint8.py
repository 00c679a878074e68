# SPDX-License-Identifier: Apache-2.0
"""The reference of MXINT8 against exact rationals, Python's integers and ml_dtypes. Its product: test_reference.py."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from helpers import ALL_PATTERNS, DTYPES, GROUPS, HALF_DTYPES, from_bits, normal, random_int8, seeded
from torch import Tensor
from xpu_fp4 import Group, reference

LARGEST = 127


def scale_byte(amax: Fraction) -> int:
    """The least scale under which amax rounds to at most 127 without saturation: section 6's 255/128, found by search."""
    e = amax.numerator.bit_length() - amax.denominator.bit_length() - 2  # too small, by at least one
    assert round(64 * amax / Fraction(2) ** e) > LARGEST
    while round(64 * amax / Fraction(2) ** e) > LARGEST:  # Python rounds ties to the even
        e += 1
    return min(max(e, -127), 127) + 127


def quantized(group: list[float]) -> tuple[int, list[int]]:
    """Scale byte and codes of one group."""
    exact = [Fraction(x) for x in group]
    amax = max(abs(x) for x in exact)
    byte = scale_byte(amax) if amax else 0
    unit = Fraction(2) ** (byte - 127 - 6)
    return byte, [min(max(round(x / unit), -LARGEST), LARGEST) for x in exact]


def assert_is_exact(x: Tensor, group: Group) -> None:
    """The reference's codes and scales of x [rows, K] are those of exact arithmetic."""
    q, scale = reference.mxint8_quantize(x, group)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.uint8)
    for row, codes, bytes_ in zip(x.double().tolist(), q.tolist(), scale.tolist(), strict=True):
        for first in range(0, len(row), group):
            byte, want = quantized(row[first : first + group])
            assert codes[first : first + group] == want
            assert bytes_[first // 32 : (first + group) // 32] == [byte] * (len(want) // 32)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_scale_of_every_16_bit_amax_is_the_least_without_saturation(dtype: torch.dtype) -> None:
    amax = from_bits(torch.arange(1, 0x8000), dtype)
    amax = amax[amax.isfinite()].double()
    assert reference.mxint8_scale_bytes(amax).tolist() == [scale_byte(Fraction(value)) for value in amax.tolist()]


def test_scale_of_float32_amax_at_every_boundary_is_the_least_without_saturation() -> None:
    exponent = torch.arange(255)[:, None] << 23
    mantissa = torch.tensor([0, 0x400000, 0x7F0000, 0x7F8000, 0x800000]) + torch.tensor([[-1], [0], [1]])
    pattern = (exponent + mantissa.flatten()).flatten()
    amax = from_bits(pattern[(pattern > 0) & (pattern < 0x7F800000)], torch.float32).double()
    expected = [scale_byte(Fraction(value)) for value in amax.tolist()]
    assert reference.mxint8_scale_bytes(amax).tolist() == expected
    assert set(expected) == set(range(255))


def test_the_rule_in_numbers() -> None:
    amax = torch.tensor([1.0, 1.984375, 255 / 128 - 2**-23, 255 / 128, 2.0, 2.0**-127, 255 * 2.0**-134, 2.0**-149, 3e38])
    assert reference.mxint8_scale_bytes(amax.double()).tolist() == [127, 127, 127, 128, 128, 0, 1, 0, 254]
    ties = torch.tensor([[0.5, 1.5, 2.5, 126.5, 127.0, -0.5, -1.5, -126.5] * 4])
    q, scale = reference.mxint8_quantize(ties / 64)
    assert q[0, :8].tolist() == [0, 2, 2, 126, 127, 0, -2, -126]
    assert scale.tolist() == [[127]]
    q, scale = reference.mxint8_quantize(torch.full((32,), torch.finfo(torch.float32).max))
    assert q.unique().tolist() == [127]  # the largest scale saturates


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_16_bit_element_rounds_exactly(dtype: torch.dtype) -> None:
    x, amax = from_bits(ALL_PATTERNS, dtype), 127 / 64
    x = x[x.isfinite() & (x.abs() <= amax)]
    x = torch.cat([x, x.new_zeros(-len(x) % 159)]).view(-1, 159)
    assert_is_exact(torch.cat([x, torch.full_like(x[:, :1], amax)], 1), 128)


@pytest.mark.parametrize("k", [32, 64, 96, 128, 160, 288])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_and_shorter_last_groups_of_every_magnitude(group: Group, k: int) -> None:
    x = normal(300, k, seed=k) * torch.exp2(torch.linspace(-150, 126, 300))[:, None]
    x = x.clamp(-3.4e38, 3.4e38) * torch.exp2(-torch.arange(k) // 32 * 3.0)  # neighbouring blocks differ
    x[::7, 3], x[::11] = 0.0, -0.0
    assert_is_exact(x, group)


@pytest.mark.parametrize("group", GROUPS)
def test_ocp_conversion_where_it_does_not_saturate(group: Group) -> None:
    """Section 6.3 of the OCP specification: the scale is the largest power of two in amax; both rules agree below 255/128."""
    x = normal(64, 256).numpy().astype(np.float64)
    groups = x.reshape(64, -1, group)
    amax = np.abs(groups).max(-1)
    shared = np.exp2(np.floor(np.log2(amax)))
    expected = np.rint(groups / shared[..., None] * 64)
    fits = np.abs(expected).max(-1) <= LARGEST
    assert 0.9 < fits.mean() <= 1
    q, scale = reference.mxint8_quantize(torch.from_numpy(x), group)
    of_group = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)[:, :: group // 32]
    np.testing.assert_array_equal(of_group[fits], shared[fits])
    np.testing.assert_array_equal(q.numpy().reshape(groups.shape)[fits], expected[fits])


@pytest.mark.parametrize("group", GROUPS)
def test_zero_and_non_finite_groups(group: Group) -> None:
    x = torch.zeros(6, 288)
    x[1] = -0.0
    for row, value in zip(range(2, 6), [torch.inf, -torch.inf, torch.nan, -torch.nan], strict=True):
        x[row] = 3.0
        x[row, 140] = value
    q, scale = reference.mxint8_quantize(x, group)
    assert not q[:2].any()
    assert not scale[:2].any()
    poisoned = range(4, 8) if group == 128 else range(4, 5)
    assert scale[2:].tolist() == [[255 if block in poisoned else 128 for block in range(9)]] * 4
    assert q[2:].tolist() == [[0 if i // 32 in poisoned else 96 for i in range(288)]] * 4


def test_values_are_those_of_ml_dtypes() -> None:
    q = torch.arange(-128, 128, dtype=torch.int8).expand(256, 256)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 8).contiguous()
    units = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, axis=1)
    np.testing.assert_array_equal(reference.values(q, scale).numpy(), q.numpy() * (units / 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_at_most_half_a_step(dtype: torch.dtype) -> None:
    x = normal(64, 288, dtype=dtype)
    for group in GROUPS:
        q, scale = reference.mxint8_quantize(x, group)
        step = torch.exp2(scale.double() - 127 - 6).repeat_interleave(32, 1)
        assert ((reference.values(q, scale) - x.double()).abs() <= step / 2).all()


def test_products_of_values_are_integer_products() -> None:
    a, w = random_int8(3, 64, seeded(1)), torch.randint(0, 256, (4, 32), generator=seeded(2), dtype=torch.uint8)
    one = torch.full((4, 2), 127, dtype=torch.uint8)
    exact = reference.values(a, one[:3]) @ reference.values(w, one).t()
    assert torch.equal(reference.gemm(a, one[:3], w, one, torch.float32).double(), exact)
