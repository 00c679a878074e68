# SPDX-License-Identifier: Apache-2.0
"""Quantizes a model in place; expands its weights for GPUs."""

import warnings
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from ._library import BLOCK
from ._text import shorten
from .functional import Group, Hadamard, Mode, ScaleMode, modes_of
from .modules import MXFP4Linear
from .moe import MXFP4Experts, experts_in, is_known, put

Model = TypeVar("Model", bound=nn.Module)
_WORTH_A_WORD = 0.01
"""Tables of positions are less than that."""
Filter = Callable[[nn.Module, str], bool]


def all_but_lm_head(module: nn.Module, name: str) -> bool:
    """The default filter: every linear layer but the output head, which checkpoints leave in high precision."""
    return name.rpartition(".")[2] != "lm_head"


def quantize_(
    model: Model,
    *,
    mode: Mode = "w4a8",
    scale_mode: ScaleMode = "even",
    group: Group = 128,
    hadamard: Hadamard = 0,
    filter_fn: Filter = all_but_lm_head,
    progress: bool = False,
) -> Model:
    """Replaces the nn.Linear modules of a model by MXFP4Linear, in place, and returns the model.

    Modules with the experts of a layer, as Transformers has them, are replaced by MXFP4Experts.

    Args:
        model: any module that contains nn.Linear; subclasses of nn.Linear are left alone, since their owners look inside them.
        mode, scale_mode, group, hadamard: as for MXFP4Linear.
        filter_fn: called with (module, its dotted name) for every nn.Linear and every module of experts; those for which it is
            false stay.
        progress: whether to draw a progress bar.

    Raises:
        ValueError: the model is itself an nn.Linear (use MXFP4Linear.from_linear), or in_features is no multiple of 32.

    Other matrices, embeddings and convolutions aside (experts whose gate is not known, GPT-2's Conv1D, nn.MultiheadAttention),
    stay as they are, and are named in a warning.
    """
    linears = linears_to_replace(model, filter_fn, hadamard, stacklevel=3)
    experts = experts_to_replace(model, filter_fn, hadamard)
    chosen: list[tuple[str, nn.Module]] = [*linears.items(), *experts.items()]
    if progress:
        from rich.progress import track

        steps = track(chosen, description=f"Quantizing to MXFP4 ({mode})")
    else:
        steps = chosen
    replacement: dict[nn.Module, nn.Module] = {}
    how: dict[str, Any] = {"mode": mode, "scale_mode": scale_mode, "group": group, "hadamard": hadamard}
    for name, module in steps:
        if module not in replacement:
            is_linear = name in linears
            replacement[module] = (
                MXFP4Linear.from_linear(linears[name], **how) if is_linear else MXFP4Experts.from_experts(module, **how)
            )
        put(model, name, replacement[module])
    return model


def experts_to_replace(model: nn.Module, filter_fn: Filter, hadamard: Hadamard = 0) -> dict[str, nn.Module]:
    """The modules of experts of a known kind for which filter_fn is true, by their names.

    Raises ValueError, with the name, if a K is no multiple of 32 or of hadamard.
    """
    chosen = {}
    for name, module in experts_in(model):
        if is_known(module) and filter_fn(module, name):
            chosen[name] = module
            try:
                MXFP4Experts.like(module, hadamard=hadamard)
            except ValueError as error:
                raise ValueError(f"{name}: {error}: leave it out by filter_fn") from None
    return chosen


def linears_to_replace(
    model: nn.Module, filter_fn: Filter, hadamard: Hadamard = 0, *, stacklevel: int = 2
) -> dict[str, nn.Linear]:
    """The nn.Linear modules for which filter_fn is true, by their names; errors and warnings are those of `quantize_`."""
    if type(model) is nn.Linear:
        raise ValueError("model is itself an nn.Linear and cannot be replaced in place: use MXFP4Linear.from_linear")
    # Duplicates too: a shared layer has several names, and each of its owners must get the replacement.
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear}
    chosen = {name: linear for name, linear in linears.items() if filter_fn(linear, name)}
    for name, linear in chosen.items():
        size = max(BLOCK, hadamard)
        if linear.in_features % size != 0:
            raise ValueError(
                f"{name} has in_features {linear.in_features}, expected a multiple of {size}: leave it out by filter_fn"
            )
    others = _other_matrices(model, experts_to_replace(model, filter_fn, hadamard))
    share = sum(p.numel() for p in others.values()) / max(1, sum(p.numel() for p in model.parameters()))
    if share >= _WORTH_A_WORD:
        warnings.warn(
            f"{share:.0%} of the parameters are not quantized, in no nn.Linear: {shorten(others)}", stacklevel=stacklevel
        )
    elif not linears:
        warnings.warn(f"{type(model).__name__} has no nn.Linear, nothing is quantized", stacklevel=stacklevel)
    return chosen


def _other_matrices(model: nn.Module, replaced: Collection[str]) -> dict[str, nn.Parameter]:
    """Returns what could be quantized by its shape, and is in no module that is left alone on purpose."""
    known = (nn.Embedding, nn.EmbeddingBag, _ConvNd)
    return {
        f"{name}.{kind}".lstrip("."): parameter
        for name, module in model.named_modules()
        if name not in replaced and type(module) is not nn.Linear and not isinstance(module, known)
        for kind, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point() and parameter.dim() > 1 and min(parameter.shape[-2:]) >= BLOCK
    }


def expand_(model: Model) -> Model:
    """Calls `expand_` of every MXFP4Linear of mode `w4a4` or `w4a8`, and returns the model.

    On a GPU that is faster prefill for three times the memory of weights.

    Raises:
        RuntimeError: a weight's device has no expanded form.
    """
    for module in model.modules():
        if isinstance(module, MXFP4Linear) and module.mode in modes_of("expanded"):
            module.expand_()
    return model
