# SPDX-License-Identifier: Apache-2.0
"""Times a layer as `xpu-fp4 explain` describes it, with weights of its shape that come from memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..explanation import Experts, Layer
from ..functional import linear_prepacked, prepack
from ..functional_experts import experts_prepacked
from . import experts as experts_bench
from .cases import Case
from .cases import Experts as ExpertsOfCase
from .contenders import Contender
from .measure import Run
from .operands import Problem
from .runner import run

SECONDS = 0.5
"""For each figure, beside what it takes to make the operands."""


def measure(layer: Layer, rows: int, dtype: torch.dtype) -> float:
    """Seconds of a call with [rows, k] of dtype on this CPU: the median over as many as fit in SECONDS, and 3 at least."""
    if isinstance(layer, Experts):
        of = ExpertsOfCase(layer.experts, layer.top_k, "silu_mul")
        case = Case("explain", layer.intermediate, layer.hidden, "gaussian", torch.get_num_threads(), rows, experts=of)
    else:
        case = Case("explain", layer.n, layer.k, "gaussian", torch.get_num_threads(), rows)
    setup = _experts(layer, dtype) if isinstance(layer, Experts) else _linear(layer, dtype)
    return run([case], [Contender("explained", "ours", "", setup, work="any")], seconds=SECONDS).results[0].seconds


def _linear(layer: Layer, dtype: torch.dtype) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        weight = problem.weights.tensors_in_turn("explained", prepack(problem.weights.codes, problem.weights.scale))
        x, n, how = problem.x.to(dtype), problem.case.n, layer.scheme.arguments()
        offset = torch.zeros(problem.case.k) if layer.scheme.input_offset else None

        def call() -> Tensor:
            (strips,) = weight()
            return linear_prepacked(x, strips, n, input_offset=offset, **how)

        return call

    return setup


def _experts(layer: Layer, dtype: torch.dtype) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        assert isinstance(problem, experts_bench.Layer)
        (w13, w2), batch, how = problem.weights.prepacked, problem.in_turn(), layer.scheme.arguments_of_experts()
        if layer.scheme.input_offset:
            how |= {"w13_offset": torch.zeros(problem.case.k), "w2_offset": torch.zeros(problem.case.n)}

        def call() -> Tensor:
            x, ids, weights = batch()
            return experts_prepacked(x.to(dtype), ids, weights, w13, w2, problem.case.n, **how)

        return call

    return setup
