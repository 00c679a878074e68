# SPDX-License-Identifier: Apache-2.0
"""Calibrates a model: `calibrate_` in memory, and what `quantize_checkpoint` does the same with, block by block."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .._library import BLOCK
from .._text import shorten
from ..checkpoints.description import Scheme
from ..convert import Filter, all_but_lm_head
from ..functional import Group, Mode, ScaleMode, check_mode
from .blocks import Batch, Call, block_lists, walk
from .layers import QuantizedLinear, linear_of, put, quantize_block, round_to_nearest

Model = TypeVar("Model", bound=nn.Module)
Progress = Callable[[int, int], None]
"""Called with the number of blocks that are done, and of all."""


@dataclass
class Calibrated:
    """What became of linears, by their names in the model."""

    layers: dict[str, QuantizedLinear] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)
    """Those that were rounded to nearest, having seen too few tokens, or none."""


class Store(Protocol):
    """Keeps finished blocks, so that an interrupted calibration can go on."""

    def load(self, block: str) -> Calibrated | None: ...

    def save(self, block: str, result: Calibrated) -> None: ...


@torch.inference_mode()
def calibrate_blocks(
    model: nn.Module,
    batches: Sequence[Batch],
    schemes: Mapping[str, Scheme],
    progress: Progress,
    *,
    store: Store | None = None,
) -> Calibrated:
    """Quantizes the linears named in schemes, in place.

    store: what it has is not calculated again, and what it is given is not kept in the model.
    """
    lists = block_lists(model, schemes)
    total = sum(map(len, lists))
    all_of = Calibrated()
    done = 0

    def process(prefix: str, block: nn.Module, calls: list[Call]) -> list[Any]:
        nonlocal done
        own = {name.removeprefix(f"{prefix}."): s for name, s in schemes.items() if name.startswith(f"{prefix}.")}
        result = store.load(prefix) if store else None
        if result is None:
            layers, rounded = quantize_block(block, calls, own, prefix)
            result = Calibrated({f"{prefix}.{n}": layer for n, layer in layers.items()}, [f"{prefix}.{n}" for n in rounded])
            if store:
                store.save(prefix, result)
        else:
            for name, layer in result.layers.items():
                put(model, name, layer)
        outputs = [call.run(block) for call in calls]
        all_of.layers |= result.layers
        all_of.rounded += result.rounded
        done += 1
        progress(done, total)
        return outputs

    progress(0, total)
    walk(model, batches, lists, process)
    for name in schemes.keys() - all_of.layers.keys():
        linear = linear_of(model, name)
        all_of.layers[name] = round_to_nearest(linear.weight, linear.bias, schemes[name], name)
        all_of.rounded.append(name)
        put(model, name, all_of.layers[name])
    return all_of
