# SPDX-License-Identifier: Apache-2.0
"""Fresh pages cost more than products: what large calls ask the system for, counted by the system itself."""

import resource
from collections.abc import Callable

import torch
import xpu_fp4

PAGE = 4096
# torch, Python and a thread that starts may map some.
SLACK = 300


def faults(call: Callable[[], object]) -> int:
    """Returns how many pages a call has the system map, in all threads: the least of five, as others may map some meanwhile."""
    counts = []
    for _ in range(7):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts[2:])


def test_a_layer_of_experts_keeps_its_scratch_memory() -> None:
    tokens, hidden, intermediate, experts = 4096, 64, 1024, 2  # the rows of both products take 16 MiB each, the output 0.5
    w13 = xpu_fp4.quantize(torch.randn(experts * 2 * intermediate, hidden))
    w2 = xpu_fp4.quantize(torch.randn(experts * hidden, intermediate))
    shaped = [
        t.view(torch.uint8).view(experts, n, -1)
        for t, n in ((w13[0], 2 * intermediate), (w13[1], 2 * intermediate), (w2[0], hidden), (w2[1], hidden))
    ]
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    ids = torch.randint(experts, (tokens, 1), dtype=torch.int32)
    weights = torch.ones(tokens, 1)
    call = lambda: torch.ops.xpu_fp4.mxfp4_experts(x, ids, weights, *shaped, mode="w4a8")  # noqa: E731
    assert faults(call) < SLACK


def test_no_page_of_a_large_output_is_asked_for_twice() -> None:
    # Without care 16 cores ask for each page four times, two cores hardly ever.
    rows, columns = 4096, 6144  # 48 MiB in bfloat16, which allocators take from the system each time
    codes, scale = xpu_fp4.quantize(torch.randn(columns, 32))
    x = torch.randn(rows, 32, dtype=torch.bfloat16)
    assert faults(lambda: xpu_fp4.linear(x, codes, scale, mode="w4a8")) < rows * columns * 2 // PAGE + SLACK
