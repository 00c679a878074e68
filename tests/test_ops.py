# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, tracing, strides."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from torch import Tensor

FP4_GEMM_NAMES = ("A", "B", "A_scale", "B_scale", "out_dtype", "bias_")
SAMPLES: list[tuple[Any, Callable[[], dict[str, Any]]]] = [
    (own.mxfp4_quantize.default, lambda: {"x": torch.randn(3, M, K, dtype=torch.bfloat16)}),
    (own.mxfp4_quantize.default, lambda: {"x": torch.randn(0, K), "scale_mode": "floor"}),
    (own.mxfp4_dequantize.default, lambda: {"q": codes(M, K // 2), "scale": scales(M, K // 32), "dtype": torch.float16}),
    (own.mxint8_quantize.default, lambda: {"x": torch.randn(3, M, K, dtype=torch.bfloat16)}),
    (own.mxint8_quantize.default, lambda: {"x": torch.randn(0, K), "group": 32}),
    (own.mxint8_dequantize.default, mxint8_arguments),
    (own.mxint8_dequantize.default, lambda: {"q": int8(2, M, K), "scale": scales(2, M, K // 32), "dtype": torch.float16}),
    (own.mxfp4_gemm.default, gemm_arguments),
    (own.mxfp4_gemm.default, w4a8_gemm_arguments),
    (own.mxfp4_gemm.default, lambda: w4a8_gemm_arguments() | {"a": int8(K), "a_scale": scales(K // 32), "out_dtype": None}),
    (own.mxfp4_gemm.default, lambda: gemm_arguments() | {"out_dtype": None, "bias": None}),
    (own.mxfp4_linear.default, linear_arguments),
    (own.mxfp4_linear.default, lambda: linear_arguments() | {"x": torch.randn(2, 3, K).half(), "bias": None}),
    (own.mxfp4_linear_w4a8.default, linear_arguments),
    (own.mxfp4_linear_w4a8.default, lambda: linear_arguments() | {"x": torch.randn(2, 3, K).half(), "bias": None, "group": 32}),
    (own.mxfp4_linear_w4a8_prepacked.default, prepacked_arguments),
    (own.mxfp4_linear_w4a8_prepacked.default, lambda: prepacked_arguments() | {"bias": torch.randn(N), "group": 32}),
    (own.mxfp4_linear_w4a16.default, linear_arguments),
    *((op.default, lambda arguments=arguments: arguments() | transform_arguments()) for op, arguments in TRANSFORMING),
    (torch.ops._xpu_C.fp4_gemm.default, lambda: dict(zip(FP4_GEMM_NAMES, gemm_arguments().values(), strict=True))),
    (torch.ops._xpu_C.fp4_gemm.default, lambda: dict(zip(FP4_GEMM_NAMES, w4a8_gemm_arguments().values(), strict=True))),
    (torch.ops._C.per_token_group_quant_mxfp4.default, group_quant_arguments),
]


def compares_float4() -> bool:
    codes = torch.zeros(2, dtype=torch.uint8).view(FP4)
    try:
        torch.testing.assert_close(codes, codes)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(("op", "arguments"), SAMPLES, ids=lambda value: str(value) if not callable(value) else None)
def test_op_passes_opcheck(op: Any, arguments: Callable[[], dict[str, Any]]) -> None:  # noqa: ANN401
    if op == own.mxfp4_quantize.default and not compares_float4():
        pytest.skip(f"opcheck of torch {torch.__version__} cannot compare float4_e2m1fn_x2")
    torch.library.opcheck(op, (), arguments())


@pytest.mark.parametrize("op", sorted({op for op, _ in SAMPLES}, key=str), ids=str)
def test_operands_keep_their_strides(op: Any) -> None:  # noqa: ANN401
    """Without such a tag, torch's compiler may copy what it passes to an op into another order."""
    exact = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    assert exact in op.tags


class Block(torch.nn.Module):
    """Everything that a model traces through: a linear of each mode, quantize, dequantize and gemms on views."""

    def __init__(self) -> None:
        super().__init__()
        self.up = xpu_fp4.MXFP4Linear.from_linear(torch.nn.Linear(K, N))
        self.gate = xpu_fp4.MXFP4Linear.from_linear(torch.nn.Linear(K, N), mode="w4a8")
        self.down = xpu_fp4.MXFP4Linear.from_linear(torch.nn.Linear(N * 2, K, bias=False), mode="w4a16")

    def forward(self, x: Tensor) -> Tensor:
        h = (torch.nn.functional.silu(self.gate(x)) * self.up(x)).repeat(1, 2)
        h = self.down(h)
        q, scale = xpu_fp4.quantize(h)
        w, w_scale = self.up.weight_packed, self.up.weight_scale
        transposed = w_scale.t().contiguous()  # as bytes: torch's compiler cannot copy float8_e8m0fnu
        y: Tensor = own.mxfp4_gemm(q, w.view(FP4).t(), scale, transposed, torch.float32)
        q8, scale8 = xpu_fp4.mxint8_quantize(h, 32)
        y8: Tensor = own.mxfp4_gemm(q8, w.t(), scale8, transposed, torch.float32)
        linear = xpu_fp4.linear(h, w, w_scale, mode="w4a8", group=32, hadamard=32, input_offset=h[0].float())
        return y + y8 + linear + xpu_fp4.dequantize(q, scale).sum() + xpu_fp4.mxint8_dequantize(q8, scale8).sum()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_full_graph_compiles_and_gives_the_eager_bits(compiler: str) -> None:
    if compiler == "inductor" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("torch's inductor needs Python's headers (Debian: python3-dev)")
    module = Block()
    compiled = torch.compile(module, backend=compiler, fullgraph=True, dynamic=True)
    for rows in (1, 3, 8):
        x = torch.randn(rows, K)
        assert torch.equal(compiled(x), module(x))


def test_export_keeps_the_ops_and_a_dynamic_batch() -> None:
    module = Block()
    exported = torch.export.export(module, (torch.randn(4, K),), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    names = ("linear", "linear_w4a8", "linear_w4a16", "gemm")
    assert {"xpu_fp4.mxint8_quantize.default", *[f"xpu_fp4.mxfp4_{name}.default" for name in names]} <= called
    x = torch.randn(7, K)
    assert torch.equal(exported.module()(x), module(x))


@pytest.mark.parametrize("name", ["mxfp4_linear", "mxfp4_linear_w4a8", "mxfp4_linear_w4a16"])
def test_backward_through_a_linear_is_an_error(name: str) -> None:
    """The ops have no derivative, and a silent zero would be worse than none."""
    given = linear_arguments() | {"x": torch.randn(M, K, requires_grad=True)}
    with pytest.raises(RuntimeError, match=f"derivative for xpu_fp4::{name} is not implemented"):
        getattr(own, name)(**given).sum().backward()


def test_backward_through_what_was_quantized_is_an_error() -> None:
    # The codes are integers, which have no gradient; the scales would have one.
    q, scale = xpu_fp4.mxint8_quantize(torch.randn(M, K, requires_grad=True))
    assert not q.requires_grad
    assert not xpu_fp4.mxint8_dequantize(q, scale.detach()).requires_grad
    y = own.mxfp4_gemm(**w4a8_gemm_arguments() | {"bias": torch.randn(N, requires_grad=True)})
    with pytest.raises(RuntimeError, match="derivative for xpu_fp4::mxfp4_gemm is not implemented"):
        y.sum().backward()


@pytest.mark.parametrize(("op", "arguments"), SAMPLES, ids=lambda value: str(value) if not callable(value) else None)
def test_meta_tensors_have_the_shapes_and_dtypes_of_results(op: Any, arguments: Callable[[], dict[str, Any]]) -> None:  # noqa: ANN401
    given = arguments()
    on_meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    results, expected = op(**on_meta), op(**given)
    if expected is None:
        return
    pairs = zip(results, expected, strict=True) if isinstance(expected, tuple) else [(results, expected)]
    for meta, real in pairs:
        assert meta.is_meta
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_backward_through_the_compatibility_op_is_an_error() -> None:
    given = dict(zip(FP4_GEMM_NAMES, gemm_arguments().values(), strict=True)) | {"bias_": torch.randn(N, requires_grad=True)}
    with pytest.raises(RuntimeError, match="derivative for _xpu_C::fp4_gemm is not implemented"):
        torch.ops._xpu_C.fp4_gemm(**given).sum().backward()


def test_outputs_that_share_memory_are_refused() -> None:
    x = torch.zeros(4, 64)
    memory = x.view(torch.uint8).view(-1)
    q, scale = torch.empty(4, 32, dtype=torch.uint8), torch.empty(4, 2)
    op = torch.ops._C.per_token_group_quant_mxfp4
    with pytest.raises(RuntimeError, match="output_q shares memory with input"):
        op(x, memory[-128:].view(4, 32), scale, 32, 1e-10)
    with pytest.raises(RuntimeError, match="output_s shares memory with input"):
        op(x, q, x[:, :2], 32, 1e-10)
    with pytest.raises(RuntimeError, match="output_s shares memory with output_q"):
        op(x, q, q.view(-1)[96:].view(torch.float32).view(4, 2), 32, 1e-10)


def test_scales_may_have_a_stride_between_rows_or_columns() -> None:
    x = torch.randn(5, 64)
    q, plain = torch.empty(5, 32, dtype=torch.uint8), torch.empty(5, 2)
    torch.ops._C.per_token_group_quant_mxfp4(x, q, plain, 32, 1e-10)
    for strides in ((1, 8), (4, 1)):
        padded = torch.empty_strided((5, 2), strides)
        torch.ops._C.per_token_group_quant_mxfp4(x, q, padded, 32, 1e-10)
        assert torch.equal(padded, plain)
