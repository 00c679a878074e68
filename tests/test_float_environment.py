# SPDX-License-Identifier: Apache-2.0
"""Rounding modes and flushed subnormals of the caller reach no bit of any op."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xpu_fp4
from helpers import (
    ENVIRONMENTS,
    Environment,
    assert_same_bits,
    bits,
    environment_is,
    expected_gemm,
    float_environment,
    gemm,
    linear_w4a4,
    linear_w4a16,
    normal,
    random_codes,
    random_scales,
    seeded,
)
from products import Operands, block_products, in_pairs, order_operands, quads, random_operands
from torch import Tensor
from xpu_fp4 import reference


def subnormal_operands() -> Operands:
    return random_operands(20, 40, 416, seed=81, low=48, high=66)


def subnormal_elements() -> Tensor:
    return normal(20, 416) * torch.exp2(torch.arange(-149, -109, 2).float())[:, None]


def environment_calls() -> dict[str, Callable[[], Tensor]]:
    """Calls whose results a foreign environment would change, and the inputs of which lie ready."""
    subnormal, ordered = subnormal_operands(), order_operands()
    x = subnormal_elements()
    large = normal(20, 416)
    codes, scales = random_codes(64, 128, seeded(82)), torch.arange(256, dtype=torch.uint8).view(64, 4)
    w, w_scale = random_codes(40, 416, seeded(83)), random_scales(40, 416, seeded(84), 117, 137)
    small_scale = random_scales(40, 416, seeded(85), 0, 20)
    output = torch.empty(20, 208, dtype=torch.uint8)

    def group_quant() -> Tensor:
        group_scale = torch.empty(20, 13)
        torch.ops._C.per_token_group_quant_mxfp4(x, output, group_scale, 32, 2.0**-126)
        return torch.cat([output.flatten(), group_scale.view(torch.uint8).flatten()])

    return {
        "quantize codes": lambda: bits(xpu_fp4.quantize(x)[0]),
        "quantize scales": lambda: bits(xpu_fp4.quantize(x)[1]),
        "group quantize": group_quant,
        "dequantize to float32": lambda: xpu_fp4.dequantize(codes, scales, torch.float32),
        "dequantize to float16": lambda: xpu_fp4.dequantize(codes, scales, torch.float16),
        "dequantize to bfloat16": lambda: xpu_fp4.dequantize(codes, scales, torch.bfloat16),
        "gemm of subnormal products": lambda: gemm(*subnormal),
        "gemm with rounded sums": lambda: gemm(*ordered),
        "gemm to float16": lambda: gemm(*ordered, torch.float16),
        "gemm to bfloat16": lambda: gemm(*ordered, torch.bfloat16),
        "w4a4": lambda: linear_w4a4(large, w, w_scale),
        "w4a16": lambda: linear_w4a16(large, w, w_scale),
        "w4a16 of subnormal elements": lambda: linear_w4a16(x, w, w_scale),
        "w4a16 of subnormal products": lambda: linear_w4a16(large, w, small_scale),
    }


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_callers_float_environment_reaches_no_bit(backend: str, environment: Environment) -> None:
    calls = environment_calls()
    before = {name: call() for name, call in calls.items()}
    with float_environment(environment):
        during = {}
        for name, call in calls.items():
            during[name] = call()
            assert environment_is(environment), f"{name} changed the caller's environment"
    for name, expected in before.items():
        assert_same_bits(during[name], expected)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_environment_would_matter_to_that_data(environment: Environment) -> None:
    # torch's own arithmetic on the same operands, in this thread only: those of its pool have their own environment.
    products, addends = block_products(*subnormal_operands()), block_products(*order_operands())
    elements = subnormal_elements()
    least_scale = bits(torch.tensor([1 << 22], dtype=torch.int32)).view(torch.float32)

    def plain() -> dict[str, Tensor]:
        return {
            "quantize": elements * 2.0**120,
            "dequantize": least_scale * 6.0,
            "gemm": products * 1.0,
            "gemm sums": quads(addends, in_pairs),
        }

    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        default = plain()
        with float_environment(environment):
            foreign = plain()
    finally:
        torch.set_num_threads(threads_before)
    changed = {name for name in default if not torch.equal(bits(default[name]), bits(foreign[name]))}
    assert changed == ({"quantize", "dequantize", "gemm"} if environment == "flush" else {"gemm sums"})


FLUSH_FIRST = """
import sys, torch
torch.set_flush_denormal(True)  # before any thread of torch's or SYCL's pool exists
import xpu_fp4
x, a, a_scale, w, w_scale = torch.load(sys.argv[2])
with xpu_fp4.cpu_backend(sys.argv[1]):
    q, scale = xpu_fp4.quantize(x)
    y = torch.ops.xpu_fp4.mxfp4_gemm(a, w.t(), a_scale, w_scale.t().contiguous(), torch.float32)
    torch.save([q.view(torch.uint8), scale.view(torch.uint8), y], sys.argv[3])
"""


def test_flushing_from_the_start_of_the_process_reaches_no_bit(backend: str, tmp_path: Path) -> None:
    # Threads inherit the environment of the thread that starts them.
    x = normal(256, 4096) * torch.exp2(torch.linspace(-148, -110, 256))[:, None]
    operands = random_operands(150, 200, 416, seed=86, low=48, high=66)
    source, result = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save([x, *operands], source)
    subprocess.run([sys.executable, "-c", FLUSH_FIRST, backend, str(source), str(result)], check=True, timeout=120)
    q, scale = reference.quantize(x)
    for actual, expected in zip(torch.load(result), (q, scale, expected_gemm(*operands)), strict=True):
        assert_same_bits(actual, expected)
