# SPDX-License-Identifier: Apache-2.0
"""Which level gemm_large's tiles take on synthetic activations, and what share of the int8 peak follows.

Executed: scales from `xpu_fp4.quantize`, and the rules of csrc/sycl/kernels/expand.cpp on them, written once more. Modelled:
the shares, from the counts of `make isa`. "Before" is without the near level, where blocks of a row share exponents by pairs.
"""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import click
import torch
import xpu_fp4
from cost_model import ROOT, Model, load
from torch import Tensor
from torch.nn.functional import silu

K = 4096
ROWS, COLUMNS = 64, 32  # of a tile
DRAWS, TILES = 16, 4  # draws of outlier channels; tiles of rows, and of columns, in each
SHIFT = 3


def gaussian(m: int) -> Tensor:
    return torch.randn(m, K)


def outlier_channels(share: float, factor: float) -> Callable[[int], Tensor]:
    return lambda m: gaussian(m) * torch.where(torch.rand(K) < share, factor, 1.0)


ACTIVATIONS: dict[str, Callable[[int], Tensor]] = {
    "Gaussian": gaussian,
    "SwiGLU-like": lambda m: gaussian(m) * silu(gaussian(m)),
    "0.1% channels x60": outlier_channels(0.001, 60),
    "student-t3": lambda m: torch.distributions.StudentT(3.0).sample((m, K)),
    "lognormal channels": lambda m: gaussian(m) * torch.randn(K).exp(),
    "1% channels x20": outlier_channels(0.01, 20),
}


def quad_scales(x: Tensor) -> Tensor:
    """[rows, quads, 4]"""
    scale: Tensor = xpu_fp4.quantize(x)[1]
    return torch.unflatten(scale.view(torch.uint8).int(), 1, (-1, 4))


def spread(scale: Tensor) -> Tensor:
    return scale.amax(-1) - scale.amin(-1)


def aligned_pairs(scale: Tensor) -> Tensor:
    return (spread(scale.unflatten(-1, (2, 2))) <= SHIFT).all(-1)


def row_exponents(scale: Tensor) -> Tensor:
    """The blocks near the lowest share an exponent, and so do the others if they are near each other."""
    low = scale <= scale.amin(-1, keepdim=True) + SHIFT
    highest, lowest = scale.amax(-1, keepdim=True), torch.where(low, 255, scale).amin(-1, keepdim=True)
    high_exponent = torch.where(highest - lowest <= SHIFT, highest, scale)
    return torch.where(low, torch.where(low, scale, 0).amax(-1, keepdim=True), high_exponent) - SHIFT


def near(scale: Tensor, exponent: Tensor) -> Tensor:
    """[rows, quads, 12 orders]"""
    most, unit = 3 * 2.0**scale, 2.0**exponent
    orders = []
    for first, second, third, fourth in permutations(range(4)):
        if third < fourth:
            exact = (unit[..., second] + unit[..., third] <= most[..., first]) & (unit[..., third] <= most[..., second])
            orders.append(exact & (exponent[..., third] == exponent[..., fourth]))
    return torch.stack(orders, -1) & (spread(scale) <= 8)[..., None]


def tiles(applies: Tensor, size: int) -> Tensor:
    return torch.all(applies.unflatten(0, (-1, size)), dim=1)


def mix(rows: Tensor, columns: Tensor, has_near: bool) -> Tensor:
    """The shares of quad, pair, near and block, over tiles and quads."""
    exponent = row_exponents(rows)
    shared = (exponent[..., 0] == exponent[..., 1]) & (exponent[..., 2] == exponent[..., 3])
    both = [
        (spread(rows) <= SHIFT, spread(columns) <= SHIFT),
        (shared if has_near else aligned_pairs(rows), aligned_pairs(columns)),
    ]
    if has_near:
        both += [(near(rows, exponent)[..., i], spread(columns) < SHIFT) for i in range(12)]
    applies = torch.stack([tiles(a, ROWS)[:, None] & tiles(b, COLUMNS)[None] for a, b in both], -1)
    quad, pair, any_near = applies[..., 0], applies[..., 1], applies[..., 2:].any(-1)
    levels = [quad, ~quad & pair, ~quad & ~pair & any_near, ~quad & ~pair & ~any_near]
    return torch.stack([level.float().mean() for level in levels])


def peak_share(model: Model, shares: Tensor, apart: bool) -> float:
    paths = model.find("gemm_large", "64x32 bf16")["paths"]
    clocks = torch.tensor([model.clocks(paths[level], apart) for level in ("quad", "pair", "near", "block")])
    return 100 * model.device["matrix_clocks"] / float(shares @ clocks)


@click.command()
@click.option("--counts", default=ROOT / "build/isa.json", type=click.Path(exists=True, path_type=Path))
def main(counts: Path) -> None:
    """Print the table of docs/GPU.md."""
    models = load(counts)
    torch.manual_seed(0)
    print("| activations | before: quad, pair, block | quad, pair, near, block | pvc before | pvc | bmg before | bmg |")
    print("|---|---|---|---|---|---|---|")
    for name, sample in ACTIVATIONS.items():
        before, now = torch.zeros(4), torch.zeros(4)
        for _ in range(DRAWS):
            rows, columns = quad_scales(sample(ROWS * TILES)), quad_scales(gaussian(COLUMNS * TILES))
            before += mix(rows, columns, has_near=False) / DRAWS
            now += mix(rows, columns, has_near=True) / DRAWS
        cells = [", ".join(f"{share:.2f}" for share in before[[0, 1, 3]]), ", ".join(f"{share:.2f}" for share in now)]
        for device in ("pvc", "bmg"):
            for shares in (before, now):
                cells.append(" / ".join(f"{peak_share(models[device], shares, apart):.0f}" for apart in (False, True)))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
