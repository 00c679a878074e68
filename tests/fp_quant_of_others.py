# SPDX-License-Identifier: Apache-2.0
"""What FP-Quant computes and stores, in plain torch by its own formulas: nothing of xpu_fp4 takes part."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
MIDDLES = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
TIMES = {"abs_max": 3.0, "quest": 1.0}


def matrix(size: int) -> Tensor:
    """Its transform's: Sylvester's by Kronecker products, over the root, in bfloat16. 0: the identity, of size 32."""
    if size == 0:
        return torch.eye(32).bfloat16()
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), found)
    scaled: Tensor = found / size**0.5
    return scaled.bfloat16()


def sequency_ordered(size: int) -> Tensor:
    """Its `gsr`: the same columns, by the number of their changes of sign."""
    found = matrix(size)
    return found[:, torch.diff(found, dim=0).ne(0).sum(0).argsort()].contiguous()


def quantize(x: Tensor, turn: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """Returns what its tests hold its kernels to, in float64: codes [..., K], scale bytes [..., K/32]; ties to even codes."""
    turned = (x.double().unflatten(-1, (-1, len(turn))) @ turn.double()).flatten(-2).unflatten(-1, (-1, 32))
    scale = turned.abs().amax(-1) if method == "abs_max" else turned.std(-1, correction=0) * (2.92247856 / 6)
    power = (scale + 1e-8).log2().floor()
    scaled = turned / power.exp2()[..., None] * TIMES[method]
    above = torch.bucketize(scaled.abs(), MIDDLES)  # a tie counts as below
    tie = scaled.abs() == MIDDLES[above.clamp(max=6)]
    codes = above + (tie & (above % 2 == 1)).int() + 8 * torch.signbit(scaled).int()
    return codes.flatten(-2).to(torch.uint8), (power + 127).to(torch.uint8)


def values(codes: Tensor, scale: Tensor) -> Tensor:
    """float64 [..., K]: of `abs_max` three times the elements."""
    signed = MAGNITUDES[(codes & 7).long()] * torch.where(codes >= 8, -1.0, 1.0)
    blocks: Tensor = signed.unflatten(-1, (-1, 32)) * (scale.double() - 127).exp2()[..., None]
    return blocks.flatten(-2)


def linear(x: Tensor, weight: Tensor, turn: Tensor, method: str) -> Tensor:
    """The product of x and an unquantized weight, float64, both quantized."""
    a, w = (values(*quantize(operand, turn, method)) for operand in (x, weight))
    return a @ w.t() / TIMES[method] ** 2


def emulate(model: nn.Module, linears: Iterable[str], weight_turn: Tensor, turn: Tensor, method: str) -> None:
    """Has linear layers compute as FP-Quant's do, in float64, with their weights of now; weights have a matrix of their own."""

    def forward_of(layer: Any) -> Callable[[Tensor], Tensor]:
        weight = values(*quantize(layer.weight, weight_turn, method)).t() / TIMES[method] ** 2
        bias = 0 if layer.bias is None else layer.bias.double()
        return lambda x: (values(*quantize(x, turn, method)) @ weight + bias).to(x.dtype)

    for name in linears:
        layer: Any = model.get_submodule(name)
        layer.forward = forward_of(layer)


def config(method: str, size: int, **changes: Any) -> dict[str, Any]:
    """Writes it as Transformers does."""
    return {
        "quant_method": "fp_quant",
        "forward_dtype": "mxfp4",
        "forward_method": method,
        "backward_dtype": "bf16",
        "hadamard_group_size": size or 32,
        "transform_init": "hadamard" if size else "identity",
        "pseudoquantization": False,
        "store_master_weights": False,
        "modules_to_not_convert": ["lm_head"],
    } | changes


def tensors(model: nn.Module, linears: Iterable[str], turn: Tensor, method: str) -> dict[str, Tensor]:
    """A model's tensors with its linear layers quantized, as Transformers writes them."""
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in linears:
        codes, scale = quantize(found.pop(f"{name}.weight"), turn, method)
        found |= {
            f"{name}.qweight": codes[:, 0::2] | codes[:, 1::2] << 4,
            f"{name}.scales": scale,
            f"{name}.weight_global_scale": torch.tensor([TIMES[method]]).bfloat16(),
            f"{name}.act_global_scale": torch.tensor([TIMES[method]]).bfloat16(),
            f"{name}.forward_hadamard_matrix": turn.clone(),
            f"{name}.backward_hadamard_matrix": turn.clone(),
            # What Transformers has in place of what it does not need.
            f"{name}.weight": torch.zeros(0),
            f"{name}.dqweight": torch.zeros(0),
        }
    return found
