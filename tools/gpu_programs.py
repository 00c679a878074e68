# SPDX-License-Identifier: Apache-2.0
"""Which GPU programs there are: what csrc/sycl/backend.cpp builds for the architectures of csrc/sycl/architectures.cpp."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc/sycl/kernels"
DTYPES = {"f32": 0, "f16": 1, "bf16": 2}
ROW_BUFFER, ROW_FRAGMENTS, COLUMN_FRAGMENTS = range(3)  # Arrangement in kernels/layout.hpp
APART, PACKED = range(2)  # ElementOrder there
ANY_WEIGHTS, WHOLE_QUADS, SCALES_TOGETHER = range(3)  # Weights there


@dataclass(frozen=True)
class Costs:
    """What the choice of a kernel weighs, as in csrc/sycl/architectures.h."""

    matrix: float
    bytes: float
    small: float
    small_row: float


@dataclass(frozen=True)
class Architecture:
    """A row of the table in csrc/sycl/architectures.cpp."""

    name: str
    sub_group: int
    block_2d: bool
    large: tuple[int, int]
    medium: tuple[int, int]
    w4a16: tuple[int, int]
    native: tuple[int, int] | None
    costs: Costs


def architectures() -> list[Architecture]:
    text = (ROOT / "csrc/sycl/architectures.cpp").read_text()
    tile = r"\{(\d+), (\d+)\}"
    row = rf'\{{"([\w-]+)", (\d+), (true|false), {tile}, {tile}, {tile}, \{{(?:(\d+), (\d+))?\}}, \{{([\d., ]+)\}}\}}'
    found = []
    for name, lanes, block_2d, *numbers, costs in re.findall(row, text):
        tiles = [(int(a), int(b)) if a else None for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
        large, medium, w4a16, native = tiles
        if large is None or medium is None or w4a16 is None:
            sys.exit(f"csrc/sycl/architectures.cpp: {name} lacks a tile")
        weights = Costs(*map(float, costs.split(",")))
        found.append(Architecture(name, int(lanes), block_2d == "true", large, medium, w4a16, native, weights))
    if not found:
        sys.exit("csrc/sycl/architectures.cpp: no table found")
    return found


@dataclass(frozen=True)
class Program:
    """A source with its macros (without XPU_FP4_) and the kernels that it must give."""

    source: Path
    macros: tuple[tuple[str, int], ...]
    label: str
    kernels: tuple[str, ...]
    budgeted: bool = True  # held to the budgets of its kernels; without, to soundness alone

    def macro(self, name: str) -> int:
        return dict(self.macros)[name]

    def options(self) -> list[str]:
        """Those of csrc/sycl/programs.cpp."""
        options = ["-ffp-contract=off", "-fno-sycl-id-queries-fit-in-int", f"-I{ROOT / 'csrc'}", f"-I{KERNELS}"]
        return options + [f"-DXPU_FP4_{name}={value}" for name, value in self.macros]


def program(
    file: str,
    architecture: Architecture,
    label: str,
    macros: Mapping[str, int],
    kernels: tuple[str, ...] = (),
    budgeted: bool = True,
) -> Program:
    """`kernels` defaults to one that is named like the source."""
    common = {"SUB_GROUP": architecture.sub_group, "MATRIX_UNIT": 1, "BLOCK_2D": int(architecture.block_2d), "ALIGNMENT": 16}
    source = ROOT / file if "/" in file else KERNELS / file
    return Program(source, tuple((common | dict(macros)).items()), label, kernels or (source.stem,), budgeted)


def tiled(architecture: Architecture, tile: tuple[int, int], dtype: str) -> tuple[str, dict[str, int]]:
    """Label and macros of a kernel of 256 registers with one tile per sub-group."""
    label = f"{8 * tile[0]}x{architecture.sub_group * tile[1]} {dtype}"
    return label, {"DTYPE": DTYPES[dtype], "ROW_UNITS": tile[0], "COLUMN_UNITS": tile[1], "REGISTERS": 256}


def gemm_large(architecture: Architecture, tile: tuple[int, int], dtype: str) -> Program:
    return program("gemm_large.cpp", architecture, *tiled(architecture, tile, dtype), budgeted=tile == architecture.large)


def gemm_small(architecture: Architecture, rows: int, weights: int) -> Program:
    label = f"{rows} rows" + ("", ", any K", ", scales apart")[(SCALES_TOGETHER, ANY_WEIGHTS, WHOLE_QUADS).index(weights)]
    return program("gemm_small.cpp", architecture, label, {"DTYPE": DTYPES["bf16"], "ROWS": rows, "WEIGHTS": weights})


def gemm_native(architecture: Architecture, tile: tuple[int, int]) -> Program:
    return program("gemm_native.cpp", architecture, *tiled(architecture, tile, "bf16"))


def gemm_w4a16(architecture: Architecture, tile: tuple[int, int], dtype: str, split: int) -> Program:
    label, macros = tiled(architecture, tile, dtype)
    macros |= {"SPLIT": split, "ALIGNED_ROWS": 1}
    if split > 1:
        label, macros["REGISTERS"] = f"{label}, K split", 128
    return program("gemm_w4a16_matrix.cpp", architecture, label, macros)


def products(architecture: Architecture) -> Iterator[Program]:
    for dtype in DTYPES:
        yield gemm_large(architecture, architecture.large, dtype)
    yield gemm_large(architecture, architecture.medium, "bf16")
    for rows in (1, 4, 8, 16, 32):
        yield gemm_small(architecture, rows, SCALES_TOGETHER)
        yield gemm_small(architecture, rows, WHOLE_QUADS)
    for rows in (8, 32):
        yield gemm_small(architecture, rows, ANY_WEIGHTS)
    for dtype in ("bf16", "f16"):
        yield gemm_w4a16(architecture, architecture.w4a16, dtype, split=1)
    for row_units in (1, 2, 4):
        yield gemm_w4a16(architecture, (row_units, 1), "bf16", split=8)
    if architecture.native:
        yield gemm_native(architecture, architecture.native)


def streams(architecture: Architecture) -> Iterator[Program]:
    """Kernels that stream through memory differ little among devices: every dtype for one with each sub-group."""
    yield program("expand.cpp", architecture, "W", {"ARRANGEMENT": COLUMN_FRAGMENTS, "ORDER": APART})
    arrangement = ROW_BUFFER if architecture.block_2d else ROW_FRAGMENTS
    for name in DTYPES if architecture.name in ("bmg", "dg2") else ("bf16",):
        dtype = {"DTYPE": DTYPES[name]}
        both = ("expand", "quantize_expand")
        for order, use in ((APART, ""), (PACKED, " for few rows")):
            macros = dtype | {"ARRANGEMENT": arrangement, "ORDER": order}
            yield program("expand.cpp", architecture, f"A{use}, {name}", macros, both)
        yield program("quantize.cpp", architecture, name, dtype, ("quantize", "group_quantize"))
        yield program("dequantize.cpp", architecture, name, dtype)


def portable(architecture: Architecture) -> Iterator[Program]:
    """For GPUs without a matrix unit, which we do not know: with each sub-group, compiled for one that we do."""
    if architecture.name in ("bmg", "dg2"):
        yield program("gemm.cpp", architecture, "no matrix unit", {"MATRIX_UNIT": 0})
        yield program("gemm_w4a16.cpp", architecture, "no matrix unit", {"MATRIX_UNIT": 0, "DTYPE": DTYPES["bf16"]})


def programs(architecture: Architecture) -> Iterator[Program]:
    """What csrc/sycl/backend.cpp builds for a device and aligned operands, and the peer."""
    yield from products(architecture)
    yield from streams(architecture)
    yield from portable(architecture)
    if architecture.block_2d:
        yield program("tools/bf16_peer.cpp", architecture, "32x64", {"REGISTERS": 256})
