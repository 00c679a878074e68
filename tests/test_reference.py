# SPDX-License-Identifier: Apache-2.0
"""The reference, which the other tests trust, against means that share nothing with it: ml_dtypes, Fraction, loops."""

from collections.abc import Callable
from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import ALL_PATTERNS, HALF_DTYPES, MODES, from_bits, random_codes, random_int8, random_scales, seeded
from torch import Tensor
from xpu_fp4 import ScaleMode, reference

# The table of section 2 as one condition: the scale is the least 2^e for which amax is not too large for it.
FITS: dict[ScaleMode, Callable[[Fraction, Fraction], bool]] = {
    "floor": lambda amax, scale: amax < 8 * scale,
    "ceil": lambda amax, scale: amax <= 4 * scale,
    "even": lambda amax, scale: amax < 7 * scale,
    "rceil": lambda amax, scale: amax <= 6 * scale,
}


def scale_byte(amax: Fraction, mode: ScaleMode) -> int:
    e = amax.numerator.bit_length() - amax.denominator.bit_length() - 4  # too small, by at least one
    assert not FITS[mode](amax, Fraction(2) ** e)
    while not FITS[mode](amax, Fraction(2) ** e):
        e += 1
    return min(max(e, -127), 127) + 127


def decoded(codes: Tensor) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return values


def test_code_values_are_those_of_ml_dtypes() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    values = reference.values(reference.pack(codes), torch.tensor([127], dtype=torch.uint8)).numpy()
    np.testing.assert_array_equal(values.view(np.int64), decoded(codes).view(np.int64))  # as bits: -0 is not 0


def test_the_low_nibble_is_the_even_element() -> None:
    codes = torch.arange(32, dtype=torch.uint8) % 16
    assert reference.pack(codes)[:3].tolist() == [0x10, 0x32, 0x54]
    assert torch.equal(reference.unpack(reference.pack(codes)), codes)


def test_scale_values_are_those_of_ml_dtypes() -> None:
    scale = torch.arange(256, dtype=torch.uint8)[:, None]
    ones = reference.pack(torch.full((256, 32), 2, dtype=torch.uint8))
    expected = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(reference.values(ones, scale).numpy(), np.broadcast_to(expected, (256, 32)))
    assert expected[0] == 2.0**-127
    assert np.isnan(expected[255])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_16_bit_value_rounds_as_in_ml_dtypes(dtype: torch.dtype) -> None:
    x = from_bits(ALL_PATTERNS, dtype)
    x = x[x.isfinite()].double()
    expected = x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(reference.encode(x).numpy(), expected)


def test_ties_go_to_the_even_code_or_toward_zero() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    even, toward_zero = reference.encode(ties), reference.encode(ties, ties_to_even=False)
    assert reference.MAGNITUDES[even.int()].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert reference.MAGNITUDES[toward_zero.int()].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4]
    assert torch.equal(reference.encode(-ties), even + 8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_scale_of_every_16_bit_amax_is_the_least_that_fits(dtype: torch.dtype, mode: ScaleMode) -> None:
    amax = from_bits(torch.arange(1, 0x8000), dtype)
    amax = amax[amax.isfinite()].double()
    expected = [scale_byte(Fraction(value), mode) for value in amax.tolist()]
    assert reference.scale_bytes(amax, mode).tolist() == expected


@pytest.mark.parametrize("mode", MODES)
def test_scale_of_float32_amax_at_every_boundary_is_the_least_that_fits(mode: ScaleMode) -> None:
    exponent = torch.arange(255)[:, None] << 23
    mantissa = torch.tensor([0, 0x400000, 0x600000, 0x800000]) + torch.tensor([[-1], [0], [1]])
    pattern = (exponent + mantissa.flatten()).flatten()
    amax = from_bits(pattern[(pattern > 0) & (pattern < 0x7F800000)], torch.float32).double()
    expected = [scale_byte(Fraction(value), mode) for value in amax.tolist()]
    assert reference.scale_bytes(amax, mode).tolist() == expected
    assert {0, 1, 252} <= set(expected)


@pytest.mark.parametrize("mode", MODES)
def test_quantize_is_divide_by_the_scale_and_round_with_ml_dtypes(mode: ScaleMode) -> None:
    x = torch.randn(200, 64, generator=seeded(1)) * torch.exp2(torch.linspace(-149, 125, 200))[:, None]
    x[::7, 3] = 0.0
    q, scale = reference.quantize(x, mode)
    blocks = x.double().numpy().reshape(200, 2, 32)
    amax = np.abs(blocks).max(-1)
    expected_scale = [[scale_byte(Fraction(v), mode) if v else 0 for v in row] for row in amax.tolist()]
    assert scale.tolist() == expected_scale
    divided = blocks / np.exp2(scale.numpy().astype(np.float64) - 127)[..., None]
    expected = np.clip(divided, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).reshape(200, 64)
    np.testing.assert_array_equal(reference.unpack(q).numpy(), expected)


def test_zero_and_non_finite_blocks() -> None:
    x = torch.zeros(6, 96)
    x[1] = -0.0
    for row, value in zip(range(2, 6), [torch.inf, -torch.inf, torch.nan, -torch.nan], strict=True):
        x[row] = 3.0
        x[row, 40] = value
    q, scale = reference.quantize(x)
    assert scale.tolist() == [[0] * 3, [0] * 3, *[[126, 255, 126]] * 4]
    assert reference.unpack(q)[:2].tolist() == [[0] * 96, [8] * 96]
    assert reference.unpack(q)[2:].tolist() == [[7] * 32 + [0] * 32 + [7] * 32] * 4
    assert reference.values(q, scale)[2:, 32:64].isnan().all()


def gemm_by_loops(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> npt.NDArray[np.float32]:
    """Sections 3 and 6 word for word, one output at a time."""
    twice_w = 2 * decoded(reference.unpack(w))
    integers = a.tolist() if a.dtype == torch.int8 else 2 * decoded(reference.unpack(a))
    offset = 7 if a.dtype == torch.int8 else 2
    blocks = a_scale.shape[1]
    y = np.zeros((len(a), len(w)), np.float32)
    for m, n in np.ndindex(*y.shape):
        p = [np.float32(0)] * (-(-blocks // 4) * 4)
        for b in range(blocks):
            ea, ew = int(a_scale[m, b]), int(w_scale[n, b])
            d = sum(int(integers[m][i]) * int(twice_w[n, i]) for i in range(32 * b, 32 * b + 32))
            p[b] = np.float32(np.nan if 255 in (ea, ew) else d * 2.0 ** (ea - 127 + ew - 127 - offset))
        acc = np.float32(0)
        for q in range(0, len(p), 4):
            acc = np.float32(acc + np.float32(np.float32(p[q] + p[q + 1]) + np.float32(p[q + 2] + p[q + 3])))
        y[m, n] = acc if bias is None else np.float32(acc + np.float32(bias[n].item()))
    return y


@pytest.mark.parametrize(
    ("low", "high", "special"),
    [(107, 147, "none"), (50, 64, "subnormal"), (180, 195, "infinite"), (120, 255, "nan")],
    ids=["ordinary", "subnormal products", "overflow", "NaN scales"],
)
@pytest.mark.parametrize("k", [32, 96, 160, 416])
@pytest.mark.parametrize("make_a", [random_codes, random_int8])
def test_gemm_is_the_definition_step_by_step(
    make_a: Callable[[int, int, torch.Generator], Tensor], k: int, low: int, high: int, special: str
) -> None:
    generator = seeded(k)
    a, w = make_a(5, k, generator), random_codes(6, k, generator)
    a[0], w[0] = (-128, 0xFF) if a.dtype == torch.int8 else (0x77, 0xFF)  # the largest integers that a block can have
    a_scale, w_scale = random_scales(5, k, generator, low, high), random_scales(6, k, generator, low, high)
    if special == "nan":
        w_scale[2, -1] = 255
    bias = torch.randn(6, generator=generator)
    for b in (None, bias):
        with np.errstate(all="ignore"):
            expected = torch.from_numpy(gemm_by_loops(a, a_scale, w, w_scale, b))
        actual = reference.gemm(a, a_scale, w, w_scale, torch.float32, b)
        assert torch.equal(actual.view(torch.int32), reference.canonical_nan(expected).view(torch.int32))
        for dtype in HALF_DTYPES:
            half = reference.gemm(a, a_scale, w, w_scale, dtype, b)
            with np.errstate(all="ignore"):
                rounded = expected.numpy().astype(np.float16 if dtype == torch.float16 else ml_dtypes.bfloat16)
            as_torch = reference.canonical_nan(torch.from_numpy(rounded.view(np.int16)).view(dtype))
            assert torch.equal(half.view(torch.int16), as_torch.view(torch.int16))
        # The data is of the kind that the case is named after.
        if special == "subnormal" and b is None:
            assert ((expected != 0) & (expected.abs() < 2.0**-126)).any()
        if special == "infinite":
            assert expected.isinf().any()
        if special == "nan":
            assert expected[:, 2].isnan().all()
