# SPDX-License-Identifier: Apache-2.0
"""Who takes part: our ops, and what torch has. What needs another package is in `peers`, limits of the machine in `limits`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from .._library import BLOCK, ops
from .cases import CONVERSIONS, Case
from .measure import Job, Run
from .operands import Problem

Kind = Literal["ours", "peer", "limit"]


class Unavailable(Exception):
    """A contender cannot take part; the message is the reason."""


@dataclass(frozen=True)
class Contender:
    """Something to time. Figures of its ops and bytes are those of the work, not of how it is done."""

    name: str
    kind: Kind
    about: str
    setup: Callable[[Problem], Run | Job]
    """Makes the operands and returns what to time. Raises Unavailable."""
    ops: Callable[[Problem], int] = lambda problem: problem.case.ops
    """Operations of one call, two for a multiply-add."""
    bytes: Callable[[Problem], int] = lambda problem: problem.weights.packed_bytes
    """Bytes of one call that have to come from memory: the weight as the contender keeps it; of a conversion, all of them."""
    device: Literal["any", "cpu", "xpu"] = "any"

    def takes_part(self, case: Case, device: str) -> bool:
        if self.device not in ("any", device):
            return False
        if case.only:
            return self.name in case.only
        # A peer's time does not depend on how scales are aligned.
        return self.name not in CONVERSIONS and (self.kind != "peer" or case.data == "gaussian")


def _linear_op(op: Callable[..., Tensor]) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        weight = problem.weights.tensors_in_turn("checkpoint", problem.weights.codes, problem.weights.scale)
        x = problem.x
        return lambda: op(x, *weight())

    return setup


def _gemm(problem: Problem) -> Run:
    """The operands as `fp4_gemm` gets them: codes as the .t() view, scales [K/32, N]."""
    weights = problem.weights
    weight = weights.tensors_in_turn("fp4_gemm", weights.codes.t(), weights.scale.t().contiguous())
    a, a_scale = ops.mxfp4_quantize(problem.x)

    def run() -> Tensor:
        b, b_scale = weight()
        return ops.mxfp4_gemm(a, b, a_scale, b_scale, torch.bfloat16)  # type: ignore[no-any-return]

    return run


def _prepacked(problem: Problem, op: str) -> Callable[[], tuple[Tensor, ...]]:
    """Repacked copies of the weight in turn, for one of the ops that take them."""
    if not (hasattr(ops, op) and hasattr(ops, "mxfp4_prepack")):
        raise Unavailable(f"this build has no {op}")
    weights = problem.weights
    codes, scale = weights.codes.to(weights.device), weights.scale.to(weights.device)
    return weights.tensors_in_turn("prepacked", ops.mxfp4_prepack(codes, scale))


def _linear_prepacked(problem: Problem) -> Run:
    weight, x, n = _prepacked(problem, "mxfp4_linear_prepacked"), problem.x, problem.case.n
    return lambda: ops.mxfp4_linear_prepacked(x, *weight(), n, None, "even")


def _linear_w4a16_prepacked(problem: Problem) -> Run:
    weight, x, n = _prepacked(problem, "mxfp4_linear_w4a16_prepacked"), problem.x, problem.case.n
    return lambda: ops.mxfp4_linear_w4a16_prepacked(x, *weight(), n, None)


def _gemm_prepacked(problem: Problem) -> Run:
    weight, n = _prepacked(problem, "mxfp4_gemm_prepacked"), problem.case.n
    a, a_scale = ops.mxfp4_quantize(problem.x)
    return lambda: ops.mxfp4_gemm_prepacked(a, a_scale, *weight(), n, torch.bfloat16, None)


def _linear_expanded(problem: Problem) -> Run:
    weights, x = problem.weights, problem.x
    codes, scale = weights.codes.to(weights.device), weights.scale.to(weights.device)
    try:
        expanded = ops.mxfp4_expand(codes, scale)
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    weight = weights.tensors_in_turn("expanded", codes, scale, expanded)
    return lambda: ops.mxfp4_linear_expanded(x, *weight())


def quantize_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes of x [m, k] in bfloat16, and of its codes and scales."""
    elements = problem.case.m * problem.case.k
    return 2 * elements, elements // 2 + elements // BLOCK


def _quantize(problem: Problem) -> Run:
    x = problem.xs
    return lambda: ops.mxfp4_quantize(*x())


def _dequantize(problem: Problem) -> Run:
    q, scale = ops.mxfp4_quantize(problem.x)
    packed = problem.weights.tensors_in_turn(f"quantized x {problem.case.m}", q, scale)
    return lambda: ops.mxfp4_dequantize(*packed(), torch.bfloat16)


def _conversion(name: str, about: str, setup: Callable[[Problem], Run]) -> Contender:
    return Contender(name, "ours", about, setup, ops=lambda _: 0, bytes=lambda problem: sum(quantize_bytes(problem)))


def _prepacked_contender(name: str, about: str, setup: Callable[[Problem], Run]) -> Contender:
    return Contender(f"{name}-prepacked", "ours", about, setup, device="cpu")


OURS = (
    Contender("w4a4-linear", "ours", "mxfp4_linear: quantizes x, weight as in a checkpoint", _linear_op(ops.mxfp4_linear)),
    _prepacked_contender("w4a4-linear", "mxfp4_linear_prepacked: quantizes x, weight repacked", _linear_prepacked),
    Contender(
        "w4a4-linear-expanded",
        "ours",
        "mxfp4_linear_expanded: quantizes x, weight kept expanded",
        _linear_expanded,
        device="xpu",
    ),
    Contender("w4a4-gemm", "ours", "mxfp4_gemm: x quantized before, weight as fp4_gemm gets it", _gemm),
    _prepacked_contender("w4a4-gemm", "mxfp4_gemm_prepacked: x quantized before, weight repacked", _gemm_prepacked),
    Contender("w4a16-linear", "ours", "mxfp4_linear_w4a16, weight as in a checkpoint", _linear_op(ops.mxfp4_linear_w4a16)),
    _prepacked_contender("w4a16-linear", "mxfp4_linear_w4a16_prepacked, weight repacked", _linear_w4a16_prepacked),
    _conversion("quantize", "mxfp4_quantize of x [M, K] bfloat16, even", _quantize),
    _conversion("dequantize", "mxfp4_dequantize to [M, K] bfloat16", _dequantize),
)


def _torch_linear(dtype: torch.dtype) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        weight = problem.weights.tensors_in_turn(str(dtype), problem.weights.bf16.to(dtype))
        x = problem.x.to(dtype)
        return lambda: linear(x, *weight())

    return setup


def _torch_int8(problem: Problem) -> Run:
    weights, generator = problem.weights, torch.Generator().manual_seed(3)
    w = torch.randint(-127, 128, (weights.n, weights.k), dtype=torch.int8, generator=generator)
    x = torch.randint(-127, 128, (problem.case.m, weights.k), dtype=torch.int8, generator=generator).to(weights.device)
    # The .t() view was the faster of the two layouts for one row and for 512.
    weight = weights.tensors_in_turn("int8", w.t())
    return lambda: torch._int_mm(x, *weight())


class Emulation:
    """MXFP4 in torch's own ops: codes to values by a table, then a bfloat16 product. x is quantized and dequantized too."""

    def __init__(self, device: torch.device) -> None:
        values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.bfloat16)
        nibble = torch.cat([values, -values])
        byte = torch.arange(256)
        self.pairs = torch.stack([nibble[byte & 15], nibble[byte >> 4]], -1).to(device)
        """The two values of each byte [256, 2]."""
        midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        midpoints[1::2] = midpoints[1::2].nextafter(torch.zeros(()))  # ties to the even code: these go up
        self.midpoints = midpoints.to(device)
        self.values = values.float().to(device)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes uint8 [n, k/2] and scale bytes [n, k/32] -> bfloat16 [n, k]."""
        n, half = codes.shape
        blocks = self.pairs[codes.int()].view(n, -1, BLOCK)
        factor = torch.exp2(scale.float() - 127).bfloat16()
        return (blocks * factor[..., None]).view(n, 2 * half)

    def round_trip(self, x: Tensor) -> Tensor:
        """x [m, k] as MXFP4 holds it, scale mode even; finite, no block of zeros or of subnormals."""
        blocks = x.float().unflatten(-1, (-1, BLOCK))
        fraction, exponent = torch.frexp(blocks.abs().amax(-1, keepdim=True))  # fraction in [0.5, 1)
        scale = torch.exp2((exponent - 3 + (fraction >= 0.875)).float())
        scaled = blocks / scale
        rounded = self.values[torch.bucketize(scaled.abs(), self.midpoints)].copysign(scaled)
        return (rounded * scale).flatten(-2).to(x.dtype)


def _emulation(problem: Problem) -> Run:
    weights, x = problem.weights, problem.x
    weight = weights.tensors_in_turn("checkpoint", weights.codes, weights.scale)
    emulation = Emulation(weights.device)
    return lambda: linear(emulation.round_trip(x), emulation.dequantize(*weight()))


def _dense_bytes(bytes_per_element: int) -> Callable[[Problem], int]:
    return lambda problem: problem.case.n * problem.case.k * bytes_per_element


TORCH = (
    Contender("torch-bf16", "peer", "torch F.linear, bfloat16", _torch_linear(torch.bfloat16), bytes=_dense_bytes(2)),
    Contender("torch-f32", "peer", "torch F.linear, float32", _torch_linear(torch.float32), bytes=_dense_bytes(4)),
    Contender("torch-int8", "peer", "torch._int_mm, int8 without scales", _torch_int8, bytes=_dense_bytes(1), device="cpu"),
    Contender("emulation", "peer", "dequantize in torch, then bfloat16 F.linear: W4A4 as frameworks emulate it", _emulation),
)
