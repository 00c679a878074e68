# SPDX-License-Identifier: Apache-2.0
"""Rounding: GPTQ against its definition, and the Hessian of what a layer multiplies."""

from typing import Any

import pytest
import torch
import xpu_fp4
from helpers import assert_same_bits, normal, seeded
from torch import Tensor, nn
from xpu_fp4 import Mode, MXFP4Linear, reference
from xpu_fp4.calibration.gptq import CORRECTION, DAMP, corrected, round_weight
from xpu_fp4.calibration.layers import multiplied_input
from xpu_fp4.checkpoints import Scheme


def correlated(rows: int, k: int, seed: int = 5) -> Tensor:
    """Inputs [rows, k] whose channels have much in common and very different sizes."""
    shared = normal(rows, k // 4, seed=seed) @ normal(k // 4, k, seed=seed + 1)
    return (shared + normal(rows, k, seed=seed + 2)) * torch.logspace(-1, 1, k)[torch.randperm(k, generator=seeded(seed))]


def gptq_by_definition(weight: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """Codes [N, K] in float64: after each channel the rest moves to where the output's error is least, by the inverse Hessian
    of the channels that are left."""
    h = hessian.double()
    h.diagonal().add_(DAMP * h.diagonal().mean())
    w = weight.double().clone()
    units = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    left = torch.argsort(hessian.diagonal(), descending=True).tolist()
    while left:
        channel, *rest = left
        inverse = torch.linalg.inv(h[left][:, left])
        code = reference.encode(w[:, channel] / units[:, channel])
        value = torch.where(code >= 8, -1, 1) * reference.MAGNITUDES[(code & 7).long()] * units[:, channel]
        codes[:, channel] = code
        w[:, rest] -= (w[:, channel] - value).outer(inverse[0, 1:] / inverse[0, 0])
        left = rest
    return codes


def test_rounding_is_gptq_by_its_definition() -> None:
    x, weight = correlated(200, 96), normal(24, 96, seed=8)
    hessian = x.T @ x
    _, scale = reference.quantize(weight)
    assert_same_bits(round_weight(weight, scale, hessian), reference.pack(gptq_by_definition(weight, scale, hessian)))


@pytest.mark.parametrize("k", [32, 64, 160])
def test_outputs_are_nearer_than_by_rounding_to_nearest(k: int) -> None:
    x, weight = correlated(400, k), normal(40, k, seed=9)
    codes, scale = reference.quantize(weight)

    def error(q: Tensor) -> float:
        return float(((reference.values(q, scale) - weight) @ x.double().T).square().mean())

    assert error(round_weight(weight, scale, x.T @ x)) < 0.5 * error(codes)


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    # Ties, signed zeros and values beyond the largest among the weights; a power of two for each channel.
    weight = torch.cat([torch.arange(-64, 64) / 8, torch.tensor([0.0, -0.2, 0.25, -0.25, 7.0, -5.0, 1.75, 2.5] * 4)]).view(
        5, 32
    )
    scale = torch.full((5, 1), 127, dtype=torch.uint8)
    codes = round_weight(weight, scale, torch.diag(torch.exp2(torch.arange(32.0) % 7)))
    assert_same_bits(codes, reference.pack(reference.encode(weight)))


def test_channels_without_input_are_rounded_to_nearest() -> None:
    x, weight = correlated(200, 64), normal(8, 64, seed=10)
    x[:, 7] = x[:, 40] = 0
    codes, scale = reference.quantize(weight)
    rounded = reference.unpack(round_weight(weight, scale, x.T @ x))
    for channel in (7, 40):
        assert_same_bits(rounded[:, channel], reference.unpack(codes)[:, channel])


def test_a_hessian_of_too_few_tokens_is_damped_until_it_is_definite() -> None:
    x, weight = normal(3, 64), normal(8, 64, seed=10)
    _, scale = reference.quantize(weight)
    codes = round_weight(weight, scale, x.T @ x, damp=0)
    assert torch.isfinite(reference.values(codes, scale)).all()


def test_a_correction_is_a_share_of_least_squares() -> None:
    x, d, weight = correlated(400, 64), normal(400, 64, seed=3), normal(8, 64, seed=10)
    ridge = (DAMP * (x.T @ x).diagonal().mean()).sqrt() * torch.eye(64)
    # What is to be added has the outputs weight d on x, and is kept small by further rows.
    inputs, outputs = torch.cat([x, ridge]).double(), torch.cat([d @ weight.T, torch.zeros(64, 8)]).double()
    expected = weight + CORRECTION * torch.linalg.lstsq(inputs, outputs).solution.T
    torch.testing.assert_close(corrected(weight, x.T @ x, d.T @ x).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("hadamard", [0, 32])
@pytest.mark.parametrize("mode", ["w4a4", "w4a8", "w4a16"])
def test_the_hessian_is_of_what_the_layer_multiplies(mode: Mode, hadamard: Any, offset: bool) -> None:
    x, mean = (3 * normal(40, 64)).bfloat16(), normal(64, seed=3) if offset else None
    scheme = Scheme(mode, hadamard=hadamard, input_offset=offset)
    layer = MXFP4Linear(64, 64, False, **scheme.arguments(), input_offset=offset, dtype=torch.bfloat16)
    layer.weight_packed.data, layer.weight_scale.data = (
        xpu_fp4.quantize(torch.eye(64))[0].view(torch.uint8),
        torch.full((64, 2), 125, dtype=torch.uint8),
    )
    layer.input_offset = None if mean is None else nn.Parameter(mean, requires_grad=False)
    # Codes of an identity are 4 under a scale of 1/4, so that the layer gives back its quantized input.
    assert_same_bits(multiplied_input(x, scheme, mean).bfloat16() + 0, layer(x))  # of no negative zeros
