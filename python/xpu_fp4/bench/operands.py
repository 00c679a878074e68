# SPDX-License-Identifier: Apache-2.0
"""The tensors of a case. Calls take copies of the weight in turn, as a model's layers do, so that it comes from memory."""

import itertools
from collections.abc import Callable
from functools import cached_property
from typing import TypeVar, cast

import torch
from torch import Tensor

from .._library import BLOCK
from ..functional import dequantize, quantize
from .cases import Case, Data

T = TypeVar("T")

_BYTES = {"random-scales": (0, 255), "random-scales-20": (107, 148)}
"""The scale bytes that are drawn from, the end excluded."""


def _random_mxfp4(rows: int, k: int, data: Data, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    low, high = _BYTES[data]
    codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(low, high, (rows, k // BLOCK), dtype=torch.uint8, generator=generator)
    return codes, scale


def gaussian_mxfp4(n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A normally distributed weight: codes [n, k/2] and scale bytes [n, k/32]."""
    q, scale = quantize(torch.randn(n, k, generator=generator).mul_(0.02).bfloat16())
    return q.view(torch.uint8), scale.view(torch.uint8)


class Weights:
    """An [n, k] weight in every form that a contender asks for, on one device."""

    def __init__(self, n: int, k: int, data: Data, device: torch.device, working_set: int) -> None:
        """working_set: bytes that the copies of one form hold together, at least."""
        self.n, self.k, self.data, self.device, self.working_set = n, k, data, device, working_set
        self._forms: dict[str, list[object]] = {}
        self.draw(torch.Generator().manual_seed(1))

    def draw(self, generator: torch.Generator) -> None:
        if self.data == "gaussian":
            self.codes, self.scale = gaussian_mxfp4(self.n, self.k, generator)
        else:
            self.codes, self.scale = _random_mxfp4(self.n, self.k, self.data, generator)

    def fits(self, case: Case) -> bool:
        return case.experts is None and (self.n, self.k, self.data) == (case.n, case.k, case.data)

    @cached_property
    def bf16(self) -> Tensor:
        return dequantize(self.codes, self.scale, torch.bfloat16)

    @property
    def packed_bytes(self) -> int:
        """Returns what a checkpoint holds: 17 bytes a block."""
        return self.codes.numel() + self.scale.numel()

    def copies(self, form: str, size: int, make: Callable[[], T]) -> list[T]:
        """Copies of a form of the weight, made at the first call. make() makes one, of `size` bytes."""
        if form not in self._forms:
            self._forms[form] = [make() for _ in range(-(-self.working_set // size))]
        return cast(list[T], self._forms[form])

    def tensors_in_turn(self, form: str, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """A function that gives copies of the tensors in turn, with their strides and dtypes."""
        size = sum(tensor.nbytes for tensor in tensors)
        made = self.copies(form, size, lambda: tuple(_copy(tensor, self.device) for tensor in tensors))
        return itertools.cycle(made).__next__


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    # Some of torch's functions do not know the dtypes of MXFP4.
    if tensor.dtype in (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu):
        return _copy(tensor.view(torch.uint8), device).view(tensor.dtype)
    return tensor.to(device, copy=True)


class Problem:
    """The operands of one case."""

    def __init__(self, case: Case, weights: Weights) -> None:
        self.case, self.weights = case, weights

    @cached_property
    def x(self) -> Tensor:
        """Activations [m, k], bfloat16."""
        generator = torch.Generator().manual_seed(2)
        m, k = self.case.m, self.case.k
        if self.case.data == "gaussian":
            x = torch.randn(m, k, generator=generator).bfloat16()
        else:
            codes, scale = _random_mxfp4(m, k, self.case.data, generator)
            x = dequantize(codes, scale.clamp(max=250), torch.bfloat16)  # 6 * 2^123: finite
        return x.to(self.weights.device)

    @cached_property
    def xs(self) -> Callable[[], tuple[Tensor, ...]]:
        """Copies of x in turn, for what reads x from memory."""
        return self.weights.tensors_in_turn(f"x {self.case.m}", self.x)

    @property
    def activation_bytes(self) -> int:
        """Read as bfloat16 and written as bfloat16."""
        return 2 * self.case.m * (self.case.k + self.case.n)
