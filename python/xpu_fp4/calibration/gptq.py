# SPDX-License-Identifier: Apache-2.0
"""GPTQ for MXFP4 weights: rounds a weight so that a layer's output on calibration data changes little.

Elements are rounded to nearest, one input channel after the other, and what a rounding changes in the output is made up for by
the channels that are still to come (Frantar et al., GPTQ, arXiv:2210.17323). Block scales are fixed before, so any order of
channels is possible: here by falling power of the inputs.
"""

import torch
from torch import Tensor

from .._library import BLOCK
from ..reference import pack

DAMP = 0.1
"""Added to the Hessian's diagonal, as a share of its mean."""
CORRECTION = 0.5
"""Share of what least squares would have a weight make up for. All of it fits the calibration data, not other text."""
_STEP = 32  # channels whose errors reach the rest of the weight together
_CODE_OF_DOUBLE = torch.tensor([0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7], dtype=torch.uint8)  # of twice a magnitude


class Products:
    """Sums over rows a, b [T, K]: of a^T b in float32, of a and b in float64; and T. A Hessian is of inputs by themselves."""

    def __init__(self, k: int) -> None:
        self.sum = torch.zeros(k, k)
        self._sums = torch.zeros(2, k, dtype=torch.float64)
        self.tokens = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        """a, b: float32 [T, K]."""
        self.sum.addmm_(a.T, b)
        self._sums += torch.stack([a.sum(0, dtype=torch.float64), b.sum(0, dtype=torch.float64)])
        self.tokens += len(a)

    def mean(self) -> Tensor:
        """The mean b, float64 [K]."""
        return self._sums[1] / self.tokens

    def centered(self) -> Tensor:
        """The products around the means: what rounding may change where a bias makes up for the mean error."""
        return (self.sum.double() - self._sums[0].outer(self._sums[1]) / self.tokens).float()


def corrected(weight: Tensor, hessian: Tensor, lag: Tensor, damp: float = DAMP) -> Tensor:
    """The weight [N, K] under which outputs on the inputs x are nearer to what it makes of x + d, the original's inputs.

    Args:
        hessian: float32 [K, K], x^T x.
        lag: float32 [K, K], d^T x. Least squares adds weight lag hessian^-1; the result has CORRECTION of that.
        damp: as for round_weight.
    """
    factor = _inverse_factor(hessian.clone(), damp)
    return weight + CORRECTION * (weight @ lag @ factor.T) @ factor


def round_weight(weight: Tensor, scale: Tensor, hessian: Tensor, damp: float = DAMP) -> Tensor:
    """Codes [N, K/2] under which (weight - rounded) hessian (weight - rounded)^T is small.

    Args:
        weight: float32 [N, K], in the basis of the inputs that are multiplied.
        scale: bytes uint8 [N, K/32] of its blocks.
        hessian: float32 [K, K] of those inputs, finite.
        damp: share of the diagonal's mean that is added to it; where the sum is not positive definite, ten times as much.

    Returns packed uint8 codes, each the nearest to its element over its scale at the time when it is rounded, ties to even.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damp)
    units = _pow2(scale).T.repeat_interleave(BLOCK, 0)[order]
    remaining = weight.T[order]
    rounded = torch.empty_like(remaining)  # in units of the scales
    for start in range(0, len(remaining), _STEP):
        end = min(start + _STEP, len(remaining))
        step, own = remaining[start:end], factor[start:end, start:end]
        errors = torch.empty_like(step)
        for i in range(end - start):
            unit = units[start + i]
            torch.div(step[i], unit, out=rounded[start + i])
            _round_to_e2m1_(rounded[start + i])
            torch.addcmul(step[i], rounded[start + i], unit, value=-1, out=errors[i]).div_(own[i, i])
            step[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        remaining[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    codes = torch.empty(rounded.shape, dtype=torch.uint8)
    codes[order] = _encode(rounded)
    return pack(codes.T).contiguous()


def _inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """The upper triangular U with U^T U = the damped Hessian's inverse.

    It is the inverse of the upper R with R R^T = the Hessian, and R is the Cholesky factor of the Hessian read backwards.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal <= 0] = 1  # of a channel that is always 0, whose rounding changes nothing
    mean = diagonal.mean().item()
    added = 0.0
    while True:
        diagonal.add_((damp - added) * mean)
        factor, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            inverse: Tensor = torch.linalg.solve_triangular(factor.flip(0, 1), torch.eye(len(factor)), upper=True)
            return inverse
        added, damp = damp, 10 * max(damp, DAMP)


def _round_to_e2m1_(y: Tensor) -> None:
    """Rounds float32 values to those of e2m1 in place: to nearest, ties to even, saturating."""
    magnitude = y.abs().clamp_(max=6)
    # Adding 2^22 times the magnitude's power of two leaves the bits of e2m1: a half below 2, one below 4, two from there on.
    exponent = magnitude.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=0x3F800000)
    large = exponent.add_(22 << 23).view(torch.float32)
    y.copy_(magnitude.add_(large).sub_(large).copysign_(y))


def _encode(values: Tensor) -> Tensor:
    """Codes of values of e2m1, a zero's sign included."""
    codes = _CODE_OF_DOUBLE[(2 * values.abs()).int()]
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def _pow2(scale: Tensor) -> Tensor:
    """What scale bytes stand for, float32."""
    bits = (scale.long() - 127 + 1023) << 52
    return bits.view(torch.float64).float()
