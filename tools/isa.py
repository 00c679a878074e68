# SPDX-License-Identifier: Apache-2.0
"""Compiles every GPU kernel with Intel's offline compiler, counts its machine code and compares the counts with budgets.

Nothing is run on a GPU: every figure is "compiled (ISA)", or "modelled" where clocks of docs/GPU.md's cost model enter.
Needs SYCL's pip packages and ocloc (tools/unpack_ocloc.sh).
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import tomllib
from gpu_programs import KERNELS, ROOT, Architecture, Program, architectures, peers
from isa_checks import Result, judge, refuse
from machine_code import Listing
from rich.console import Console
from rich.table import Table

BUDGETS = ROOT / "tools/isa_budgets.toml"


# ---- compiling, with everything kept by its content ----


def digest(*parts: str | bytes) -> str:
    hashed = sha256()
    for part in parts:
        hashed.update(sha256(part.encode() if isinstance(part, str) else part).digest())
    return hashed.hexdigest()[:24]


@dataclass
class Compiler:
    ocloc: Path
    folder: Path  # results of earlier runs, and of this
    used: set[Path] = field(default_factory=set)

    @cached_property
    def version(self) -> str:
        return importlib.metadata.version("dpcpp-cpp-rt")

    @cached_property
    def sycl(self) -> str:
        """What, beside its options, decides on a program's SPIR-V."""
        sources = sorted([*KERNELS.iterdir(), *(ROOT / "csrc/format").iterdir(), *(ROOT / "tools").glob("*.cpp")])
        return digest(self.version, *(file.name + file.read_text() for file in sources))

    @cached_property
    def dumper(self) -> Path:
        """A program that compiles a source as the runtime does and leaves its SPIR-V."""
        source, prefix = ROOT / "tools/dump_spirv.cpp", Path(sys.prefix)
        binary = self.folder / f"dump_spirv-{digest(self.version, source.read_bytes())}"
        if not binary.exists():
            include = ["-isystem", f"{prefix}/include", "-isystem", f"{prefix}/include/sycl"]
            link = [f"-L{prefix}/lib", "-lsycl", f"-Wl,-rpath,{prefix}/lib"]
            subprocess.run(["g++", "-std=c++17", "-w", *include, str(source), "-o", str(binary), *link], check=True)
        self.used.add(binary)
        return binary

    @cached_property
    def compiler(self) -> str:
        """What, beside the SPIR-V, decides on the machine code."""
        packages = sorted(file.name for file in (self.ocloc.parent / "packages").glob("*.deb"))
        return digest(*packages) if packages else digest(self.ocloc.read_bytes())

    def spirv(self, item: Program) -> Path:
        module = self.folder / f"{item.source.stem}-{digest(self.sycl, str(item.source), *item.options())}.spv"
        self.used.add(module)
        if module.exists():
            return module
        environment = os.environ | {
            "OCL_ICD_FILENAMES": f"{sys.prefix}/lib/libintelocl.so",
            "SYCL_CACHE_PERSISTENT": "0",
            "SYCL_DUMP_IMAGES": "1",
            "SYCL_DUMP_IMAGES_PREFIX": f"{module}.",
        }
        command = [str(self.dumper), str(item.source), *item.options()]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = list(self.folder.glob(f"{module.name}.*"))
        if len(found) != 1:
            sys.exit(f"{item.source.name} {item.label}: {result.stdout}{result.stderr}")
        found[0].rename(module)
        return module

    def assemble(self, module: Path, device: str) -> Path:
        """A folder with the machine code of the module's kernels as text, or with the compiler's errors."""
        folder = self.folder / f"{module.stem}-{device}-{digest(self.compiler, module.read_bytes())}"
        self.used.add(folder)
        if folder.exists():
            return folder
        dump = folder.with_suffix(".unfinished")
        shutil.rmtree(dump, ignore_errors=True)
        environment = os.environ | {"IGC_ShaderDumpEnable": "1", "IGC_DumpToCustomDir": str(dump)}
        command: list[str | Path] = [self.ocloc, "compile", "-spirv_input", "-file", module]
        command += ["-device", device, "-output", dump / "binary"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        for file in dump.iterdir():
            if not file.name.endswith((".asm", "_optimized.ll")):
                file.unlink()
        if result.returncode != 0:
            (dump / "errors").write_text(result.stdout + result.stderr)
        return dump.rename(folder)

    def judge(self, device: str, item: Program, budgets: Mapping[str, Any]) -> list[Result]:
        folder = self.assemble(self.spirv(item), device)
        if (errors := folder / "errors").exists():
            return refuse(device, item, errors.read_text())
        return judge(device, item, self.listings(folder, device), budgets)

    def listings(self, folder: Path, device: str) -> dict[str, Listing]:
        """Kernel name -> its machine code."""
        declared = "".join(file.read_text() for file in folder.glob("*_optimized.ll"))
        # A built-in that the compiler does not know stays a call, and ocloc exits with 0 all the same.
        unresolved = tuple(re.findall(r"^declare .*@(_Z\w*matrix_mad\w*)", declared, re.MULTILINE))
        native = 8 if device == "dg2" else 16
        files = sorted(folder.glob("*.asm"))
        found = [Listing(file.read_text(errors="replace"), native, unresolved, file) for file in files]
        return {listing.kernel: listing for listing in found}

    def forget_the_rest(self) -> None:
        """Removes what no kernel of this run needed."""
        for path in set(self.folder.iterdir()) - self.used:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(compiler: Compiler, wanted: Iterable[tuple[str, Program]], budgets: Mapping[str, Any]) -> list[Result]:
    jobs = list(wanted)
    modules = list(dict.fromkeys(item for _, item in jobs))
    compiler.folder.mkdir(parents=True, exist_ok=True)
    _ = compiler.dumper  # once, before threads need it
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiler.spirv, modules))
        results = pool.map(lambda job: compiler.judge(job[0], job[1], budgets), jobs)
        return [result for of_program in results for result in of_program]


# ---- kernels that must be refused ----


def controls(bmg: Architecture) -> dict[str, Program]:
    """Bad kernels, each with what its refusal must say."""

    large = bmg.program("gemm_large", "48x32 bf16")
    (bdpas,) = (item for architecture in architectures() for item in architecture.programs if "gemm_bdpas" in item.kernels)
    return {
        "spills": large.changed("in 128 registers", REGISTERS=128),
        "no matrix instruction": large.changed("with the stand-in", MATRIX_UNIT=0, ROW_UNITS=2),
        "at most": large.changed("of 16x32, which has too little to do between its loads", ROW_UNITS=2),
        "does not compile": bdpas,  # for an instruction that bmg lacks
        "no machine code": replace(peers(large)[0], label="which is another", kernels=("gemm_large",)),
    }


def require_refusals(compiler: Compiler, budgets: Mapping[str, Any]) -> int:
    """The number of controls; exits with the one that passed."""
    wanted = controls(next(item for item in architectures() if item.name == "bmg"))
    results = run(compiler, [("bmg", control) for control in wanted.values()], budgets)
    for (reason, control), result in zip(wanted.items(), results, strict=True):
        if not any(reason in failure for failure in result.failures):
            sys.exit(f"a bad kernel passed: {control.source.name} {control.label} was to be refused for '{reason}'")
    return len(results)


# ---- the choice of a kernel ----

TOLERANCE = 0.1  # of a cost in the table of csrc/sycl/architectures.cpp; a choice that depends on less is of no consequence


def is_chosen(architecture: Architecture, small: Program) -> bool:
    return small.label in {architecture.small(small.macro("ROWS"), suffix) for suffix in ("", ", W4A8")}


def stale_costs(results: Iterable[Result], table: Iterable[Architecture]) -> list[str]:
    """Names the costs that choose a kernel and are not those that were counted."""
    known = {item.name: item for item in table}
    failures = []
    for result in results:
        if result.kernel == "gemm_small" and "block" in result.paths and is_chosen(known[result.device], result.program):
            of = known[result.device].costs
            rows, counted = result.program.macro("ROWS"), result.paths["block"]["per 256 bytes"]
            stated = of.small + of.small_row * rows
            if abs(stated - counted) > TOLERANCE * counted:
                failures.append(
                    f"{result.device} gemm_small ({rows} rows): csrc/sycl/architectures.cpp states {stated:.0f} instructions "
                    f"per 256 bytes, counted {counted:.0f}"
                )
    return failures


# ---- report ----


def describe(path: Mapping[str, float]) -> str:
    if "together" in path:
        busy = f", busy {path['busy']:.0f} %" if "busy" in path else ""
        return (
            f"{path['int']:.1f} int, {path['float']:.1f} float, {path['send']:.2f} send per dpas; "
            f"{path['together']:.0f} / {path['none']:.0f} % of peak{busy}"
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
        row = [result.device, result.kernel, result.program.label, str(listing.registers), str(listing.size)]
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
            "instructions": result.listing.size,
            "in the loop": result.listing.segment(*result.listing.loop).instructions if result.listing.loop else 0,
            "spilled": result.listing.spilled,
            "paths": result.paths,
            "listing": str(result.listing.file),
        }
        for result in results
    ]
    file.write_text(json.dumps(rows, indent=1) + "\n")


@click.command()
@click.option("--ocloc", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Intel's compiler.")
@click.option("--folder", default=ROOT / "build/isa", type=click.Path(path_type=Path), help="Keeps what was compiled.")
@click.option(
    "--only", default="", help="Only programs of which 'DEVICE KERNEL LABEL' matches this; nothing is forgotten then."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the counts here.")
def main(ocloc: Path, folder: Path, only: str, json_file: Path | None) -> None:
    """Compile every GPU kernel, count its machine code, compare with tools/isa_budgets.toml."""
    budgets = tomllib.loads(BUDGETS.read_text())
    compiler = Compiler(ocloc, folder.resolve())
    wanted = [(item.name, part) for item in architectures() for part in item.programs]
    wanted = [(name, part) for name, part in wanted if re.search(only, f"{name} {' '.join(part.kernels)} {part.label}")]
    results = run(compiler, wanted, budgets)
    refused = 0 if only else require_refusals(compiler, budgets)
    if not only:
        compiler.forget_the_rest()
    Console(width=170).print(table(results))
    if json_file:
        save(results, json_file)
    failures = [failure for result in results for failure in result.failures] + stale_costs(results, architectures())
    for failure in failures:
        click.echo(f"FAILED {failure}", err=True)
    click.echo(f"{len(results)} kernels, {len(failures)} failures; {refused} bad kernels were refused")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
