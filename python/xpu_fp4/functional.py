# SPDX-License-Identifier: Apache-2.0
"""The ops as typed functions, but those of experts, which functional_experts has. The same as `torch.ops.xpu_fp4.*`; errors are
RuntimeError and name the argument."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._library import ops

ScaleMode = Literal["floor", "ceil", "even", "rceil", "abs_max", "quest"]
"""How a block's scale follows from its largest magnitude f * 2^E: 2^(E-2), doubled if f > 1 (ceil), f >= 1.75 (even) or f > 1.5
(rceil). floor is the OCP specification's rule, even that of compressed-tensors and Quark checkpoints. abs_max and quest are
FP-Quant's: 2^E, under which codes stand for 3 times the elements; the power of two at or below 0.487 standard deviations."""

GLOBAL_SCALES: dict[ScaleMode, float] = {"abs_max": 3.0}
"""What codes and scales stand for, over what was quantized, of rules where that is not 1."""

Mode = Literal["w4a4", "w4a8", "w4a16"]
"""What a linear with MXFP4 weights makes of its input: MXFP4, MXINT8 (8-bit integers under the scales of MXFP4), nothing."""

Group = Literal[32, 128]
"""Elements of the input that share an MXINT8 scale: one block, as OCP has it, or four neighbouring blocks."""

Hadamard = Literal[0, 32, 64, 128]
"""Size of the Hadamard matrices that blocks of a row are multiplied with before they are quantized, or 0 for none."""

Activation = Literal["silu_mul", "swiglu_oai"]
"""What joins an expert's gate g and up u: g * sigmoid(g) * u; or gpt-oss' g * sigmoid(alpha * g) * (u + 1) of g and u that were
clamped to a limit."""

Form = Literal["stored", "prepacked", "expanded"]
"""How a weight lies in memory: as checkpoints store it, as `prepack` gives it, or as stored and as `expand` gives it."""


class _Product(NamedTuple):
    """A mode's ops. Each takes (x, the weight's operands, bias, options)."""

    options: tuple[str, ...]  # how x is quantized; what comes before that, all modes take
    ops: dict[Form, Any]


_PRODUCTS: dict[Mode, _Product] = {
    "w4a4": _Product(
        ("scale_mode",),
        {"stored": ops.mxfp4_linear, "prepacked": ops.mxfp4_linear_prepacked, "expanded": ops.mxfp4_linear_expanded},
    ),
    "w4a8": _Product(
        ("group",),
        {
            "stored": ops.mxfp4_linear_w4a8,
            "prepacked": ops.mxfp4_linear_w4a8_prepacked,
            "expanded": ops.mxfp4_linear_w4a8_expanded,
        },
    ),
    "w4a16": _Product((), {"stored": ops.mxfp4_linear_w4a16, "prepacked": ops.mxfp4_linear_w4a16_prepacked}),
}


_CAST = (torch.float32, torch.float16, torch.bfloat16)
"""What autocast gives another dtype."""


def check_mode(mode: str) -> None:
    if mode not in _PRODUCTS:
        raise ValueError(f"mode is {mode!r}, expected {_either(_PRODUCTS)}")


def options_of(mode: Mode) -> tuple[str, ...]:
    """The arguments of `linear` that say how x is quantized in that mode."""
    return _PRODUCTS[mode].options


def modes_of(form: Form) -> list[Mode]:
    """The modes that have a product with a weight of that form."""
    return [mode for mode, product in _PRODUCTS.items() if form in product.ops]


def multiply(
    form: Form,
    operands: tuple[Tensor | int, ...],
    x: Tensor,
    bias: Tensor | None,
    mode: Mode,
    hadamard: Hadamard,
    input_offset: Tensor | None,
    weight_global_scale: float,
    **options: object,
) -> Tensor:
    """The product of x and a weight, by the op for that mode and form.

    Args:
        operands: what the op takes of the weight.
        options: those of every mode; the mode's own are passed on.

    Raises:
        ValueError: there is no such mode, or it has no product with a weight of that form.
    """
    check_mode(mode)
    product = _PRODUCTS[mode]
    if form not in product.ops:
        raise ValueError(f"an {form} weight is for mode {_either(modes_of(form))}, got mode {mode!r}")
    # nn.Linear does so too. torch knows of no autocast on meta tensors, and raises.
    if isinstance(x, Tensor) and not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype in _CAST:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    how = [options[name] for name in product.options]
    out: Tensor = product.ops[form](x, *operands, bias, *how, hadamard, input_offset, weight_global_scale)
    return out


def _either(names: Iterable[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)


def quantize(
    x: Tensor, scale_mode: ScaleMode = "even", *, hadamard: Hadamard = 0, input_offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., K] (float32, float16, bfloat16) -> codes [..., K/2] float4_e2m1fn_x2, scales [..., K/32] float8_e8m0fnu.

    Rounds to nearest, ties to even, saturating (OCP Microscaling Formats v1.0, section 6.3, for `floor`). A block with a NaN or
    Inf gets the scale NaN and codes 0. Under `abs_max` codes and scales stand for 3 x.
    hadamard, input_offset: what comes before that, in float32: input_offset [K], float32, is subtracted from each row, and the
    row multiplied by a block diagonal of orthonormal Sylvester matrices of that size, which divides K. They spread outliers
    over a block, and are their own inverse: with a weight that was quantized with the same hadamard, products are the same.
    """
    q, scale = ops.mxfp4_quantize(x, scale_mode, hadamard, input_offset)
    return q, scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes [..., K/2] and scales [..., K/32] (their dtypes or uint8) -> values [..., K] of dtype, each rounded once."""
    out: Tensor = ops.mxfp4_dequantize(q, scale, dtype)
    return out


def mxint8_quantize(
    x: Tensor, group: Group = 128, *, hadamard: Hadamard = 0, input_offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., K] (float32, float16, bfloat16) -> codes int8 [..., K], scales [..., K/32] float8_e8m0fnu.

    A code stands for code * 2^-6 * scale (OCP Microscaling Formats v1.0, element INT8). The blocks of a group have the same
    scale, the least that holds its largest magnitude; a last group may be shorter. Rounds to nearest, ties to even; -128 does
    not occur. A group with a NaN or Inf gets the scale NaN and codes 0. hadamard and input_offset are those of `quantize`.
    """
    q, scale = ops.mxint8_quantize(x, group, hadamard, input_offset)
    return q, scale


def mxint8_dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes int8 [..., K] and scales [..., K/32] (float8_e8m0fnu or uint8) -> values [..., K] of dtype, each rounded once."""
    out: Tensor = ops.mxint8_dequantize(q, scale, dtype)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    mode: Mode = "w4a4",
    scale_mode: ScaleMode = "even",
    group: Group = 128,
    hadamard: Hadamard = 0,
    input_offset: Tensor | None = None,
    weight_global_scale: float = 1.0,
    expanded: Tensor | None = None,
) -> Tensor:
    """x [..., K] @ weight [N, K]^T + bias [N] -> [..., N] of x's dtype; weight as codes [N, K/2] and scales [N, K/32].

    `w4a4` quantizes x to MXFP4 with scale_mode, `w4a8` to MXINT8 with a scale for each `group` of a row; their results are
    defined to the bit. `w4a16` takes x as it is and sums in float32.
    hadamard, input_offset: what x goes through before, see `quantize`; in `w4a16` the result is rounded to x's dtype. weight is
    that of the transformed input: `quantize(W, hadamard=...)`.
    weight_global_scale: what the codes and scales of weight stand for, over the weight itself, 2^-64 to 2^64: 3 for those of
    `quantize(W, "abs_max")`. The sum over K is multiplied by 1 / (weight_global_scale * that of scale_mode), in float32, before
    bias is added.
    expanded: what `expand` gave for this weight, for modes `w4a4` and `w4a8`; the result is the same bits.

    Raises:
        ValueError: there is no such mode, or it has no product with an expanded weight.
        RuntimeError: an argument does not fit; the message names it.
    """
    form: Form = "stored" if expanded is None else "expanded"
    operands = (weight, weight_scale) if expanded is None else (weight, weight_scale, expanded)
    how = {"scale_mode": scale_mode, "group": group}
    return multiply(form, operands, x, bias, mode, hadamard, input_offset, weight_global_scale, **how)


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
    group: Group = 128,
    hadamard: Hadamard = 0,
    input_offset: Tensor | None = None,
    weight_global_scale: float = 1.0,
) -> Tensor:
    """`linear` with a weight from `prepack` of out_features rows."""
    how = {"scale_mode": scale_mode, "group": group}
    return multiply("prepacked", (weight, out_features), x, bias, mode, hadamard, input_offset, weight_global_scale, **how)
