# SPDX-License-Identifier: Apache-2.0
"""FP-Quant's rules for scales and a weight's global scale: the bits of their definition in every op, and FP-Quant's numbers."""

import io
import math
import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import fp_quant_of_others
import ml_dtypes
import numpy as np
import pytest
import torch
import xpu_fp4
from helpers import (
    ALL_PATTERNS,
    DTYPES,
    ENVIRONMENTS,
    FP_QUANT_MODES,
    HALF_DTYPES,
    Environment,
    assert_quantizes,
    assert_same_bits,
    environment_is,
    float_environment,
    from_bits,
    normal,
    off_by,
    random_codes,
    random_scales,
    seeded,
)
from torch import Tensor, nn
from xpu_fp4 import Hadamard, Mode, MXFP4Linear, ScaleMode, reference

SIZES: tuple[Hadamard, ...] = (0, 32, 64, 128)
MODES: tuple[Mode, ...] = ("w4a4", "w4a8", "w4a16")
GLOBAL_SCALES = (1.0, 3.0, 0.7)
SHAPES: tuple[tuple[Hadamard, int], ...] = ((0, 160), (32, 160), (128, 256))
# Each is a program to compile, and so is each rule: one of both kinds of products has the other rule.
SYCL_VARIANTS: dict[str, tuple[ScaleMode, int, int]] = {
    "portable": ("abs_max", 18, 20),
    "bmg:large": ("quest", 70, 37),
    "bmg:small": ("abs_max", 8, 35),
    "dg2:large": ("abs_max", 70, 37),
    "dg2:small": ("quest", 8, 35),
    "bmg:w4a16": ("even", 8, 35),
}
LEAST = 100  # the byte of 2^-27

modes = pytest.mark.parametrize("rule", FP_QUANT_MODES)


# ---- the definition, once more, and FP-Quant's own formulas ----


def scale_byte(block: np.ndarray, rule: ScaleMode) -> int:
    """Takes a block of 32 float32, all finite: float32 by numpy, powers of two by exact fractions."""
    if rule == "abs_max":
        return math.frexp(np.abs(block).max() + np.float32(1e-8))[1] - 1 + 127

    def mean(terms: np.ndarray) -> Any:
        while len(terms) > 1:
            terms = np.array([terms[i] + terms[i + 1] for i in range(0, len(terms), 2)], dtype=np.float32)
        return terms[0] / np.float32(32)

    variance = mean(block * block) - mean(block) * mean(block)
    if not np.isfinite(variance):
        return 255
    if variance < 0:
        return 127
    square = Fraction(float(variance * np.float32((2.92247856 / 6) ** 2)))
    return 127 + next(e for e in range(64, -28, -1) if e == -27 or Fraction(4) ** e <= square)


def definition(x: Tensor, rule: ScaleMode) -> tuple[Tensor, Tensor]:
    """Codes [..., K] and scale bytes [..., K/32] of float32: elements are rounded by ml_dtypes."""
    blocks = x.numpy().reshape(-1, 32)
    with np.errstate(all="ignore"):
        scales = np.array([scale_byte(block, rule) for block in blocks])
        times = np.float32(3 if rule == "abs_max" else 1)
        scaled = (blocks * times * 2.0 ** (127.0 - scales[:, None])).astype(np.float32)
        codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes[scales == 255] = 0
    return torch.from_numpy(codes).view(x.shape), torch.from_numpy(scales.astype(np.uint8)).view(*x.shape[:-1], -1)


def random_floats(rows: int, k: int = 256) -> Tensor:
    """Rows of every size, whose blocks lean to either side, some nearly constant."""
    x = normal(rows, k) * torch.logspace(-12, 12, rows)[:, None] + normal(rows, k // 32, seed=61).repeat_interleave(32, -1)
    x[::7] = x[::7] * 1e-4 + 1
    x[1::7] *= 1e-30
    return x


@modes
def test_the_reference_is_the_definition(rule: ScaleMode) -> None:
    for x in (random_floats(300), random_floats(300).flip(0) * 1e9, torch.zeros(2, 64), -torch.zeros(2, 64)):
        q, scale = reference.quantize(x, rule)
        codes, expected = definition(x, rule)
        assert_same_bits(scale, expected)
        assert_same_bits(reference.unpack(q), codes)


@modes
@pytest.mark.parametrize("size", SIZES)
def test_codes_are_fp_quants(rule: ScaleMode, size: Hadamard) -> None:
    x = (normal(512, 1024) * torch.logspace(-3, 3, 512)[:, None]).bfloat16()
    q, scale = xpu_fp4.quantize(x, rule, hadamard=size)
    codes, expected = fp_quant_of_others.quantize(x, fp_quant_of_others.matrix(size), rule)
    same_scale = scale.view(torch.uint8) == expected
    # Its matrix is rounded to bfloat16, by 1 in 10,000, which ours is not, and so is an element that is that near to a tie.
    assert same_scale.float().mean() > 0.9995
    same = reference.unpack(q) == codes
    assert same.unflatten(-1, (-1, 32))[same_scale].float().mean() > (0.9995 if size in (32, 128) else 0.999999)


# ---- quantizers ----


@modes
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_element_that_a_dtype_has(backend: str, dtype: torch.dtype, rule: ScaleMode) -> None:
    for x in (from_bits(ALL_PATTERNS, dtype).view(-1, 1024), from_bits(ALL_PATTERNS, dtype).view(1024, -1).t()):
        assert_quantizes(x, rule)


@modes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [32, 96, 160, 2080])
def test_rows_of_any_length_and_dtype(backend: str, dtype: torch.dtype, k: int, rule: ScaleMode) -> None:
    assert_quantizes(random_floats(9, k).to(dtype), rule)
    if dtype == torch.bfloat16:  # a program of its own
        assert_quantizes(off_by(random_floats(9, k).to(dtype)), rule)


@modes
def test_random_float32_patterns(backend: str, rule: ScaleMode) -> None:
    pattern = torch.randint(-(1 << 31), 1 << 31, (4096, 32), generator=seeded(5)).int()
    assert_quantizes(pattern.view(torch.float32), rule)
    # Exponents that are near to each other, from all over.
    exponent = torch.randint(1, 250, (4096, 1), generator=seeded(6)) + torch.randint(0, 4, (4096, 32), generator=seeded(7))
    assert_quantizes(((pattern & ~0x7F800000) | exponent.int() << 23).view(torch.float32), rule)


def near(value: float) -> Iterator[float]:
    middle = np.float32(value)
    yield from (float(np.nextafter(middle, np.float32(0))), float(middle), float(np.nextafter(middle, np.float32(np.inf))))


def test_abs_max_at_every_power_of_two_and_tie(backend: str) -> None:
    rows = []
    for exponent in range(-40, 128):
        for amax in near(2.0**exponent):
            ties = torch.tensor([tie for middle in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0) for tie in near(middle / 3)])
            rows.append(torch.cat([torch.tensor([amax]), ties[:31] * 2.0**exponent, torch.zeros(10)])[:32])
    assert_quantizes(torch.stack(rows), "abs_max")
    assert_quantizes(-torch.stack(rows), "abs_max")


def test_quest_where_the_scale_changes(backend: str) -> None:
    # Half of a block is s and half -s, so that sigma is s: around each power of two, elements saturate or not.
    sigma = torch.tensor([s for e in range(-45, 63) for s in near(2.0**e / (2.92247856 / 6))])
    signs = torch.where(torch.arange(32) % 2 == 0, 1.0, -1.0)
    for order in (signs, signs.sort().values):
        assert_quantizes(sigma[:, None] * order, "quest")
        assert_quantizes(sigma[:, None] * order * torch.linspace(0.7, 1.3, 32), "quest")


def test_quest_of_blocks_without_spread(backend: str) -> None:
    # Rounding alone decides whether the variance of nearly equal elements is 0, more or less.
    x = 1 + normal(2000, 32) * torch.logspace(-9, -3, 2000)[:, None]
    assert_quantizes(x, "quest")
    _, scale = xpu_fp4.quantize(x, "quest")
    found = set(scale.view(torch.uint8).flatten().tolist())
    assert {LEAST, 127} <= found, "the cases were to be among them"


@modes
def test_zeros_nan_and_inf(backend: str, rule: ScaleMode) -> None:
    x = torch.zeros(1, 192)
    x[0, 32:64] = -0.0
    x[0, 70], x[0, 100], x[0, 130], x[0, 161] = torch.nan, torch.inf, 1e30, 3e38
    q, scale = xpu_fp4.quantize(x, rule)
    squares_overflow = rule == "quest"
    assert scale.view(torch.uint8)[0, :4].tolist() == [LEAST, LEAST, 255, 255]
    assert (scale.view(torch.uint8)[0, 4:] == 255).tolist() == [squares_overflow] * 2
    codes = reference.unpack(q)[0]
    assert codes[:32].eq(0).all()
    assert codes[32:64].eq(8).all()
    assert codes[64:128].eq(0).all()
    assert_quantizes(x, rule)


@modes
@pytest.mark.parametrize("size", SIZES[1:])
def test_after_a_transform(backend: str, rule: ScaleMode, size: Hadamard) -> None:
    for dtype in DTYPES:
        x, offset = random_floats(9, 384).to(dtype), normal(384, seed=63)
        q, scale = xpu_fp4.quantize(x, rule, hadamard=size, input_offset=offset)
        want_q, want_scale = reference.quantize(reference.transform(x, size, offset), rule)
        assert_same_bits(scale, want_scale)
        assert_same_bits(q, want_q)


@modes
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_float_environment_of_the_caller_does_not_matter(backend: str, rule: ScaleMode, environment: Environment) -> None:
    x = random_floats(64) * 1e-7
    want = [*xpu_fp4.quantize(x, rule)]
    with float_environment(environment):
        got = [*xpu_fp4.quantize(x, rule)]
        assert environment_is(environment)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


# ---- products ----


def operands(n: int, k: int) -> tuple[Tensor, Tensor]:
    return random_codes(n, k, seeded(1)), random_scales(n, k, seeded(2), 110, 140)


def expected(
    x: Tensor, w: Tensor, w_scale: Tensor, rule: ScaleMode, global_scale: float, bias: Tensor | None, size: Hadamard = 0
) -> Tensor:
    a = reference.quantize(reference.transform(x, size), rule)
    both = float(np.float32(global_scale) * np.float32(3 if rule == "abs_max" else 1))
    return reference.gemm(*a, w, w_scale, x.dtype, bias, both)


@modes
@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.parametrize("m", [1, 5, 33])
def test_a_linear_is_quantize_then_the_product_over_both_scales(
    backend: str, m: int, global_scale: float, rule: ScaleMode
) -> None:
    for dtype in DTYPES:
        for size, k in SHAPES:
            x, (w, w_scale) = normal(m, k, dtype=dtype), operands(37, k)
            for bias in (None, normal(37, seed=64, dtype=dtype)):
                y = xpu_fp4.linear(x, w, w_scale, bias, scale_mode=rule, hadamard=size, weight_global_scale=global_scale)
                assert_same_bits(y, expected(x, w, w_scale, rule, global_scale, bias, size))


def test_a_sum_that_vanishes_keeps_its_sign(backend: str) -> None:
    # The least negative number over 3 is -0; there is no bias that would make it +0.
    w = torch.zeros(4, 16, dtype=torch.uint8)
    w[:, 0] = 0x09  # -0.5
    x = torch.zeros(3, 32)
    x[:, 0] = 1
    y = xpu_fp4.linear(x, w, torch.zeros(4, 1, dtype=torch.uint8), scale_mode="floor", weight_global_scale=2.0**60)
    assert_same_bits(y, torch.full((3, 4), -0.0))


@pytest.mark.parametrize("mode", MODES)
def test_other_modes_divide_by_the_weights_scale_alone(backend: str, mode: Mode) -> None:
    x, bias, (w, w_scale) = normal(9, 256), normal(37), operands(37, 256)
    plain = xpu_fp4.linear(x, w, w_scale, mode=mode, hadamard=32)
    y = xpu_fp4.linear(x, w, w_scale, bias, mode=mode, hadamard=32, weight_global_scale=3.0)
    assert_same_bits(y, plain * (1 / torch.tensor(3.0)) + bias)


@pytest.mark.parametrize("mode", MODES)
def test_forms_of_the_weight_change_nothing(mode: Mode) -> None:
    x, (w, w_scale) = normal(70, 256), operands(50, 256)
    how = {"mode": mode, "scale_mode": "abs_max", "hadamard": 128, "weight_global_scale": 3.0}
    y = xpu_fp4.linear(x, w, w_scale, **how)  # type: ignore[arg-type]
    strips = xpu_fp4.prepack(w, w_scale)
    assert_same_bits(xpu_fp4.linear_prepacked(x, strips, 50, **how), y)  # type: ignore[arg-type]
    for rows in (slice(0, 1), slice(1, 8), slice(30, 70)):
        assert_same_bits(xpu_fp4.linear(x[rows], w, w_scale, **how), y[rows])  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", SYCL_VARIANTS)
@pytest.mark.usefixtures("requires_sycl")
def test_every_sycl_variant(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant.replace("w4a16", "small"))
    rule, m, n = SYCL_VARIANTS[variant]
    mode: Mode = "w4a16" if rule == "even" else "w4a4"
    k = 288
    x, (w, w_scale) = normal(m, k, dtype=torch.bfloat16), operands(n, k)
    for size in (0, 32) if variant == "bmg:large" else (32,):
        for bias in (None, normal(n, seed=65)):
            with xpu_fp4.cpu_backend("sycl"):
                how = {"mode": mode, "scale_mode": rule, "hadamard": size}
                y = xpu_fp4.linear(x, w, w_scale, bias, **how, weight_global_scale=3.0)  # type: ignore[arg-type]
            if mode == "w4a4":
                assert_same_bits(y, expected(x, w, w_scale, rule, 3.0, bias, size))
            else:
                turned = reference.transform(x, 32).bfloat16().double()
                want = turned @ reference.values(w, w_scale).t() / 3 + (0 if bias is None else bias)
                torch.testing.assert_close(y, want.bfloat16(), rtol=2.0**-8, atol=1e-4)


@pytest.mark.parametrize("wrong", [0.0, -3.0, float("nan"), float("inf"), 1e30])
def test_a_wrong_global_scale_is_named(wrong: float) -> None:
    x, (w, w_scale) = normal(2, 32), operands(4, 32)
    with pytest.raises(RuntimeError, match=r"mxfp4_linear: weight_global_scale is .*, expected a positive number"):
        xpu_fp4.linear(x, w, w_scale, weight_global_scale=wrong)


def test_a_wrong_rule_is_named() -> None:
    with pytest.raises(RuntimeError, match=r'scale_mode is "absmax", expected "floor", .* "abs_max" or "quest"'):
        xpu_fp4.quantize(normal(2, 32), "absmax")  # type: ignore[arg-type]


# ---- the module ----


@modes
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_computes_what_the_layer_computed(rule: ScaleMode, mode: Mode) -> None:
    source = nn.Linear(256, 48)
    source.weight.data = normal(48, 256)
    layer = MXFP4Linear.from_linear(source, mode=mode, scale_mode=rule, hadamard=32)
    assert layer.weight_global_scale == {"abs_max": 3.0, "quest": 1.0}[rule]
    x = normal(9, 256, seed=66)
    want = source(x)
    assert (layer(x) - want).norm() < 0.25 * want.norm()
    assert (layer.weight - source.weight).norm() < 0.2 * source.weight.norm()
    values = reference.values(layer.weight_packed, layer.weight_scale).float() / layer.weight_global_scale
    assert_same_bits(layer.weight + 0, reference.transform(values, 32))


def torch_save(layer: MXFP4Linear) -> MXFP4Linear:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded: MXFP4Linear = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("copy_of", [lambda layer: pickle.loads(pickle.dumps(layer)), torch_save])
def test_copies_keep_the_global_scale(copy_of: Callable[[MXFP4Linear], MXFP4Linear]) -> None:
    layer = MXFP4Linear.from_linear(nn.Linear(64, 16), scale_mode="abs_max", hadamard=64)
    x = normal(3, 64)
    want = layer(x)
    copied = copy_of(layer)
    assert "weight_global_scale=3" in str(copied)
    assert_same_bits(copied(x), want)
    other = MXFP4Linear(64, 16, scale_mode="abs_max", hadamard=64, weight_global_scale=3.0)
    other.load_state_dict(layer.state_dict())
    assert_same_bits(other(x), want)


def test_torch_compile_takes_it() -> None:
    layer = MXFP4Linear.from_linear(nn.Linear(64, 16), scale_mode="abs_max", hadamard=32)
    x = normal(3, 64)
    want = layer(x)
    assert_same_bits(torch.compile(layer, backend="eager", fullgraph=True)(x), want)
