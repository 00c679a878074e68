# SPDX-License-Identifier: Apache-2.0
"""The W4A8 product under all scales: every pair, W's quads aligned or not, both edges of the kernels' exponent windows."""

from functools import cache

import pytest
import torch
from helpers import (
    DTYPES,
    SPREADS,
    assert_same_bits,
    expected_gemm,
    gemm,
    random_codes,
    random_int8,
    seeded,
    spread_scales,
)
from products import CENTRES, Operands
from torch import Tensor

LARGEST_W, MOST_NEGATIVE_W = 0x77, 0xFF  # bytes of two codes: 6 and -6


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
    # A whole quad of A has one scale: all that remains is W's, aligned or not.
    (a, _, w, w_scale), _ = every_scale_pair(160)
    a_scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 5).contiguous()
    for scale in (w_scale, torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 5).contiguous()):
        assert_same_bits(gemm(a, a_scale, w, scale, dtype), expected_gemm(a, a_scale, w, scale, dtype))


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

# These are both edges of the windows in use: [-55, 55] natively, [-44, 33] and [-42, 33] in SYCL.
LOW_EDGES = [-56, -55, -54, -45, -44, -43, -42, -41]
HIGH_EDGES = [32, 33, 34, 54, 55, 56]
# Each of a quad's four exponents is so far above the least (below the greatest, at a high edge).
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


@pytest.mark.parametrize("level", OFFSETS)
def test_whole_tiles_where_sums_underflow_and_overflow(backend: str, level: str) -> None:
    # A has one exponent and W the same quads all over, whose product's least bits or sums leave float32's range: no
    # window may reach so far.
    below = torch.tensor([*OFFSETS[level], 0])
    a, w = random_int8(20, 160, seeded(31)), random_codes(40, 160, seeded(32))
    for total in (*range(-160, -126), *range(108, 136)):
        for ea in (total // 2, total // 2 - 10, total // 2 + 10):
            a_scale = torch.full((20, 5), ea + 127, dtype=torch.uint8)
            w_scale = (total - ea - below + 127).to(torch.uint8).expand(40, 5).contiguous()
            assert_same_bits(gemm(a, a_scale, w, w_scale), expected_gemm(a, a_scale, w, w_scale))
