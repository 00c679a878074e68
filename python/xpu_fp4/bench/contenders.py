# SPDX-License-Identifier: Apache-2.0
"""Who takes part: our ops, and what torch has. What needs another package is in `peers`, limits of the machine in `limits`."""

from collections.abc import Callable, Iterator
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
    work: Literal["product", "experts", "any"] = "product"

    def takes_part(self, case: Case, device: str) -> bool:
        if self.device not in ("any", device):
            return False
        if self.work not in ("any", "product" if case.experts is None else "experts"):
            return False
        if case.only:
            return self.name in case.only
        # A peer's time does not depend on how scales are aligned.
        return self.name not in CONVERSIONS and (self.kind != "peer" or case.data == "gaussian")


@dataclass(frozen=True)
class Mode:
    """What our products of a mode are called, and how their activations are made."""

    name: Literal["w4a4", "w4a8", "w4a16"]
    linear: str
    """The op for a stored weight; those for other forms have a suffix."""
    quantize: str | None = None
    """The op that makes the codes of a product of codes."""

    def op(self, form: str = "") -> Callable[..., Tensor]:
        name = self.linear + form
        if not hasattr(ops, name):
            raise Unavailable(f"this build has no {name}")
        return getattr(ops, name)  # type: ignore[no-any-return]

    def activations(self, problem: Problem) -> tuple[Tensor, Tensor]:
        assert self.quantize is not None
        codes, scale = getattr(ops, self.quantize)(problem.x)
        return codes, scale


HADAMARD = 32
"""The contenders that transform x first use this size. The time is that of any weight, so theirs is not turned."""

MODES = (
    Mode("w4a4", "mxfp4_linear", "mxfp4_quantize"),
    Mode("w4a8", "mxfp4_linear_w4a8", "mxint8_quantize"),
    Mode("w4a16", "mxfp4_linear_w4a16"),
)


def _linear(mode: Mode) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        weight = problem.weights.tensors_in_turn("checkpoint", problem.weights.codes, problem.weights.scale)
        op, x = mode.op(), problem.x
        return lambda: op(x, *weight())

    return setup


def _linear_prepacked(mode: Mode, hadamard: int = 0) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        op, weight, x, n = mode.op("_prepacked"), _prepacked(problem), problem.x, problem.case.n
        return lambda: op(x, *weight(), n, hadamard=hadamard)

    return setup


def _linear_expanded(mode: Mode) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        op, weights, x = mode.op("_expanded"), problem.weights, problem.x
        codes, scale = weights.codes.to(weights.device), weights.scale.to(weights.device)
        try:
            expanded = ops.mxfp4_expand(codes, scale)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error
        weight = weights.tensors_in_turn("expanded", codes, scale, expanded)
        return lambda: op(x, *weight())

    return setup


def _gemm(mode: Mode) -> Callable[[Problem], Run]:
    """The operands as `fp4_gemm` gets them: codes as the .t() view, scales [K/32, N]."""

    def setup(problem: Problem) -> Run:
        weights = problem.weights
        weight = weights.tensors_in_turn("fp4_gemm", weights.codes.t(), weights.scale.t().contiguous())
        a, a_scale = mode.activations(problem)

        def run() -> Tensor:
            b, b_scale = weight()
            return ops.mxfp4_gemm(a, b, a_scale, b_scale, torch.bfloat16)  # type: ignore[no-any-return]

        return run

    return setup


def _gemm_prepacked(mode: Mode) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        weight, n = _prepacked(problem), problem.case.n
        a, a_scale = mode.activations(problem)
        return lambda: ops.mxfp4_gemm_prepacked(a, a_scale, *weight(), n, torch.bfloat16)

    return setup


def _prepacked(problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """Repacked copies of the weight in turn."""
    if not hasattr(ops, "mxfp4_prepack"):
        raise Unavailable("this build has no mxfp4_prepack")
    weights = problem.weights
    codes, scale = weights.codes.to(weights.device), weights.scale.to(weights.device)
    return weights.tensors_in_turn("prepacked", ops.mxfp4_prepack(codes, scale))


def quantize_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes of x [m, k] in bfloat16, and of its MXFP4 codes and scales."""
    elements = problem.case.m * problem.case.k
    return 2 * elements, elements // 2 + elements // BLOCK


def quantize_mxint8_bytes(problem: Problem) -> tuple[int, int]:
    """Counts what quantizing to MXINT8 reads and writes."""
    elements = problem.case.m * problem.case.k
    return 2 * elements, elements + elements // BLOCK


def _quantize(op: Callable[..., object], hadamard: int = 0) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        x = problem.xs
        return lambda: op(*x(), hadamard=hadamard)

    return setup


def _dequantize(problem: Problem) -> Run:
    q, scale = ops.mxfp4_quantize(problem.x)
    packed = problem.weights.tensors_in_turn(f"quantized x {problem.case.m}", q, scale)
    return lambda: ops.mxfp4_dequantize(*packed(), torch.bfloat16)


def _conversion(
    name: str,
    about: str,
    setup: Callable[[Problem], Run],
    sizes: Callable[[Problem], tuple[int, int]] = quantize_bytes,
) -> Contender:
    return Contender(name, "ours", about, setup, ops=lambda _: 0, bytes=lambda problem: sum(sizes(problem)))


def _products_of(mode: Mode) -> Iterator[Contender]:
    op, how = mode.linear, "quantizes x, " if mode.quantize else ""
    linear_name, gemm_name = f"{mode.name}-linear", f"{mode.name}-gemm"
    yield Contender(linear_name, "ours", f"{op}: {how}weight as in a checkpoint", _linear(mode))
    about = f"{op}_prepacked: {how}weight repacked"
    yield Contender(f"{linear_name}-prepacked", "ours", about, _linear_prepacked(mode), device="cpu")
    if mode.quantize is None:
        return
    about = f"{op}_expanded: {how}weight kept expanded"
    yield Contender(f"{linear_name}-expanded", "ours", about, _linear_expanded(mode), device="xpu")
    yield Contender(gemm_name, "ours", "mxfp4_gemm: x quantized before, weight as fp4_gemm gets it", _gemm(mode))
    about = "mxfp4_gemm_prepacked: x quantized before, weight repacked"
    yield Contender(f"{gemm_name}-prepacked", "ours", about, _gemm_prepacked(mode), device="cpu")


OURS = (
    *(contender for mode in MODES for contender in _products_of(mode)),
    _conversion("quantize", "mxfp4_quantize of x [M, K] bfloat16, even", _quantize(ops.mxfp4_quantize)),
    _conversion(
        "quantize-mxint8",
        "mxint8_quantize of x [M, K] bfloat16, groups of 128",
        _quantize(ops.mxint8_quantize),
        quantize_mxint8_bytes,
    ),
    _conversion("quantize-hadamard", "the same after a Hadamard of 32: quantize", _quantize(ops.mxfp4_quantize, HADAMARD)),
    _conversion(
        "quantize-mxint8-hadamard",
        "the same after a Hadamard of 32: quantize-mxint8",
        _quantize(ops.mxint8_quantize, HADAMARD),
        quantize_mxint8_bytes,
    ),
    Contender(
        "w4a8-linear-hadamard-prepacked",
        "ours",
        "mxfp4_linear_w4a8_prepacked: a Hadamard of 32, then as w4a8-linear-prepacked",
        _linear_prepacked(MODES[1], hadamard=HADAMARD),
        device="cpu",
    ),
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
