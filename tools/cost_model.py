# SPDX-License-Identifier: Apache-2.0
"""From counted machine code to the modelled time of whole products; draws docs/gpu_model.png. Modelled: nothing is run.

A product of many rows takes rounds of work-groups, one per core. Each engine's matrix unit is busy for the share of the time
that engine_model.py finds for the kernel's own loop; memory brings what cache_model.py finds the last-level cache to miss; the
slower of the two decides. Pre-passes and products of few rows take the longer of ALU clocks and memory traffic. Launches are
counted. Left out: power, the first cache's misses. Input: build/isa.json of `make isa`, and the listings that it names.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
import tomllib
from cache_model import Walk, traffic
from engine_model import ASSUMED, LATENCIES, Engine, Latencies, matrix_busy
from gpu_programs import Architecture, architectures
from isa_checks import LEVELS
from latency_model import QUAD_BYTES, Round
from machine_code import Instruction, Listing

ROOT = Path(__file__).resolve().parent.parent
SHORT, LONG = LATENCIES[0], LATENCIES[-1]
EXPANDED = 1.03  # bytes of an element, with exponents and levels
PACKED = 0.53
SHAPES = {
    "4096 x 4096": (4096, 4096),
    "Llama-3-8B gate+up, 28672 x 4096": (28672, 4096),
    "Llama-3-8B down, 4096 x 14336": (4096, 14336),
}  # N, K
ROWS = [2**i for i in range(13)]


@cache
def loop_of(file: Path, lanes: int, level: int | None, least: int) -> tuple[Instruction, ...]:
    """A listing's loop, or one of its paths with at least so many matrix instructions, the cheapest first."""
    code = Listing(file.read_text(errors="replace"), lanes)
    run = code.loop if level is None else code.runs(least)[level]
    return tuple(code.code[0][slice(*run)]) if run else ()


@dataclass
class Model:
    """One device: its data of tools/isa_budgets.toml and its counted kernels."""

    device: dict[str, float]
    kernels: list[dict[str, Any]]
    architecture: Architecture
    lanes: int

    def find(self, kernel: str, variant: str) -> dict[str, Any]:
        rows = (row for row in self.kernels if row["kernel"] == kernel and row["variant"].startswith(variant))
        return next(rows)

    def seconds(self, engine_clocks: float) -> float:
        return engine_clocks / (self.device["ghz"] * 1e9)

    def memory(self, moved: float) -> float:
        return moved / (self.device["bandwidth"] * 1e9)

    @property
    def launch(self) -> float:
        return float(ASSUMED["launch_us"]) * 1e-6

    def stream(self, kernel: str, variant: str, sub_groups: float, moved: float) -> float:
        path = self.find(kernel, variant)["paths"]["all"]
        clocks = max(path["int clocks"], path["float clocks"])
        return self.launch + max(self.seconds(ceil(sub_groups / self.device["engines"]) * clocks), self.memory(moved))

    def clocks(self, path: dict[str, float], apart: bool) -> float:
        """Of a matrix instruction in a path of gemm_large, if no latency shows."""
        return max(self.device["matrix_clocks"], path["int"] + path["float"] if apart else max(path["int"], path["float"]))

    # ---- products of many rows ----

    def busy(self, row: dict[str, Any], level: str | None, threads: int, latencies: Latencies) -> float:
        """The share of the time in which the matrix unit is busy in a kernel's loop, or in a level of gemm_large."""
        levels = [known for known in LEVELS if known in row["paths"]]
        index, least = (levels.index(level), row["paths"]["block"]["matrix"]) if level else (None, 0)
        engine = Engine(int(self.device["matrix_clocks"]), self.lanes, threads)
        return matrix_busy(loop_of(Path(row["listing"]), self.lanes, index, least), engine, latencies)

    def walk(self, tile: tuple[int, int], m: int, n: int) -> tuple[Walk, int]:
        """That of gemm_large, as csrc/sycl/architectures.cpp plans it; and sub-groups of a work-group."""

        def fit(wanted: int, available: int) -> int:
            while wanted // 2 >= available:
                wanted //= 2
            return wanted

        rows, columns = (
            fit(most, ceil(size / side)) for most, size, side in zip(self.architecture.group, (m, n), tile, strict=True)
        )
        return Walk(rows * tile[0], columns * tile[1], self.architecture.panel), rows * columns

    def memory_share(self, m: int, n: int, k: int, tile: tuple[int, int], panel: int | None = None) -> float:
        """The time of gemm_large's memory traffic over that of its matrix instructions."""
        walk, _ = self.walk(tile, m, n)
        walk = Walk(walk.rows, walk.columns, panel or walk.panel)
        moved = traffic(m, n, k, walk, int(self.device["cores"]), self.device["cache"] * 1e6, EXPANDED, EXPANDED)
        instructions = m * n * k / (8 * self.lanes * 32)
        return self.memory(moved) / self.seconds(instructions * self.device["matrix_clocks"] / self.device["engines"])

    def tiles(self, row: dict[str, Any], m: int, n: int, k: int, level: str, latencies: Latencies) -> float:
        rows, columns = map(int, row["variant"].split()[0].split("x"))
        walk, sub_groups = self.walk((rows, columns), m, n)
        level = level if level in row["paths"] else "block"
        cores, threads = int(self.device["cores"]), int(ASSUMED["threads"])
        engines = self.device["engines"] / cores  # of a core
        groups = ceil(m / walk.rows) * ceil(n / walk.columns)
        # A core runs as many work-groups at once as its threads hold.
        at_once = min(ceil(groups / cores), max(1, int(engines * threads // sub_groups)))
        rounds = ceil(groups / (cores * at_once))
        each = ceil(sub_groups * at_once / engines)  # tiles of an engine in a round: a thread has one
        instructions = each * ceil(k / 128) * row["paths"][level]["matrix"]
        epilogue = each * (row["instructions"] - row["in the loop"])
        busy = self.busy(row, level, min(each, threads), latencies)
        clocks = rounds * (instructions * self.device["matrix_clocks"] / busy + epilogue)
        moved = traffic(m, n, k, walk, cores * at_once, self.device["cache"] * 1e6, EXPANDED, EXPANDED)
        return self.launch + max(self.seconds(clocks), self.memory(moved))

    def large(self, m: int, n: int, k: int, level: str, latencies: Latencies, kept: bool = False) -> float:
        """Quantize and expand A, expand W unless that form is kept, multiply; bfloat16 in and out."""
        quads = ceil(k / 128)
        prepare = self.stream("quantize_expand", "A, bf16", ceil(m / self.lanes) * quads, m * k * (2 + EXPANDED))
        if not kept:
            prepare += self.stream("expand", "W", ceil(n / self.lanes) * quads, n * k * (PACKED + EXPANDED))
        variants = [row for row in self.kernels if row["kernel"] == "gemm_large" and row["variant"].endswith("bf16")]
        return prepare + min(self.tiles(row, m, n, k, level, latencies) for row in variants)

    # ---- of few ----

    def small(self, m: int, n: int, k: int) -> float:
        """Quantize and expand A; packed weights, read once for every 32 rows."""
        rows = self.small_rows(m)
        path = self.find("gemm_small", self.architecture.small(rows))["paths"]["block"]
        clocks = ceil(m / rows) * n * k / 2 / 256 * path["per 256 bytes"] / self.device["engines"]
        prepare = self.stream("quantize_expand", "A for few rows, bf16", m * ceil(k / 128), m * k * (2 + EXPANDED))
        moved = ceil(m / rows) * n * k * PACKED + 2 * m * (n + k)
        share = self.small_round(m, n).share
        return prepare + self.launch + max(self.seconds(clocks), self.memory(moved) / share)

    def small_rows(self, m: int) -> int:
        return next((rows for rows in self.architecture.small_split if rows >= m), 32)

    def small_round(self, m: int, n: int, split: int | None = None, ahead: bool | None = None) -> Round:
        """Of gemm_small: as it is, or with another split, or with or without the fetch of the next quad."""
        rows, known = self.small_rows(m), self.architecture
        path = self.find("gemm_small", known.small(rows))["paths"]["block"]
        sub_groups = ceil(m / rows) * ceil(n / self.lanes) * (split or known.small_split[rows]) / self.device["engines"]
        us = ASSUMED["memory_us"]
        return Round(
            min(ASSUMED["few_rows_threads"], sub_groups),
            QUAD_BYTES * self.lanes,
            self.device["bandwidth"] / (self.device["engines"] * self.device["ghz"]),
            path["per 256 bytes"] * self.lanes / 4,
            us.get(known.name, us["default"]) * 1e3 * self.device["ghz"],
            rows <= known.fetched_ahead if ahead is None else ahead,
        )

    def ours(self, m: int, n: int, k: int, level: str, latencies: Latencies, kept: bool = False) -> float:
        return min(self.small(m, n, k), self.large(m, n, k, level, latencies, kept))

    # ---- others ----

    def peer(self, m: int, n: int, k: int) -> float:
        """Widening to bfloat16 at its best: decoding is free, no latency shows, and caches are perfect."""
        instructions = ceil(m / 8) * ceil(n / self.lanes) * k / 16
        clocks = instructions * self.device["matrix_clocks"] / self.device["engines"]
        return self.launch + max(self.seconds(clocks), self.memory(n * k * PACKED + 2 * m * (n + k)))

    def published(self, of: dict[str, Any], latencies: Latencies, side: int = 4096) -> float:
        """What this model says of somebody's product (tools/gpu_model.toml)."""
        row = self.find(of["kernel"], "32x64")
        cores = int(self.device["cores"])
        rounds = ceil(ceil(side / of["rows"]) * ceil(side / of["columns"]) / cores)
        k_each = 64 // of["bytes"][0] // 2  # of a matrix instruction
        instructions = of["rows"] * of["columns"] / (8 * self.lanes) * side / k_each / (self.device["engines"] / cores)
        epilogue = ASSUMED["threads"] * (row["instructions"] - row["in the loop"])
        busy = self.busy(row, None, int(ASSUMED["threads"]), latencies)
        clocks = rounds * (instructions * self.device["matrix_clocks"] / busy + epilogue)
        walk = Walk(of["rows"], of["columns"], panel=1)
        moved = traffic(side, side, side, walk, cores, self.device["cache"] * 1e6, *of["bytes"])
        passes = [self.launch + self.memory(size * side * side) for size in of.get("passes", [])]
        seconds: float = max(clocks / (of["ghz"] * 1e9), self.memory(moved))
        return self.launch + seconds + sum(passes)


def load(counts: Path) -> dict[str, Model]:
    devices = tomllib.loads((ROOT / "tools/isa_budgets.toml").read_text())["device"]
    rows = json.loads(counts.read_text())
    known = {item.name: item for item in architectures()}
    return {
        name: Model(data, [row for row in rows if row["device"] == name], known[name], 8 if name == "dg2" else 16)
        for name, data in devices.items()
    }


# ---- what it prints and draws ----


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n")
    for cells in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(cells)} |")


def span(short: float, long: float) -> str:
    return f"{short:.3g} to {long:.3g}"


def print_products(models: dict[str, Model]) -> None:
    side = (4096,) * 3
    cases = [("W4A4, quads aligned, weight expanded once", "quad", True)]
    cases += [(f"W4A4, {name}", name, False) for name in ("quad", "pair", "near", "block")]
    rows = []
    for title, level, kept in cases:
        times = ([1e3 * model.large(*side, level, set, kept) for set in (SHORT, LONG)] for model in models.values())
        rows.append([title, *(span(*pair) for pair in times)])
    rows.append(["widening to bf16, at its best", *(f"{1e3 * model.peer(*side):.3g}" for model in models.values())])
    print_table("4096 x 4096 x 4096, milliseconds (modelled; short to long latencies)", ["", *models], rows)


def tile_of(row: dict[str, Any]) -> tuple[int, int]:
    rows, columns = map(int, row["variant"].split()[0].split("x"))
    return rows, columns


def print_busy(models: dict[str, Model]) -> None:
    rows = []
    for name, model in models.items():
        row = next(row for row in model.kernels if row["kernel"] == "gemm_large" and row["variant"].endswith("bf16"))
        cells = []
        for level in LEVELS[:4]:
            shares = [f"{100 * model.busy(row, level, 4, set):.0f}" for set in (SHORT, LONG)] if level in row["paths"] else []
            cells.append(" / ".join(shares))
        for shape in ((4096, 4096, 4096), (4096, 28672, 4096)):
            shares = [f"{model.memory_share(*shape, tile_of(row), panel):.2f}" for panel in (1, None)]
            cells.append(" / ".join(shares))
        rows.append([f"{name} {row['variant'].split()[0]}", *cells])
    head = ["device, tile", *(f"busy %, {level}" for level in LEVELS[:4])]
    head += ["memory over matrix time, 4096^3: by rows / panels", "4096 x 28672 x 4096"]
    print_table("gemm_large, four threads of an engine (modelled; busy: short / long latencies)", head, rows)


def print_published(models: dict[str, Model]) -> None:
    rows = []
    for of in ASSUMED["published"]:
        times = [1e3 * models[of["device"]].published(of, set) for set in (SHORT, LONG)]
        misses = [f"{100 * (time / known - 1):+.0f}" for time, known in zip(times, of["milliseconds"], strict=True)]
        measured = " to ".join(f"{time:.2f}" for time in of["milliseconds"])
        rows.append([of["name"], of["source"].split(":")[0], measured, span(*times), " to ".join(misses)])
    print_table("4096 x 4096 x 4096 by others, milliseconds", ["", "source", "measured by them", "modelled", "off by %"], rows)


def print_in_flight(models: dict[str, Model]) -> None:
    rows = []
    for m in (1, 4, 8):
        for name in ("pvc", "bmg"):
            model = models[name]
            engines = model.device["engines"]
            before, now = model.small_round(m, 4096, 8, False), model.small_round(m, 4096)
            cells = [f"{engines * bytes / 1e6:.2f}" for bytes in (now.needed, before.in_flight, now.in_flight)]
            shares = [f"{100 * round.share:.0f}" for round in (before, now)]
            rows.append([f"{name}, {m} x 4096", *cells, " / ".join(shares)])
    head = ["device, rows x columns", "bandwidth x latency", "before", "now", "of the bandwidth, %: before / now"]
    print_table("gemm_small, megabytes in flight (modelled)", head, rows)


def draw(models: dict[str, Model], file: Path) -> None:
    figure, axes = plt.subplots(len(models), len(SHAPES), figsize=(14, 3.2 * len(models)), sharex=True, squeeze=False)
    for line, (name, model) in zip(axes, models.items(), strict=True):
        for axis, (title, (n, k)) in zip(line, SHAPES.items(), strict=True):
            for level, latencies, kept, style, label in (
                ("quad", LONG, True, "C2-", "W4A4, aligned quads, weight expanded once"),
                ("quad", LONG, False, "C0-", "W4A4, aligned quads"),
                ("block", LONG, False, "C0:", "W4A4, no quad aligned"),
            ):
                times = [1e6 * model.ours(m, n, k, level, latencies, kept) for m in ROWS]
                axis.loglog(ROWS, times, style, label=label)
            axis.loglog(ROWS, [1e6 * model.peer(m, n, k) for m in ROWS], "C1--", label="widening to bf16, at its best")
            if (n, k) == (4096, 4096):
                for marker, of in zip("ox", (of for of in ASSUMED["published"] if of["device"] == name), strict=False):
                    axis.plot(4096, 1e3 * of["milliseconds"][0], f"k{marker}", label=f"measured by others: {of['name']}")
                axis.legend(fontsize=6)
            axis.set_title(f"{name}: {title}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("M")
    for line in axes:
        line[0].set_ylabel("microseconds, modelled, long latencies")
    figure.tight_layout()
    figure.savefig(file, dpi=70)


@click.command()
@click.option("--counts", default=ROOT / "build/isa.json", type=click.Path(exists=True, path_type=Path))
@click.option("--plot", default=ROOT / "docs/gpu_model.png", type=click.Path(path_type=Path))
def main(counts: Path, plot: Path) -> None:
    """Print the modelled tables of docs/GPU.md and draw the Llama-3-8B shapes."""
    models = load(counts)
    print_published(models)
    print_busy(models)
    print_products(models)
    print_in_flight(models)
    draw({name: models[name] for name in ("bmg", "pvc", "dg2")}, plot)


if __name__ == "__main__":
    main()
