# SPDX-License-Identifier: Apache-2.0
"""The W4A8 product of codes gives the reference's bits: scales, levels and their windows, order, sizes, outputs, biases."""

import math
from functools import cache

import pytest
import torch
import xpu_fp4
from helpers import (
    BIASES,
    DTYPES,
    SPREADS,
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


# ---- scales ----


@cache
def every_scale_pair(k: int) -> tuple[Operands, Tensor]:
    """All 256 scales of a row against all of a column; with more blocks, in every place of a quad and of a started one."""
    generator = seeded(20)
    scale = ((torch.arange(256)[:, None] + 64 * torch.arange(k // 32)) % 256).to(torch.uint8)
    operands = random_int8(256, k, generator), scale, random_codes(256, k, generator), scale.flip(0)
    return operands, expected_gemm(*operands)


def test_every_pair_of_scales(backend: str) -> None:
    operands, expected = every_scale_pair(32)
    magnitude = expected.abs()
    assert ((magnitude > 0) & (magnitude < 2.0**-126)).any(), "no subnormal product"
    assert magnitude.isinf().any(), "no overflow"
    assert expected[255].isnan().all()
    assert expected[:, 0].isnan().all()
    assert_same_bits(gemm(*operands), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pair_of_scales_beside_other_blocks(backend: str, dtype: torch.dtype) -> None:
    operands, _ = every_scale_pair(160)
    assert_same_bits(gemm(*operands, dtype), expected_gemm(*operands, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_of_a_group_beside_every_scale_of_w(backend: str, dtype: torch.dtype) -> None:
    # One scale for a whole quad of A: all that remains is W's, aligned or not.
    (a, _, w, w_scale), _ = every_scale_pair(160)
    a_scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 5).contiguous()
    for scale in (w_scale, torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 5).contiguous()):
        assert_same_bits(gemm(a, a_scale, w, scale, dtype), expected_gemm(a, a_scale, w, scale, dtype))


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
    a, w = random_int8(m, k, seeded(22)), random_codes(n, k, seeded(23))
    a[::5], w[::6] = -128, MOST_NEGATIVE_W
    group_of_32, w_scale = spread_scales(spread, m, 13, a_centre, 24), spread_scales(spread, n, 13, w_centre, 25)
    group_of_128 = group_of_32[:, ::4].repeat_interleave(4, 1)[:, :13].contiguous()
    equal = spread_scales("equal", n, 13, w_centre, 25)
    for scales in [(group_of_128, w_scale), (group_of_32, w_scale), (group_of_32, equal)]:
        operands = a, scales[0], w, scales[1]
        assert_same_bits(gemm(*operands), expected_gemm(*operands))


# ---- the windows of exponents in which a kernel takes a shortcut, at every level ----

# Both edges of the windows in use: [-55, 55] natively, [-44, 33] and [-42, 33] in SYCL.
LOW_EDGES = [-56, -55, -54, -45, -44, -43, -42, -41]
HIGH_EDGES = [32, 33, 34, 54, 55, 56]
# Of the four exponents of a quad, how far each is above the least (below the greatest, at a high edge).
OFFSETS = {
    "equal": (0, 0, 0, 0),
    "quad": (0, 3, 1, 2),
    "just no quad": (0, 4, 0, 0),
    "pair": (0, 3, 9, 8),
    "just no pair": (0, 4, 9, 9),
    "block": (0, 5, 13, 20),
}


def extreme_int8(rows: int, k: int, seed: int) -> Tensor:
    """Rows of kinds that take turns: random, all -128, all 127, a single 1."""
    a = random_int8(rows, k, seeded(seed))
    a[1::4], a[2::4], a[3::4] = -128, 127, 0
    a[3::4, 0::32] = 1
    return a


def extreme_codes(rows: int, k: int, seed: int) -> Tensor:
    """Rows of kinds that take turns: random, all -6, all 6, a single 0.5."""
    w = random_codes(rows, k, seeded(seed))
    w[1::4], w[2::4], w[3::4] = MOST_NEGATIVE_W, LARGEST_W, 0
    w[3::4, 0::16] = 1
    return w


def at_edges(offsets: tuple[int, ...], rows_each: int) -> Tensor:
    """Scale bytes [edges * rows_each, 5], a quad and a started one: runs of rows in which a whole tile is at one edge."""
    up = [[edge + offset for offset in (*offsets, 0)] for edge in LOW_EDGES]
    down = [[edge - offset for offset in (*offsets, 0)] for edge in HIGH_EDGES]
    return (torch.tensor(up + down) + 127).to(torch.uint8).repeat_interleave(rows_each, 0)


@pytest.mark.parametrize("level", OFFSETS)
@pytest.mark.parametrize("side", ["W", "A", "both"])
def test_both_edges_of_every_window_at_every_level(backend: str, side: str, level: str) -> None:
    a_scale = at_edges(OFFSETS[level if side != "W" else "equal"], 16)
    w_scale = at_edges(OFFSETS[level if side != "A" else "equal"], 32)
    operands = extreme_int8(len(a_scale), 160, 26), a_scale, extreme_codes(len(w_scale), 160, 27), w_scale
    assert_same_bits(gemm(*operands), expected_gemm(*operands))


@pytest.mark.parametrize("order", [(0, 1, 1, 0), (0, 0, 1, 1), (1, 0, 0, 0)], ids=str)
def test_a_quad_that_spans_a_whole_window(backend: str, order: tuple[int, ...]) -> None:
    spans = torch.tensor([(low, high) for low in LOW_EDGES for high in HIGH_EDGES])
    w_scale = (spans[:, [*order, 0]] + 127).to(torch.uint8).repeat_interleave(16, 0)
    a_scale = at_edges(OFFSETS["equal"], 16)
    operands = extreme_int8(len(a_scale), 160, 28), a_scale, extreme_codes(len(w_scale), 160, 29), w_scale
    assert_same_bits(gemm(*operands), expected_gemm(*operands))
    # A of group 32, too.
    mixed = spans[:, [*order, 0]].add(127).to(torch.uint8)
    operands = extreme_int8(len(mixed), 160, 30), mixed, operands[2][:64], w_scale[:64]
    assert_same_bits(gemm(*operands), expected_gemm(*operands))


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
