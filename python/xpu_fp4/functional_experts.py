# SPDX-License-Identifier: Apache-2.0
"""The ops of layers of experts as typed functions, like those of functional."""

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from ._library import ops
from .functional import Activation, Group, Hadamard, Mode, ScaleMode, prepack, unprepack

if TYPE_CHECKING:
    from typing_extensions import Unpack


def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    *,
    activation: Activation = "silu_mul",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    mode: Mode = "w4a16",
    scale_mode: ScaleMode = "even",
    group: Group = 128,
    hadamard: Hadamard = 0,
    expert_map: Tensor | None = None,
    router_on_input: bool = False,
    w13_offset: Tensor | None = None,
    w2_offset: Tensor | None = None,
) -> Tensor:
    """A layer of experts: x [T, H] -> [T, H], for each token the sum over its slots of weight * W2 act(W13 x).

    Both products are those of `linear` in that mode, W13's rounded to x's dtype like what `act` makes of it, W2's left in
    float32; slots are added by ascending position, an fma each, and the sum is rounded once. So `w4a4` and `w4a8` are defined
    to the bit, whatever tokens come together.

    Args:
        topk_ids: int32 or int64 [T, top_k], the experts chosen for each token. An id that is none of them adds nothing.
        topk_weights: [T, top_k], how much each counts.
        w13, w13_scale: codes [E, 2I, H/2] and scales [E, 2I, H/32] of gate and up; w13_bias [E, 2I].
        w2, w2_scale: codes [E, H, I/2] and scales [E, H, I/32]; w2_bias [E, H].
        activation: what joins gate and up; alpha and limit are swiglu_oai's.
        interleaved: the rows of w13 alternate gate and up, as gpt-oss has them; otherwise gate's come first.
        scale_mode, group, hadamard: as in `linear`, for both products.
        expert_map: int32, of which entry `id` is the expert's place in w13 and w2, or -1: experts of other processes.
        router_on_input: topk_weights multiply x on its way in instead of the sum (Llama 4).
        w13_offset, w2_offset: float32 [H] and [I], `input_offset` of the two products, for all experts the same.

    Raises:
        RuntimeError: an argument does not fit; the message names it.
    """
    out: Tensor = ops.mxfp4_experts(
        x, topk_ids, topk_weights, w13, w13_scale, w2, w2_scale, w13_bias, w2_bias, activation, interleaved, alpha, limit,
        mode, scale_mode, group, hadamard, expert_map, router_on_input, w13_offset, w2_offset,
    )  # fmt: skip
    return out


def prepack_experts(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Codes [E, N, K/2] and scales [E, N, K/32] on the CPU -> `prepack` of each expert, stacked."""
    return torch.stack([prepack(codes, scale) for codes, scale in zip(weight, weight_scale, strict=True)])


def unprepack_experts(prepacked: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The way back: codes uint8 [E, N, K/2] and scales uint8 [E, N, K/32]. RuntimeError if prepacked is not of that N and K."""
    codes, scales = zip(*(unprepack(weight, out_features, in_features) for weight in prepacked), strict=True)
    return torch.stack(codes), torch.stack(scales)


class ExpertsOptions(TypedDict, total=False):
    """What `experts` takes by keyword, with the same defaults."""

    activation: Activation
    interleaved: bool
    alpha: float
    limit: float
    mode: Mode
    scale_mode: ScaleMode
    group: Group
    hadamard: Hadamard
    expert_map: Tensor | None
    router_on_input: bool
    w13_offset: Tensor | None
    w2_offset: Tensor | None


def experts_prepacked(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    intermediate_size: int,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    **options: "Unpack[ExpertsOptions]",
) -> Tensor:
    """`experts` with weights from `prepack_experts`; intermediate_size is I."""
    out: Tensor = ops.mxfp4_experts_prepacked(
        x, topk_ids, topk_weights, w13, w2, intermediate_size, w13_bias, w2_bias, **options
    )
    return out
