# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture-of-experts layer in MXFP4, in place of Transformers' experts module."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .._library import BLOCK
from ..functional import linear
from .description import Scheme

GATE_UP, DOWN = "gate_up_proj", "down_proj"


class MXFP4Experts(nn.Module):
    """Every expert's `down(gate(gate_up(x)))` for the tokens routed to it, its two weights in MXFP4.

    Parameters have the names and the layout of gpt-oss: for NAME `gate_up_proj` and `down_proj`, `NAME_blocks` uint8
    [E, N, K/32, 16], `NAME_scales` uint8 [E, N, K/32] and, where the model has biases, `NAME_bias` [E, N].

    Args:
        source: Transformers' experts module, whose gate function stays in use; its parameters are dropped.
        shapes: [E, N, K] of both weights, by name.
        scheme: of both.
        bias: whether there are biases.
        device, dtype: of the parameters; dtype is the biases'.
    """

    def __init__(
        self,
        source: nn.Module,
        shapes: dict[str, tuple[int, ...]],
        scheme: Scheme,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.num_experts = shapes[GATE_UP][0]
        source._parameters.clear()
        # In a tuple, so that it is no submodule: Transformers would initialize the parameters that it has no more.
        self._source = (source,)
        for name, (*rows, k) in shapes.items():
            parts = {
                "blocks": torch.zeros(*rows, k // BLOCK, BLOCK // 2, dtype=torch.uint8, device=device),
                "scales": torch.zeros(*rows, k // BLOCK, dtype=torch.uint8, device=device),
                "bias": torch.zeros(rows, device=device, dtype=dtype) if bias else None,
            }
            for part, tensor in parts.items():
                parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(f"{name}_{part}", parameter)

    def flatten_blocks(self) -> None:
        """Gives codes the shape [E, N, K/2], in which those of single experts are stacked, until `fold_blocks`."""
        for name in (f"{GATE_UP}_blocks", f"{DOWN}_blocks"):
            blocks = self.get_parameter(name)
            blocks.data = blocks.data.flatten(2)

    def fold_blocks(self) -> None:
        """Gives codes their shape [E, N, K/32, 16] back, if they have another."""
        for name in (f"{GATE_UP}_blocks", f"{DOWN}_blocks"):
            blocks = self.get_parameter(name)
            blocks.data = blocks.data.view(*blocks.shape[:2], -1, BLOCK // 2)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [T, H], the experts chosen for each [T, top_k] and their weights [T, top_k] -> [T, H]."""
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # the index that Transformers gives to slots of other ranks
                continue
            token, slot = torch.where(top_k_index == expert)
            hidden = self._gate(self._project(GATE_UP, expert, hidden_states[token]))
            y = self._project(DOWN, expert, hidden) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _gate(self, gate_up: Tensor) -> Tensor:
        return cast(Callable[[Tensor], Tensor], self._source[0]._apply_gate)(gate_up)

    def _project(self, name: str, expert: int, x: Tensor) -> Tensor:
        blocks = self.get_parameter(f"{name}_blocks")[expert].flatten(1)
        scales = self.get_parameter(f"{name}_scales")[expert]
        bias = getattr(self, f"{name}_bias")
        bias = None if bias is None else bias[expert]
        return linear(x, blocks, scales, bias, **self.scheme.arguments())

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, scheme={self.scheme}"
