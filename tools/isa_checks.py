# SPDX-License-Identifier: Apache-2.0
"""Holds counted machine code to tools/isa_budgets.toml. Clocks enter where a statement is "modelled"."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine_model import LATENCIES, Engine, matrix_busy
from gpu_programs import MXFP4, Program
from machine_code import Listing, Segment

# A load to nowhere. The second way is that of Xe3 and Xe3P, where a store has something as its second source.
FETCH = re.compile(r"load\S* .*\bnull:0 |sendg?\.ugm \((8|16)\|M0\)\s+null\s+\S+\s+null:0 ")
LEVELS = ("quad", "pair", "near", "block", "general")


def peak_share(segment: Segment, matrix_clocks: float, useful: float) -> tuple[float, float]:
    """Modelled % of the matrix peak: if integer and float pipes issue together, and if they never do. `useful` matrix
    instructions would do; the compiler may split one."""
    matrix = segment.matrix * matrix_clocks
    integer, floating = segment.clocks["int"], segment.clocks["float"]
    together = max(matrix, integer, floating)
    apart = max(matrix, integer + floating)
    return 100 * useful * matrix_clocks / together, 100 * useful * matrix_clocks / apart


def clocks_per_bytes(device: Mapping[str, float], count: float) -> float:
    """Clocks of a vector engine in which its share of the memory bandwidth brings so many bytes."""
    return count / (device["bandwidth"] / (device["engines"] * device["ghz"]))


@dataclass
class Result:
    """A kernel's machine code for a device: what was counted, and every way in which it fails."""

    device: str
    program: Program
    kernel: str
    listing: Listing
    failures: list[str] = field(default_factory=list)
    paths: dict[str, dict[str, float]] = field(default_factory=dict)

    def fail(self, message: str) -> None:
        self.failures.append(f"{self.device} {self.kernel} ({self.program.label}): {message}")

    def check_soundness(self) -> None:
        if self.listing.spilled:
            self.fail(f"spills {self.listing.spilled} bytes per thread")
        if self.listing.invalid:
            self.fail("opcodes that the device does not have")
        if self.listing.unresolved:
            self.fail(f"unresolved built-ins: {', '.join(sorted(set(self.listing.unresolved)))}")

    def add_path(self, name: str, segment: Segment, share: tuple[float, float] | None = None) -> dict[str, float]:
        path: dict[str, float] = {
            "matrix": segment.matrix,
            "int": segment.per_matrix("int"),
            "float": segment.per_matrix("float"),
            "send": segment.counts["send"] / max(segment.matrix, 1),
        }
        if share:
            path |= {"together": share[0], "none": share[1]}
        self.paths[name] = path
        return path

    def check_decoding(self, name: str, instructions: float, weights: float, budgets: Mapping[str, Any]) -> None:
        """Instructions that decode so many bytes of weights against the clocks in which memory brings them."""
        per_256, clocks = instructions * 256 / weights, clocks_per_bytes(budgets["device"][self.device], 256)
        self.paths[name] = {"per 256 bytes": per_256, "clocks": clocks}
        share = budgets["decoding"].get(self.device, {}).get(self.kernel, {}).get(self.program.label, 1)
        self.exceed("instructions per 256 bytes of weights", per_256, share * clocks)

    def exceed(self, what: str, value: float, most: float) -> None:
        if value > most:
            self.fail(f"{what} is {value:.2f}, at most {most:g}")

    def fall_short(self, what: str, value: float, least: float) -> None:
        if round(value) < least:
            self.fail(f"{what} is {value:.1f}, at least {least:g}")


def of_device(budget: Mapping[str, Any], device: str) -> Mapping[str, Any]:
    chosen: Mapping[str, Any] = budget.get(device, budget["default"])
    return chosen


def check_large(result: Result, budgets: Mapping[str, Any]) -> None:
    useful = 4 * result.program.macro("ROW_UNITS") * result.program.macro("COLUMN_UNITS")
    paths = result.listing.paths(least=useful)
    has_near = result.program.macro("BLOCK_2D") and result.program.macro("FORMAT") == MXFP4
    levels = [level for level in LEVELS if level != "near" or has_near]
    if len(paths) != len(levels):
        return result.fail(f"{len(paths)} paths with {useful} matrix instructions in the loop, expected {len(levels)}")
    clocks = budgets["device"][result.device]["matrix_clocks"]
    most, least = of_device(budgets["gemm_large"], result.device), of_device(budgets["gemm_large_peak"], result.device)
    for level, segment in zip(levels, paths, strict=True):
        share = peak_share(segment, clocks, useful)
        path = result.add_path(level, segment, share)
        if result.program.budgeted:
            result.exceed(f"{level}: int per dpas", path["int"], most[level][0])
            result.exceed(f"{level}: float per dpas", path["float"], most[level][1])
            for name, value, bound in zip(("together", "none"), share, least.get(level, (0, 0)), strict=True):
                result.fall_short(f"{level}: % of the int8 peak, {name}", value, bound)
    # Of one program for a device: the others' loops are alike, and this takes a second.
    if bound := budgets["gemm_large_busy"].get(result.device, {}).get(result.program.label):
        instructions = tuple(result.listing.code[0][slice(*result.listing.runs(useful)[0])])
        engine = Engine(int(clocks), result.listing.native)
        busy = [100 * matrix_busy(instructions, engine, latencies) for latencies in LATENCIES]
        result.paths["quad"]["busy"] = min(busy)
        result.fall_short("quad: % of the time in which the matrix unit is busy", min(busy), bound)
    return None


def check_half(result: Result, budgets: Mapping[str, Any]) -> None:
    """W4A16 and the peer: products of 16-bit operands, whose matrix instructions take the clocks of int8 for half of K."""
    if result.listing.loop is None:
        return result.fail("no loop with matrix instructions")
    device = budgets["device"][result.device]
    segment = result.listing.segment(*result.listing.loop)
    if "split" in result.program.label:
        return result.check_decoding("loop", segment.instructions, result.program.macro("SUB_GROUP") * 16, budgets)
    share = peak_share(segment, device["matrix_clocks"], segment.matrix)
    result.add_path("loop", segment, share)
    return result.fall_short("% of the bf16 peak, together", share[0], budgets["gemm_w4a16"]["together"])


def check_bdpas(result: Result, budgets: Mapping[str, Any]) -> None:
    if result.listing.loop is None:
        return result.fail("no loop with matrix instructions")
    segment = result.listing.segment(*result.listing.loop)
    path = result.add_path("loop", segment)
    return result.exceed("ALU clocks per bdpas", path["int"] + path["float"], budgets["gemm_bdpas"]["alu"])


def check_small(result: Result, budgets: Mapping[str, Any]) -> None:
    """A pass through the loop handles a quad for a sub-group, on the level for any exponents inside of the window or on the
    general one. Counted is the longest way through the former."""
    row_units = -(-result.program.macro("ROWS") // 8)
    runs = result.listing.runs(least=4 * row_units)
    if len(runs) != 2:
        return result.fail(f"{len(runs)} runs with {4 * row_units} matrix instructions in the loop, expected 2")
    weights = result.program.macro("SUB_GROUP") * 64
    result.check_decoding("block", result.listing.longest_pass(runs[0]), weights, budgets)
    device = budgets["device"][result.device]
    matrix = result.listing.segment(*runs[0]).matrix * device["matrix_clocks"]
    result.exceed("matrix clocks per quad", matrix, clocks_per_bytes(device, weights))
    if result.program.macro("ROWS") > budgets["fetched_ahead"]["rows"]:
        return None
    loop = result.listing.code[0][slice(*(result.listing.loop or (0, 0)))]
    fetches = sum(bool(FETCH.match(instruction.text)) for instruction in loop)
    return result.fall_short("fetches of the next quad", fetches, 2)


def check_stream(result: Result, budgets: Mapping[str, Any]) -> None:
    """ALU clocks of a sub-group's pass through the kernel against the clocks of its memory traffic."""
    macros = dict(result.program.macros)
    size = 4 if macros.get("DTYPE") == 0 else 2
    quad_of_lanes = 128 / macros["SUB_GROUP"]
    per_lane = {
        "quantize": 16 + 16 / size * 17 / 32,
        "quantize_mxint8": quad_of_lanes * (size + 33 / 32),
        "dequantize": 4 + 0.25 + 8 * size,
        "dequantize_mxint8": 8 + 0.25 + 8 * size,
        "expand": (68 if macros.get("FORMAT", MXFP4) == MXFP4 else 132) + 132,
        "quantize_expand": 128 * size + 132,
        "gather_quantize_expand": 128 * size + 132,
        "gate_quantize_expand": 2 * 128 * size + 132,
        "transform": 32 * 2 * size,
        "transform_quantize": 32 * (size + 17 / 32),
        "transform_quantize_mxint8": 32 * (size + 33 / 32),
        "transform_quantize_expand": 128 * size + 132,
    }
    whole = result.listing.whole
    one_row = result.program.source.name == FEW_ROWS  # for a sub-group, else for each of its lanes
    rows = 1 if one_row else result.program.macro("SUB_GROUP")
    moved = clocks_per_bytes(budgets["device"][result.device], per_lane[result.kernel] * rows)
    result.paths["all"] = {"int clocks": whole.clocks["int"], "float clocks": whole.clocks["float"], "memory clocks": moved}
    if one_row:
        most = of_device(budgets["few_rows"], result.device)[result.kernel]
        result.exceed("ALU clocks of a row's quad", max(whole.clocks["int"], whole.clocks["float"]), most)
    elif result.kernel in budgets["streams"]["kernels"] and result.device in budgets["streams"]["devices"]:
        result.exceed("ALU clocks per sub-group", max(whole.clocks["int"], whole.clocks["float"]), moved)


Check = Callable[[Result, Mapping[str, Any]], None]
MATRIX_CHECKS: dict[str, Check] = {
    "gemm_large": check_large,
    "gemm_small": check_small,
    "gemm_w4a16_matrix": check_half,
    "bf16_peer": check_half,
    "int8_peer": check_half,
    "gemm_bdpas": check_bdpas,
}
TRANSFORMS = ("transform", "transform_quantize", "transform_quantize_mxint8", "transform_quantize_expand")
FEW_ROWS = "expand_row.cpp"
OF_EXPERTS = ("gather_quantize_expand", "gate_quantize_expand")
STREAM_CHECKS: dict[str, Check] = dict.fromkeys(
    ("quantize", "quantize_mxint8", "dequantize", "dequantize_mxint8", "expand", "quantize_expand", *OF_EXPERTS, *TRANSFORMS),
    check_stream,
)


def refuse(device: str, program: Program, errors: str) -> list[Result]:
    """A program that the compiler does not take."""
    result = Result(device, program, program.kernels[0], Listing("", 1))
    result.fail(f"does not compile: {errors.strip()}")
    return [result]


def judge(device: str, program: Program, listings: Mapping[str, Listing], budgets: Mapping[str, Any]) -> list[Result]:
    """Every kernel that the program must give, counted and checked."""
    results = []
    for kernel in program.kernels:
        result = Result(device, program, kernel, listings.get(kernel, Listing("", 1)))
        results.append(result)
        if kernel not in listings:
            result.fail("no machine code")
            continue
        result.check_soundness()
        if kernel in MATRIX_CHECKS:
            if result.listing.whole.matrix == 0:
                result.fail("no matrix instruction")
            else:
                MATRIX_CHECKS[kernel](result, budgets)
        elif kernel in STREAM_CHECKS:
            STREAM_CHECKS[kernel](result, budgets)
    return results
