# SPDX-License-Identifier: Apache-2.0
"""The kernels of a GPU's architecture, one by one, against the reference: which of them work on a new device."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..functional import Hadamard, Mode, expand, linear, mxint8_quantize, quantize

M, N, K = {"small": 5, "small, int8": 5, "medium": 200, "large": 200, "portable": 37}, 96, 416  # K ends within a quad


class Result(NamedTuple):
    """One kernel in one task: None if its bits are the reference's, else what is wrong."""

    kernel: str
    task: str
    wrong: str | None


class _Operands(NamedTuple):
    x: Tensor
    w: Tensor
    w_scale: Tensor


def _operands(rows: int, dtype: torch.dtype) -> _Operands:
    generator = torch.Generator().manual_seed(rows)
    exponents = torch.randint(-9, 9, (rows, K // 32), generator=generator).repeat_interleave(32, 1)
    x = torch.randn(rows, K, generator=generator) * torch.exp2(exponents)
    return _Operands(x.to(dtype), *reference.quantize(torch.randn(N, K, generator=generator)))


def _differences(got: Tensor, expected: Tensor) -> str | None:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    different = int((got.cpu().view(integer) != expected.view(integer)).sum())
    return f"{different} of {expected.numel()} values differ from the reference" if different else None


def _quantizer(device: torch.device, mode: Mode, rows: int) -> str | None:
    x = _operands(rows, torch.bfloat16).x
    ours, defined = (quantize, reference.quantize) if mode == "w4a4" else (mxint8_quantize, reference.mxint8_quantize)
    pairs = zip(ours(x.to(device)), defined(x), strict=True)
    return next(filter(None, (_differences(got.view(want.dtype), want) for got, want in pairs)), None)


def _defined(device: torch.device, mode: Mode, rows: int, *, hadamard: bool = False, expanded: bool = False) -> str | None:
    x, w, w_scale = _operands(rows, torch.bfloat16)
    size: Hadamard = 32 if hadamard else 0
    transformed = reference.transform(x, size) if size else x
    codes = reference.quantize(transformed) if mode == "w4a4" else reference.mxint8_quantize(transformed)
    on_device = (x.to(device), w.to(device), w_scale.to(device))
    form = expand(*on_device[1:]) if expanded else None
    got = linear(*on_device, mode=mode, hadamard=size, expanded=form)
    return _differences(got, reference.gemm(*codes, w, w_scale, torch.bfloat16))


def _w4a16(device: torch.device, dtype: torch.dtype, rows: int) -> str | None:
    """Not defined to the bit: within its bound, and the rounding of the output."""
    x, w, w_scale = _operands(rows, dtype)
    got = linear(x.to(device), w.to(device), w_scale.to(device), mode="w4a16").cpu().double()
    integers, unit = reference.integers(w)
    values = torch.ldexp(integers, (w_scale.int() - 127 + unit).repeat_interleave(32, 1))
    exact, size = x.double() @ values.t(), x.double().abs() @ values.abs().t()
    bound = 2**-22 * K**0.5 * size
    rounding = (exact.abs() + bound) * (2**-8 if dtype == torch.bfloat16 else 2**-11)
    beyond = int(((got - exact).abs() > bound + rounding).sum())
    return f"{beyond} of {got.numel()} values beyond their bound" if beyond else None


Task = Callable[[torch.device, int], str | None]
_TASKS: dict[str, Task] = {
    "W4A4": lambda device, rows: _defined(device, "w4a4", rows),
    "W4A8": lambda device, rows: _defined(device, "w4a8", rows),
    "W4A4, Hadamard": lambda device, rows: _defined(device, "w4a4", rows, hadamard=True),
    "W4A8, Hadamard": lambda device, rows: _defined(device, "w4a8", rows, hadamard=True),
    "W4A16, bf16": lambda device, rows: _w4a16(device, torch.bfloat16, rows),
    "W4A16, f16": lambda device, rows: _w4a16(device, torch.float16, rows),
}
_EXPANDED: dict[str, Task] = {
    "W4A4, expanded": lambda device, rows: _defined(device, "w4a4", rows, expanded=True),
    "W4A8, expanded": lambda device, rows: _defined(device, "w4a8", rows, expanded=True),
}
_QUANTIZERS: dict[str, Task] = {
    "MXFP4": lambda device, rows: _quantizer(device, "w4a4", rows),
    "MXINT8": lambda device, rows: _quantizer(device, "w4a8", rows),
}


# Two ways of the small kernel: what it decodes weights to is an operand of the matrix unit that may be another than we think.
_OF_OPERANDS = ("W4A4", "W4A8")


@contextmanager
def _forced(variable: str, value: str) -> Iterator[None]:
    """Makes the launcher, which reads the environment at each call, take this value."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def _tasks(kernel: str) -> dict[str, Task]:
    if kernel == "small, int8":
        return {task: _TASKS[task] for task in _OF_OPERANDS}
    return _TASKS if kernel in ("small", "portable") else _TASKS | _EXPANDED


def bring_up(device: torch.device, architecture: str) -> Iterator[Result]:
    """Every kernel of that architecture in every task, on tensors of the device. Empty architecture: the portable kernels."""
    for task, run in _QUANTIZERS.items():
        yield Result("quantize", task, _outcome(run, device, 37))
    kernels = ("small", "small, int8", "medium", "large") if architecture else ()
    for kernel in (*kernels, "portable"):
        name, _, operand = kernel.partition(", ")
        variant = name if name == "portable" else f"{architecture}:{name}"
        with _forced("XPU_FP4_SYCL_VARIANT", variant), _forced("XPU_FP4_WEIGHT_OPERAND", operand or "int4"):
            for task, run in _tasks(kernel).items():
                yield Result(kernel, task, _outcome(run, device, M[kernel]))


def advice(results: Iterable[Result]) -> str | None:
    """What to set where one way of the small kernel is wrong and the other right."""
    wrong = {(kernel, task) for kernel, task, what in results if what is not None}
    int4, int8 = ({(kernel, task) for task in _OF_OPERANDS} & wrong for kernel in ("small", "small, int8"))
    return "set XPU_FP4_WEIGHT_OPERAND=int8, with which few rows are right" if int4 and not int8 else None


def _outcome(run: Task, device: torch.device, rows: int) -> str | None:
    try:
        return run(device, rows)
    except RuntimeError as error:
        return str(error).split("\nException raised from")[0]
