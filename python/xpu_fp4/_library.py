# SPDX-License-Identifier: Apache-2.0
"""Loads the op library and gives each op its fake: the shapes and dtypes that tracing needs. It checks nothing: C++ does."""

from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_xpu_C.abi3.so")
BLOCK = 32

if not LIBRARY.exists():
    raise ImportError(f"xpu_fp4 is not built: {LIBRARY} does not exist. Build it: pip install --no-build-isolation -e .")
torch.ops.load_library(LIBRARY)
ops = torch.ops.xpu_fp4


@torch.library.register_fake("xpu_fp4::mxfp4_quantize")
def _fake_quantize(x: Tensor, scale_mode: str = "even") -> tuple[Tensor, Tensor]:
    *leading, k = x.shape
    q = x.new_empty([*leading, k // 2], dtype=torch.float4_e2m1fn_x2)
    return q, x.new_empty([*leading, k // BLOCK], dtype=torch.float8_e8m0fnu)


@torch.library.register_fake("xpu_fp4::mxfp4_dequantize")
def _fake_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    *leading, packed = q.shape
    return q.new_empty([*leading, packed * 2], dtype=dtype)


@torch.library.register_fake("xpu_fp4::mxfp4_gemm")
def fake_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Also the fake of the compatibility op, which has the same arguments."""
    return a.new_empty([*a.shape[:-1], b.shape[1]], dtype=out_dtype or torch.float16)


@torch.library.register_fake("xpu_fp4::mxfp4_linear")
def _fake_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, scale_mode: str = "even"
) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[0]])


@torch.library.register_fake("xpu_fp4::mxfp4_linear_w4a16")
def _fake_linear_w4a16(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty([*x.shape[:-1], weight.shape[0]])
