# SPDX-License-Identifier: Apache-2.0
"""The machine's own limits as contenders, so that they are measured in the rounds of what they bound."""

from collections.abc import Callable

import torch

from .._library import ops
from .contenders import Contender, quantize_bytes, quantize_mxint8_bytes
from .measure import Run
from .operands import Problem

READ_BYTES = 64 << 20
"""Read by one call. Successive calls go through memory that no cache holds."""
_ITERATIONS = 100_000


def _compute(instruction: str) -> Contender:
    def run() -> int:
        return ops._limit_compute(instruction, _ITERATIONS)  # type: ignore[no-any-return]

    return Contender(
        f"limit-{instruction}",
        "limit",
        f"{instruction} on registers, all threads",
        setup=lambda _: run,
        ops=lambda _: run(),  # it returns how many it does
        bytes=lambda _: 0,
        device="cpu",
        work="any",
    )


def _read(problem: Problem) -> Run:
    memory = problem.weights.tensors_in_turn("read", torch.ones(READ_BYTES, dtype=torch.uint8))
    return lambda: ops._limit_read(*memory())


def _copy(name: str, sizes: Callable[[Problem], tuple[int, int]]) -> Contender:
    def setup(problem: Problem) -> Run:
        read, written = sizes(problem)
        source = problem.weights.tensors_in_turn(f"copy {read}", torch.ones(read, dtype=torch.uint8))
        # A new result each call, as the ops make one: the allocator gives the same memory again.
        return lambda: ops._limit_copy(*source(), torch.empty(written, dtype=torch.uint8))

    about = f"reads and writes as many bytes as {name}"
    return Contender(
        f"limit-copy-{name}", "limit", about, setup, lambda _: 0, lambda problem: sum(sizes(problem)), device="cpu"
    )


def limits() -> tuple[Contender, ...]:
    """The limits of this machine: each instruction for products that it has, the fastest first; reading; copying."""
    read = Contender(
        "limit-read", "limit", "memory read once, all threads", _read, lambda _: 0, lambda _: READ_BYTES, "cpu", "any"
    )
    copies = (
        _copy("quantize", quantize_bytes),
        _copy("quantize-mxint8", quantize_mxint8_bytes),
        _copy("dequantize", lambda problem: quantize_bytes(problem)[::-1]),
    )
    return (*map(_compute, ops._limit_instructions()), read, *copies)
