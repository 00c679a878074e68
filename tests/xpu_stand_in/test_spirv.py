# SPDX-License-Identifier: Apache-2.0
"""Programs that were compiled at build and embedded give the bits of those that are compiled from source, on the CPU device.

build.py embeds those that csrc/sycl/variants.cpp has for tests; one that is not among them raises.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import xpu_fp4
from torch import Tensor
from xpu_fp4 import ScaleMode, reference

own = torch.ops.xpu_fp4
N, K = 20, 384
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Results = Tensor | tuple[Tensor, ...]

pytestmark = pytest.mark.usefixtures("device")


@pytest.fixture
def same_both_ways(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Results]], None]:
    def check(run: Callable[[], Results]) -> None:
        results = []
        for kernels in ("spirv", "source"):
            monkeypatch.setenv("XPU_FP4_KERNELS", kernels)
            with xpu_fp4.cpu_backend("sycl"):
                got = run()
            results.append(got if isinstance(got, tuple) else (got,))
        for spirv, source in zip(*results, strict=True):
            assert torch.equal(spirv.view(torch.uint8), source.view(torch.uint8))

    return check


def floats(dtype: torch.dtype, aligned: bool = True) -> Tensor:
    """Blocks of very different size, a NaN; one element into its memory where it is not to be aligned."""
    torch.manual_seed(0)
    x = torch.randn(5, K) * torch.exp2(torch.randint(-20, 9, (5, K // 32)).repeat_interleave(32, 1))
    x[1, 40] = torch.nan
    return x.to(dtype) if aligned else torch.empty(5 * K + 1, dtype=dtype)[1:].view(5, K).copy_(x)


def weight(aligned: bool = True) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    codes, scale = reference.quantize(torch.randn(N, K))
    if not aligned:
        codes = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:].view(codes.shape).copy_(codes)
    return codes, scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers(same_both_ways: Any, dtype: torch.dtype) -> None:  # noqa: ANN401
    modes: tuple[ScaleMode, ...] = ("even", "rceil")
    for x in (floats(dtype), floats(dtype, aligned=False)):
        for mode in modes:
            same_both_ways(partial(own.mxfp4_quantize, x, mode))
        same_both_ways(partial(own.mxint8_quantize, x))
    codes, scale = weight()
    same_both_ways(lambda: own.mxfp4_dequantize(codes, scale, dtype))
    same_both_ways(lambda: own.mxint8_dequantize(codes.view(torch.int8)[:, :128], scale[:, :4], dtype))


@pytest.mark.parametrize("mode", ["abs_max", "quest"])
def test_rules_of_scales(same_both_ways: Any, mode: str) -> None:  # noqa: ANN401
    same_both_ways(lambda: own.mxfp4_quantize(floats(torch.bfloat16), mode))


def test_transforms(same_both_ways: Any) -> None:  # noqa: ANN401
    x = floats(torch.bfloat16)
    same_both_ways(lambda: own.mxfp4_quantize(x, "even", 128, torch.ones(K)))
    same_both_ways(lambda: own.mxint8_quantize(x, 32, 64))


@pytest.mark.parametrize("architecture", ["bmg", "dg2"])
def test_expanded_weights(same_both_ways: Any, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:  # noqa: ANN401
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", architecture)
    for aligned in (True, False):
        same_both_ways(partial(own.mxfp4_expand, *weight(aligned)))


@pytest.mark.parametrize("architecture", ["bmg", "dg2"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_products(same_both_ways: Any, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: torch.dtype) -> None:  # noqa: ANN401
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", f"{architecture}:small")
    x = torch.zeros(5, K + 64, dtype=dtype)
    start = -x.data_ptr() % 64 // x.element_size()
    aligned = x.view(-1)[start : start + 5 * K].view(5, K).copy_(torch.randn(5, K))  # to a cache line, as a GPU's memory is
    same_both_ways(lambda: own.mxfp4_linear_w4a16(aligned, *weight()))


def test_a_program_that_was_not_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "portable")
    x = floats(torch.bfloat16)
    with xpu_fp4.cpu_backend("sycl"):
        monkeypatch.setenv("XPU_FP4_KERNELS", "spirv")
        with pytest.raises(
            RuntimeError, match=r"cannot build gemm\.cpp .*from spirv: .* not one of the \d+ that were compiled"
        ):
            own.mxfp4_linear(x, *weight())
        monkeypatch.setenv("XPU_FP4_KERNELS", "spirv,source")
        y = own.mxfp4_linear(x, *weight())
        monkeypatch.setenv("XPU_FP4_KERNELS", "binary")
        with pytest.raises(RuntimeError, match='XPU_FP4_KERNELS is "binary", expected "spirv", "source" or "spirv,source"'):
            own.mxfp4_linear(x, *weight())
    with xpu_fp4.cpu_backend("native"):
        assert torch.equal(y.view(torch.int16), own.mxfp4_linear(x, *weight()).view(torch.int16))
