# SPDX-License-Identifier: Apache-2.0
"""Tensors without the memory that they are said to have: a RuntimeError with op and argument, and no signal."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xpu_fp4
from torch import Tensor
from xpu_fp4.functional import Mode

O = torch.ops.xpu_fp4  # noqa: E741
M, N, K = 3, 64, 256


def operands(op: str) -> dict[str, Any]:
    """Good arguments of every op, by name; tensors of memory of their own."""
    x = torch.randn(M, K)
    codes, scale = (t.view(torch.uint8) for t in xpu_fp4.quantize(torch.randn(N, K)))
    a, a_scale = (t.view(torch.uint8) for t in xpu_fp4.quantize(x))
    integers, integer_scale = (t.view(dtype) for t, dtype in zip(O.mxint8_quantize(x), (torch.int8, torch.uint8), strict=True))
    strips = xpu_fp4.prepack(codes, scale)
    stored = {"x": x, "weight": codes, "weight_scale": scale, "bias": torch.randn(N)}
    prepacked = {"x": x, "weight": strips, "out_features": N, "bias": torch.randn(N)}
    layer = {
        "x": x,
        "topk_ids": torch.zeros(M, 2, dtype=torch.int32),
        "topk_weights": torch.rand(M, 2),
        "w13_bias": torch.randn(2, N),
        "w2_bias": torch.randn(2, K),
    }
    w13, w13_scale = codes.expand(2, -1, -1).clone(), scale.expand(2, -1, -1).clone()  # [E, 2I, H/2], I is N / 2
    w2, w2_scale = (t.view(torch.uint8).expand(2, -1, -1).clone() for t in xpu_fp4.quantize(torch.randn(K, N // 2)))
    stored_layer = {**layer, "w13": w13, "w13_scale": w13_scale, "w2": w2, "w2_scale": w2_scale}
    prepacked_layer = {
        **layer,
        "w13": xpu_fp4.prepack_experts(w13, w13_scale),
        "w2": xpu_fp4.prepack_experts(w2, w2_scale),
        "intermediate_size": N // 2,
    }
    arguments: dict[str, dict[str, Any]] = {
        "mxfp4_quantize": {"x": x},
        "mxint8_quantize": {"x": x},
        "mxfp4_dequantize": {"q": a, "scale": a_scale, "dtype": torch.float32},
        "mxint8_dequantize": {"q": integers, "scale": integer_scale, "dtype": torch.float32},
        "mxfp4_gemm": {"a": a, "b": codes.t(), "a_scale": a_scale, "b_scale": scale.t().contiguous(), "bias": torch.randn(N)},
        "mxfp4_linear": stored,
        "mxfp4_linear_w4a8": stored,
        "mxfp4_linear_w4a16": stored,
        "mxfp4_prepack": {"weight": codes, "weight_scale": scale},
        "mxfp4_unprepack": {"prepacked": strips, "out_features": N, "in_features": K},
        "mxfp4_gemm_prepacked": {"a": a, "a_scale": a_scale, "b": strips, "out_features": N, "bias": torch.randn(N)},
        "mxfp4_linear_prepacked": prepacked,
        "mxfp4_linear_w4a8_prepacked": prepacked,
        "mxfp4_linear_w4a16_prepacked": prepacked,
        "mxfp4_experts": stored_layer,
        "mxfp4_experts_prepacked": prepacked_layer,
    }
    return arguments[op]


OPS = [
    *("mxfp4_quantize", "mxint8_quantize", "mxfp4_dequantize", "mxint8_dequantize", "mxfp4_gemm"),
    *("mxfp4_linear", "mxfp4_linear_w4a8", "mxfp4_linear_w4a16", "mxfp4_prepack", "mxfp4_unprepack"),
    *("mxfp4_gemm_prepacked", "mxfp4_linear_prepacked", "mxfp4_linear_w4a8_prepacked", "mxfp4_linear_w4a16_prepacked"),
    *("mxfp4_experts", "mxfp4_experts_prepacked"),
]


def shrink(tensor: Tensor, size: int) -> Tensor:
    tensor.untyped_storage().resize_(size)
    return tensor


def without_last_byte(tensor: Tensor) -> Tensor:
    storage = tensor.untyped_storage()
    return shrink(tensor, storage.nbytes() - 1)


def behind_an_offset(tensor: Tensor) -> Tensor:
    """A view whose last element alone is missing."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    view = memory.as_strided(tensor.shape, tensor.stride(), 1)
    return without_last_byte(view)


DAMAGES: dict[str, Callable[[Tensor], Any]] = {
    "freed": lambda t: shrink(t, 0),
    "one byte short": without_last_byte,
    "one byte short behind an offset": behind_an_offset,
    "None": lambda t: None,
    "sparse": lambda t: t.float().to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
}
MESSAGES = {"None": "is None", "sparse": "layout", "nested": "nested"}


def tensors_of(op: str) -> Iterator[str]:
    return (name for name, value in operands(op).items() if isinstance(value, Tensor))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_argument_without_memory_is_named(op: str, damage: str) -> None:
    for name in tensors_of(op):
        if name.endswith("bias") and damage == "None":
            continue
        arguments = operands(op)
        arguments[name] = DAMAGES[damage](arguments[name])
        with pytest.raises(RuntimeError) as raised:
            getattr(O, op)(**arguments)
        assert str(raised.value).startswith(f"{op}: {name} "), name
        assert MESSAGES.get(damage, "freed or shrunk") in str(raised.value)


def test_every_op_is_among_them() -> None:
    # The expanded form is of SYCL's kernels for GPUs; its ops go the same way (table.h).
    expanded = {"mxfp4_expand", "mxfp4_linear_expanded", "mxfp4_linear_w4a8_expanded"}
    names = {
        name.removeprefix("xpu_fp4::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("xpu_fp4::mx")
    }
    assert names - expanded == set(OPS)


def test_functional_wrappers_give_a_result_or_a_named_error() -> None:
    x = torch._to_functional_tensor(torch.randn(M, K))
    try:
        q, _ = O.mxfp4_quantize(x)
        assert q.shape == (M, K // 2)
    except RuntimeError as error:
        assert "mxfp4_quantize: x" in str(error)  # noqa: PT017


def test_views_at_the_end_of_their_memory_pass() -> None:
    x = torch.randn(M * K + 1)[1:].view(M, K)
    expected = O.mxfp4_quantize(x.clone())
    assert all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(O.mxfp4_quantize(x), expected, strict=True)
    )


def test_the_group_quantizer_names_what_it_would_write_to() -> None:
    op = torch.ops._C.per_token_group_quant_mxfp4
    out, scale = torch.zeros(M, K // 2, dtype=torch.uint8), torch.zeros(M, K // 32)
    shrink(out, 4)
    with pytest.raises(RuntimeError, match=r"per_token_group_quant_mxfp4: output_q has shape .* freed or shrunk"):
        op(torch.randn(M, K), out, scale, 32, 1e-10)


# ---- work for nothing ----

MANY = 2**62
NOTHING = {
    "linear": "O.mxfp4_linear(torch.empty(MANY, 0), e(0, 0), e(0, 0)).shape[0]",
    "w4a8": "O.mxfp4_linear_w4a8(torch.empty(MANY, 0), e(0, 0), e(0, 0)).shape[0]",
    "w4a16": "O.mxfp4_linear_w4a16(torch.empty(MANY, 0), e(0, 0), e(0, 0)).shape[0]",
    "gemm": "O.mxfp4_gemm(e(MANY, 0), e(0, 0).t(), e(MANY, 0), e(0, 0)).shape[0]",
    "prepacked": "O.mxfp4_linear_prepacked(torch.empty(MANY, 0), e(0, 0), 0).shape[0]",
    "quantize": "O.mxfp4_quantize(torch.empty(MANY, 0))[0].shape[0]",
    "quantize to integers": "O.mxint8_quantize(torch.empty(MANY, 0))[0].shape[0]",
    "dequantize": "O.mxfp4_dequantize(e(MANY, 0), e(MANY, 0), torch.float32).shape[0]",
    "prepack": "O.mxfp4_prepack(e(MANY, 0), e(MANY, 0)).shape[0] * 16",
    "unprepack": "O.mxfp4_unprepack(e(MANY // 16, 0), MANY, 0)[0].shape[0]",
}


def test_products_of_nothing_return_at_once() -> None:
    lines = "\n".join(f"assert {code} == MANY, {case!r}" for case, code in NOTHING.items())
    program = f"import torch, xpu_fp4\nO, MANY = torch.ops.xpu_fp4, {MANY}\n"
    program += f"def e(*s): return torch.empty(*s, dtype=torch.uint8)\n{lines}\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("backend", "mode"),
    [("native", "w4a4"), ("native", "w4a8"), ("native", "w4a16"), ("sycl", "w4a4"), ("sycl", "w4a8"), ("sycl", "w4a16")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_k_the_bias_is_the_result(backend: str, mode: Mode, dtype: torch.dtype) -> None:
    bias = torch.tensor([1.0, -0.0, 0.1, float("inf"), 1e-30])
    nothing = torch.empty(5, 0, dtype=torch.uint8)
    with xpu_fp4.cpu_backend(backend):
        y = xpu_fp4.linear(torch.empty(2, 0, dtype=dtype), nothing, nothing, bias, mode=mode)
    assert y.dtype == dtype
    assert torch.equal(y, bias.to(dtype).expand(2, 5))


# ---- autocast ----


@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_autocast_gives_what_a_linear_gives(mode: Mode) -> None:
    linear = torch.nn.Linear(K, N).requires_grad_(False)
    ours = xpu_fp4.MXFP4Linear.from_linear(linear, mode=mode)
    x = torch.randn(M, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == linear(x).dtype == torch.bfloat16
        assert torch.equal(ours(x), ours(x.bfloat16()))
    assert ours(x).dtype == torch.float32


def test_a_trace_multiplies_as_the_module_does() -> None:
    module = xpu_fp4.MXFP4Linear.from_linear(torch.nn.Linear(K, N).requires_grad_(False))
    x = torch.randn(M, K)
    traced = torch.jit.trace(module, x)  # the first forward, which prepacks where nothing traces
    assert torch.equal(traced(x), module(x))


# ---- the kernel cache ----


def quantize_by_sycl(cache: Path) -> "subprocess.CompletedProcess[str]":
    command = "import torch, xpu_fp4; xpu_fp4.quantize(torch.zeros(1, 32))"
    environment = {name: value for name, value in os.environ.items() if name != "SYCL_CACHE_DIR"}
    environment |= {"XPU_FP4_CACHE_DIR": str(cache), "XPU_FP4_CPU_BACKEND": "sycl"}
    return subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=600)


needs_sycl = pytest.mark.skipif(not xpu_fp4.backends()["sycl"].available, reason="no SYCL CPU device")


@needs_sycl
def test_the_kernel_cache_is_private_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache"
    assert quantize_by_sycl(cache).returncode == 0
    assert cache.stat().st_mode & 0o777 == 0o700
    noise = random.Random(0)
    for file in sorted(path for path in cache.rglob("*") if path.is_file()):
        file.write_bytes(noise.randbytes(file.stat().st_size))
    done = quantize_by_sycl(cache)
    # SYCL finds some damages by itself, and builds anew.
    if done.returncode != 0:
        assert "RuntimeError: xpu_fp4: SYCL cannot build quantize.cpp" in done.stderr
        assert str(cache) in done.stderr.splitlines()[-1]


@needs_sycl
def test_a_kernel_cache_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    done = quantize_by_sycl(tmp_path)
    assert done.returncode == 1
    assert f"the kernel cache {tmp_path} is not a folder of this user's that others cannot write to" in done.stderr
