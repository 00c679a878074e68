# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels, forced on the CPU device through the stand-in of the matrix unit, give the native backend's bits.

The architectures here cover every program that is built: `pvc`, `lnl-m`, `ptl` and `cri` share bmg's.
"""

import re
from collections.abc import Iterator
from itertools import product
from typing import Literal, get_args
from zlib import crc32

import pytest
import torch
import xpu_fp4
from helpers import (
    DTYPES,
    HALF_DTYPES,
    MODES,
    SPREADS,
    assert_same_bits,
    gemm,
    linear_w4a4,
    linear_w4a8,
    linear_w4a16,
    random_codes,
    random_int8,
    random_scales,
    seeded,
    spread_scales,
)
from products import CENTRES, Operands, w4a16_error
from torch import Tensor
from xpu_fp4 import Group, Hadamard, Mode, ScaleMode, reference

LARGE = {"bmg:large": (50, 40), "dg2:large": (17, 40)}
TILE_ROWS = {"bmg:large": 48, "dg2:large": 16}
MEDIUM = {"bmg:medium": (33, 20), "dg2:medium": (9, 20)}
SMALL = {"bmg:small": (1, 3, 8, 13, 37), "dg2:small": (1, 8, 37)}
# One shape for each variant: with tails, of its large tile, or of eight rows.
SHAPES = LARGE | dict.fromkeys(SMALL, (8, 35))
own = torch.ops.xpu_fp4

Format = Literal["mxfp4", "mxint8"]
FORMATS: tuple[Format, ...] = get_args(Format)  # of the activations: W4A4 and W4A8
# Each variant, number of rows and kind of weight is a program to compile: W4A8 takes fewer, with the same data.
SMALL_ROWS = [("mxfp4", variant, m) for variant, rows in SMALL.items() for m in rows]
SMALL_ROWS += [
    ("mxint8", variant, m) for variant, rows in {"bmg:small": (1, 13, 37), "dg2:small": (8, 37)}.items() for m in rows
]
OF_ALL_DTYPES = [("mxfp4", variant) for variant in SHAPES] + [("mxint8", "bmg:large"), ("mxint8", "dg2:small")]

pytestmark = pytest.mark.usefixtures("requires_sycl")


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Seeded by the test's name and parameters, so that a failure comes back alone."""
    return seeded(crc32(request.node.name.encode()))


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def random_activations(format: Format, m: int, k: int, generator: torch.Generator) -> Tensor:
    """Codes: packed MXFP4 uint8 [m, k/2], or MXINT8 int8 [m, k] with -128 among them."""
    return random_codes(m, k, generator) if format == "mxfp4" else random_int8(m, k, generator)


def blocks_of(codes: Tensor, scale: Tensor) -> Tensor:
    """[rows, blocks, bytes], the same memory."""
    return codes.view(len(codes), scale.shape[1], -1)


def with_special_blocks(operands: Operands, generator: torch.Generator) -> Operands:
    """Blocks and whole rows of zeros (under an extreme scale, which must not matter), NaN scales in both operands."""
    a, a_scale, w, w_scale = (tensor.clone() for tensor in operands)
    for codes, scale in ((a, a_scale), (w, w_scale)):
        signs = 0 if codes.dtype == torch.int8 else 0x88  # MXFP4 has a -0
        zero = torch.rand(scale.shape, generator=generator) < 0.2
        blocks_of(codes, scale)[zero] &= signs
        scale[zero] = torch.randint(0, 255, (int(zero.sum()),), generator=generator, dtype=torch.uint8)
        scale[torch.rand(scale.shape, generator=generator) < 0.01] = 0xFF
        codes[-1] &= signs
    return a, a_scale, w, w_scale


def shared(scale: Tensor, blocks: int) -> Tensor:
    """The first scale of so many neighbouring blocks for all of them: four, as a group of 128 has."""
    return scale[:, torch.arange(scale.shape[1]) // blocks * blocks]


def spread_operands(
    spread: str, centre: str, m: int, n: int, k: int, generator: torch.Generator, format: Format = "mxfp4"
) -> Operands:
    a_seed, w_seed = torch.randint(1 << 31, (2,), generator=generator).tolist()
    a_centre, w_centre = CENTRES[centre]
    a_scale = spread_scales(spread, m, k // 32, a_centre, a_seed)
    w_scale = spread_scales(spread, n, k // 32, w_centre, w_seed)
    return random_activations(format, m, k, generator), a_scale, random_codes(n, k, generator), w_scale


def assert_native_bits(operands: Operands, dtype: torch.dtype = torch.float32, bias: Tensor | None = None) -> None:
    with xpu_fp4.cpu_backend("native"):
        expected = gemm(*operands, dtype, bias)
    with xpu_fp4.cpu_backend("sycl"):
        assert_same_bits(gemm(*operands, dtype, bias), expected)


def linear_of_values(operands: Operands) -> Tensor:
    """A linear whose x are A's values."""
    a, a_scale, w, w_scale = operands
    if a.dtype == torch.int8:
        return linear_w4a8(own.mxint8_dequantize(a, a_scale, torch.float32), w, w_scale)
    return linear_w4a4(reference.values(a, a_scale).float(), w, w_scale)


def assert_native_bits_with_scales_together(operands: Operands) -> None:
    """A row's scales of W side by side, as a linear passes them."""
    with xpu_fp4.cpu_backend("native"):
        expected = linear_of_values(operands)
    with xpu_fp4.cpu_backend("sycl"):
        assert_same_bits(linear_of_values(operands), expected)


def assert_every_spread(m: int, n: int, k: int, generator: torch.Generator, format: Format = "mxfp4") -> None:
    for i, (spread, centre) in enumerate(product(SPREADS, CENTRES)):
        a, a_scale, w, w_scale = spread_operands(spread, centre, m, n, k, generator, format)
        if format == "mxint8":  # with W's own spread: every level
            a_scale = shared(a_scale, (4, 2, 1)[i % 3])
        assert_native_bits((a, a_scale, w, w_scale))
        if spread == "mixed":
            assert_native_bits(with_special_blocks((a, a_scale, w, w_scale), generator))


def biases(m: int, n: int, generator: torch.Generator) -> Iterator[Tensor | None]:
    for shape in ((n,), (m, n), (m, 1), (1,)):
        yield torch.randn(shape, generator=generator)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", LARGE)
@pytest.mark.parametrize("k", [32, 544, 2176])
def test_large_tiles_give_the_native_bits(
    force: pytest.MonkeyPatch, generator: torch.Generator, variant: str, k: int, format: Format
) -> None:
    """Last quads of one block, more quads than lanes; every level, and every level beside every other."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    assert_every_spread(*LARGE[variant], k, generator, format)


def test_every_tile_of_several_panels_is_computed(force: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Work-groups of 128 x 256: two panels of three rows of them, the last row's and column's with tiles to spare."""
    force.setenv("XPU_FP4_SYCL_VARIANT", "dg2:large")
    assert_native_bits(spread_operands("equal", "ordinary", 5 * 128 + 20, 2 * 256 + 40, 32, generator))


@pytest.mark.parametrize("variant", LARGE)
def test_near_rows_give_the_native_bits(force: pytest.MonkeyPatch, generator: torch.Generator, variant: str) -> None:
    """One quad, whose sum is the output to its last bit. Each tile has scales of its own: each distance up to where the near
    level ends and beyond, in each order; columns within 2 and 3 powers of two."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    distances = [offsets for offsets in product((0, 1, 4, 5, 8, 9, 12), repeat=4) if min(offsets) == 0 and max(offsets) > 3]
    for first in range(0, len(distances), 131):
        a_scale = 120 + torch.tensor(distances[first : first + 131], dtype=torch.uint8).repeat_interleave(TILE_ROWS[variant], 0)
        within = torch.tensor((3, 4)).repeat_interleave(32)[:, None]
        w_scale = 120 + (torch.rand(64, 4, generator=generator) * within).to(torch.uint8)
        a, w = random_codes(len(a_scale), 128, generator), random_codes(64, 128, generator)
        assert_native_bits((a, a_scale, w, w_scale))


@pytest.mark.parametrize("variant", ["bmg:large"])
def test_sums_of_mxint8_are_too_large_to_be_near(force: pytest.MonkeyPatch, generator: torch.Generator, variant: str) -> None:
    """Scales as the near level takes them of MXFP4, the same in all rows: with MXINT8 its sums would round."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
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
    force: pytest.MonkeyPatch, generator: torch.Generator, variant: str, centre: int
) -> None:
    """Outliers in some blocks of each quad, the same in all rows, so that most tiles are near; a last quad of one block, zero
    blocks and rows, NaN scales; exponents up to the ends of the window and beyond."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
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
def test_the_largest_sums_of_the_window_stay_finite(force: pytest.MonkeyPatch, variant: str, format: Format, high: int) -> None:
    """In units of the first block's scale, the least of the window, the others are as large as they get; -128 is."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    a = torch.full((65, 64), 0x77, dtype=torch.uint8) if format == "mxfp4" else torch.full((65, 128), -128, dtype=torch.int8)
    w = torch.full((33, 64), 0x77, dtype=torch.uint8)
    a_scale = torch.full((65, 4), 127 + high, dtype=torch.uint8)
    for w_high in (33, 34):
        w_scale = torch.tensor([127 - 44, *[127 + w_high] * 3], dtype=torch.uint8).expand(33, 4).contiguous()
        assert_native_bits((a, a_scale, w, w_scale))


@pytest.mark.parametrize("variant", [*LARGE, *SMALL])
def test_both_edges_of_the_window_at_every_level(force: pytest.MonkeyPatch, generator: torch.Generator, variant: str) -> None:
    """MXINT8 at either end of its window and beyond, W at either end of its own: together in a quad, in pairs, apart."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
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
    force: pytest.MonkeyPatch, generator: torch.Generator, variant: str, format: Format
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    assert_every_spread(*MEDIUM[variant], 224, generator, format)


@pytest.mark.parametrize(("format", "variant", "m"), SMALL_ROWS)
def test_small_products_give_the_native_bits(
    force: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str, m: int
) -> None:
    """Eight sub-groups share K, or 16 for up to four rows: rounds that are full, started and, at K = 32, mostly idle."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    for k in (32, 352, 1088, 4256):
        assert_every_spread(m, 35, k, generator, format)


@pytest.mark.parametrize(("format", "variant", "m"), SMALL_ROWS)
def test_small_products_of_whole_quads(
    force: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str, m: int
) -> None:
    """K a multiple of 128 has kernels of its own: with a row's scale bytes side by side, or a column of them."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    for k in (128, 1152, 4224):
        for spread, centre in (("mixed", "ordinary"), ("unaligned", "subnormal"), ("mixed", "largest")):
            operands = spread_operands(spread, centre, m, 35, k, generator, format)
            assert_native_bits(operands)
            assert_native_bits_with_scales_together(operands)
        assert_native_bits_with_scales_together(with_special_blocks(operands, generator))


@pytest.mark.parametrize("variant", SMALL)
def test_small_products_multiply_all_codes(force: pytest.MonkeyPatch, variant: str) -> None:
    """Every pair of codes at every place in a dword, alone in its row and column. MXINT8's 256 codes meet all of W's too."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
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
    force: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str
) -> None:
    """One program each: all codes at all places of a dword, then every spread of scales."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    force.setenv("XPU_FP4_WEIGHT_OPERAND", "int8")
    k = 160
    w = torch.zeros(128, k // 2, dtype=torch.uint8)
    for place in range(8):
        w[16 * place :][:16, 20 + place // 2] = torch.arange(16, dtype=torch.uint8) << 4 * (place % 2)
    a = torch.full((1, k // 2), 0x12, dtype=torch.uint8) if format == "mxfp4" else random_int8(1, k, generator)
    one = torch.full((128, k // 32), 127, dtype=torch.uint8)
    assert_native_bits((a, one[:1], w, one))
    assert_every_spread(1, 35, 352, generator, format)


def test_an_unknown_operand_is_refused(force: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", "bmg:small")
    force.setenv("XPU_FP4_WEIGHT_OPERAND", "int2")
    operands = spread_operands("equal", "ordinary", 2, 2, 32, generator)
    with xpu_fp4.cpu_backend("sycl"), pytest.raises(RuntimeError, match='XPU_FP4_WEIGHT_OPERAND is "int2", expected "int4" or'):
        gemm(*operands)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", SMALL)
@pytest.mark.parametrize("k", [128, 160])
def test_one_exponent_outside_of_the_window_suffices(
    force: pytest.MonkeyPatch, generator: torch.Generator, variant: str, k: int, format: Format
) -> None:
    """In any place of a row's, or of a column's, quad: the cheap sum would give other bits."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
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
    force: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES[variant]
    operands = spread_operands("mixed", "ordinary", m, n, 8192, generator, format)
    assert_native_bits(with_special_blocks(operands, generator))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "variant"), OF_ALL_DTYPES)
def test_bias_and_output_dtypes(
    force: pytest.MonkeyPatch, generator: torch.Generator, format: Format, variant: str, dtype: torch.dtype
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES[variant]
    operands = spread_operands("mixed", "ordinary", m, n, 160, generator, format)
    for bias in biases(m, n, generator):
        assert_native_bits(operands, dtype, bias)
    overflowing = spread_operands("mixed", "overflow", m, n, 160, generator, format)
    assert_native_bits(with_special_blocks(overflowing, generator), dtype)


def difficult_floats(m: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Channels of very different size; zeros, Inf, NaN, and a row of what is small."""
    x = (torch.randn(m, k, generator=generator) * torch.randn(k, generator=generator).exp2().pow(3)).to(dtype)
    x[1, :40], x[2, 3], x[3, 40], x[-1] = 0.0, torch.inf, torch.nan, 1e-30
    return x


@pytest.mark.parametrize("variant", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_linear_quantizes_like_quantize(
    force: pytest.MonkeyPatch, generator: torch.Generator, variant: str, dtype: torch.dtype
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES[variant]
    weight, scale = random_codes(n, 160, generator), random_scales(n, 160, generator)
    x = difficult_floats(m, 160, dtype, generator)
    modes: tuple[ScaleMode, ...] = MODES
    for mode in modes:
        with xpu_fp4.cpu_backend("native"):
            expected = linear_w4a4(x, weight, scale, None, mode)
        with xpu_fp4.cpu_backend("sycl"):
            assert_same_bits(linear_w4a4(x, weight, scale, None, mode), expected)


@pytest.mark.parametrize("variant", ["bmg:large", "dg2:small", "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_linear_quantizes_to_mxint8(
    force: pytest.MonkeyPatch, generator: torch.Generator, variant: str, dtype: torch.dtype
) -> None:
    """Whole groups of 128, a last one of 32 and of 96; amax at 255/128 of a power of two and just below; the least floats."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES.get(variant, (18, 20))
    groups: tuple[Group, ...] = get_args(Group)
    for k, group in product((160, 224), groups):
        weight, scale = random_codes(n, k, generator), random_scales(n, k, generator)
        x = difficult_floats(m, k, dtype, generator)
        x[0] = x[0].clamp(-0.9, 0.9)
        x[0, ::32] = 255 / 128
        x[4] = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * torch.randint(-300, 300, (k,), generator=generator)
        with xpu_fp4.cpu_backend("native"):
            codes, bytes_of = own.mxint8_quantize(x, group)
            expected = linear_w4a8(x, weight, scale, None, group)
        with xpu_fp4.cpu_backend("sycl"):
            got, got_bytes = own.mxint8_quantize(x, group)
            assert_same_bits(got_bytes, bytes_of)
            assert_same_bits(got, codes)
            assert_same_bits(
                own.mxint8_dequantize(got, got_bytes, dtype)[4:5], own.mxint8_dequantize(codes, bytes_of, dtype)[4:5]
            )
            assert_same_bits(linear_w4a8(x, weight, scale, None, group), expected)


# A row's quad is transformed by one lane: sub-groups of both sizes, each arrangement and order of what it writes, each dtype.
# H ends within a row's last quad, or is all of it.
TRANSFORMED = [
    ("w4a4", "bmg:large", torch.bfloat16),
    ("w4a8", "bmg:large", torch.float16),
    ("w4a4", "dg2:large", torch.float16),
    ("w4a4", "dg2:small", torch.float32),
    ("w4a8", "dg2:small", torch.float32),
]
SIZES_AND_K: list[tuple[Hadamard, int]] = [(0, 96), (32, 64), (64, 64), (32, 160), (64, 192), (128, 128), (128, 1152)]


@pytest.mark.parametrize(("mode", "variant", "dtype"), TRANSFORMED)
def test_the_fused_linear_transforms_x(
    force: pytest.MonkeyPatch, generator: torch.Generator, mode: Mode, variant: str, dtype: torch.dtype
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    m, n = SHAPES.get(variant, (17, 40))
    for size, k in SIZES_AND_K:
        weight, scale = random_codes(n, k, generator), random_scales(n, k, generator)
        x, some = difficult_floats(m, k, dtype, generator), torch.randn(k, generator=generator)
        for offset in (some, None) if size != 0 else (some,):
            for group in get_args(Group) if mode == "w4a8" else (128,):
                results = []
                for backend in ("native", "sycl"):
                    with xpu_fp4.cpu_backend(backend):
                        results.append(
                            xpu_fp4.linear(x, weight, scale, mode=mode, group=group, hadamard=size, input_offset=offset)
                        )
                assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("variant", ["bmg:large", "dg2:large"])
def test_one_expanded_weight_serves_both_formats(force: pytest.MonkeyPatch, generator: torch.Generator, variant: str) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
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


def test_the_portable_kernel_multiplies_mxint8(force: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", "portable")
    for k in (32, 544):
        assert_every_spread(18, 20, k, generator, "mxint8")


def test_operands_that_are_not_aligned(force: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Views one byte into their memory."""
    force.setenv("XPU_FP4_SYCL_VARIANT", "dg2:small")
    for format in FORMATS:
        a, a_scale, w, w_scale = spread_operands("mixed", "ordinary", 8, 20, 96, generator, format)
        shifted = [torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t) for t in (a, w)]
        assert_native_bits((shifted[0], a_scale, shifted[1], w_scale))


def test_without_a_forced_kernel_the_shape_decides(force: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", "bmg")
    for m in (8, 260):
        assert_native_bits(spread_operands("mixed", "ordinary", m, 35, 160, generator))


def test_k_of_zero_gives_the_bias(force: pytest.MonkeyPatch) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", "bmg:large")
    empty = torch.empty(4, 0, dtype=torch.uint8)
    for a in (empty, empty.to(torch.int8)):
        assert_native_bits((a, empty, empty, empty), torch.float32, torch.randn(4))


@pytest.mark.parametrize("value", ["gpu", "bmg:huge", "bmg:", ":large", "bmg:bdpas"])
def test_an_unknown_variant_is_refused(force: pytest.MonkeyPatch, generator: torch.Generator, value: str) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", value)
    operands = spread_operands("equal", "ordinary", 2, 2, 32, generator)
    with xpu_fp4.cpu_backend("sycl"), pytest.raises(RuntimeError, match=f'XPU_FP4_SYCL_VARIANT is "{value}".*bmg'):
        gemm(*operands)


# ---- W4A16 on the matrix unit: within the bound, and each row the same whatever surrounds it ----


def w4a16_operands(m: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    weight, scale = random_codes(n, k, generator), random_scales(n, k, generator, 117, 137)
    return (torch.randn(m, k, generator=generator) * 2.0**-5).to(dtype), weight, scale


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(
    ("variant", "m", "k"),
    [("bmg:large", 70, 544), ("pvc:large", 130, 160), ("dg2:large", 70, 160), ("bmg:small", 5, 8192), ("dg2:small", 19, 416)],
)
def test_w4a16_stays_within_the_bound(
    force: pytest.MonkeyPatch, generator: torch.Generator, variant: str, m: int, k: int, dtype: torch.dtype
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    x, weight, scale = w4a16_operands(m, 37, k, dtype, generator)
    bias = torch.randn(37, generator=seeded(1)).to(dtype)
    with xpu_fp4.cpu_backend("sycl"):
        y = linear_w4a16(x, weight, scale, bias)
        head = linear_w4a16(x[: m // 2], weight, scale, bias)
    assert w4a16_error(y, x, weight, scale, bias).max() <= 1
    if variant.endswith("large"):
        assert_same_bits(head, y[: m // 2])


@pytest.mark.parametrize("variant", ["bmg:large", "bmg:small"])
def test_w4a16_scales_are_exact(force: pytest.MonkeyPatch, variant: str) -> None:
    """One element of X at a time: the result is the exactly scaled weight. All codes, all scales, NaN among them."""
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    n, k = 256, 64
    scale = torch.arange(n, dtype=torch.uint8)[:, None].expand(n, 2).contiguous()
    codes = (torch.arange(k // 2, dtype=torch.uint8) * 17 + 0x10).expand(n, k // 2).contiguous()
    x = torch.eye(k, dtype=torch.bfloat16)[: 70 if variant == "bmg:large" else 8]
    with xpu_fp4.cpu_backend("sycl"):
        y = linear_w4a16(x, codes, scale)
    expected = reference.values(codes, scale).t()[: len(x)].bfloat16() + 0.0  # -0 becomes 0, as a sum does
    expected[expected.isnan()] = torch.nan  # the canonical one
    assert_same_bits(y, expected)


@pytest.mark.parametrize(("variant", "m", "dtype"), [("bmg:small", 5, torch.bfloat16), ("dg2:small", 19, torch.float16)])
def test_w4a16_multiplies_what_the_transform_rounds_to(
    force: pytest.MonkeyPatch, generator: torch.Generator, variant: str, m: int, dtype: torch.dtype
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    for size, k in SIZES_AND_K:
        x, weight, scale = w4a16_operands(m, 37, k, dtype, generator)
        offset = torch.randn(k, generator=generator)
        with xpu_fp4.cpu_backend("sycl"):
            y = xpu_fp4.linear(x, weight, scale, mode="w4a16", hadamard=size, input_offset=offset)
            assert_same_bits(y, linear_w4a16(reference.transform(x, size, offset).to(dtype), weight, scale))


@pytest.mark.parametrize("variant", ["bmg:small", "dg2:small"])
def test_w4a16_operands_that_are_not_aligned(force: pytest.MonkeyPatch, generator: torch.Generator, variant: str) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    x, weight, scale = w4a16_operands(5, 20, 96, torch.bfloat16, generator)
    shifted_x = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    shifted = torch.empty(weight.numel() + 1, dtype=torch.uint8)[1:].view(weight.shape).copy_(weight)
    with xpu_fp4.cpu_backend("sycl"):
        assert_same_bits(linear_w4a16(shifted_x, shifted, scale), linear_w4a16(x, weight, scale))


# ---- Xe3P's own FP4 instruction ----


@pytest.mark.parametrize(("m", "n", "k"), [(33, 70, 128), (5, 9, 416), (5, 9, 8192)])
def test_bdpas_stays_within_the_bound(force: pytest.MonkeyPatch, generator: torch.Generator, m: int, n: int, k: int) -> None:
    """Its hardware rounds in its own way, so this is not the definition; K with a started quad, tails in M and N."""
    force.setenv("XPU_FP4_SYCL_VARIANT", "cri:bdpas")
    a, a_scale, w, w_scale = spread_operands("mixed", "ordinary", m, n, k, generator)
    bias = torch.randn(n, generator=seeded(3))
    with xpu_fp4.cpu_backend("sycl"):
        y = gemm(a, a_scale, w, w_scale, torch.float32, bias)
        a_scale[0, 0], w_scale[1, -1] = 0xFF, 0xFF
        with_nan = gemm(a, a_scale, w, w_scale, torch.float32, bias)
    a_scale[0, 0] = 127
    assert w4a16_error(y[1:], reference.values(a, a_scale)[1:], w, w_scale.where(w_scale != 0xFF, 127), bias)[:, 2:].max() <= 1
    assert with_nan[0].isnan().all()
    assert with_nan[:, 1].isnan().all()
    assert_same_bits(with_nan[1:, 2:], y[1:, 2:])


def test_bdpas_leaves_what_it_cannot_load_and_mxint8_to_the_exact_kernels(
    force: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", "cri:bdpas")
    assert_native_bits(spread_operands("mixed", "ordinary", 5, 9, 96, generator))
    assert_native_bits(spread_operands("mixed", "ordinary", 5, 9, 160, generator, "mxint8"))


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        ("bmg", r"gemm_small \(bmg 8 rows, any K, W4A8\); passed over .*clocks are \d+ for gemm_small"),
        ("portable", r"gemm \(no matrix unit, W4A8\); passed over others: XPU_FP4_SYCL_VARIANT asks for portable"),
        ("cri:bdpas", r"gemm_small \(cri .*passed over gemm_bdpas: multiplies MXFP4 activations alone; others: modelled"),
    ],
)
def test_a_call_says_which_kernel_it_took_and_why(
    force: pytest.MonkeyPatch, generator: torch.Generator, capfd: pytest.CaptureFixture[str], variant: str, line: str
) -> None:
    force.setenv("XPU_FP4_SYCL_VARIANT", variant)
    operands = spread_operands("mixed", "ordinary", 5, 20, 1056, generator, "mxint8")
    with xpu_fp4.cpu_backend("sycl"):
        gemm(*operands)
        assert "passed over" not in capfd.readouterr().err
        force.setenv("XPU_FP4_VERBOSE", "1")
        gemm(*operands)
    assert re.search(f"^xpu_fp4: sycl w4a8 5x20x1056 on .*: {line}", capfd.readouterr().err, re.MULTILINE)


def test_warmup_leaves_nothing_to_compile(force: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Programs are built in the first call of a shape and kept: the second finds them."""
    force.setenv("XPU_FP4_SYCL_VARIANT", "bmg:small")
    with xpu_fp4.cpu_backend("sycl"):
        for mode in get_args(Mode):
            xpu_fp4.warmup([(3, 20, 96)], mode=mode, device="cpu")
        capfd.readouterr()
        for mode in get_args(Mode):
            xpu_fp4.warmup([(3, 20, 96)], mode=mode, device="cpu")
        with pytest.raises(ValueError, match="mode is 'w8a8'"):
            xpu_fp4.warmup([], mode="w8a8")  # type: ignore[arg-type]
    assert "compiling" not in capfd.readouterr().err
