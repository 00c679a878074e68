# SPDX-License-Identifier: Apache-2.0
"""The ops under the names that vLLM calls: the group quantizer's own numbers, and the product in its layout."""

import itertools
from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xpu_fp4
from helpers import (
    ALL_PATTERNS,
    DTYPES,
    HALF_DTYPES,
    assert_same_bits,
    bits,
    expected_gemm,
    from_bits,
    gemm,
    random_codes,
    random_scales,
    seeded,
)
from torch import Tensor

EPS = 1e-10  # what vLLM passes
THRESHOLDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def least_exponent(value: Fraction) -> int:
    """ceil(log2(value))."""
    e = value.numerator.bit_length() - value.denominator.bit_length() - 1
    while Fraction(2) ** e < value:
        e += 1
    return e


@cache
def exponent_of(amax: float, eps: float) -> int:
    # eps is a float32 in the kernel, as everything else there.
    return max(least_exponent(max(Fraction(amax) / 6, Fraction(float(np.float32(eps))))), -127)


def by_the_formula(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Section 2's last paragraph: packed codes uint8 [..., K/2] and scales float32 [..., K/32]."""
    blocks: npt.NDArray[np.float64] = x.double().numpy().reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    finite = np.asarray(np.isfinite(blocks).all(-1))
    safe = np.where(finite[..., None], blocks, 0.0)
    amax, where = np.unique(np.abs(safe).max(-1), return_inverse=True)
    exponent = np.array([exponent_of(value, eps) for value in amax.tolist()], np.int64)[where].reshape(finite.shape)
    y = np.clip(np.ldexp(safe, -exponent[..., None]), -6, 6)
    code = (np.abs(y)[..., None] > THRESHOLDS).sum(-1) + 8 * (safe < 0)
    code = np.where(finite[..., None], code, 0).astype(np.uint8).reshape(x.shape)
    scale = np.where(finite, np.ldexp(1.0, exponent), np.nan).astype(np.float32)
    return torch.from_numpy(code[..., 0::2] | code[..., 1::2] << 4), torch.from_numpy(scale)


def group_quant(x: Tensor, eps: float = EPS, *, column_major: bool = False) -> tuple[Tensor, Tensor]:
    # Filled with what the op never writes, so that an entry it left out shows.
    q = torch.full((*x.shape[:-1], x.shape[-1] // 2), 0x99, dtype=torch.uint8)
    scale = torch.full((*x.shape[:-1], x.shape[-1] // 32), -1.0)
    if column_major:
        scale = scale.t().contiguous().t()
    torch.ops._C.per_token_group_quant_mxfp4(x, q, scale, 32, eps)
    return q, scale


def assert_group_quantizes(x: Tensor, eps: float = EPS) -> None:
    want_q, want_scale = by_the_formula(x, eps)
    q, scale = group_quant(x, eps)
    assert_same_bits(scale, want_scale)
    assert_same_bits(q, want_q)
    if x.dim() == 2:
        q, scale = group_quant(x, eps, column_major=True)
        assert_same_bits(scale, want_scale)
        assert_same_bits(q, want_q)


def patterns_with(dtype: torch.dtype, amax: float) -> Tensor:
    """Every bit pattern with 31 to a block, and amax."""
    padding = torch.zeros(-len(ALL_PATTERNS) % 31, dtype=torch.int16)
    others = from_bits(torch.cat([ALL_PATTERNS, padding]), dtype).reshape(-1, 31)
    return torch.cat([others, torch.full((len(others), 1), amax, dtype=dtype)], 1)


@pytest.mark.parametrize("amax", [0.0, 0.0117, 4.0, 6.0, 7.5, 60000.0])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_16_bit_pattern_as_an_element(backend: str, dtype: torch.dtype, amax: float) -> None:
    assert_group_quantizes(patterns_with(dtype, amax))


@pytest.mark.parametrize("eps", [EPS, 2.0**-126, 3.0])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_16_bit_pattern_as_the_largest_magnitude(backend: str, dtype: torch.dtype, eps: float) -> None:
    pattern = ALL_PATTERNS.int() & 0xFFFF
    magnitude = pattern & 0x7FFF
    smaller = (torch.rand(len(pattern), 31, generator=seeded(1)) * magnitude[:, None]).int()
    smaller |= torch.randint(0, 2, smaller.shape, generator=seeded(2), dtype=torch.int32) << 15
    x = from_bits(torch.cat([smaller, pattern[:, None]], 1), dtype)
    assert_group_quantizes(x.reshape(-1, 256), eps)


def test_float32_ties_and_scale_thresholds(backend: str) -> None:
    exponent = torch.arange(255)[:, None] << 23
    mantissa = torch.tensor([0, 0x400000, 0x600000, 0x7FFFFF]) + torch.tensor([[-1], [0], [1]])
    amax = (exponent + mantissa.flatten()).flatten()
    amax = from_bits(amax[(amax >= 0) & (amax < 0x7F800000)], torch.float32)
    ties = torch.tensor([*THRESHOLDS.tolist(), 5.0]).repeat(2) * torch.tensor([1.0, -1.0]).repeat_interleave(8)
    # The ties of each amax's scale and the floats beside them, as far as they are not above amax.
    _, scale = by_the_formula(amax[:, None].expand(-1, 32), 2.0**-126)
    at_ties, limit = (scale.double() * ties).float(), amax[:, None]
    beside = [from_bits(bits(at_ties) + step, torch.float32) for step in (-1, 0, 1)]
    x = torch.cat([*(torch.where(b.abs() <= limit, b, limit) for b in beside), limit.expand(-1, 16)], 1)
    x[:, 15] = amax
    assert x.isfinite().all()
    assert_group_quantizes(x, 2.0**-126)
    assert_group_quantizes(x, EPS)


def test_ties_go_toward_zero_and_only_a_negative_has_a_sign(backend: str) -> None:
    x = torch.zeros(1, 32)
    x[0, :7] = torch.from_numpy(THRESHOLDS).float()
    x[0, 8:15] = -x[0, :7]
    x[0, 16:20] = torch.tensor([-0.0, 0.0, -1e-30, 6.0])
    q, scale = group_quant(x)
    codes = torch.stack([q & 15, q >> 4], -1).flatten().tolist()
    assert scale.tolist() == [[1.0]]
    assert codes[:7] == [0, 1, 2, 3, 4, 5, 6]
    assert codes[8:15] == [8, 9, 10, 11, 12, 13, 14]
    assert codes[16:20] == [0, 0, 8, 7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_block_has_the_scale_of_eps(backend: str, dtype: torch.dtype) -> None:
    q, scale = group_quant(-torch.zeros(3, 64, dtype=dtype))
    assert (scale == 2.0**-33).all()
    assert not q.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_that_is_not_finite_is_nan_and_spoils_no_other(backend: str, dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(32, 96, generator=seeded(3)).to(dtype)
    x[torch.arange(32), 32 + torch.arange(32)] = bad
    q, scale = group_quant(x)
    assert (bits(scale[:, 1]) == 0x7FC00000).all()
    assert not q[:, 16:32].any()
    assert scale[:, [0, 2]].isfinite().all()
    assert_group_quantizes(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_rows_and_both_scale_layouts(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(40, 160, generator=seeded(4)).to(dtype)
    for rows in range(41):
        assert_group_quantizes(x[:rows])
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    assert shifted.data_ptr() % 16 != 0
    assert_group_quantizes(shifted)
    assert_group_quantizes(x.view(4, 10, 160))
    assert_group_quantizes(x[0])


def test_its_numbers_are_not_those_of_our_quantizer(backend: str) -> None:
    # The tests above could not tell the two apart otherwise.
    ties = torch.tensor([[6.0, 0.75, -0.0] + [0.0] * 29])
    nothing = torch.zeros(1, 32)
    (q, scale), (ours_q, ours_scale) = group_quant(ties), xpu_fp4.quantize(ties, "rceil")
    assert torch.equal(ours_scale.float(), scale)
    assert (bits(ours_q) != q).any()
    assert xpu_fp4.quantize(nothing)[1].float().item() != group_quant(nothing)[1].item()


def test_the_callers_route_through_both_ops_is_the_product(backend: str) -> None:
    # q viewed as fp4x2 and s cast to e8m0, as vLLM does.
    x = torch.randn(9, 128, generator=seeded(5))
    w, w_scale = random_codes(33, 128, seeded(6)), random_scales(33, 128, seeded(7))
    q, scale = group_quant(x)
    exact = scale.to(torch.float8_e8m0fnu)
    assert torch.equal(exact.float(), scale)
    y = fp4_gemm(q.view(torch.float4_e2m1fn_x2), exact, w, w_scale, torch.bfloat16)
    assert_same_bits(y, expected_gemm(q, bits(exact), w, w_scale, torch.bfloat16))


# ---- fp4_gemm ----


def fp4_gemm(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype | None, bias: Tensor | None = None
) -> Tensor:
    y: Tensor = torch.ops._xpu_C.fp4_gemm(a, w.t(), a_scale, w_scale.t().contiguous(), dtype, bias)
    return y


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = seeded(m + n + k)
    a, w = random_codes(m, k, generator), random_codes(n, k, generator)
    return a, random_scales(m, k, generator, 117, 127), w, random_scales(n, k, generator, 117, 127)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp4_gemm_is_our_gemm(backend: str, dtype: torch.dtype) -> None:
    m, n = 17, 40
    args = operands(m, n, 160)
    generator = seeded(8)
    shapes = [(), (n,), (m, 1), (m, n)]
    for shape, bias_dtype in itertools.product(shapes, DTYPES):
        bias = torch.randn(shape, generator=generator).to(bias_dtype)
        y = fp4_gemm(*args, dtype, bias)
        assert_same_bits(y, gemm(*args, dtype, bias))
        assert_same_bits(y, expected_gemm(*args, dtype, bias))
    assert_same_bits(fp4_gemm(*args, dtype), expected_gemm(*args, dtype))


def test_fp4_gemm_gives_float16_by_default(backend: str) -> None:
    args = operands(5, 6, 64)
    y = fp4_gemm(*args, None)
    assert y.dtype == torch.float16
    assert_same_bits(y, expected_gemm(*args, torch.float16))


def test_fp4_gemm_keeps_three_dimensions(backend: str) -> None:
    a, a_scale, w, w_scale = operands(6, 10, 96)
    y = fp4_gemm(a.view(2, 3, 48), a_scale.view(2, 3, 3), w, w_scale, torch.float32)
    assert_same_bits(y, expected_gemm(a, a_scale, w, w_scale).view(2, 3, 10))


def test_scales_in_the_checkpoints_layout_are_an_error(backend: str) -> None:
    a, a_scale, w, w_scale = operands(5, 12, 160)
    with pytest.raises(RuntimeError, match=r"fp4_gemm: B_scale has shape \[12, 5\], expected \[5, 12\]"):
        torch.ops._xpu_C.fp4_gemm(a, w.t(), a_scale, w_scale, torch.float32, None)
    with pytest.raises(RuntimeError, match="fp4_gemm: B_scale must be contiguous"):
        torch.ops._xpu_C.fp4_gemm(a, w.t(), a_scale, w_scale.t(), torch.float32, None)


def test_where_shapes_cannot_tell_the_layout_the_numbers_do(backend: str) -> None:
    # N = K/32: [K/32, N] is what the op takes, never a guess.
    n = 5
    a, a_scale, w, w_scale = operands(7, n, 32 * n)
    right = expected_gemm(a, a_scale, w, w_scale)
    transposed = expected_gemm(a, a_scale, w, w_scale.t().contiguous())
    assert (right != transposed).double().mean() > 0.9
    assert (right != 0).double().mean() > 0.9  # an output of zeros would not pass either
    scale_kn = w_scale.t().contiguous()
    assert_same_bits(torch.ops._xpu_C.fp4_gemm(a, w.t(), a_scale, scale_kn, torch.float32, None), right)
    assert_same_bits(torch.ops._xpu_C.fp4_gemm(a, w.t(), a_scale, w_scale, torch.float32, None), transposed)
