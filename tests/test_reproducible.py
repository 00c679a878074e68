# SPDX-License-Identifier: Apache-2.0
"""Products have the same bits on every backend, again, in any batch and place, and on any number of threads."""

from collections.abc import Callable

import pytest
import torch
import xpu_fp4
from helpers import (
    DTYPES,
    SPREADS,
    assert_same_bits,
    bits,
    expected_gemm,
    gemm,
    linear_w4a4,
    linear_w4a8,
    linear_w4a16,
    normal,
    random_codes,
    random_scales,
    seeded,
    spread_scales,
)
from products import OPS, random_operands
from torch import Tensor


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
