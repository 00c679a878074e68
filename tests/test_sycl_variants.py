# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of W4A4 and W4A8, forced on the CPU device through the stand-in of the matrix unit, give the native bits."""

import re
from itertools import product
from typing import get_args

import pytest
import torch
import xpu_fp4
from helpers import (
    DTYPES,
    assert_same_bits,
    gemm,
    random_codes,
    random_int8,
    random_scales,
)
from sycl_cases import (
    FORMATS,
    LARGE,
    MEDIUM,
    OF_ALL_DTYPES,
    SHAPES,
    SMALL,
    SMALL_ROWS,
    TILE_ROWS,
    Format,
    assert_every_spread,
    assert_native_bits,
    assert_native_bits_with_scales_together,
    biases,
    blocks_of,
    random_activations,
    spread_operands,
    with_special_blocks,
)
from xpu_fp4 import Mode, reference

pytestmark = pytest.mark.usefixtures("requires_sycl")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", LARGE)
@pytest.mark.parametrize("k", [32, 544, 2176])
def test_large_tiles_give_the_native_bits(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str, k: int, format: Format
) -> None:
    """Last quads of one block, more quads than lanes; every level, and every level beside every other."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    assert_every_spread(*LARGE[variant], k, generator, format)


def test_every_tile_of_several_panels_is_computed(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Work-groups of 128 x 256: two panels of three rows of them, the last row's and column's with tiles to spare."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "dg2:large")
    assert_native_bits(spread_operands("equal", "ordinary", 5 * 128 + 20, 2 * 256 + 40, 32, generator))


@pytest.mark.parametrize("variant", LARGE)
def test_near_rows_give_the_native_bits(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str) -> None:
    """One quad, whose sum is the output to its last bit. Each tile has scales of its own: each distance up to where the near
    level ends and beyond, in each order; columns within 2 and 3 powers of two."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    distances = [offsets for offsets in product((0, 1, 4, 5, 8, 9, 12), repeat=4) if min(offsets) == 0 and max(offsets) > 3]
    for first in range(0, len(distances), 131):
        a_scale = 120 + torch.tensor(distances[first : first + 131], dtype=torch.uint8).repeat_interleave(TILE_ROWS[variant], 0)
        within = torch.tensor((3, 4)).repeat_interleave(32)[:, None]
        w_scale = 120 + (torch.rand(64, 4, generator=generator) * within).to(torch.uint8)
        a, w = random_codes(len(a_scale), 128, generator), random_codes(64, 128, generator)
        assert_native_bits((a, a_scale, w, w_scale))


@pytest.mark.parametrize("variant", ["bmg:large"])
def test_sums_of_mxint8_are_too_large_to_be_near(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str
) -> None:
    """Scales as the near level takes them of MXFP4, the same in all rows: with MXINT8 its sums would round."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = LARGE[variant]
    a = torch.randint(-128, -100, (m, 128), generator=generator, dtype=torch.int8)
    # 0.5 and 6: large sums, odd ones among them.
    w = reference.pack(torch.where(torch.rand(n, 128, generator=generator) < 0.1, 1, 7).to(torch.uint8))
    for offsets in ((0, 8, 0, 8), (8, 0, 8, 0), (8, 0, 0, 8), (0, 0, 8, 4), (7, 0, 7, 0)):
        a_scale = (120 + torch.tensor(offsets, dtype=torch.uint8)).expand(m, 4).contiguous()
        w_scale = torch.randint(120, 123, (n, 4), generator=generator, dtype=torch.uint8)
        assert_native_bits((a, a_scale, w, w_scale))


@pytest.mark.parametrize("variant", LARGE)
@pytest.mark.parametrize("centre", [82, 83, 86, 120, 152, 153, 160, 161])
def test_outlier_channels_give_the_native_bits(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str, centre: int
) -> None:
    """Outliers in some blocks of each quad, the same in all rows, so that most tiles are near; a last quad of one block, zero
    blocks and rows, NaN scales; exponents up to the ends of the window and beyond."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    (m, n), k = LARGE[variant], 2080
    outlier = torch.rand(k // 32, generator=generator) < 0.3
    distance = torch.rand(m, k // 32, generator=generator)
    a_scale = (centre + distance * torch.where(outlier, 9, 2)).to(torch.uint8)
    w_scale = (125 + torch.rand(n, k // 32, generator=generator) * 3).to(torch.uint8)
    operands = random_codes(m, k, generator), a_scale, random_codes(n, k, generator), w_scale
    assert_native_bits(operands)
    assert_native_bits(with_special_blocks(operands, generator))


@pytest.mark.parametrize(("format", "high"), [("mxfp4", 33), ("mxfp4", 34), ("mxint8", 30), ("mxint8", 31)])
@pytest.mark.parametrize("variant", [*LARGE, *SMALL])
def test_the_largest_sums_of_the_window_stay_finite(
    monkeypatch: pytest.MonkeyPatch, variant: str, format: Format, high: int
) -> None:
    """In units of the first block's scale, the least of the window, the others are as large as they get; -128 is."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    a = torch.full((65, 64), 0x77, dtype=torch.uint8) if format == "mxfp4" else torch.full((65, 128), -128, dtype=torch.int8)
    w = torch.full((33, 64), 0x77, dtype=torch.uint8)
    a_scale = torch.full((65, 4), 127 + high, dtype=torch.uint8)
    for w_high in (33, 34):
        w_scale = torch.tensor([127 - 44, *[127 + w_high] * 3], dtype=torch.uint8).expand(33, 4).contiguous()
        assert_native_bits((a, a_scale, w, w_scale))


@pytest.mark.parametrize("variant", [*LARGE, *SMALL])
def test_both_edges_of_the_window_at_every_level(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str
) -> None:
    """MXINT8 at either end of its window and beyond, W at either end of its own: together in a quad, in pairs, apart."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    rows, columns = 65, 33
    for a_exponent, w_exponent in product((-45, -44, 30, 31), (-45, -44, 33, 34)):
        for a_kind, w_kind in product(("equal", "pairs", "apart"), repeat=2):
            steps = {"equal": (0, 0, 0, 0), "pairs": (0, 0, 9, 9), "apart": (0, 9, 4, 11)}
            scales = []
            for exponent, kind, count in ((a_exponent, a_kind, rows), (w_exponent, w_kind, columns)):
                inwards = torch.tensor(steps[kind]) * (1 if exponent < 0 else -1)
                scales.append((127 + exponent + inwards).to(torch.uint8).expand(count, 4).contiguous())
            a, w = random_activations("mxint8", rows, 128, generator), random_codes(columns, 128, generator)
            assert_native_bits((a, scales[0], w, scales[1]))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", MEDIUM)
def test_medium_tiles_give_the_native_bits(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str, format: Format
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    assert_every_spread(*MEDIUM[variant], 224, generator, format)


@pytest.mark.parametrize(("format", "variant", "m"), SMALL_ROWS)
def test_small_products_give_the_native_bits(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str, m: int
) -> None:
    """Eight sub-groups share K, or 16 for up to four rows: rounds that are full, started and, at K = 32, mostly idle."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    for k in (32, 352, 1088, 4256):
        assert_every_spread(m, 35, k, generator, format)


@pytest.mark.parametrize(("format", "variant", "m"), SMALL_ROWS)
def test_small_products_of_whole_quads(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str, m: int
) -> None:
    """K a multiple of 128 has kernels of its own: with a row's scale bytes side by side, or a column of them."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    for k in (128, 1152, 4224):
        for spread, centre in (("mixed", "ordinary"), ("unaligned", "subnormal"), ("mixed", "largest")):
            operands = spread_operands(spread, centre, m, 35, k, generator, format)
            assert_native_bits(operands)
            assert_native_bits_with_scales_together(operands)
        assert_native_bits_with_scales_together(with_special_blocks(operands, generator))


@pytest.mark.parametrize("variant", SMALL)
def test_small_products_multiply_all_codes(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Every pair of codes at every place in a dword, alone in its row and column. MXINT8's 256 codes meet all of W's too."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    one = torch.full((16, 4), 127, dtype=torch.uint8)
    for place in range(8):
        codes = torch.zeros(16, 64, dtype=torch.uint8)
        codes[:, 20 + place // 2] = torch.arange(16, dtype=torch.uint8) << 4 * (place % 2)
        for repeats in (1, 2):  # 32 rows have a decoding of their own
            assert_native_bits((codes.repeat(repeats, 1), one.repeat(repeats, 1), codes, one))
        int8 = torch.zeros(256, 128, dtype=torch.int8)
        int8[:, 40 + place] = torch.arange(-128, 128, dtype=torch.int8)
        assert_native_bits((int8, torch.full((256, 4), 127, dtype=torch.uint8), codes, one))


@pytest.mark.parametrize(("format", "variant"), [("mxfp4", "bmg:small"), ("mxint8", "dg2:small")])
def test_weights_as_int8_give_the_native_bits(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str
) -> None:
    """One program each: all codes at all places of a dword, then every spread of scales."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    monkeypatch.setenv("XPU_FP4_WEIGHT_OPERAND", "int8")
    k = 160
    w = torch.zeros(128, k // 2, dtype=torch.uint8)
    for place in range(8):
        w[16 * place :][:16, 20 + place // 2] = torch.arange(16, dtype=torch.uint8) << 4 * (place % 2)
    a = torch.full((1, k // 2), 0x12, dtype=torch.uint8) if format == "mxfp4" else random_int8(1, k, generator)
    one = torch.full((128, k // 32), 127, dtype=torch.uint8)
    assert_native_bits((a, one[:1], w, one))
    assert_every_spread(1, 35, 352, generator, format)


def test_an_unknown_operand_is_refused(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg:small")
    monkeypatch.setenv("XPU_FP4_WEIGHT_OPERAND", "int2")
    operands = spread_operands("equal", "ordinary", 2, 2, 32, generator)
    with xpu_fp4.cpu_backend("sycl"), pytest.raises(RuntimeError, match='XPU_FP4_WEIGHT_OPERAND is "int2", expected "int4" or'):
        gemm(*operands)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", SMALL)
@pytest.mark.parametrize("k", [128, 160])
def test_one_exponent_outside_of_the_window_suffices(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str, k: int, format: Format
) -> None:
    """In any place of a row's, or of a column's, quad: the cheap sum would give other bits."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    for block in range(k // 32):
        for place in ((5, 0), (20, 34)):  # in the first or the second group of rows; of A or of W
            for byte, other in ((0xFF, 127), (0, 110), (254, 140)):
                a, a_scale, w, w_scale = spread_operands("equal", "ordinary", 21, 35, k, generator, format)
                a_scale[:], w_scale[:] = other, other
                if byte != 0xFF:  # nothing else may hide what becomes of this block
                    blocks_of(a, a_scale)[:, torch.arange(k // 32) != block] = 0
                (a_scale if place[1] == 0 else w_scale)[place[0], block] = byte
                assert_native_bits((a, a_scale, w, w_scale))
                assert_native_bits_with_scales_together((a, a_scale, w, w_scale))


@pytest.mark.parametrize(("format", "variant"), OF_ALL_DTYPES)
def test_the_longest_k_gives_the_native_bits(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES[variant]
    operands = spread_operands("mixed", "ordinary", m, n, 8192, generator, format)
    assert_native_bits(with_special_blocks(operands, generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "variant"), OF_ALL_DTYPES)
def test_bias_and_output_dtypes(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES[variant]
    operands = spread_operands("mixed", "ordinary", m, n, 160, generator, format)
    for bias in biases(m, n, generator):
        assert_native_bits(operands, dtype, bias)
    overflowing = spread_operands("mixed", "overflow", m, n, 160, generator, format)
    assert_native_bits(with_special_blocks(overflowing, generator), dtype)


@pytest.mark.parametrize("variant", ["bmg:large", "dg2:large"])
def test_one_expanded_weight_serves_both_formats(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, variant: str
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = LARGE[variant]
    weight, scale = random_codes(n, 544, generator), random_scales(n, 544, generator, 120, 126)
    x = torch.randn(m, 544, generator=generator)
    modes: tuple[Mode, ...] = ("w4a4", "w4a8")
    with xpu_fp4.cpu_backend("sycl"):
        expanded = xpu_fp4.expand(weight, scale)
        results = [xpu_fp4.linear(x, weight, scale, mode=mode, expanded=expanded) for mode in modes]
    with xpu_fp4.cpu_backend("native"):
        for mode, y in zip(modes, results, strict=True):
            assert_same_bits(y, xpu_fp4.linear(x, weight, scale, mode=mode))


def test_the_portable_kernel_multiplies_mxint8(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "portable")
    for k in (32, 544):
        assert_every_spread(18, 20, k, generator, "mxint8")


def test_operands_that_are_not_aligned(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Views one byte into their memory."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "dg2:small")
    for format in FORMATS:
        a, a_scale, w, w_scale = spread_operands("mixed", "ordinary", 8, 20, 96, generator, format)
        shifted = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (a, w)]
        assert_native_bits((shifted[0], a_scale, shifted[1], w_scale))


def test_without_a_forced_kernel_the_shape_decides(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg")
    for m in (8, 260):
        assert_native_bits(spread_operands("mixed", "ordinary", m, 35, 160, generator))


def test_k_of_zero_gives_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg:large")
    empty = torch.empty(4, 0, dtype=torch.uint8)
    for a in (empty, empty.to(torch.int8)):
        assert_native_bits((a, empty, empty, empty), torch.float32, torch.randn(4))


@pytest.mark.parametrize("value", ["gpu", "bmg:huge", "bmg:", ":large", "bmg:bdpas"])
def test_an_unknown_variant_is_refused(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, value: str) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", value)
    operands = spread_operands("equal", "ordinary", 2, 2, 32, generator)
    with xpu_fp4.cpu_backend("sycl"), pytest.raises(RuntimeError, match=f'XPU_FP4_SYCL_VARIANT is "{value}".*bmg'):
        gemm(*operands)


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        ("bmg", r"gemm_small \(bmg 8 rows, any K, W4A8\); passed over .*clocks are \d+ for gemm_small"),
        ("portable", r"gemm \(no matrix unit, W4A8\); passed over others: XPU_FP4_SYCL_VARIANT asks for portable"),
        ("cri:bdpas", r"gemm_small \(cri .*passed over gemm_bdpas: multiplies MXFP4 activations alone; others: modelled"),
    ],
)
def test_a_call_says_which_kernel_it_took_and_why(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator, capfd: pytest.CaptureFixture[str], variant: str, line: str
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    operands = spread_operands("mixed", "ordinary", 5, 20, 1056, generator, "mxint8")
    with xpu_fp4.cpu_backend("sycl"):
        gemm(*operands)
        assert "passed over" not in capfd.readouterr().err
        monkeypatch.setenv("XPU_FP4_VERBOSE", "1")
        gemm(*operands)
    assert re.search(f"^xpu_fp4: sycl w4a8 5x20x1056 on .*: {line}", capfd.readouterr().err, re.MULTILINE)


def test_warmup_leaves_nothing_to_compile(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Programs are built in the first call of a shape and kept: the second finds them."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg:small")
    with xpu_fp4.cpu_backend("sycl"):
        for mode in get_args(Mode):
            xpu_fp4.warmup([(3, 20, 96)], mode=mode, device="cpu")
        capfd.readouterr()
        for mode in get_args(Mode):
            xpu_fp4.warmup([(3, 20, 96)], mode=mode, device="cpu")
        with pytest.raises(ValueError, match="mode is 'w8a8'"):
            xpu_fp4.warmup([], mode="w8a8")  # type: ignore[arg-type]
    assert "compiling" not in capfd.readouterr().err
