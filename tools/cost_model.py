# SPDX-License-Identifier: Apache-2.0
"""From counted machine code to the modelled time of whole products; draws docs/gpu_model.png. Modelled: nothing is run.

Per vector engine the matrix, integer and float pipes run beside each other or, for the pessimistic bound, integer and float
never together; a kernel takes the longest of its pipes and of its memory traffic. Left out: cache misses, the issue of loads,
latency, power, launches. Input: build/isa.json of `make isa`.
"""

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
import tomllib

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "4096 x 4096": (4096, 4096),
    "Llama-3-8B gate+up, 28672 x 4096": (28672, 4096),
    "Llama-3-8B down, 4096 x 14336": (4096, 14336),
}  # N, K
ROWS = [2**i for i in range(13)]


@dataclass
class Model:
    """One device: its data of tools/isa_budgets.toml and its counted kernels."""

    device: dict[str, float]
    kernels: list[dict[str, Any]]
    lanes: int

    def find(self, kernel: str, variant: str) -> dict[str, Any]:
        rows = (row for row in self.kernels if row["kernel"] == kernel and row["variant"].startswith(variant))
        return next(rows)

    def seconds(self, engine_clocks: float) -> float:
        return engine_clocks / (self.device["ghz"] * 1e9)

    def memory(self, moved: float) -> float:
        return moved / (self.device["bandwidth"] * 1e9)

    def stream(self, kernel: str, variant: str, sub_groups: float, moved: float, apart: bool) -> float:
        path = self.find(kernel, variant)["paths"]["all"]
        clocks = path["int clocks"] + path["float clocks"] if apart else max(path["int clocks"], path["float clocks"])
        return max(self.seconds(ceil(sub_groups / self.device["engines"]) * clocks), self.memory(moved))

    def clocks(self, path: dict[str, float], apart: bool) -> float:
        """Of a matrix instruction in a path of gemm_large."""
        return max(self.device["matrix_clocks"], path["int"] + path["float"] if apart else max(path["int"], path["float"]))

    def large(self, m: int, n: int, k: int, level: str, apart: bool, kept: bool = False) -> float:
        """Quantize and expand A, expand W unless that form is kept, multiply; bfloat16 in and out."""
        quads = ceil(k / 128)
        prepare = self.stream("quantize_expand", "A, bf16", ceil(m / self.lanes) * quads, m * k * (2 + 1.03), apart)
        if not kept:
            prepare += self.stream("expand", "W", ceil(n / self.lanes) * quads, n * k * (0.53 + 1.03), apart)
        variants = [row for row in self.kernels if row["kernel"] == "gemm_large" and row["variant"].endswith("bf16")]
        return prepare + min(self.tiles(row, m, n, k, level, apart) for row in variants)

    def tiles(self, kernel: dict[str, Any], m: int, n: int, k: int, level: str, apart: bool) -> float:
        rows, columns = map(int, kernel["variant"].split()[0].split("x"))
        path = kernel["paths"].get(level) or kernel["paths"]["block"]
        epilogue = kernel["instructions"] - kernel["in the loop"]
        tile = ceil(k / 128) * path["matrix"] * self.clocks(path, apart) + epilogue
        count = ceil(m / rows) * ceil(n / columns)
        return max(self.seconds(ceil(count / self.device["engines"]) * tile), self.memory(m * k + n * k + 2 * m * n))

    def small(self, m: int, n: int, k: int, apart: bool) -> float:
        """Quantize and expand A; packed weights, read once for every 32 rows."""
        rows = next((rows for rows in (1, 4, 8, 16, 32) if rows >= m), 32)
        path = self.find("gemm_small", f"{rows} rows")["paths"]["block"]
        clocks = ceil(m / rows) * n * k / 2 / 256 * path["per 256 bytes"] / self.device["engines"]
        groups = ceil(m / self.lanes) * ceil(k / 128)
        prepare = self.stream("quantize_expand", "A for few rows, bf16", groups, m * k * (2 + 1.03), apart)
        return prepare + max(self.seconds(clocks), self.memory(ceil(m / rows) * n * k * 0.53 + 2 * m * (n + k)))

    def ours(self, m: int, n: int, k: int, level: str, apart: bool, kept: bool = False) -> float:
        return min(self.small(m, n, k, apart), self.large(m, n, k, level, apart, kept))

    def peer(self, m: int, n: int, k: int) -> float:
        """Widening to bfloat16 at its best: decoding is free, the bf16 rate and the packed weights' traffic bound it."""
        instructions = ceil(m / 8) * ceil(n / self.lanes) * k / 16
        clocks = instructions * self.device["matrix_clocks"] / self.device["engines"]
        return max(self.seconds(clocks), self.memory(n * k * 0.53 + 2 * m * (n + k)))


def load(counts: Path) -> dict[str, Model]:
    devices = tomllib.loads((ROOT / "tools/isa_budgets.toml").read_text())["device"]
    rows = json.loads(counts.read_text())
    return {
        name: Model(data, [row for row in rows if row["device"] == name], 8 if name == "dg2" else 16)
        for name, data in devices.items()
    }


def draw(models: dict[str, Model], file: Path) -> None:
    figure, axes = plt.subplots(len(models), len(SHAPES), figsize=(14, 3.2 * len(models)), sharex=True, squeeze=False)
    for line, (name, model) in zip(axes, models.items(), strict=True):
        for axis, (title, (n, k)) in zip(line, SHAPES.items(), strict=True):
            for level, apart, kept, style, label in (
                ("quad", False, True, "C2-", "W4A4, aligned quads, weight expanded once"),
                ("quad", False, False, "C0-", "W4A4, aligned quads"),
                ("block", True, False, "C0:", "W4A4, no quad aligned, int and float never together"),
            ):
                times = [1e6 * model.ours(m, n, k, level, apart, kept) for m in ROWS]
                axis.loglog(ROWS, times, style, label=label)
            axis.loglog(ROWS, [1e6 * model.peer(m, n, k) for m in ROWS], "C1--", label="widening to bf16, at its best")
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("M")
    for line in axes:
        line[0].set_ylabel("microseconds, modelled")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=70)


@click.command()
@click.option("--counts", default=ROOT / "build/isa.json", type=click.Path(exists=True, path_type=Path))
@click.option("--plot", default=ROOT / "docs/gpu_model.png", type=click.Path(path_type=Path))
def main(counts: Path, plot: Path) -> None:
    """Print the modelled milliseconds of 4096^3 and draw the Llama-3-8B shapes."""
    models = load(counts)
    print(
        "4096 x 4096 x 4096, milliseconds (modelled): aligned quads with the weight expanded once; expanded in each call, "
        "aligned quads, pairs, near rows (dg2: blocks); with int and float apart near rows, unaligned blocks; bf16 peer"
    )
    for name, model in models.items():
        once = model.large(4096, 4096, 4096, "quad", False, kept=True)
        cases = (("quad", False), ("pair", False), ("near", False), ("near", True), ("block", True))
        times = [once, *(model.large(4096, 4096, 4096, level, apart) for level, apart in cases), model.peer(4096, 4096, 4096)]
        print(f"{name:6}", *(f"{1e3 * time:7.3f}" for time in times))
    draw({name: models[name] for name in ("bmg", "pvc", "dg2")}, plot)


if __name__ == "__main__":
    main()
