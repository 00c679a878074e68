# SPDX-License-Identifier: Apache-2.0
"""A layer of experts on the GPU kernels, forced on the CPU device through the stand-in of the matrix unit: the native backend's
bits in W4A4 and W4A8, section 4's bound in W4A16; and which kernels are launched."""

import re
from typing import Any

import pytest
import torch
import xpu_fp4
from helpers import assert_same_bits, seeded
from products import w4a16_error
from test_experts import CASES, Layer, layer
from xpu_fp4 import Mode, reference

pytestmark = pytest.mark.usefixtures("requires_sycl")


def on_both(given: Layer, mode: Mode, **options: Any) -> None:  # noqa: ANN401
    with xpu_fp4.cpu_backend("native"):
        expected = given.run(mode=mode, **options)
    with xpu_fp4.cpu_backend("sycl"):
        assert_same_bits(given.run(mode=mode, **options), expected)


def changed(given: Layer, **fields: torch.Tensor) -> Layer:
    return Layer(**{**given.__dict__, **fields})


# Programs take long to compile. With float32 both products have the same one.
VARIANTS: list[tuple[str, Mode, torch.dtype]] = [
    ("bmg:small", "w4a8", torch.bfloat16),
    ("dg2:small", "w4a4", torch.float32),
    ("bmg:large", "w4a4", torch.float32),
    ("dg2:large", "w4a8", torch.float32),
]


def skewed(dtype: torch.dtype) -> Layer:
    """Experts of no row, of one, of more than a tile; slots of no expert; NaN. Tails in K of both products."""
    given = layer(31, 3, 5, 160, 96, dtype=dtype)
    ids = given.ids.clone()
    ids[:, 0] = torch.where(torch.rand(31, generator=seeded(1)) < 0.8, 2, ids[:, 0])
    ids[ids == 3] = 1
    ids[4], ids[7, 1] = -1, 5
    x = given.x.clone()
    x[2, 5] = torch.nan
    return changed(given, ids=ids, x=x)


@pytest.mark.parametrize(("variant", "mode", "dtype"), VARIANTS)
def test_experts_have_the_native_bits(monkeypatch: pytest.MonkeyPatch, variant: str, mode: Mode, dtype: torch.dtype) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    given = skewed(dtype)
    for options in CASES.values():
        if dtype == torch.bfloat16 or "hadamard" not in options:  # whose quantizers are programs of their own
            on_both(given, mode, **options)
    on_both(given, mode, expert_map=torch.tensor([4, 0, -1, 9, 2], dtype=torch.int32))


def launches(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The kernels of the last layer, in their order, without their variants."""
    line = re.findall(r"^xpu_fp4: sycl w4a\d+ experts, .* on .*: (.*)$", capfd.readouterr().err, re.MULTILINE)[-1]
    return re.sub(r" \([^)]*\)", "", line).split(", ")


@pytest.mark.parametrize(("variant", "mode"), [("bmg:small", "w4a8"), ("dg2:small", "w4a4")])
def test_few_slots_are_not_sorted(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], variant: str, mode: Mode
) -> None:
    """Four launches; slots of no expert, of the same one."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    monkeypatch.setenv("XPU_FP4_VERBOSE", "1")
    for tokens, top_k, experts in ((1, 4, 5), (1, 1, 1), (2, 3, 12)):
        given = layer(tokens, top_k, experts, 160, 96, dtype=torch.float32)
        ids = given.ids.clone()
        if top_k > 1:
            ids[0, 1], ids[-1, 2] = -1, ids[-1, 0]
        for options in ({}, {"router_on_input": True}, {"activation": "swiglu_oai", "interleaved": True}):
            on_both(changed(given, ids=ids), mode, **options)
        assert launches(capfd) == ["gather_quantize_expand", "gemm_small", "gate_quantize_expand", "gemm_small"]


@pytest.mark.parametrize(("variant", "mode", "dtype"), VARIANTS)
def test_a_layer_is_so_many_launches(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], variant: str, mode: Mode, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    monkeypatch.setenv("XPU_FP4_VERBOSE", "1")
    with xpu_fp4.cpu_backend("sycl"):
        skewed(dtype).run(mode=mode)
    product = ["gemm_small"] if variant.endswith("small") else ["expand", "gemm_large"]
    expected = ["sort_slots", "gather_quantize_expand", *product, "gate_quantize_expand", *product, "combine_slots"]
    assert launches(capfd) == expected


@pytest.mark.parametrize(
    ("variant", "tokens", "dtype"),
    [("bmg:small", 31, torch.bfloat16), ("bmg:small", 9, torch.bfloat16), ("dg2:large", 31, torch.float16)],
)
def test_w4a16_stays_within_the_bound(monkeypatch: pytest.MonkeyPatch, variant: str, tokens: int, dtype: torch.dtype) -> None:
    """The first product is of small integers, so exact in any order; a token has one slot of weight 1, so y is the second."""
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", variant)
    given = layer(tokens, 1, 3, 160, 96, dtype=dtype)
    x = torch.randint(-3, 4, given.x.shape, generator=seeded(2)).to(dtype)
    given = changed(given, x=x, weights=torch.ones(tokens, 1), w13_scale=torch.full_like(given.w13_scale, 124))
    assert given.w13_bias is not None
    assert given.w2_bias is not None
    with xpu_fp4.cpu_backend("sycl"):
        y = given.run(mode="w4a16")
    for e in range(3):
        rows = given.ids[:, 0] == e
        u = (x[rows].double() @ reference.values(given.w13[e], given.w13_scale[e]).double().t()).float()
        h = reference.gate((u + given.w13_bias[e].float()).to(dtype), "silu_mul")
        assert w4a16_error(y[rows], h, given.w2[e], given.w2_scale[e], given.w2_bias[e]).max() <= 1
