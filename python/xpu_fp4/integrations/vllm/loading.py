# SPDX-License-Identifier: Apache-2.0
"""Parameters of vLLM's layers that are not a part for each of the layers that they are made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def load_the_same(weight_loader: Callable[..., None], layer: str, what: str) -> Callable[..., None]:
    """Loads a parameter, all NaN at first, of which each part of a fused layer has one in the files, but all the same."""

    def load(param: Any, loaded: Tensor, *shard: Any, **more: Any) -> None:
        before = param.data.clone()
        weight_loader(param, loaded, *shard, **more)
        if not before.isnan().all() and not torch.equal(before, param.data):
            raise ValueError(f"{layer}: its parts have different {what}, expected one for all that vLLM makes one layer of")

    return load
