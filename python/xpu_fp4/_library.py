# SPDX-License-Identifier: Apache-2.0
"""Loads the op library and gives each op its fake: the shapes and dtypes that tracing needs.

Fakes leave the checks to C++, but for devices: a meta tensor among real ones brings the real ones here.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_xpu_C.abi3.so")
XPU_QUEUE = LIBRARY.with_name("_xpu_queue.abi3.so")  # what it loads at the first op on an XPU tensor
BLOCK = 32

# Under an XPU torch, loading the library sets SYCL_CACHE_PERSISTENT, which SYCL reads when a process's first kernel is built.
XPU_CAME_FIRST = torch.xpu.is_initialized() and "SYCL_CACHE_PERSISTENT" not in os.environ

if not LIBRARY.exists():
    raise ImportError(f"xpu_fp4 is not built: {LIBRARY} does not exist. Build it: pip install --no-build-isolation -e .")
try:
    torch.ops.load_library(LIBRARY)
except OSError as error:
    raise ImportError(
        f"xpu_fp4's library does not fit torch {torch.__version__}: it must be built against the torch it runs with. "
        f"Build it again: pip install --no-build-isolation --force-reinstall --no-deps . ({error})"
    ) from error
ops = torch.ops.xpu_fp4


def _on_one_device(first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(f"{name} is on {tensor.device}, expected {first.device} like the first argument")


@torch.library.register_fake("xpu_fp4::mxfp4_quantize")
def _fake_quantize(
    x: Tensor, scale_mode: str = "even", hadamard: int = 0, input_offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _on_one_device(x, input_offset=input_offset)
    *leading, k = x.shape
    q = x.new_empty([*leading, k // 2], dtype=torch.float4_e2m1fn_x2)
    return q, x.new_empty([*leading, k // BLOCK], dtype=torch.float8_e8m0fnu)


@torch.library.register_fake("xpu_fp4::mxfp4_dequantize")
def _fake_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _on_one_device(q, scale=scale)
    *leading, packed = q.shape
    return q.new_empty([*leading, packed * 2], dtype=dtype)


@torch.library.register_fake("xpu_fp4::mxint8_quantize")
def _fake_mxint8_quantize(
    x: Tensor, group: int = 128, hadamard: int = 0, input_offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _on_one_device(x, input_offset=input_offset)
    *leading, k = x.shape
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty([*leading, k // BLOCK], dtype=torch.float8_e8m0fnu)


@torch.library.register_fake("xpu_fp4::mxint8_dequantize")
def _fake_mxint8_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _on_one_device(q, scale=scale)
    return q.new_empty(q.shape, dtype=dtype)


@torch.library.register_fake("xpu_fp4::mxfp4_gemm")
def fake_gemm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Serves as the fake of the compatibility op too, which has the same arguments."""
    _on_one_device(a, b=b, a_scale=a_scale, b_scale=b_scale, bias=bias)
    return a.new_empty([*a.shape[:-1], b.shape[1]], dtype=out_dtype or torch.float16)


@torch.library.register_fake("xpu_fp4::mxfp4_expand")
def _fake_expand(weight: Tensor, weight_scale: Tensor) -> Tensor:
    _on_one_device(weight, weight_scale=weight_scale)
    # The layout is the device's; a graph that expands is to keep the result whatever its size.
    context = torch.library.get_ctx()
    return weight.new_empty([context.new_dynamic_size(), context.new_dynamic_size()], dtype=torch.uint8)


STRIP, QUAD = 16, 128  # csrc/format/strips.h: columns and elements of a prepacked record


@torch.library.register_fake("xpu_fp4::mxfp4_prepack")
def _fake_prepack(weight: Tensor, weight_scale: Tensor) -> Tensor:
    _on_one_device(weight, weight_scale=weight_scale)
    n, packed = weight.shape
    quads = -(-2 * packed // QUAD)  # each has its codes and four scales for each column
    return weight.new_empty([-(-n // STRIP), STRIP * (packed + 4 * quads)], dtype=torch.uint8)


@torch.library.register_fake("xpu_fp4::mxfp4_unprepack")
def _fake_unprepack(prepacked: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    weight = prepacked.new_empty([out_features, in_features // 2])
    return weight, prepacked.new_empty([out_features, in_features // BLOCK])


@torch.library.register_fake("xpu_fp4::mxfp4_gemm_prepacked")
def _fake_gemm_prepacked(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    out_features: int,
    out_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    _on_one_device(a, a_scale=a_scale, b=b, bias=bias)
    return a.new_empty([*a.shape[:-1], out_features], dtype=out_dtype or torch.float16)


def _register_linear(name: str) -> None:
    arguments = [argument.name for argument in getattr(ops, name).default._schema.arguments]

    def fake(x: Tensor, *others: Any) -> Tensor:  # noqa: ANN401
        given = dict(zip(arguments[1:], others, strict=False))  # but for defaults
        _on_one_device(x, **{name: value for name, value in given.items() if isinstance(value, Tensor)})
        n = given["out_features"] if "out_features" in given else given["weight"].shape[0]
        return x.new_empty([*x.shape[:-1], n])

    torch.library.register_fake(f"xpu_fp4::{name}", fake)


# Each mode and form of a weight has one: all take x first and give [..., N] of its dtype.
for _name in ("mxfp4_linear", "mxfp4_linear_w4a8", "mxfp4_linear_w4a16"):
    for _form in ("", "_prepacked", "_expanded"):
        if hasattr(ops, _name + _form):
            _register_linear(_name + _form)


def _fake_experts(x: Tensor, *others: Any) -> Tensor:  # noqa: ANN401
    for tensor in others:
        if isinstance(tensor, Tensor):
            _on_one_device(x, **{"an argument": tensor})
    return x.new_empty(x.shape)


for _name in ("mxfp4_experts", "mxfp4_experts_prepacked"):
    if hasattr(ops, _name):
        torch.library.register_fake(f"xpu_fp4::{_name}", _fake_experts)
