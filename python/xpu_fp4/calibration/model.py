# SPDX-License-Identifier: Apache-2.0
"""Calibrates the linears of a model, block by block."""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .._text import shorten
from ..checkpoints.description import Scheme, get_scale_mode
from ..checkpoints.quantized import QuantizedLinear, round_to_nearest, schemes_of
from ..convert import Filter, all_but_lm_head, experts_to_replace, linears_to_replace
from ..functional import Group, Hadamard, Mode, ScaleMode, check_mode
from .blocks import Batch, Call, block_lists, record, walk
from .experts import fuse, schemes_of_each, unfuse
from .layers import linear_of, put, quantize_block

Model = TypeVar("Model", bound=nn.Module)
Progress = Callable[[int, int], None]
"""Called with the number of blocks that are done, and of all."""


def calibrate_(
    model: Model,
    batches: Sequence[Batch],
    *,
    mode: Mode = "w4a8",
    scale_mode: ScaleMode = "even",
    group: Group = 128,
    hadamard: Hadamard = 0,
    offset: bool = False,
    keep_high: Sequence[str] = (),
    correct: bool = False,
    filter_fn: Filter = all_but_lm_head,
    progress: Progress = lambda done, total: None,
) -> Model:
    """Replaces the nn.Linear modules of a model by MXFP4Linear, in place, their weights rounded by GPTQ, and returns the model.

    Modules of experts become MXFP4Experts, each expert's weights rounded on the tokens that are routed to it.

    It goes block by block (the entries of a model's ModuleLists), with the blocks before quantized, and in each linear by
    linear, on the inputs as they will be multiplied: without their offset, transformed, quantized. The same model, batches and
    number of threads give the same bits.

    Memory, beside the model: what its blocks give on all batches; the calls of one block; what one batch takes in a block; for
    one linear, or those with the same input, its Hessian (float32 [K, K]) three times and its weight in float32 three times.
    With `correct`: what blocks give, and their calls, twice; the inputs of one block's linears; one more [K, K].

    Args:
        model: a decoder or encoder on the CPU, in eval mode.
        batches: what the model is called with: token ids [batch, length], or keyword arguments. Padding counts like text.
        mode, scale_mode, group, hadamard: as for MXFP4Linear, but without FP-Quant's rules.
        offset: whether each layer subtracts the mean of its inputs first; what that takes from the output is put into the bias.
        keep_high: linears that compute in W4A16, by the last part of their names, the whole name, or `re:` and a regex.
        correct: whether each layer makes up for a part of what those before it have lost, besides its own rounding. The
            original is computed alongside, in 1.6 times the arithmetic.
        filter_fn: called with (module, its dotted name) for every nn.Linear and every module of experts; those for which it is
            false stay.
        progress: called with the number of blocks that are done, and of all.

    Raises:
        ValueError: no batches, an entry of keep_high that names no linear, a linear whose in_features is no multiple of 32
            or of hadamard, inputs that hold NaN or Inf.

    Linears that saw too few tokens (experts), or are in no block, are rounded to nearest, and named in a warning.
    """
    check_mode(mode)
    if not batches:
        raise ValueError("batches is empty, expected what the model is called with to calibrate it")
    linears = linears_to_replace(model, filter_fn, hadamard, stacklevel=3)
    first: dict[nn.Linear, str] = {}  # of a shared layer's names
    for name, linear in linears.items():
        first.setdefault(linear, name)
    experts = list(experts_to_replace(model, filter_fn, hadamard))
    scheme = Scheme(mode, get_scale_mode(scale_mode, "calibrate_"), group, hadamard, offset)
    schemes = schemes_of([*first.values(), *experts], scheme, keep_high)
    of_experts = {name: schemes.pop(name) for name in experts}
    unfuse(model, experts)
    schemes |= schemes_of_each(model, of_experts)
    rounded = calibrate_blocks(model, batches, schemes, progress, correct=correct)
    outside = [name for name in schemes if isinstance(model.get_submodule(name), nn.Linear)]
    for name in outside:
        put(model, name, round_to_nearest(linear_of(model, name).weight, schemes[name], f"the weight of {name}"))
    for name, linear in linears.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_submodule(first[linear]))
    fuse(model, of_experts)
    if rounded or outside:
        warnings.warn(not_calibrated(rounded, outside), stacklevel=2)
    return model


def not_calibrated(rounded: Collection[str], outside: Collection[str]) -> str:
    """Says which layers were rounded to nearest: those that saw too few tokens, and those that are in no block."""
    why = {"too few tokens reach": rounded, "in no block are": outside}
    return "rounded to nearest: " + "; ".join(f"{reason} {len(of)} ({shorten(of)})" for reason, of in why.items() if of)


@dataclass(frozen=True)
class FinishedBlock:
    """What became of a block's linears, by their names in the model."""

    layers: dict[str, QuantizedLinear]
    rounded: list[str]
    """Those that too few tokens reached, or none: they were rounded to nearest."""


class Store(Protocol):
    """Where finished blocks are kept, so that an interrupted calibration can go on."""

    def load(self, block: str) -> FinishedBlock | None: ...

    def save(self, block: str, finished: FinishedBlock) -> None: ...


@torch.no_grad()
def calibrate_blocks(
    model: nn.Module,
    batches: Sequence[Batch],
    schemes: Mapping[str, Scheme],
    progress: Progress,
    store: Store | None = None,
    *,
    correct: bool = False,
) -> list[str]:
    """Quantizes linears of a model's blocks, in place; returns the names of those that were rounded to nearest.

    Args:
        schemes: of the linears, by their names. Those that are in no block stay as they are.
        store: it gets what becomes of each block, which leaves the model after that; a block that it has is not made again.
        correct: as for calibrate_.
    """
    lists = block_lists(model, schemes)
    total = sum(map(len, lists))
    done = 0
    rounded: list[str] = []

    def process(name: str, block: nn.Module, calls: list[Call]) -> list[Any]:
        nonlocal done
        of_block = {layer.removeprefix(f"{name}."): s for layer, s in schemes.items() if layer.startswith(f"{name}.")}
        calls, in_original = calls[: len(batches)], calls[len(batches) :]
        inputs, original_outputs = record(block, in_original, of_block)  # while the block is still the original
        finished = store.load(name) if store else None
        if finished is None:
            finished = _quantize(name, block, calls, of_block, inputs if correct else None)
            if store:
                store.save(name, finished)
        else:
            for layer, result in finished.layers.items():
                put(model, layer, result)
        outputs = [call.run(block) for call in calls]
        if store:  # from now on its results stand for the block
            for layer in finished.layers:
                model.get_submodule(layer).to("meta")
        rounded.extend(finished.rounded)
        done += 1
        progress(done, total)
        return outputs + original_outputs

    progress(0, total)
    with _without_cache(model):
        # The second time, batches go through blocks as they were.
        walk(model, [*batches, *batches] if correct else batches, lists, process)
    return rounded


def _quantize(
    name: str,
    block: nn.Module,
    calls: list[Call],
    schemes: Mapping[str, Scheme],
    originals: Mapping[str, Sequence[Tensor]] | None,
) -> FinishedBlock:
    layers, rounded = quantize_block(block, calls, schemes, name, originals)
    return FinishedBlock({f"{name}.{n}": layer for n, layer in layers.items()}, [f"{name}.{n}" for n in rounded])


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Has decoders of Transformers keep no keys and values, to which a block would add each time that it is run."""
    parts: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = [config for config in parts if getattr(config, "use_cache", False)]
    for c in configs:
        c.use_cache = False
    try:
        yield
    finally:
        for c in configs:
            c.use_cache = True
