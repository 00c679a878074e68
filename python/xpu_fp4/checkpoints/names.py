# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's names are in a model."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def names_in_model(model: nn.Module, tensors: Iterable[str]) -> dict[str, list[str]]:
    """Returns what each of a checkpoint's tensors may be called in a model, by its name in the files.

    Transformers has rules that rename what was published under other names (`block_sparse_moe`, `language_model.model`). And
    one of the two may have a base model's prefix.
    """
    prefix = getattr(model, "base_model_prefix", "")
    rules = _renamings(model)
    candidates = {}
    # Transformers goes through them in this order: some of its rules wait for the first name that they are for.
    for tensor in sorted(tensors):
        name = tensor
        for rule in rules:
            name = rule.rename_source_key(name)[0]
        candidates[tensor] = [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
    return candidates


def without_conversion(model: nn.Module, tensors: Iterable[str]) -> list[str]:
    """The tensors that Transformers loads as they are. Others it transposes, stacks or splits."""
    from transformers.core_model_loading import WeightConverter

    converters = [rule for rule in _rules(model) if isinstance(rule, WeightConverter)]
    names = names_in_model(model, tensors)
    return [tensor for tensor in names if not any(rule.rename_source_key(names[tensor][0])[1] for rule in converters)]


def _renamings(model: nn.Module) -> list[Any]:
    if not hasattr(model, "base_model_prefix"):  # no model of Transformers, which may not even be there
        return []
    from transformers.core_model_loading import WeightRenaming

    return [rule for rule in _rules(model) if isinstance(rule, WeightRenaming)]


def _rules(model: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))
