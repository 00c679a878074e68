# SPDX-License-Identifier: Apache-2.0
"""The ops as typed functions. The same as `torch.ops.xpu_fp4.*`; errors are RuntimeError and name the argument."""

from typing import Literal, get_args

import torch
from torch import Tensor

from ._library import ops

ScaleMode = Literal["floor", "ceil", "even", "rceil"]
"""How a block's scale follows from its largest magnitude f * 2^E: 2^(E-2), doubled if f > 1 (ceil), f >= 1.75 (even) or f > 1.5
(rceil). floor is the OCP specification's rule, even that of compressed-tensors and Quark checkpoints."""

Mode = Literal["w4a4", "w4a16"]
"""Whether a linear quantizes its input to MXFP4 as well as its weight."""


def check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f'mode is {mode!r}, expected "w4a4" or "w4a16"')


def quantize(x: Tensor, scale_mode: ScaleMode = "even") -> tuple[Tensor, Tensor]:
    """x [..., K] (float32, float16, bfloat16) -> codes [..., K/2] float4_e2m1fn_x2, scales [..., K/32] float8_e8m0fnu.

    Rounds to nearest, ties to even, saturating (OCP Microscaling Formats v1.0, section 6.3, for `floor`). A block with a NaN or
    Inf gets the scale NaN and codes 0.
    """
    q, scale = ops.mxfp4_quantize(x, scale_mode)
    return q, scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes [..., K/2] and scales [..., K/32] (their dtypes or uint8) -> values [..., K] of dtype, each rounded once."""
    out: Tensor = ops.mxfp4_dequantize(q, scale, dtype)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    mode: Mode = "w4a4",
    scale_mode: ScaleMode = "even",
    expanded: Tensor | None = None,
) -> Tensor:
    """x [..., K] @ weight [N, K]^T + bias [N] -> [..., N] of x's dtype; weight as codes [N, K/2] and scales [N, K/32].

    `w4a4` quantizes x with scale_mode, and its result is defined to the bit; `w4a16` takes x as it is and sums in float32.
    expanded: what `expand` gave for this weight, for mode `w4a4`; the result is the same bits.

    Raises:
        ValueError: mode is neither, or `w4a16` with an expanded weight.
        RuntimeError: an argument does not fit; the message names it.
    """
    check_mode(mode)
    out: Tensor
    if expanded is not None:
        if mode != "w4a4":
            raise ValueError(f'an expanded weight is for mode "w4a4", got mode {mode!r}')
        out = ops.mxfp4_linear_expanded(x, weight, weight_scale, expanded, bias, scale_mode)
    elif mode == "w4a4":
        out = ops.mxfp4_linear(x, weight, weight_scale, bias, scale_mode)
    else:
        out = ops.mxfp4_linear_w4a16(x, weight, weight_scale, bias)
    return out


def expand(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Codes [N, K/2] and scales [N, K/32] -> the form in which W4A4 products for many rows read a weight on a GPU.

    It is uint8 and opaque; without it they make that form anew in each call. It takes 1.03 bytes an element (N rounded up to a
    multiple of 32, K to one of 128) beside the 0.53 of codes and scales, which products for few rows go on reading.

    Raises:
        RuntimeError: the kernels have no such form: native CPU kernels (see `prepack`), devices without a matrix unit.
    """
    out: Tensor = ops.mxfp4_expand(weight, weight_scale)
    return out


def prepack(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Codes [N, K/2] and scales [N, K/32] on the CPU -> the same weight in the native kernels' own layout, uint8 and opaque.

    Its size is that of codes and scales, with N rounded up to a multiple of 16 and K to one of 128. Results are the same bits.
    """
    out: Tensor = ops.mxfp4_prepack(weight, weight_scale)
    return out


def unprepack(prepacked: Tensor, out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The way back: codes uint8 [N, K/2] and scales uint8 [N, K/32]. RuntimeError if prepacked is not of that N and K."""
    weight, scale = ops.mxfp4_unprepack(prepacked, out_features, in_features)
    return weight, scale


def linear_prepacked(
    x: Tensor,
    weight: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    mode: Mode = "w4a4",
    scale_mode: ScaleMode = "even",
) -> Tensor:
    """`linear` with a weight from `prepack` of out_features rows."""
    check_mode(mode)
    out: Tensor
    if mode == "w4a4":
        out = ops.mxfp4_linear_prepacked(x, weight, out_features, bias, scale_mode)
    else:
        out = ops.mxfp4_linear_w4a16_prepacked(x, weight, out_features, bias)
    return out
