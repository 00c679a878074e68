# SPDX-License-Identifier: Apache-2.0
"""A layer of experts: its operands, and who takes part in it."""

import itertools
import statistics
from collections.abc import Callable
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from .._library import BLOCK, ops
from ..functional import dequantize, prepack
from ..functional_experts import prepack_experts
from . import ggml
from .cases import Case, Router
from .contenders import MODES, Contender, Emulation, Mode, Unavailable
from .measure import Job, Run
from .operands import Problem, Weights, gaussian_mxfp4

INPUTS = 16
"""Batches of tokens in turn, each with choices of its own, so that the chosen experts' weights come from memory."""


class LayerWeights(Weights):
    """Every expert's two weights in the forms that contenders ask for, one copy of each: a layer is larger than a cache."""

    def __init__(self, case: Case, device: torch.device, working_set: int) -> None:
        assert case.experts is not None
        self.layer = case.experts
        super().__init__(case.n, case.k, case.data, device, working_set)

    def draw(self, generator: torch.Generator) -> None:
        # Each expert has the rows of the first, turned by some.
        def stacked(n: int, k: int) -> tuple[Tensor, Tensor]:
            codes, scale = (
                torch.stack([of.roll(e, 0) for e in range(self.layer.experts)]) for of in gaussian_mxfp4(n, k, generator)
            )
            return codes.to(self.device), scale.to(self.device)

        self.codes, self.scale = stacked(2 * self.n, self.k)
        self.w2, self.w2_scale = stacked(self.k, self.n)

    def fits(self, case: Case) -> bool:
        layer = case.experts
        return layer is not None and (self.n, self.k, self.layer.experts) == (case.n, case.k, layer.experts)

    @property
    def elements(self) -> int:
        """Counts the elements of one expert's weights."""
        return 3 * self.n * self.k

    @cached_property
    def prepacked(self) -> tuple[Tensor, Tensor]:
        if not hasattr(ops, "mxfp4_prepack"):
            raise Unavailable("this build has no mxfp4_prepack")
        return prepack_experts(self.codes, self.scale), prepack_experts(self.w2, self.w2_scale)

    @cached_property
    def bf16(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[E, 2I, H] and [E, H, I]."""
        return dequantize(self.codes, self.scale, torch.bfloat16), dequantize(self.w2, self.w2_scale, torch.bfloat16)


def routes(tokens: int, experts: int, top_k: int, router: Router, generator: torch.Generator) -> Tensor:
    """The experts that tokens choose, int32 [T, top_k]."""
    if router == "half":
        first = torch.rand(tokens, top_k, generator=generator) < 0.5
        return torch.randint(1, experts, (tokens, top_k), generator=generator).masked_fill(first, 0).int()
    odds = torch.arange(1, experts + 1).float().reciprocal() if router == "skewed" else torch.ones(experts)
    return torch.multinomial(odds.expand(tokens, -1), top_k, generator=generator).int()


class Layer(Problem):
    """The operands of one case: batches of x [T, H], ids and weights [T, top_k]."""

    weights: LayerWeights

    @cached_property
    def inputs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        generator, layer = torch.Generator().manual_seed(2), self.weights.layer
        assert self.case.experts is not None
        tokens, router, device = self.case.m, self.case.experts.router, self.weights.device
        # The ranks of a skewed router are turned by some experts from batch to batch.
        batches = []
        for i in range(INPUTS):
            x = torch.randn(tokens, self.case.k, generator=generator).bfloat16()
            ids = routes(tokens, layer.experts, layer.top_k, router, generator)
            ids = (ids + i * layer.experts // INPUTS) % layer.experts
            weights = torch.rand(tokens, layer.top_k, generator=generator).softmax(-1)
            batches.append((x.to(device), ids.to(device), weights.to(device)))
        return batches

    def in_turn(self) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
        return itertools.cycle(self.inputs).__next__

    @cached_property
    def chosen(self) -> float:
        """Experts that a batch chooses."""
        return statistics.fmean(ids.unique().numel() for _, ids, _ in self.inputs)

    def gate(self, u: Tensor) -> Tensor:
        """The activation in torch's own ops."""
        if self.weights.layer.activation == "silu_mul":
            g, up = u.chunk(2, -1)
            return torch.nn.functional.silu(g) * up
        g, up = u[..., ::2].clamp(max=7.0), u[..., 1::2].clamp(-7.0, 7.0)
        return g * torch.sigmoid(1.702 * g) * (up + 1)


def _layer(problem: Problem) -> Layer:
    assert isinstance(problem, Layer)
    return problem


def _ours(mode: Mode) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        layer = _layer(problem)
        (w13, w2), batch, inner = layer.weights.prepacked, layer.in_turn(), layer.case.n
        activation = layer.weights.layer.activation
        op = partial(ops.mxfp4_experts_prepacked, activation=activation, interleaved=activation == "swiglu_oai", mode=mode.name)
        return lambda: op(*batch(), w13, w2, inner)

    return setup


Project = Callable[[int, Tensor], Tensor]


def _loop(layer: Layer, up: Project, down: Project) -> Run:
    """Expert by expert, as a model's Python does it."""
    batch = layer.in_turn()

    def run() -> Tensor:
        x, ids, weights = batch()
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, slot = torch.where(ids == expert)
            y = down(expert, layer.gate(up(expert, x[token]))) * weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    return run


def _our_loop(mode: Mode) -> Callable[[Problem], Run]:
    def setup(problem: Problem) -> Run:
        layer, op = _layer(problem), mode.op("_prepacked")
        (w13, w2), inner, hidden = layer.weights.prepacked, layer.case.n, layer.case.k
        return _loop(layer, lambda e, x: op(x, w13[e], 2 * inner), lambda e, h: op(h, w2[e], hidden))

    return setup


def _our_dense(mode: Mode) -> Callable[[Problem], Run]:
    """One product of as many rows and operations, whose weight has as many rows as both of an expert's would have."""

    def setup(problem: Problem) -> Run:
        layer, op = _layer(problem), mode.op("_prepacked")
        n, k, rows = 3 * layer.case.n, layer.case.k, layer.case.m * layer.weights.layer.top_k
        weight = layer.weights.tensors_in_turn("dense", prepack(*gaussian_mxfp4(n, k, torch.Generator().manual_seed(3))))
        x = torch.randn(rows, k, generator=torch.Generator().manual_seed(4)).bfloat16()
        return lambda: op(x, *weight(), n)

    return setup


def _bf16_loop(problem: Problem) -> Run:
    layer = _layer(problem)
    w13, w2 = layer.weights.bf16
    return _loop(layer, lambda e, x: linear(x, w13[e]), lambda e, h: linear(h, w2[e]))


def _bf16_grouped(problem: Problem) -> Run:
    layer = _layer(problem)
    experts, top_k = layer.weights.layer.experts, layer.weights.layer.top_k
    w13, w2 = (w.transpose(1, 2) for w in layer.weights.bf16)
    try:
        torch._grouped_mm(layer.inputs[0][0][:1], w13[:1], offs=torch.ones(1, dtype=torch.int32, device=w13.device))
    except RuntimeError as error:
        raise Unavailable(f"torch._grouped_mm: {str(error).splitlines()[0]}") from error
    batch = layer.in_turn()

    def run() -> Tensor:
        x, ids, weights = batch()
        order = ids.flatten().argsort(stable=True)
        ends = torch.bincount(ids.flatten(), minlength=experts).cumsum(0).int()
        token = order // top_k
        u = torch._grouped_mm(x[token], w13, offs=ends)
        y = torch._grouped_mm(layer.gate(u), w2, offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add_(0, token, y.to(x.dtype))

    return run


def _emulation(problem: Problem) -> Run:
    layer = _layer(problem)
    weights, emulation = layer.weights, Emulation(layer.weights.device)

    def project(codes: Tensor, scale: Tensor) -> Project:
        return lambda e, x: linear(emulation.round_trip(x), emulation.dequantize(codes[e], scale[e]))

    return _loop(layer, project(weights.codes, weights.scale), project(weights.w2, weights.w2_scale))


def _ggml(problem: Problem, *, repacked: bool) -> Job:
    layer = _layer(problem)
    weights, tokens, top_k = layer.weights, layer.case.m, layer.weights.layer.top_k
    try:
        library = ggml.instance()
        layouts = library.repacking if repacked else [library.plain]

        def load(codes: Tensor, scale: Tensor) -> ggml.Weight:
            blocks = ggml.to_blocks(codes.flatten(0, 1), scale.flatten(0, 1))
            return ggml.Weight(library, blocks.view(*codes.shape[:2], *blocks.shape[1:]), layouts)

        form = "ggml experts repacked" if repacked else "ggml experts"
        w13, w2 = weights.copies(
            form, weights.working_set, lambda: (load(weights.codes, weights.scale), load(weights.w2, weights.w2_scale))
        )[0]
    except (ImportError, ValueError) as error:
        raise Unavailable(str(error)) from error
    library.use_threads(layer.case.threads)
    ids = [of_batch for _, of_batch, _ in layer.inputs]
    up = ggml.Products(library, layer.inputs[0][0].float().view(tokens, 1, -1), [w13] * INPUTS, 2 * layer.case.n, ids)
    h = torch.randn(tokens, top_k, layer.case.n, generator=torch.Generator().manual_seed(5))
    down = ggml.Products(library, h, [w2] * INPUTS, layer.case.k, ids)
    index = itertools.cycle(range(INPUTS)).__next__

    def run() -> None:
        i = index()
        up.run(i)
        down.run(i)

    return Job(run, library.rest)


def _bytes(bytes_per_block: float) -> Callable[[Problem], int]:
    def read(problem: Problem) -> int:
        layer = _layer(problem)
        return int(layer.chosen * layer.weights.elements // BLOCK * bytes_per_block)

    return read


def _contender(
    name: str,
    kind: Literal["ours", "peer"],
    about: str,
    setup: Callable[[Problem], Run | Job],
    bytes_per_block: float = 17,
    device: Literal["any", "cpu"] = "cpu",
) -> Contender:
    return Contender(name, kind, about, setup, bytes=_bytes(bytes_per_block), device=device, work="experts")


def _of_mode(mode: Mode) -> tuple[Contender, ...]:
    loop = f"a Python loop over experts, {mode.linear}_prepacked each, torch's activation"
    return (
        _contender(f"{mode.name}-experts", "ours", f"mxfp4_experts_prepacked, {mode.name}", _ours(mode)),
        _contender(f"{mode.name}-loop", "peer", loop, _our_loop(mode)),
    )


EXPERTS = (
    *(contender for mode in MODES for contender in _of_mode(mode)),
    Contender(
        "w4a8-dense",
        "peer",
        "mxfp4_linear_w4a8_prepacked: one product of as many rows and operations as the layer's",
        _our_dense(MODES[1]),
        device="cpu",
        work="experts",
        bytes=lambda problem: _layer(problem).weights.elements // BLOCK * 17,
    ),
    _contender("torch-bf16-loop", "peer", "a Python loop over experts, F.linear each, bfloat16", _bf16_loop, 2 * BLOCK, "any"),
    _contender("torch-bf16-grouped", "peer", "torch._grouped_mm for both products, bfloat16", _bf16_grouped, 2 * BLOCK, "any"),
    _contender("emulation-loop", "peer", "a Python loop over experts, each dequantized, then bfloat16 F.linear", _emulation),
    _contender(
        "ggml-mxfp4-id", "peer", "ggml_mul_mat_id for both products, MXFP4, x as Q8_0 inside; no activation, no sum",
        partial(_ggml, repacked=False),
    ),
    _contender(
        "ggml-mxfp4-id-repacked", "peer", "the same, repacked as llama.cpp loads it where it can", partial(_ggml, repacked=True)
    ),
)  # fmt: skip
"""Who takes part in a layer of experts. What runs there is each contender's whole layer, but for ggml's."""
