# SPDX-License-Identifier: Apache-2.0
"""Which GPU programs there are: those that csrc/sycl/variants.cpp lists, asked of the library that builds them, and a peer."""

import ctypes
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import xpu_fp4

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc/sycl/kernels"
MXFP4 = 1  # Format in csrc/format/formats.h


@dataclass(frozen=True)
class Costs:
    """What the choice of a kernel weighs, as in csrc/sycl/architectures.h."""

    matrix: float
    bytes: float
    small: float
    small_row: float


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

    def changed(self, label: str, **macros: int) -> "Program":
        """The same source with other macros, under another label."""
        return Program(self.source, tuple((dict(self.macros) | macros).items()), label, self.kernels)


@dataclass(frozen=True)
class Architecture:
    """A row of the table in csrc/sycl/architectures.cpp, with its programs."""

    name: str
    costs: Costs
    group: tuple[int, int]  # rows and columns of sub-groups in a work-group of gemm_large
    panel: int  # rows of work-groups that are walked together
    weights_as_int8: bool  # in gemm_small, unless someone asks for the other
    small_split: dict[int, int]  # sub-groups that share K there, by the rows of their work-group
    fetched_ahead: int  # most rows there for which a round asks for the next one's weights
    programs: tuple[Program, ...]

    def small(self, rows: int, suffix: str = "") -> str:
        """The label of gemm_small as it is chosen, for scales that lie together."""
        return f"{rows} rows{suffix}{', W as int8' if self.weights_as_int8 else ''}"

    def program(self, kernel: str, label: str) -> Program:
        found = [item for item in self.programs if kernel in item.kernels and item.label == label]
        if len(found) != 1:
            sys.exit(f"{self.name} has {len(found)} programs with {kernel} that are labelled {label!r}")
        return found[0]


@cache
def sycl_backend() -> ctypes.CDLL:
    """The library. Asking xpu_fp4 loads it, and SYCL's runtime, which it needs, before."""
    sycl = xpu_fp4.backends()["sycl"]
    if not sycl.available:
        sys.exit(f"the tools for GPU kernels ask the SYCL backend: {sycl.detail}")
    return ctypes.CDLL(torch.ops.xpu_fp4._sycl_backend_file())


def described() -> list[dict[str, Any]]:
    """What the SYCL backend says of its programs."""
    variants = sycl_backend().xpu_fp4_sycl_variants
    variants.restype = ctypes.c_char_p
    found: list[dict[str, Any]] = json.loads(variants())
    return found


def read_program(row: Mapping[str, Any]) -> Program:
    macros = tuple(row["macros"].items())
    return Program(KERNELS / row["file"], macros, row["label"], tuple(row["kernels"]), row["budgeted"])


def peers(block_2d: Program) -> list[Program]:
    """The cores of products that widen to bfloat16 and to int8, on the device of another program."""
    shared = {name: block_2d.macro(name) for name in ("SUB_GROUP", "MATRIX_UNIT", "BLOCK_2D", "ALIGNMENT")}
    macros = (*shared.items(), ("REGISTERS", 256))
    source = ROOT / "tools/peer.cpp"
    return [
        Program(source, macros, "32x64", ("bf16_peer",)),
        Program(source, (*macros, ("INT8", 1)), "32x64", ("int8_peer",)),
    ]


@cache
def architectures() -> list[Architecture]:
    found = []
    for row in described():
        programs = [read_program(program) for program in row["programs"]]
        if row["block_2d"]:
            programs += peers(programs[0])
        walk = tuple(row["group"]), row["panel"]
        small = row["weights_as_int8"], dict(row["small_split"]), row["fetched_ahead"]
        found.append(Architecture(row["name"], Costs(**row["costs"]), *(*walk, *small), tuple(programs)))
    return found
