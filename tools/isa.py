# SPDX-License-Identifier: Apache-2.0
"""Compiles every GPU kernel with Intel's offline compiler, counts its machine code and compares the counts with budgets.

Nothing is run on a GPU: every figure is "compiled (ISA)", or "modelled" where clocks of docs/GPU.md's cost model enter.
Needs SYCL's pip packages and ocloc (tools/unpack_ocloc.sh).
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import tomllib
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc/sycl/kernels"
BUDGETS = ROOT / "tools/isa_budgets.toml"
DTYPES = {"f32": 0, "f16": 1, "bf16": 2}
LEVELS = ("quad", "pair", "block", "general")
ROW_BUFFER, ROW_FRAGMENTS, COLUMN_FRAGMENTS = range(3)  # Arrangement in kernels/layout.hpp


# ---- which programs ----


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


def architectures() -> list[Architecture]:
    text = (ROOT / "csrc/sycl/architectures.cpp").read_text()
    tile = r"\{(\d+), (\d+)\}"
    row = rf'\{{"([\w-]+)", (\d+), (true|false), {tile}, {tile}, {tile}, \{{(?:(\d+), (\d+))?\}}\}}'
    found = []
    for name, lanes, block_2d, *numbers in re.findall(row, text):
        tiles = [(int(a), int(b)) if a else None for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
        large, medium, w4a16, native = tiles
        if large is None or medium is None or w4a16 is None:
            sys.exit(f"csrc/sycl/architectures.cpp: {name} lacks a tile")
        found.append(Architecture(name, int(lanes), block_2d == "true", large, medium, w4a16, native))
    if not found:
        sys.exit("csrc/sycl/architectures.cpp: no table found")
    return found


@dataclass(frozen=True)
class Program:
    """A source with its macros (without XPU_FP4_), and what is expected of each of its kernels."""

    source: Path
    macros: tuple[tuple[str, int], ...]
    label: str

    @property
    def key(self) -> str:
        return "_".join([self.source.stem, *(f"{name}{value}" for name, value in self.macros)])


def program(file: str, architecture: Architecture, label: str, **macros: int) -> Program:
    common = {"SUB_GROUP": architecture.sub_group, "MATRIX_UNIT": 1, "BLOCK_2D": int(architecture.block_2d), "ALIGNMENT": 16}
    source = KERNELS / file if "/" not in file else ROOT / file
    return Program(source, tuple((common | macros).items()), label)


def programs(architecture: Architecture) -> Iterator[Program]:
    """What csrc/sycl/backend.cpp builds for a device, output dtypes beside bf16 for the largest tile only."""
    for tile, dtypes in ((architecture.large, DTYPES), (architecture.medium, {"bf16": 2})):
        for name, dtype in dtypes.items():
            label = f"{8 * tile[0]}x{architecture.sub_group * tile[1]} {name}"
            yield program(
                "gemm_large.cpp", architecture, label, DTYPE=dtype, ROW_UNITS=tile[0], COLUMN_UNITS=tile[1], REGISTERS=256
            )
    for rows in (1, 8, 32):
        yield program("gemm_small.cpp", architecture, f"{rows} rows", DTYPE=2, ROWS=rows)
    for tile, split, registers in ((architecture.w4a16, 1, 256), ((1, 1), 8, 128)):
        label = f"{8 * tile[0]}x{architecture.sub_group * tile[1]} bf16" + (", K split" if split > 1 else "")
        macros = {"ROW_UNITS": tile[0], "COLUMN_UNITS": tile[1], "SPLIT": split, "REGISTERS": registers, "ALIGNED_ROWS": 1}
        yield program("gemm_w4a16_matrix.cpp", architecture, label, DTYPE=2, **macros)
    if architecture.native:
        rows, columns = architecture.native
        label = f"{8 * rows}x{architecture.sub_group * columns} bf16"
        yield program("gemm_native.cpp", architecture, label, DTYPE=2, ROW_UNITS=rows, COLUMN_UNITS=columns, REGISTERS=256)
    if architecture.block_2d:
        yield program("tools/bf16_peer.cpp", architecture, "32x64", REGISTERS=256)
    yield program("expand.cpp", architecture, "W", ARRANGEMENT=COLUMN_FRAGMENTS)
    arrangement = ROW_BUFFER if architecture.block_2d else ROW_FRAGMENTS
    # Kernels that stream through memory differ little among devices: every dtype for one with each sub-group.
    for name, dtype in (DTYPES if architecture.name in ("bmg", "dg2") else {"bf16": 2}).items():
        yield program("expand.cpp", architecture, f"A, {name}", ARRANGEMENT=arrangement, DTYPE=dtype)
        yield program("quantize.cpp", architecture, name, DTYPE=dtype)
        yield program("dequantize.cpp", architecture, name, DTYPE=dtype)


# ---- machine code ----


@dataclass
class Compiler:
    ocloc: str
    folder: Path

    @cached_property
    def dumper(self) -> Path:
        """A program that compiles a source as the runtime does and leaves its SPIR-V."""
        binary, prefix = self.folder / "dump_spirv", Path(sys.prefix)
        include = ["-isystem", f"{prefix}/include", "-isystem", f"{prefix}/include/sycl"]
        link = [f"-L{prefix}/lib", "-lsycl", f"-Wl,-rpath,{prefix}/lib"]
        source = str(ROOT / "tools/dump_spirv.cpp")
        subprocess.run(["g++", "-std=c++17", "-O1", "-w", *include, source, "-o", str(binary), *link], check=True)
        return binary

    def spirv(self, item: Program) -> Path:
        options = ["-ffp-contract=off", "-fno-sycl-id-queries-fit-in-int", f"-I{ROOT / 'csrc'}", f"-I{KERNELS}"]
        options += [f"-DXPU_FP4_{name}={value}" for name, value in item.macros]
        environment = os.environ | {
            "OCL_ICD_FILENAMES": f"{sys.prefix}/lib/libintelocl.so",
            "SYCL_CACHE_PERSISTENT": "0",
            "SYCL_DUMP_IMAGES": "1",
            "SYCL_DUMP_IMAGES_PREFIX": f"{self.folder}/{item.key}.",
        }
        command = [str(self.dumper), str(item.source), *options]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = list(self.folder.glob(f"{item.key}.*spv"))
        # The link for the CPU device may fail, or crash Intel's compiler, over the GPU's built-ins: the image is there before.
        if not found:
            sys.exit(f"{item.source.name} {item.label}: {result.stdout}{result.stderr}")
        return found[0]

    def assemble(self, item: Program, module: Path, device: str) -> dict[str, "Listing"]:
        """Kernel name -> its machine code."""
        dump = self.folder / f"{item.key}_{device}"
        dump.mkdir()
        environment = os.environ | {"IGC_ShaderDumpEnable": "1", "IGC_DumpToCustomDir": str(dump)}
        command = [self.ocloc, "compile", "-spirv_input", "-file", str(module), "-device", device, "-output", f"{dump}/binary"]
        result = subprocess.run([*command, "-q"], env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            sys.exit(f"{item.source.name} {item.label} for {device}: {result.stdout}{result.stderr}")
        listings = {}
        for file in sorted(dump.glob("*.asm")):
            listing = Listing(file.read_text(errors="replace"), native=8 if device == "dg2" else 16)
            if listing.kernel != "Intel_Symbol_Table_Void_Program":
                listings[listing.kernel] = listing
        declared = "".join(file.read_text() for file in dump.glob("*_optimized.ll"))
        # A built-in that the compiler does not know stays a call, and ocloc exits with 0 all the same.
        unresolved = re.findall(r"^declare .*@(_Z\w*matrix_mad\w*)", declared, re.MULTILINE)
        for listing in listings.values():
            listing.unresolved = unresolved
        return listings


@dataclass(frozen=True)
class Instruction:
    text: str
    pipe: str | None  # as the compiler notes it

    @cached_property
    def opcode(self) -> str:
        return re.sub(r"^\([^)]*\)\s*", "", self.text).split()[0].split("(")[0]

    @cached_property
    def kind(self) -> str:
        if self.opcode.startswith(("dpas", "bdpas")):
            return "matrix"
        if self.opcode.startswith(("load", "store", "send", "prefetch", "atomic")):
            return "send"
        if self.opcode.startswith(("jmpi", "goto", "join", "if", "else", "endif", "while", "br", "call", "ret")):
            return "flow"
        return self.pipe or "other"

    def clocks(self, native: int) -> int:
        """Issue clocks of an ALU instruction; 16-bit ones at the rate of 32 bits."""
        lanes = re.search(r"\((\d+)\|M", self.text)
        size = {"q": 8, "uq": 8, "df": 8}
        widest = max([size.get(name, 4) for name in re.findall(r">?:([a-z]+)", self.text)] or [4])
        per_clock = native * 4 // widest
        return max(1, -(-int(lanes.group(1) if lanes else 1) // per_clock))


@dataclass
class Segment:
    """Counts over a run of instructions."""

    native: int
    instructions: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    clocks: Counter[str] = field(default_factory=Counter)

    def add(self, instruction: Instruction) -> None:
        self.instructions += 1
        self.counts[instruction.kind] += 1
        if instruction.kind in ("int", "float", "math", "long"):
            self.clocks[instruction.kind] += instruction.clocks(self.native)

    @property
    def matrix(self) -> int:
        return self.counts["matrix"]

    def per_matrix(self, kind: str) -> float:
        return self.clocks[kind] / max(self.matrix, 1)


@dataclass
class Listing:
    """One kernel's assembly."""

    text: str
    native: int  # lanes of an instruction that issues in one clock
    unresolved: list[str] = field(default_factory=list)

    def header(self, key: str) -> str:
        found = re.search(rf"^//\.{key}\s+(\S+)", self.text, re.MULTILINE)
        return found.group(1) if found else "0"

    @property
    def kernel(self) -> str:
        return self.header("kernel").removeprefix("__sycl_kernel_")

    @property
    def registers(self) -> int:
        found = re.search(r"numGRF=(\d+)", self.text)
        return int(found.group(1)) if found else 0

    @property
    def spilled(self) -> int:
        return int(self.header("spill size"))

    @cached_property
    def code(self) -> tuple[list[Instruction], dict[str, int]]:
        """Instructions, and label -> index of the one that follows."""
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in self.text.splitlines():
            if label := re.match(r"^([A-Za-z_][\w.]*):\s*$", line):
                labels[label.group(1)] = len(instructions)
            elif (stripped := line.strip()) and not stripped.startswith(("//", ".")):
                body, _, comment = stripped.partition("//")
                pipe = re.search(r"ALU pipe: (\w+)", comment)
                instructions.append(Instruction(body.strip(), pipe.group(1) if pipe else None))
        return instructions, labels

    def segment(self, first: int = 0, last: int | None = None) -> Segment:
        result = Segment(self.native)
        for instruction in self.code[0][first:last]:
            result.add(instruction)
        return result

    @property
    def whole(self) -> Segment:
        return self.segment()

    @cached_property
    def loop(self) -> tuple[int, int] | None:
        """The innermost loop with the most matrix instructions, as a range of instructions."""
        instructions, labels = self.code
        loops = []
        for end, instruction in enumerate(instructions):
            target = re.search(r"(?:jmpi|goto|while)\b.*?\b(_\w+)", instruction.text)
            if target and labels.get(target.group(1), end + 1) <= end:
                loops.append((labels[target.group(1)], end + 1))
        holding = [loop for loop in loops if self.segment(*loop).matrix]
        innermost = [a for a in holding if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in holding)]
        return max(innermost, key=lambda loop: self.segment(*loop).matrix, default=None)

    def paths(self, least: int) -> list[Segment]:
        """Straight runs of the loop with at least so many matrix instructions, in ascending order of their float work."""
        if self.loop is None:
            return []
        first, last = self.loop
        cuts = sorted({first, last, *(at for at in self.code[1].values() if first < at < last)})
        runs = [self.segment(a, b) for a, b in pairwise(cuts)]
        return sorted((run for run in runs if run.matrix >= least), key=lambda run: run.per_matrix("float"))


# ---- what is expected of it ----


def peak_share(segment: Segment, matrix_clocks: float, useful: float) -> tuple[float, float]:
    """Modelled % of the matrix peak: if integer and float pipes issue together, and if they never do. `useful` matrix
    instructions would do; the compiler may split one."""
    matrix = segment.matrix * matrix_clocks
    integer, floating = segment.clocks["int"], segment.clocks["float"]
    together = max(matrix, integer, floating)
    apart = max(matrix, integer + floating)
    return 100 * useful * matrix_clocks / together, 100 * useful * matrix_clocks / apart


@dataclass
class Result:
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
        if re.search(r"\bINVALID\b|\billegal\b", self.listing.text):
            self.fail("opcodes that the device does not have")
        if self.listing.unresolved:
            self.fail(f"unresolved built-ins: {', '.join(sorted(set(self.listing.unresolved)))}")

    def require_matrix(self) -> bool:
        if self.listing.whole.matrix == 0:
            self.fail("no matrix instruction")
        return self.listing.whole.matrix > 0

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

    def exceed(self, what: str, value: float, most: float) -> None:
        if value > most:
            self.fail(f"{what} is {value:.2f}, at most {most}")

    def fall_short(self, what: str, value: float, least: float) -> None:
        if round(value) < least:
            self.fail(f"{what} is {value:.1f}, at least {least}")


def of_device(budget: Mapping[str, Any], device: str) -> Mapping[str, Any]:
    chosen: Mapping[str, Any] = budget.get(device, budget["default"])
    return chosen


def check_large(result: Result, budgets: Mapping[str, Any]) -> None:
    macros = dict(result.program.macros)
    useful = 4 * macros["ROW_UNITS"] * macros["COLUMN_UNITS"]
    paths = result.listing.paths(least=useful)
    if len(paths) != len(LEVELS):
        return result.fail(f"{len(paths)} paths with {useful} matrix instructions in the loop, expected {len(LEVELS)}")
    clocks = budgets["device"][result.device]["matrix_clocks"]
    most, least = of_device(budgets["gemm_large"], result.device), of_device(budgets["gemm_large_peak"], result.device)
    largest = "bf16" in result.program.label and macros["ROW_UNITS"] * macros["COLUMN_UNITS"] >= 8
    for level, segment in zip(LEVELS, paths, strict=True):
        share = peak_share(segment, clocks, useful)
        path = result.add_path(level, segment, share)
        if largest:
            result.exceed(f"{level}: int per dpas", path["int"], most[level][0])
            result.exceed(f"{level}: float per dpas", path["float"], most[level][1])
            for name, value, bound in zip(("together", "none"), share, least.get(level, (0, 0)), strict=True):
                result.fall_short(f"{level}: % of the int8 peak, {name}", value, bound)
    return None


def check_half(result: Result, budgets: Mapping[str, Any]) -> None:
    """W4A16 and the peer: products of 16-bit operands, whose matrix instructions take the clocks of int8 for half of K."""
    if result.listing.loop is None:
        return None if result.device == "dg2" else result.fail("no loop with matrix instructions")
    segment = result.listing.segment(*result.listing.loop)
    share = peak_share(segment, budgets["device"][result.device]["matrix_clocks"], segment.matrix)
    if "split" in result.program.label:
        per_256 = segment.instructions * 16 / dict(result.program.macros)["SUB_GROUP"]
        have = clocks_per_bytes(budgets["device"][result.device], 256)
        result.paths["loop"] = {"per 256 bytes": per_256, "clocks": have}
        return result.exceed("instructions per 256 bytes of weights", per_256, have) if result.device == "bmg" else None
    result.add_path("loop", segment, share)
    return result.fall_short("% of the bf16 peak, together", share[0], budgets["gemm_w4a16"]["together"])


def check_native(result: Result, budgets: Mapping[str, Any]) -> None:
    if result.listing.loop is None:
        return result.fail("no loop with matrix instructions")
    segment = result.listing.segment(*result.listing.loop)
    path = result.add_path("loop", segment)
    return result.exceed("ALU clocks per bdpas", path["int"] + path["float"], budgets["gemm_native"]["alu"])


def clocks_per_bytes(device: Mapping[str, float], count: float) -> float:
    """Clocks of a vector engine in which its share of the memory bandwidth brings so many bytes."""
    return count / (device["bandwidth"] / (device["engines"] * device["ghz"]))


def check_small(result: Result, budgets: Mapping[str, Any]) -> None:
    """The loop body handles a quad for a sub-group; of its two last paths only the cheap one is taken."""
    loop = result.listing.loop
    lanes = dict(result.program.macros)["SUB_GROUP"]
    paths = result.listing.paths(least=4)
    if loop is None or len(paths) < 2:
        return result.fail("no loop with two paths")
    whole = result.listing.segment(*loop)
    taken = whole.instructions - sum(path.instructions for path in paths[len(paths) // 2 :])  # of block and general: block
    per_256 = taken * 256 / (lanes * 64)
    have = clocks_per_bytes(budgets["device"][result.device], 256)
    result.paths["block"] = {"per 256 bytes": per_256, "clocks": have}
    if result.program.label in budgets["gemm_small"]["labels"] and (share := budgets["gemm_small"]["share"].get(result.device)):
        result.exceed("instructions per 256 bytes of weights", per_256, share * have)
    return None


def check_streaming(result: Result, budgets: Mapping[str, Any]) -> None:
    """ALU clocks of a sub-group's pass through the kernel against the clocks of its memory traffic."""
    macros = dict(result.program.macros)
    size = 4 if macros.get("DTYPE") == 0 else 2
    per_lane = {
        "quantize": 16 + 16 / size * 17 / 32,
        "dequantize": 4 + 0.25 + 8 * size,
        "expand": 68 + 132,
        "quantize_expand": 128 * size + 132,
    }
    if result.kernel not in per_lane:
        return
    whole = result.listing.whole
    moved = clocks_per_bytes(budgets["device"][result.device], per_lane[result.kernel] * macros["SUB_GROUP"])
    result.paths["all"] = {"int clocks": whole.clocks["int"], "float clocks": whole.clocks["float"], "memory clocks": moved}
    if result.kernel == "quantize" and result.device in budgets["quantize"]["devices"]:
        result.exceed("ALU clocks per sub-group", max(whole.clocks["int"], whole.clocks["float"]), moved)


def judge(result: Result, budgets: Mapping[str, Any]) -> Result:
    result.check_soundness()
    checks = {"gemm_large": check_large, "gemm_small": check_small, "gemm_w4a16_matrix": check_half, "bf16_peer": check_half}
    checks["gemm_native"] = check_native
    if check := checks.get(result.kernel):
        if result.require_matrix():
            check(result, budgets)
    else:
        check_streaming(result, budgets)
    return result


def run(compiler: Compiler, wanted: list[tuple[str, Program]], budgets: Mapping[str, Any]) -> list[Result]:
    _ = compiler.dumper
    unique = list(dict.fromkeys(item for _, item in wanted))
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        modules = dict(zip(unique, pool.map(compiler.spirv, unique), strict=True))

        def one(job: tuple[str, Program]) -> list[Result]:
            device, item = job
            listings = compiler.assemble(item, modules[item], device)
            return [judge(Result(device, item, kernel, listing), budgets) for kernel, listing in listings.items()]

        return [result for results in pool.map(one, wanted) for result in results]


# ---- report ----


def describe(path: Mapping[str, float]) -> str:
    if "together" in path:
        return (
            f"{path['int']:.1f} int, {path['float']:.1f} float, {path['send']:.2f} send per dpas; "
            f"{path['together']:.0f} / {path['none']:.0f} % of peak"
        )
    if "matrix" in path:
        return f"{path['int']:.1f} int, {path['float']:.1f} float, {path['send']:.2f} send per bdpas"
    if "clocks" in path:
        return f"{path['per 256 bytes']:.0f} instructions per 256 bytes, {path['clocks']:.0f} clocks"
    return ", ".join(f"{value:.0f} {name}" for name, value in path.items())


def table(results: list[Result]) -> Table:
    out = Table(title="compiled (ISA); % of peak modelled: int and float pipes together / never together")
    for column in ("device", "kernel", "variant", "registers", "instructions", "dpas", "spilled", "path", "cost"):
        out.add_column(column)
    for result in results:
        listing = result.listing
        row = [result.device, result.kernel, result.program.label, str(listing.registers), listing.header("instCount")]
        row += [str(listing.whole.matrix), str(listing.spilled)]
        for i, (name, path) in enumerate(result.paths.items() or [("", {})]):
            out.add_row(*(row if i == 0 else [""] * len(row)), name, describe(path))
    return out


def save(results: list[Result], file: Path) -> None:
    rows = [
        {
            "device": result.device,
            "kernel": result.kernel,
            "variant": result.program.label,
            "registers": result.listing.registers,
            "instructions": int(result.listing.header("instCount")),
            "spilled": result.listing.spilled,
            "paths": result.paths,
        }
        for result in results
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")


def negative_control(compiler: Compiler, budgets: Mapping[str, Any]) -> None:
    """A kernel that must be refused: the largest tile with half the registers that it needs."""
    bmg = next(item for item in architectures() if item.name == "bmg")
    bad = program("gemm_large.cpp", bmg, "control, 128 registers", DTYPE=2, ROW_UNITS=8, COLUMN_UNITS=2, REGISTERS=128)
    (result,) = run(compiler, [("bmg", bad)], budgets)
    if not any("spills" in failure for failure in result.failures):
        sys.exit("the negative control passed: a tile that cannot fit 128 registers was not refused")


@click.command()
@click.option("--ocloc", required=True, type=click.Path(exists=True, dir_okay=False), help="Intel's offline compiler.")
@click.option("--device", "devices", multiple=True, help="Default: every architecture.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the counts here.")
def main(ocloc: str, devices: tuple[str, ...], json_file: Path | None) -> None:
    """Compile every GPU kernel, count its machine code, compare with tools/isa_budgets.toml."""
    budgets = tomllib.loads(BUDGETS.read_text())
    wanted = [(item.name, part) for item in architectures() if not devices or item.name in devices for part in programs(item)]
    with tempfile.TemporaryDirectory() as temporary:
        compiler = Compiler(ocloc, Path(temporary))
        results = run(compiler, wanted, budgets)
        negative_control(compiler, budgets)
    Console(width=170).print(table(results))
    if json_file:
        save(results, json_file)
    failures = [failure for result in results for failure in result.failures]
    for failure in failures:
        click.echo(f"FAILED {failure}", err=True)
    click.echo(f"{len(results)} kernels, {len(failures)} over budget; the negative control was refused")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
