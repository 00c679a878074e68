# SPDX-License-Identifier: Apache-2.0
"""csrc/torch/xpu.cpp, executed: XPU tensors through torch's dispatcher to the queue of the current stream.

The device is a stand-in over Intel's CPU device (stand_in.cpp); the binding, the ops and the kernels are the real ones.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import xpu_fp4
from torch import Tensor
from xpu_fp4 import Mode, MXFP4Linear, reference

own = torch.ops.xpu_fp4
M, N, K = 70, 40, 160
Arguments = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["bmg:large", "bmg:small", "dg2:large", "portable"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", request.param)
    return str(request.param)


@pytest.fixture
def bmg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg:large")


@pytest.fixture(autouse=True)
def _first_device(device: Any) -> Iterator[None]:  # noqa: ANN401
    device.set_current(1, 0)
    device.set_current(0, 0)
    yield
    device.open_gate()
    for index in (0, 1):
        for stream in (0, 1):
            device.synchronize(index, stream)


def layer(seed: int = 0) -> Arguments:
    """x, weight, weight_scale, bias."""
    torch.manual_seed(seed)
    weight, scale = reference.quantize(torch.randn(N, K))
    return torch.randn(M, K), weight, scale, torch.randn(N)


def moved(device: Any, tensors: tuple[Tensor, ...], index: int = 0) -> list[Tensor]:  # noqa: ANN401
    return [device.to_device(tensor, index) for tensor in tensors]


def assert_same(device: Any, y: Tensor, expected: Tensor) -> None:  # noqa: ANN401
    """Bits; waits for nothing."""
    assert torch.equal(device.to_host(y).view(torch.uint8), expected.view(torch.uint8))


def test_every_op_gives_the_cpus_bits(device: Any, variant: str) -> None:  # noqa: ANN401
    x, weight, scale, bias = layer()
    on_device = moved(device, (x, weight, scale, bias))
    q, q_scale = own.mxfp4_quantize(x)
    b_scale = scale.t().contiguous()
    gemm = (q.view(torch.uint8), weight.t(), q_scale.view(torch.uint8), b_scale)
    got = [
        *own.mxfp4_quantize(on_device[0]),
        own.mxfp4_dequantize(*on_device[1:3], torch.bfloat16),
        own.mxfp4_linear(*on_device),
        own.mxfp4_gemm(*moved(device, gemm), torch.float16, on_device[3]),
    ]
    expected = [
        q,
        q_scale,
        own.mxfp4_dequantize(weight, scale, torch.bfloat16),
        own.mxfp4_linear(x, weight, scale, bias),
        own.mxfp4_gemm(*gemm, torch.float16, bias),
    ]
    got.append(own.mxfp4_linear_w4a16(*on_device))
    with xpu_fp4.cpu_backend("sycl"):  # W4A16 has an order of its own in each backend
        expected.append(own.mxfp4_linear_w4a16(x, weight, scale, bias))
    if variant != "portable":
        expanded = own.mxfp4_expand(*on_device[1:3])
        got.append(own.mxfp4_linear_expanded(*on_device[:3], expanded, on_device[3]))
        expected.append(expected[3])
    device.synchronize(0, 0)
    for y, on_cpu in zip(got, expected, strict=True):
        assert y.device == torch.device("xpu", 0)
        assert_same(device, y, on_cpu)


def test_mxint8_and_w4a8_give_the_cpus_bits(device: Any, variant: str) -> None:  # noqa: ANN401
    x, weight, scale, bias = layer()
    on_device = moved(device, (x, weight, scale, bias))
    q, q_scale = own.mxint8_quantize(x)
    gemm = (q, weight.t(), q_scale.view(torch.uint8), scale.t().contiguous())
    got = [
        *own.mxint8_quantize(on_device[0]),
        own.mxint8_dequantize(*moved(device, (q, q_scale)), torch.float32),
        own.mxfp4_linear_w4a8(*on_device),
        own.mxfp4_gemm(*moved(device, gemm), torch.float16, on_device[3]),
    ]
    expected = [
        q,
        q_scale,
        own.mxint8_dequantize(q, q_scale, torch.float32),
        own.mxfp4_linear_w4a8(x, weight, scale, bias),
        own.mxfp4_gemm(*gemm, torch.float16, bias),
    ]
    if variant != "portable":
        expanded = own.mxfp4_expand(*on_device[1:3])
        got.append(own.mxfp4_linear_w4a8_expanded(*on_device[:3], expanded, on_device[3]))
        expected.append(expected[3])
    device.synchronize(0, 0)
    for y, on_cpu in zip(got, expected, strict=True):
        assert_same(device, y, on_cpu)


def test_transformed_inputs_give_the_cpus_bits(device: Any, variant: str) -> None:  # noqa: ANN401
    x, weight, scale, bias = layer()
    offset = torch.randn(K)
    x_there, offset_there, *weight_there = moved(device, (x, offset, weight, scale, bias))
    how = {"hadamard": 32, "input_offset": offset}
    how_there = {"hadamard": 32, "input_offset": offset_there}
    quantizers = (own.mxfp4_quantize, own.mxint8_quantize)
    linears = (own.mxfp4_linear, own.mxfp4_linear_w4a8, own.mxfp4_linear_w4a16)
    got = [y for quantize in quantizers for y in quantize(x_there, **how_there)]
    got += [linear(x_there, *weight_there, **how_there) for linear in linears]
    expected = [y for quantize in quantizers for y in quantize(x, **how)]
    expected += [linear(x, weight, scale, bias, **how) for linear in linears[:2]]
    with xpu_fp4.cpu_backend("sycl"):  # W4A16 has an order of its own in each backend
        expected.append(own.mxfp4_linear_w4a16(x, weight, scale, bias, **how))
    device.synchronize(0, 0)
    for y, on_cpu in zip(got, expected, strict=True):
        assert_same(device, y, on_cpu)


def test_vllms_names_serve_xpu_tensors(device: Any, bmg: None) -> None:  # noqa: ANN401
    x, weight, scale, _ = layer()
    q, q_scale = torch.empty(M, K // 2, dtype=torch.uint8), torch.empty(M, K // 32)
    arguments = moved(device, (x, q, q_scale))
    torch.ops._C.per_token_group_quant_mxfp4(*arguments, 32, 1e-10)
    torch.ops._C.per_token_group_quant_mxfp4(x, q, q_scale, 32, 1e-10)
    gemm = (q, weight.t(), q_scale.to(torch.float8_e8m0fnu).view(torch.uint8), scale.t().contiguous())
    y = torch.ops._xpu_C.fp4_gemm(*moved(device, gemm), torch.float16, None)
    device.synchronize(0, 0)
    assert_same(device, arguments[1], q)
    assert_same(device, arguments[2], q_scale)
    assert_same(device, y, torch.ops._xpu_C.fp4_gemm(*gemm, torch.float16, None))


def test_a_module_with_xpu_weights(device: Any, bmg: None) -> None:  # noqa: ANN401
    module, x = MXFP4Linear.from_linear(torch.nn.Linear(K, N)), torch.randn(2, 3, K)
    expected = own.mxfp4_linear(x, module.weight_packed, module.weight_scale, module.bias)
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(device.to_device(parameter.detach(), 0), requires_grad=False))
    on_device = device.to_device(x, 0)
    results = [module(on_device), module.expand_()(on_device)]
    device.synchronize(0, 0)
    assert not module.is_prepacked
    for y in results:
        assert_same(device, y, expected)


def test_an_op_returns_before_its_kernels_have_run(device: Any, variant: str) -> None:  # noqa: ANN401
    arguments = layer()
    on_device = moved(device, arguments)
    device.close_gate(0, 0)
    y = own.mxfp4_linear(*on_device)
    assert not device.is_idle(0, 0)
    device.open_gate()
    device.synchronize(0, 0)
    assert_same(device, y, own.mxfp4_linear(*arguments))


def test_calls_in_a_row_may_take_each_others_scratch_memory(device: Any, variant: str) -> None:  # noqa: ANN401
    """The allocator gives it out again while the first kernels have not begun: the queue's order is all that protects it."""
    calls = [layer(seed) for seed in range(5)]
    on_device = [moved(device, arguments) for arguments in calls]
    device.close_gate(0, 0)
    results = [own.mxfp4_linear(*arguments) for arguments in on_device]
    device.open_gate()
    device.synchronize(0, 0)
    for y, arguments in zip(results, calls, strict=True):
        assert_same(device, y, own.mxfp4_linear(*arguments))


def test_kernels_go_to_the_current_stream(device: Any, bmg: None) -> None:  # noqa: ANN401
    arguments = layer()
    on_device = moved(device, arguments)
    device.close_gate(0, 0)
    device.set_current(0, 1)
    y = own.mxfp4_linear(*on_device)
    device.synchronize(0, 1)  # stream 0 is still held up
    assert_same(device, y, own.mxfp4_linear(*arguments))
    assert not device.is_idle(0, 0)


def test_the_tensors_device_is_the_one_that_computes(device: Any, bmg: None) -> None:  # noqa: ANN401
    """Whatever the current device is; and it is the current one again afterwards."""
    arguments = layer()
    on_device = moved(device, arguments, index=1)
    device.close_gate(0, 0)
    y = own.mxfp4_linear(*on_device)
    device.synchronize(1, 0)
    assert y.device == torch.device("xpu", 1)
    assert device.current_device() == 0
    assert_same(device, y, own.mxfp4_linear(*arguments))


def test_memory_is_the_allocators_and_a_warm_call_takes_none_that_is_fresh(device: Any, variant: str) -> None:  # noqa: ANN401
    on_device = moved(device, layer())
    own.mxfp4_linear(*on_device)
    before = device.allocations()
    own.mxfp4_linear(*on_device)
    after = device.allocations()
    # The result, and codes and scales, or A and W expanded: few rows read W as it is.
    assert after[0] - before[0] == (2 if variant == "bmg:small" else 3)
    assert after[1] == before[1]


def test_a_captured_call_computes_anew_at_each_replay(device: Any, variant: str) -> None:  # noqa: ANN401
    """Once warm, a call only submits kernels, which SYCL records, as in a torch.xpu graph."""
    x, *weights = layer()
    on_device = moved(device, (x, *weights))
    own.mxfp4_linear(*on_device)
    device.synchronize(0, 0)
    fresh = device.allocations()[1]
    device.begin_recording(0, 0)
    y = own.mxfp4_linear(*on_device)
    device.end_recording()
    assert device.allocations()[1] == fresh
    for factor in (1.0, -3.0):
        on_device[0].copy_(x * factor)
        device.replay(0, 0)
        assert_same(device, y, own.mxfp4_linear(x * factor, *weights))


@pytest.mark.parametrize(
    ("variant", "mode", "tokens"),
    [("bmg:large", "w4a4", 31), ("bmg:small", "w4a8", 1), ("portable", "w4a8", 31)],
    indirect=["variant"],
)
def test_captured_experts_route_anew_at_each_replay(
    device: Any,  # noqa: ANN401
    variant: str,
    mode: Mode,
    tokens: int,
) -> None:
    """No launch depends on where tokens go, and nothing comes back to the host: the call returns while its queue is held up."""
    torch.manual_seed(3)
    experts, hidden, inner, top_k = 5, 160, 96, 3
    w13, w13_scale = (part.view(torch.uint8) for part in reference.quantize(torch.randn(experts, 2 * inner, hidden)))
    w2, w2_scale = (part.view(torch.uint8) for part in reference.quantize(torch.randn(experts, hidden, inner)))
    weights = (w13, w13_scale, w2, w2_scale, torch.randn(experts, 2 * inner), torch.randn(experts, hidden))
    routed = [
        (torch.randn(tokens, hidden), torch.randint(-1, experts, (tokens, top_k)).int(), torch.rand(tokens, top_k))
        for _ in range(3)
    ]
    there, weights_there = moved(device, routed[0]), moved(device, weights)
    own.mxfp4_experts(*there, *weights_there, mode=mode)
    device.synchronize(0, 0)
    fresh = device.allocations()[1]
    device.close_gate(0, 0)
    y = own.mxfp4_experts(*there, *weights_there, mode=mode)
    assert not device.is_idle(0, 0)
    device.open_gate()
    device.synchronize(0, 0)
    assert_same(device, y, own.mxfp4_experts(*routed[0], *weights, mode=mode))
    assert device.allocations()[1] == fresh
    device.begin_recording(0, 0)
    y = own.mxfp4_experts(*there, *weights_there, mode=mode)
    device.end_recording()
    for inputs in routed[1:]:
        for tensor, value in zip(there, inputs, strict=True):
            tensor.copy_(value)
        device.replay(0, 0)
        assert_same(device, y, own.mxfp4_experts(*inputs, *weights, mode=mode))


def test_tensors_of_two_devices_are_refused(device: Any, bmg: None) -> None:  # noqa: ANN401
    x, weight, scale, _ = layer()
    with pytest.raises(RuntimeError, match="mxfp4_linear: weight is on cpu, expected xpu:0 like the first argument"):
        own.mxfp4_linear(device.to_device(x, 0), weight, scale)
    with pytest.raises(RuntimeError, match="mxfp4_linear: weight_scale is on xpu:1, expected xpu:0 like the first argument"):
        own.mxfp4_linear(*moved(device, (x, weight)), device.to_device(scale, 1))
