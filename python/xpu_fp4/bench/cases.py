# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes, data and threads, in named suites."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Data = Literal["gaussian", "random-scales", "random-scales-20"]
"""How scales are spread. gaussian: activations and weights are normally distributed, so scales of neighbouring blocks hardly
differ. random-scales: each scale byte is drawn from all 255 finite ones, so next to none are aligned. random-scales-20: from
107 to 147."""

DATA = get_args(Data)


Router = Literal["even", "skewed", "half"]
"""How tokens choose experts, seeded. even: all alike. skewed: the odds of the expert of rank i are 1 / i, as routers have
favourites. half: half of all slots are the first expert's, so that it is chosen more than once by a token."""


@dataclass(frozen=True, order=True)
class Experts:
    """A layer of experts; what gpt-oss has is "swiglu_oai" with gate and up in turn, others have "silu_mul" of halves."""

    experts: int
    top_k: int
    activation: Literal["silu_mul", "swiglu_oai"]
    router: Router = "even"


@dataclass(frozen=True, order=True)
class Case:
    """One product [m, k] x [n, k]^T, the conversions of [m, k], or m tokens of k columns through experts, n between the two
    products."""

    suite: str
    n: int
    k: int
    data: Data
    threads: int
    m: int
    only: tuple[str, ...] = ()
    """The contenders that take part; empty: all."""
    experts: Experts | None = None

    @property
    def ops(self) -> int:
        one = 2 * self.m * self.n * self.k
        return one if self.experts is None else 3 * self.experts.top_k * one

    def __str__(self) -> str:
        if (of := self.experts) is not None:
            tokens = f"{self.m} token{'s' * (self.m > 1)}, {of.top_k} of {of.experts} experts {self.n} x {self.k}"
            return f"{tokens}, {of.router} router, {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.m} x {self.n} x {self.k}, {self.data}, {self.threads} thread{'s' * (self.threads > 1)}"


SQUARE_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LAYER_M = (1, 16, 512)
# [n, k] of the linear layers as vLLM runs them: query, key and value in one, gate and up in one; then output and down.
LAYERS = {
    "llama-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),  # Llama-3.2-1B
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),  # Llama-3-8B
    "smollm2": ((960, 576), (576, 576), (3072, 576), (576, 1536)),  # SmolLM2-135M
}
# [inner size, hidden size] of a layer of experts.
EXPERTS = {
    "gpt-oss-20b": (2880, 2880, Experts(32, 4, "swiglu_oai")),
    "qwen3-30b-a3b": (768, 2048, Experts(128, 8, "silu_mul")),
}
EXPERTS_M = (1, 4, 16, 128, 1024)
HALF_M = 1024
"""Tokens with which one expert is given half of all slots."""
# Multiples of the kernels' tiles and their neighbours.
SMALL_M = (2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)
_CONVERTED = ("quantize", "quantize-mxint8", "dequantize")
_TRANSFORMED = ("quantize-hadamard", "quantize-mxint8-hadamard")
CONVERSIONS = (*_CONVERTED, *_TRANSFORMED, *(f"limit-copy-{name}" for name in _CONVERTED))
FORMS = ("linear", "linear-prepacked", "linear-expanded", "gemm", "gemm-prepacked")
QUANTIZED = tuple(f"{mode}-{form}" for mode in ("w4a4", "w4a8") for form in FORMS)
"""Our products with quantized activations."""
LIMITS = ("limit-vpdpbusd", "limit-tdpbusd", "limit-tdpbf16ps", "limit-vpmaddubsw", "limit-vpdpbusd-256", "limit-read")


def _targets(threads: int) -> list[Case]:
    def square(m: int, *only: str, data: Data = "gaussian", threads: int = threads) -> Case:
        return Case("targets", 4096, 4096, data, threads, m, only)

    down = [Case("targets", 4096, 14336, "gaussian", threads, m) for m in (1, 512)]
    of_modes = [Case("targets", 4096, 14336, "gaussian", threads, m, QUANTIZED) for m in (16, 128, 1024)]
    small = [square(m, *QUANTIZED, "torch-bf16") for m in SMALL_M]
    unaligned = [square(1024, *QUANTIZED, *LIMITS, data=data) for data in DATA[1:]]
    scaling = [square(1024, *QUANTIZED, threads=t) for t in {1, 2} - {threads}]
    conversions = [square(1024, *CONVERSIONS)]
    # The conversions are a case of their own, and so must differ from the product of the same size.
    return [*(square(m) for m in (1, 128, 256, 512, 1024)), *small, *unaligned, *scaling, *conversions, *down, *of_modes]


def _threads(most: int, data: Data, ms: Sequence[int]) -> list[Case]:
    counts = sorted({2**i for i in range(most.bit_length())} | {most})
    return [Case("threads", 4096, 4096, data, t, m) for t in counts for m in ms]


def _experts(name: str, threads: int, ms: Sequence[int]) -> list[Case]:
    inner, hidden, layer = EXPERTS[name]

    def case(m: int, router: Router, *only: str) -> Case:
        return Case(name, inner, hidden, "gaussian", threads, m, only, replace(layer, router=router))

    routers: tuple[Router, ...] = ("even", "skewed")
    cases = [case(m, router) for m in ms or EXPERTS_M for router in routers]
    return [*cases, case(HALF_M, "half", *OUR_EXPERTS)] if HALF_M in (ms or EXPERTS_M) else cases


OUR_EXPERTS = ("w4a4-experts", "w4a8-experts", "w4a16-experts")
SUITES = ("targets", "square", *LAYERS, "convert", "threads", *EXPERTS)


def suite(name: str, threads: int, data: Data = "gaussian", ms: Sequence[int] = ()) -> list[Case]:
    """The cases of one suite, those of a weight together. `threads` goes up to that many threads.

    ms replaces the suite's own numbers of rows. Raises ValueError for other names, for `targets` with ms or data, as it has a
    choice of its own, and for experts with other data than gaussian.
    """
    if name == "targets":
        if ms or data != "gaussian":
            raise ValueError("the suite targets chooses M and data itself")
        cases = _targets(threads)
    elif name == "threads":
        cases = _threads(threads, data, ms or (1, 1024))
    elif name == "square":
        cases = [Case(name, 4096, 4096, data, threads, m) for m in ms or SQUARE_M]
    elif name == "convert":
        cases = [Case(name, 4096, 4096, data, threads, m, CONVERSIONS) for m in ms or (1, 32, 1024)]
    elif name in EXPERTS:
        if data != "gaussian":
            raise ValueError(f"the suite {name} has gaussian data alone")
        cases = _experts(name, threads, ms)
    elif name in LAYERS:
        cases = [Case(name, n, k, data, threads, m) for n, k in LAYERS[name] for m in ms or LAYER_M]
    else:
        raise ValueError(f"suite is {name!r}, expected one of {', '.join(SUITES)}")
    return sorted(cases)
