# SPDX-License-Identifier: Apache-2.0
"""What the scales of a layer look like, and how much of it takes the kernels' fast paths."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

ALIGNED = 3
"""Codes times 2 are within 12, so they can be shifted by 3 bits and stay int8: scales that far apart are aligned."""
TILE = 32
_BIAS = 127
_NAN = 255


@dataclass(frozen=True)
class ScaleStatistics:
    """Shares are of all pairs (quads) of consecutive blocks in a row, or of tiles of 32 rows in which all rows are aligned."""

    histogram: dict[int, int]
    """Number of blocks by the exponent of their scale."""
    invalid: int
    """Number of blocks whose scale is NaN."""
    pairs: float
    quads: float
    tile_pairs: float
    tile_quads: float


def scale_statistics(scale: Tensor) -> ScaleStatistics:
    """Counts over scales uint8 [..., K/32]. A last pair or quad that is not full is judged by the blocks it has."""
    rows = scale.flatten(0, -2)
    count = torch.bincount(rows.flatten().int(), minlength=256).tolist()
    histogram = {byte - _BIAS: n for byte, n in enumerate(count) if n and byte != _NAN}
    pairs, quads = _aligned(rows, 2), _aligned(rows, 4)
    return ScaleStatistics(histogram, count[_NAN], _share(pairs), _share(quads), _share(_tiles(pairs)), _share(_tiles(quads)))


def _aligned(rows: Tensor, size: int) -> Tensor:
    """Whether each group of consecutive blocks is aligned: bool [N, groups]."""
    missing = -rows.shape[1] % size
    if missing:
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1)
    groups = rows.int().unflatten(1, (-1, size))
    return torch.le(groups.amax(-1) - groups.amin(-1), ALIGNED)


def _tiles(aligned: Tensor) -> Tensor:
    padded = pad(aligned, (0, 0, 0, -aligned.shape[0] % TILE), value=True)
    return torch.all(padded.unflatten(0, (-1, TILE)), dim=1)


def _share(aligned: Tensor) -> float:
    return float(aligned.float().mean())
