# SPDX-License-Identifier: Apache-2.0
"""Good arguments of every op, for the tests of ops: random codes, scales and floats of small shapes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

own = torch.ops.xpu_fp4
FP4 = torch.float4_e2m1fn_x2
M, N, K = 5, 48, 96


def codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scales(*shape: int) -> Tensor:
    return torch.randint(120, 135, shape, dtype=torch.uint8)


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def dequantize_arguments() -> dict[str, Any]:
    return {"q": codes(M, 16), "scale": scales(M, 1), "dtype": torch.float32}


def mxint8_arguments() -> dict[str, Any]:
    return {"q": int8(M, K), "scale": scales(M, K // 32), "dtype": torch.float32}


def gemm_arguments() -> dict[str, Any]:
    return {
        # Bytes will do: opcheck computes with arguments, and torch has no arithmetic on float4_e2m1fn_x2 and float8_e8m0fnu.
        "a": codes(M, K // 2),
        "b": codes(N, K // 2).t(),
        "a_scale": scales(M, K // 32),
        "b_scale": scales(K // 32, N),
        "out_dtype": torch.bfloat16,
        "bias": torch.randn(N),
    }


def linear_arguments() -> dict[str, Any]:
    return {"x": torch.randn(M, K), "weight": codes(N, K // 2), "weight_scale": scales(N, K // 32), "bias": torch.randn(N)}


def w4a8_gemm_arguments() -> dict[str, Any]:
    return gemm_arguments() | {"a": int8(M, K)}


def prepacked_arguments() -> dict[str, Any]:
    return {"x": torch.randn(M, K), "weight": own.mxfp4_prepack(codes(N, K // 2), scales(N, K // 32)), "out_features": N}


def group_quant_arguments() -> dict[str, Any]:
    return {
        "input": torch.randn(M, K),
        "output_q": torch.empty(M, K // 2, dtype=torch.uint8),
        "output_s": torch.empty(M, K // 32),
        "group_size": 32,
        "eps": 1e-10,
    }


def transform_arguments() -> dict[str, Any]:
    return {"hadamard": 32, "input_offset": torch.randn(K)}


def x_alone() -> dict[str, Any]:
    return {"x": torch.randn(M, K)}


TRANSFORMING: list[tuple[Any, Callable[[], dict[str, Any]]]] = [
    *((op, x_alone) for op in (own.mxfp4_quantize, own.mxint8_quantize)),
    *((op, linear_arguments) for op in (own.mxfp4_linear, own.mxfp4_linear_w4a8, own.mxfp4_linear_w4a16)),
    *(
        (op, prepacked_arguments)
        for op in (own.mxfp4_linear_prepacked, own.mxfp4_linear_w4a8_prepacked, own.mxfp4_linear_w4a16_prepacked)
    ),
]
