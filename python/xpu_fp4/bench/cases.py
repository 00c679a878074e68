# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes, data and threads, in named suites."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Data = Literal["gaussian", "random-scales", "random-scales-20"]
"""How scales are spread. gaussian: activations and weights are normally distributed, so scales of neighbouring blocks hardly
differ. random-scales: each scale byte is drawn from all 255 finite ones, so next to none are aligned. random-scales-20: from
107 to 147."""

DATA = get_args(Data)


@dataclass(frozen=True, order=True)
class Case:
    """One product [m, k] x [n, k]^T, or the conversions of [m, k]."""

    suite: str
    n: int
    k: int
    data: Data
    threads: int
    m: int
    only: tuple[str, ...] = ()
    """The contenders that take part; empty: all."""

    @property
    def ops(self) -> int:
        return 2 * self.m * self.n * self.k

    def __str__(self) -> str:
        return f"{self.m} x {self.n} x {self.k}, {self.data}, {self.threads} thread{'s' * (self.threads > 1)}"


SQUARE_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LAYER_M = (1, 16, 512)
# [n, k] of the linear layers as vLLM runs them: query, key and value in one, gate and up in one; then output and down.
LAYERS = {
    "llama-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),  # Llama-3.2-1B
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),  # Llama-3-8B
    "smollm2": ((960, 576), (576, 576), (3072, 576), (576, 1536)),  # SmolLM2-135M
}
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


SUITES = ("targets", "square", *LAYERS, "convert", "threads")


def suite(name: str, threads: int, data: Data = "gaussian", ms: Sequence[int] = ()) -> list[Case]:
    """The cases of one suite, those of a weight together. `threads` goes up to that many threads.

    ms replaces the suite's own numbers of rows. Raises ValueError for other names, and for `targets` with ms or data: it has a
    choice of its own.
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
    elif name in LAYERS:
        cases = [Case(name, n, k, data, threads, m) for n, k in LAYERS[name] for m in ms or LAYER_M]
    else:
        raise ValueError(f"suite is {name!r}, expected one of {', '.join(SUITES)}")
    return sorted(cases)
