# SPDX-License-Identifier: Apache-2.0
"""The definition of every op, evaluated slowly and literally: what the backends are checked against.

It shares nothing with the kernels: codes come from distances to the eight magnitudes in float64 or from float64's rounding to
an integer, exponents from frexp, and a block's product from exact float64 arithmetic that is rounded to float32 once. Needs
torch's default float environment.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ._library import BLOCK
from .functional import GLOBAL_SCALES, Activation, Group, Hadamard, ScaleMode

QUAD = 4
NAN_SCALE = 0xFF
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def _exponent(value: Tensor) -> tuple[Tensor, Tensor]:
    """value = f * 2^E with 1 <= f < 2: (f, E). value is float64, positive, finite."""
    half_f, exponent = torch.frexp(value)
    return 2 * half_f, exponent - 1


def _pow2(exponent: Tensor) -> Tensor:
    """2^exponent, exact, from the bits of a float64 (torch.ldexp and exp2 promise less)."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def scale_bytes(amax: Tensor, scale_mode: ScaleMode) -> Tensor:
    """Scale byte of each block from its largest magnitude, float64 and finite; of all rules but `quest`."""
    if scale_mode == "abs_max":
        _, exponent = _exponent((amax.float() + 1e-8).double())
        return (exponent + 127).to(torch.uint8)
    f, exponent = _exponent(torch.where(amax > 0, amax, 1.0))
    doubled = {"floor": f > 2, "ceil": f > 1, "even": f >= 1.75, "rceil": f > 1.5}[scale_mode]
    e = torch.where(amax > 0, exponent - 2 + doubled.int(), -127)
    return (e.clamp(-127, 127) + 127).to(torch.uint8)


def quest_scale_bytes(blocks: Tensor) -> Tensor:
    """Scale byte of each block [..., 32], finite: the exponent of half the logarithm of c^2 times its variance, all float32."""

    def mean(terms: Tensor) -> Tensor:
        for _ in range(5):  # as a tree, neighbours first
            terms = terms[..., 0::2] + terms[..., 1::2]
        return terms[..., 0] / 32

    x = blocks.float()
    variance = mean(x * x) - mean(x) * mean(x)
    square = (variance * (2.92247856 / 6) ** 2).double()
    _, exponent = _exponent(torch.where(square > 0, square, 1e-30))
    e = torch.where(variance < 0, 0, (exponent // 2).clamp(min=-27))
    return torch.where(variance.isfinite(), e + 127, NAN_SCALE).to(torch.uint8)


def encode(y: Tensor, *, ties_to_even: bool = True) -> Tensor:
    """Nearest code of each finite y, the sign bit from the sign of y, zeros included; ties otherwise go toward zero."""
    distance = (y.double().abs().clamp(max=6)[..., None] - MAGNITUDES).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    lower = nearest.int().argmax(-1)
    is_tie = nearest.sum(-1) == 2
    magnitude = lower + (is_tie & (lower % 2 == 1) & ties_to_even).int()
    return (magnitude + 8 * torch.signbit(y).int()).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """Codes [..., K] -> bytes [..., K/2], even elements in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(q: Tensor) -> Tensor:
    """Bytes [..., K/2] -> codes [..., K]."""
    q = q.view(torch.uint8)
    return torch.stack([q & 15, q >> 4], -1).flatten(-2)


def quantize(x: Tensor, scale_mode: ScaleMode = "even") -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes uint8 [..., K/2], scale bytes uint8 [..., K/32]."""
    blocks = x.double().unflatten(-1, (-1, BLOCK))
    finite = blocks.isfinite().all(-1)
    safe = torch.where(finite[..., None], blocks, 0.0)
    scale = quest_scale_bytes(safe) if scale_mode == "quest" else scale_bytes(safe.abs().amax(-1), scale_mode)
    finite &= scale != NAN_SCALE
    scaled = safe * (GLOBAL_SCALES.get(scale_mode, 1.0) * _pow2(127 - scale[..., None].int()))
    codes = encode(scaled if scale_mode not in GLOBAL_SCALES else scaled.float())
    codes = torch.where(finite[..., None], codes, 0)
    return pack(codes.flatten(-2)), torch.where(finite, scale, NAN_SCALE).to(torch.uint8)


def transform(x: Tensor, hadamard: Hadamard, input_offset: Tensor | None = None) -> Tensor:
    """x [..., K] -> (x - input_offset [K]) x H, float32: what comes before a quantizer. H is its own inverse.

    Sums and differences of pairs that are 1, 2, 4 ... elements apart, each rounded to float32, then one product.
    """
    x = x.float() if input_offset is None else x.float() - input_offset
    if hadamard == 0:
        return x
    pairs = x.unflatten(-1, (-1, hadamard))
    for bit in range(hadamard.bit_length() - 1):
        pairs = pairs.unflatten(-1, (-1, 2, 1 << bit))
        u, v = pairs.select(-2, 0), pairs.select(-2, 1)
        pairs = torch.stack([u + v, u - v], -2).flatten(-3)
    scaled: Tensor = pairs * torch.tensor(hadamard, dtype=torch.float64).rsqrt().float()
    return scaled.flatten(-2)


def mxint8_scale_bytes(amax: Tensor) -> Tensor:
    """Scale byte of each group from its largest magnitude, float64 and finite."""
    f, exponent = _exponent(torch.where(amax > 0, amax, 1.0))
    e = torch.where(amax > 0, exponent + (f >= 255 / 128).int(), -127)
    return (e.clamp(-127, 127) + 127).to(torch.uint8)


def mxint8_quantize(x: Tensor, group: Group = 128) -> tuple[Tensor, Tensor]:
    """x [..., K] -> codes int8 [..., K], scale bytes uint8 [..., K/32], the same for all blocks of a group."""
    k = x.shape[-1]
    groups = torch.nn.functional.pad(x.double(), (0, -k % group)).unflatten(-1, (-1, group))
    finite = groups.isfinite().all(-1, keepdim=True)
    safe = torch.where(finite, groups, 0.0)
    scale = mxint8_scale_bytes(safe.abs().amax(-1, keepdim=True))
    rounded = (safe * _pow2(6 + 127 - scale.int())).round()  # of ties to the even
    codes = rounded.clamp(-127, 127).to(torch.int8).flatten(-2)[..., :k]
    scale = torch.where(finite, scale, NAN_SCALE).to(torch.uint8)
    return codes, scale.expand(*scale.shape[:-1], group // BLOCK).flatten(-2)[..., : k // BLOCK].contiguous()


def integers(q: Tensor) -> tuple[Tensor, int]:
    """Codes of either format -> integers, float64 [..., K], and e: an element is its integer times 2^e."""
    if q.dtype == torch.int8:
        return q.double(), -6
    codes = unpack(q).int()
    return 2 * MAGNITUDES[codes & 7] * torch.where(codes >= 8, -1.0, 1.0), -1


def values(q: Tensor, scale: Tensor) -> Tensor:
    """Codes of either format and scales [..., K/32] -> exact values, float64 [..., K]."""
    (integer, e), scale = integers(q), scale.view(torch.uint8)
    value = integer.unflatten(-1, (-1, BLOCK)) * _pow2(scale[..., None].int() - 127 + e)
    return torch.where(scale[..., None] == NAN_SCALE, torch.nan, value).flatten(-2)


def canonical_nan(y: Tensor) -> Tensor:
    """Every NaN as the one that the ops return: torch and processors make others, depending on how they got there."""
    bits, integer = {
        torch.float32: (0x7FC00000, torch.int32),
        torch.float16: (0x7E00, torch.int16),
        torch.bfloat16: (0x7FC0, torch.int16),
    }[y.dtype]
    return torch.where(y.isnan(), torch.tensor(bits, dtype=integer).view(y.dtype), y)


def _add_in_quads(shares: Tensor) -> Tensor:
    """shares [blocks, M, N] float32 -> their sum in the defined order: pairs, pairs of pairs, then quad after quad."""
    missing = -shares.shape[0] % QUAD
    shares = torch.cat([shares, shares.new_zeros(missing, *shares.shape[1:])])
    acc = shares.new_zeros(shares.shape[1:])
    for p0, p1, p2, p3 in shares.unflatten(0, (-1, QUAD)):
        acc = acc + ((p0 + p1) + (p2 + p3))
    return acc


def gemm(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    global_scale: float = 1.0,
) -> Tensor:
    """a codes [M, K/2] or int8 [M, K], w codes [N, K/2], with scales [., K/32] -> [M, N] of dtype, bias broadcast.

    global_scale: what codes and scales of both stand for together, over the operands, a float32.
    """
    (a_integers, a_unit), (w_integers, w_unit) = integers(a), integers(w)
    a_blocks, w_blocks = a_integers.unflatten(-1, (-1, BLOCK)), w_integers.unflatten(-1, (-1, BLOCK))
    dot = torch.einsum("mbk,nbk->bmn", a_blocks, w_blocks)  # exact: integers up to 49152
    ea, ew = a_scale.view(torch.uint8).int(), w_scale.view(torch.uint8).int()
    exponent = ea.t()[:, :, None] + ew.t()[:, None, :] - 2 * 127 + a_unit + w_unit
    invalid = (ea.t() == NAN_SCALE)[:, :, None] | (ew.t() == NAN_SCALE)[:, None, :]
    products = torch.where(invalid, torch.nan, dot * _pow2(exponent)).float()
    y = _add_in_quads(products) * (1 / torch.tensor(global_scale))
    if bias is not None:
        y = y + bias.float()
    return canonical_nan(y.to(dtype))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of float32, rounded once: float64's product is exact, its sum is rounded to odd before the last rounding."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    rest = (product - (total - part)) + (c - part)
    is_even = (total.contiguous().view(torch.int64) & 1) == 0
    odd = torch.nextafter(total, torch.where(rest > 0, torch.inf, -torch.inf).double())
    return torch.where((rest != 0) & is_even & total.isfinite(), odd, total).float()


def _float(bits: int) -> Tensor:
    return torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32).view(torch.float32)


def exp_neg(a: Tensor) -> Tensor:
    """e^-a for float32 a >= 0: +0 above 86.9, else a polynomial in a's distance to a multiple of ln 2, times a power of two."""
    n = (a * _float(0x3FB8AA3B)).clamp(max=126).round()
    q = fma(n, _float(0xB95E8083), fma(n, _float(0x3F318000), -a))
    p = _float(0x3AB42996)
    for coefficient in (0x3C091DE6, 0x3D2AADCB, 0x3E2AAA47, 0x3EFFFFFC):
        p = fma(p, q, _float(coefficient))
    small = ((fma(p, q * q, q) + 1).double() * _pow2(-n.nan_to_num().int())).float()
    return torch.where(a > _float(0x42ADCCCD), 0.0, small)


def sigmoid(z: Tensor) -> Tensor:
    """1 / (1 + e^-z) of float32 z: three Newton steps from 24/17 - 8/17 d for the reciprocal of d = 1 + e^-|z|."""
    t = exp_neg(z.abs())
    d = 1 + t
    s = fma(d, _float(0xBEF0F0F1), _float(0x3FB4B4B5))
    for _ in range(3):
        s = fma(s, fma(-d, s, torch.tensor(1.0)), s)
    return torch.where(z.isnan(), torch.nan, torch.where(torch.signbit(z), t * s, s))


def gate(
    gate_up: Tensor, activation: Activation, *, interleaved: bool = False, alpha: float = 1.702, limit: float = 7.0
) -> Tensor:
    """gate_up [..., 2I] -> [..., I] of its dtype: g * sigmoid(g) * u, or g * sigmoid(alpha g) * (u + 1) of clamped g and u."""
    rows = gate_up.float()
    g, u = (rows[..., 0::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
    if activation == "silu_mul":
        return canonical_nan((g * sigmoid(g) * u).to(gate_up.dtype))
    bound = torch.tensor(limit)
    g = torch.where(g > bound, bound, g)
    u = torch.where(u > bound, bound, torch.where(u < -bound, -bound, u))
    return canonical_nan((g * sigmoid(torch.tensor(alpha) * g) * (u + 1)).to(gate_up.dtype))


def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    up: Callable[[int, Tensor], Tensor],
    down: Callable[[int, Tensor], Tensor],
    *,
    router_on_input: bool = False,
) -> Tensor:
    """x [T, H] -> [T, H], token by token and slot by slot: the sum of weight * down(e, up(e, x)), an fma each, from +0.

    Args:
        up: expert, row of x [1, H] -> what goes into its second product, of x's dtype.
        down: expert, that -> float32 [1, H]. Slots whose id is below 0 add nothing.
    """
    out = torch.empty_like(x)
    for token, row in enumerate(x):
        acc = torch.zeros_like(row, dtype=torch.float32)
        for expert, weight in zip(topk_ids[token].tolist(), topk_weights[token].float(), strict=True):
            if expert >= 0:
                given = (weight * row.float()).to(x.dtype) if router_on_input else row
                v = down(expert, up(expert, given[None]))[0]
                acc = fma(torch.tensor(1.0) if router_on_input else weight, v, acc)
        out[token] = acc.to(x.dtype)
    return canonical_nan(out)
