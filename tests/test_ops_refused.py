# SPDX-License-Identifier: Apache-2.0
"""The error of every argument of the ops: it names op and argument, what was given and what is expected."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import xpu_fp4
from op_arguments import (
    FP4,
    TRANSFORMING,
    K,
    M,
    N,
    codes,
    dequantize_arguments,
    gemm_arguments,
    group_quant_arguments,
    int8,
    linear_arguments,
    mxint8_arguments,
    own,
    prepacked_arguments,
    scales,
    transform_arguments,
    w4a8_gemm_arguments,
)


def swap(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:  # noqa: ANN401
    return lambda arguments: arguments | changes


Change = Callable[[dict[str, Any]], dict[str, Any]]
ERRORS: list[tuple[Any, Callable[[], dict[str, Any]], Change, str]] = [
    # quantize
    (
        own.mxfp4_quantize,
        lambda: {"x": torch.ones(K)},
        swap(x=torch.ones(M, K).int()),
        "mxfp4_quantize: x must be float32, float16 or bfloat16, got Int",
    ),
    (
        own.mxfp4_quantize,
        lambda: {"x": torch.ones(K)},
        swap(x=torch.ones(M, 40)),
        "mxfp4_quantize: x has 40 elements in its last dimension, expected a multiple of 32",
    ),
    (
        own.mxfp4_quantize,
        lambda: {"x": torch.ones(K)},
        swap(x=torch.tensor(1.0)),
        "mxfp4_quantize: x must have at least 1 dimension",
    ),
    (
        own.mxfp4_quantize,
        lambda: {"x": torch.ones(K)},
        swap(scale_mode="nearest"),
        'mxfp4_quantize: scale_mode is "nearest", expected "floor", "ceil", "even", "rceil", "abs_max" or "quest"',
    ),
    # dequantize
    (
        own.mxfp4_dequantize,
        dequantize_arguments,
        swap(q=torch.ones(M, 16)),
        "mxfp4_dequantize: q must be float4_e2m1fn_x2 or uint8, got Float",
    ),
    (
        own.mxfp4_dequantize,
        dequantize_arguments,
        swap(q=codes(M, 8)),
        "mxfp4_dequantize: q has 16 elements in its last dimension",
    ),
    (
        own.mxfp4_dequantize,
        dequantize_arguments,
        swap(scale=scales(M, 2)),
        r"mxfp4_dequantize: scale has shape \[5, 2\], expected \[5, 1\]",
    ),
    (
        own.mxfp4_dequantize,
        dequantize_arguments,
        swap(scale=torch.ones(M, 1)),
        "mxfp4_dequantize: scale must be float8_e8m0fnu or uint8, got Float",
    ),
    (
        own.mxfp4_dequantize,
        dequantize_arguments,
        swap(dtype=torch.float64),
        "mxfp4_dequantize: dtype must be float32, float16 or bfloat16, got Double",
    ),
    # MXINT8 quantize and dequantize
    *[
        (own.mxint8_quantize, lambda: {"x": torch.ones(K)}, change, f"mxint8_quantize: {message}")
        for change, message in (
            (swap(x=torch.ones(M, K).int()), "x must be float32, float16 or bfloat16, got Int"),
            (swap(x=torch.ones(M, 40)), "x has 40 elements in its last dimension, expected a multiple of 32"),
            (swap(x=torch.tensor(1.0)), "x must have at least 1 dimension"),
            (swap(group=64), "group is 64, expected 32 or 128"),
            (swap(group=0), "group is 0, expected 32 or 128"),
            (swap(group=-32), "group is -32, expected 32 or 128"),
        )
    ],
    *[
        (own.mxint8_dequantize, mxint8_arguments, change, f"mxint8_dequantize: {message}")
        for change, message in (
            (swap(q=codes(M, K)), "q must be int8, got Byte"),
            (swap(q=codes(M, K).view(FP4)), "q must be int8, got Float4_e2m1fn_x2"),
            (swap(q=torch.ones(M, K)), "q must be int8, got Float"),
            (swap(q=int8(M, 40)), "q has 40 elements in its last dimension, expected a multiple of 32"),
            (swap(q=torch.tensor(1, dtype=torch.int8)), "q must have at least 1 dimension"),
            (swap(scale=scales(M, 2)), r"scale has shape \[5, 2\], expected \[5, 3\]"),
            (swap(scale=torch.ones(M, 3)), "scale must be float8_e8m0fnu or uint8, got Float"),
            (swap(dtype=torch.float64), "dtype must be float32, float16 or bfloat16, got Double"),
        )
    ],
    # gemm of MXINT8 codes
    *[
        (own.mxfp4_gemm, w4a8_gemm_arguments, change, f"mxfp4_gemm: {message}")
        for change, message in (
            (swap(a=int8(M, K // 2)), r"a has 48 elements in its last dimension, expected a multiple of 32"),
            (swap(a=int8(M, 64)), r"b has shape \[48, 48\], expected \[K/2, N\] with K/2 = 32"),
            (swap(a=codes(M, K)), r"b has shape \[48, 48\], expected \[K/2, N\] with K/2 = 96"),  # int8 codes as bytes
            (swap(a=int8(M, K).short()), r"a must be float4_e2m1fn_x2 or uint8 \(MXFP4\) or int8 \(MXINT8\), got Short"),
            (swap(a=torch.tensor(3, dtype=torch.int8)), "a must have at least 1 dimension"),
            (swap(b=int8(N, K // 2).t()), "b must be float4_e2m1fn_x2 or uint8, got Char"),
            (swap(a_scale=scales(M, 1)), r"a_scale has shape \[5, 1\], expected \[5, 3\]"),  # one for a group of 128
        )
    ],
    # gemm
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(a=torch.ones(M, K // 2)),
        r"mxfp4_gemm: a must be float4_e2m1fn_x2 or uint8 \(MXFP4\) or int8 \(MXINT8\), got Float",
    ),
    (own.mxfp4_gemm, gemm_arguments, swap(a=codes(M, 24)), "mxfp4_gemm: a has 48 elements in its last dimension"),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(a=torch.tensor(3, dtype=torch.uint8)),
        "mxfp4_gemm: a must have at least 1 dimension",
    ),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(b=torch.ones(K // 2, N)),
        "mxfp4_gemm: b must be float4_e2m1fn_x2 or uint8, got Float",
    ),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(b=codes(N, K // 2 + 16).t()),
        r"mxfp4_gemm: b has shape \[64, 48\], expected \[K/2, N\] with K/2 = 48",
    ),
    (own.mxfp4_gemm, gemm_arguments, swap(b=codes(2, K // 2, N)), "mxfp4_gemm: b has shape .*expected \\[K/2, N\\]"),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(b=codes(K // 2, N)),
        r"mxfp4_gemm: b must be the .t\(\) view of a contiguous \[N, K/2\], got shape \[48, 48\] with strides \[48, 1\]",
    ),
    (own.mxfp4_gemm, gemm_arguments, swap(a_scale=scales(M, 4)), r"mxfp4_gemm: a_scale has shape \[5, 4\], expected \[5, 3\]"),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(a_scale=torch.ones(M, 3)),
        "mxfp4_gemm: a_scale must be float8_e8m0fnu or uint8, got Float",
    ),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(b_scale=scales(N, K // 32)),
        r"mxfp4_gemm: b_scale has shape \[48, 3\], expected \[3, 48\]",
    ),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(b_scale=scales(N, K // 32).t()),
        "mxfp4_gemm: b_scale must be contiguous, got shape .* with strides",
    ),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(b_scale=torch.ones(3, N)),
        "mxfp4_gemm: b_scale must be float8_e8m0fnu or uint8, got Float",
    ),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(out_dtype=torch.int8),
        "mxfp4_gemm: out_dtype must be float32, float16 or bfloat16, got Char",
    ),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(bias=torch.ones(N + 1)),
        r"mxfp4_gemm: bias has shape \[49\], expected a scalar, \[N\], \[M, 1\] or \[M, N\] with \[M, N\] = \[5, 48\]",
    ),
    (own.mxfp4_gemm, gemm_arguments, swap(bias=torch.ones(1, M, N)), "mxfp4_gemm: bias has shape"),
    (
        own.mxfp4_gemm,
        gemm_arguments,
        swap(bias=torch.ones(N).long()),
        "mxfp4_gemm: bias must be float32, float16 or bfloat16, got Long",
    ),
    # linear, of each mode
    *[
        (getattr(own, name), linear_arguments, change, f"{name}: {message}")
        for name in ("mxfp4_linear", "mxfp4_linear_w4a8", "mxfp4_linear_w4a16")
        for change, message in (
            (swap(x=torch.ones(M, K).double()), "x must be float32, float16 or bfloat16, got Double"),
            (swap(x=torch.ones(M, 33)), "x has 33 elements in its last dimension, expected a multiple of 32"),
            (swap(x=torch.tensor(1.0)), "x must have at least 1 dimension"),
            (swap(x=torch.ones(M, 64)), r"weight has shape \[48, 48\], expected \[48, 32\]"),
            (swap(weight=codes(K // 2)), r"weight must be \[N, K/2\], got shape \[48\]"),
            (swap(weight=codes(K // 2, N).t()), r"weight must be contiguous, got shape \[48, 48\] with strides \[1, 48\]"),
            (swap(weight=torch.ones(N, K // 2)), "weight must be float4_e2m1fn_x2 or uint8, got Float"),
            (swap(weight=int8(N, K // 2)), "weight must be float4_e2m1fn_x2 or uint8, got Char"),
            (swap(weight_scale=scales(K // 32, N)), r"weight_scale has shape \[3, 48\], expected \[48, 3\]"),
            (swap(weight_scale=scales(K // 32, N).t()), "weight_scale must be contiguous"),
            (swap(weight_scale=torch.ones(N, 3)), "weight_scale must be float8_e8m0fnu or uint8, got Float"),
            (swap(bias=torch.ones(N, 1)), r"bias has shape \[48, 1\], expected \[48\]"),
            (swap(bias=torch.ones(N).int()), "bias must be float32, float16 or bfloat16, got Int"),
        )
    ],
    (own.mxfp4_linear, linear_arguments, swap(scale_mode=""), 'mxfp4_linear: scale_mode is ""'),
    (own.mxfp4_linear_w4a8, linear_arguments, swap(group=64), "mxfp4_linear_w4a8: group is 64, expected 32 or 128"),
    # what comes before a quantizer
    *[
        (op, arguments, change, f"{op._qualified_op_name.rpartition('::')[2]}: {message}")
        for op, arguments in TRANSFORMING
        for change, message in (
            (swap(hadamard=16), r"hadamard is 16, expected 0 \(none\), 32, 64 or 128"),
            (swap(hadamard=-32), "hadamard is -32, expected 0"),
            (swap(hadamard=2**40), "hadamard is 1099511627776, expected 0"),
            (swap(hadamard=64), "x has 96 elements in its last dimension, expected a multiple of hadamard, 64"),
            (swap(input_offset=torch.ones(K).half()), "input_offset must be float32, got Half"),
            (swap(input_offset=torch.ones(K + 1)), r"input_offset has shape \[97\], expected \[96\]"),
            (swap(input_offset=torch.ones(1, K)), r"input_offset has shape \[1, 96\], expected \[96\]"),
        )
    ],
    # a prepacked weight, in W4A8
    *[
        (own.mxfp4_linear_w4a8_prepacked, prepacked_arguments, change, f"mxfp4_linear_w4a8_prepacked: {message}")
        for change, message in (
            (swap(group=16), "group is 16, expected 32 or 128"),
            (swap(x=int8(M, K)), "x must be float32, float16 or bfloat16, got Char"),
            (swap(x=torch.ones(M, 256)), "weight has shape"),
            (swap(out_features=N + 16), "weight has shape"),
            (swap(out_features=-1), "out_features is -1, expected 0 or more"),
            (swap(weight=codes(N, K // 2)), "weight has shape"),
            (swap(bias=torch.ones(N, 1)), r"bias has shape \[48, 1\], expected \[48\]"),
        )
    ],
    # the compatibility quantizer
    *[
        (torch.ops._C.per_token_group_quant_mxfp4, group_quant_arguments, change, f"per_token_group_quant_mxfp4: {message}")
        for change, message in (
            (swap(input=torch.ones(M, K).int()), "input must be float32, float16 or bfloat16, got Int"),
            (swap(input=torch.ones(K, M).t()), "input must be contiguous"),
            (swap(input=torch.ones(M, 40)), "input has 40 elements"),
            (swap(output_q=codes(M, K)), r"output_q has shape \[5, 96\], expected \[5, 48\]"),
            (swap(output_q=torch.ones(M, K // 2)), "output_q must be uint8, got Float"),
            (swap(output_q=codes(K // 2, M).t()), "output_q must be contiguous"),
            (swap(output_s=torch.ones(M, 4)), r"output_s has shape \[5, 4\], expected \[5, 3\]"),
            (swap(output_s=torch.ones(M, 3).half()), "output_s must be float32, got Half"),
            (
                swap(output_s=torch.ones(M, 6)[:, ::2]),
                "output_s must be contiguous or, with two dimensions, row-major or column-major",
            ),
            (swap(group_size=64), "group_size is 64, expected 32"),
            (swap(eps=0.0), "eps is 0, expected a positive finite number"),
            (swap(eps=float("nan")), "eps is nan"),
            (swap(eps=float("inf")), "eps is inf"),
            (swap(input=torch._neg_view(torch.ones(M, K))), "input is a lazily negated view"),
            (swap(output_s=torch._neg_view(torch.ones(M, 3))), "output_s is a lazily negated view"),
        )
    ],
]


@pytest.mark.parametrize(("op", "arguments", "change", "message"), ERRORS, ids=lambda v: v if isinstance(v, str) else None)
def test_bad_argument_is_named(op: Any, arguments: Callable[[], dict[str, Any]], change: Change, message: str) -> None:  # noqa: ANN401
    op(**arguments())  # the unchanged arguments are good ones
    with pytest.raises(RuntimeError, match=message):
        op(**change(arguments()))


@pytest.mark.parametrize("name", ["a", "b", "a_scale", "b_scale", "bias"])
def test_sparse_tensors_are_refused(name: str) -> None:
    arguments = gemm_arguments()
    arguments[name] = torch.ones(4, 4).to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)):
        own.mxfp4_gemm(**arguments)


@pytest.mark.parametrize("name", ["mxfp4_linear", "mxfp4_linear_w4a8", "mxfp4_linear_w4a16"])
@pytest.mark.parametrize("argument", ["weight", "weight_scale", "bias", "input_offset"])
def test_tensors_on_two_devices_are_refused(name: str, argument: str) -> None:
    arguments = linear_arguments() | transform_arguments()
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(RuntimeError, match=f"{argument} is on meta, expected cpu"):
        getattr(own, name)(**arguments)


def test_where_a_weight_cannot_be_expanded_w4a8_says_so() -> None:
    given = linear_arguments() | {"expanded": codes(1, 64)}
    with (
        xpu_fp4.cpu_backend("native"),
        pytest.raises(RuntimeError, match="mxfp4_linear_w4a8_expanded: weight cannot be expanded"),
    ):
        own.mxfp4_linear_w4a8_expanded(**given)


def test_an_unknown_mode_is_named() -> None:
    given, mode = linear_arguments(), cast(xpu_fp4.Mode, "w8a8")
    message = 'mode is \'w8a8\', expected "w4a4" or "w4a8" or "w4a16"'
    with pytest.raises(ValueError, match=message):
        xpu_fp4.linear(given["x"], given["weight"], given["weight_scale"], mode=mode)
    with pytest.raises(ValueError, match=message):
        xpu_fp4.linear_prepacked(given["x"], codes(3, 8), N, mode=mode)
