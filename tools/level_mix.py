# SPDX-License-Identifier: Apache-2.0
"""Which level gemm_large's tiles take on synthetic activations, and what share of the int8 peak follows.

Executed: scales from the quantizers, and the pre-pass's rules on them (csrc/sycl/kernels/alignment.hpp, asked of the library).
Modelled: the shares of the peak, from the counts of `make isa`.
"""

import ctypes
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import click
import torch
import xpu_fp4
from cost_model import ROOT, Model, load
from gpu_programs import MXFP4, sycl_backend
from torch import Tensor
from torch.nn.functional import silu

K = 4096
ROWS, COLUMNS = 48, 32  # of a tile
DRAWS, TILES = 16, 4  # draws of outlier channels; tiles of rows, and of columns, in each
MXINT8 = 2  # Format in csrc/format/formats.h
ROW_BUFFER, _, COLUMN_FRAGMENTS = range(3)  # Arrangement in csrc/sycl/kernels/layout.hpp
LEVELS = ("quad", "pair", "near", "block", "general")
FIRST_OF_NEXT = (1, 2, 18, 19)  # Level there: near are 16


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


def ruled_out(scale: Tensor, arrangement: int, activations: int) -> Tensor:
    """The levels that each row's quads rule out, as bits int32 [rows, quads], by the pre-pass's own rules."""
    scale = scale.view(torch.uint8).contiguous()
    levels = torch.empty(scale.shape[0], scale.shape[1] // 4, dtype=torch.int32)
    arguments = scale.data_ptr(), levels.numel(), arrangement, activations, levels.data_ptr()
    sycl_backend().xpu_fp4_sycl_levels(
        ctypes.c_void_p(arguments[0]), ctypes.c_int64(arguments[1]), *arguments[2:4], ctypes.c_void_p(arguments[4])
    )
    return levels


def of_tiles(levels: Tensor, size: int) -> Tensor:
    """Returns what any of a tile's rows rules out, [tiles, quads]."""
    return torch.stack([reduce(torch.bitwise_or, tile) for tile in levels.unflatten(0, (-1, size))])


def mix(rows: Tensor, columns: Tensor) -> Tensor:
    """The shares of quad, pair, near, block and general, over tiles and quads."""
    both = of_tiles(rows, ROWS)[:, None] | of_tiles(columns, COLUMNS)[None]
    level = torch.bitwise_and(~both, both + 1).log2().int()  # the lowest that is not ruled out
    last = torch.tensor(FIRST_OF_NEXT)
    return torch.bincount(torch.bucketize(level.flatten(), last, right=True), minlength=len(LEVELS)) / level.numel()


def peak_share(model: Model, variant: str, shares: Tensor, apart: bool) -> float:
    paths = model.find("gemm_large", variant)["paths"]
    clocks = torch.tensor([model.clocks(paths.get(level, paths["general"]), apart) for level in LEVELS])
    return 100 * model.device["matrix_clocks"] / float(shares @ clocks)


@click.command()
@click.option("--counts", default=ROOT / "build/isa.json", type=click.Path(exists=True, path_type=Path))
def main(counts: Path) -> None:
    """Print the table of docs/GPU.md."""
    models = load(counts)
    torch.manual_seed(0)
    print("| activations | W4A4: quad, pair, near, block | pvc | bmg | W4A8 | pvc | bmg |")
    print("|---|---|---|---|---|---|---|")
    for name, sample in ACTIVATIONS.items():
        w4a4, w4a8 = torch.zeros(len(LEVELS)), torch.zeros(len(LEVELS))
        for _ in range(DRAWS):
            x, w = sample(ROWS * TILES), xpu_fp4.quantize(gaussian(COLUMNS * TILES))[1]
            columns = ruled_out(w, COLUMN_FRAGMENTS, MXFP4)
            w4a4 += mix(ruled_out(xpu_fp4.quantize(x)[1], ROW_BUFFER, MXFP4), columns) / DRAWS
            w4a8 += mix(ruled_out(torch.ops.xpu_fp4.mxint8_quantize(x)[1], ROW_BUFFER, MXINT8), columns) / DRAWS
        cells = []
        for shares, variant in ((w4a4, "48x32 bf16"), (w4a8, "48x32 bf16, W4A8")):
            cells.append(", ".join(f"{share:.2f}" for share in shares[:4]))
            for device in ("pvc", "bmg"):
                peaks = [peak_share(models[device], variant, shares, apart) for apart in (False, True)]
                cells.append(" / ".join(f"{peak:.0f}" for peak in peaks))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
