# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for real GPUs with Intel's offline compiler, and counts what matters in the machine code.

Nothing is run: the result is "compiled (ISA)". Needs the SYCL pip packages and ocloc (tools/unpack_ocloc.sh).
Usage: python tools/compile_for_gpus.py --ocloc FOLDER/ocloc
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# ocloc's device -> lanes of a sub-group, which is the width of the matrix unit.
DEVICES = {"dg2": 8, "pvc": 16, "lnl-m": 16, "bmg": 16, "ptl": 16, "cri": 16}
DTYPES = {"f32": 0, "f16": 1, "bf16": 2}
# Kernels whose loop depends on the dtype are compiled for each.
KERNELS = {"quantize": tuple(DTYPES), "dequantize": tuple(DTYPES), "gemm": ("",), "gemm_w4a16": tuple(DTYPES)}


def build_dumper(folder: Path) -> Path:
    program = folder / "dump_spirv"
    prefix = Path(sys.prefix)
    include = ["-isystem", f"{prefix}/include", "-isystem", f"{prefix}/include/sycl"]
    link = [f"-L{prefix}/lib", "-lsycl", f"-Wl,-rpath,{prefix}/lib"]
    source = str(ROOT / "tools/dump_spirv.cpp")
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", *include, source, "-o", str(program), *link], check=True)
    return program


def spirv(dumper: Path, folder: Path, kernel: str, dtype: str, sub_group: int) -> Path:
    """SPIR-V of one variant, as the runtime would hand it to the GPU driver."""
    name = f"{kernel}_{dtype}_{sub_group}"
    macros = {"SUB_GROUP": sub_group, "MATRIX_UNIT": 1, "ALIGNMENT": 16} | ({"DTYPE": DTYPES[dtype]} if dtype else {})
    options = ["-ffp-contract=off", f"-I{CSRC}", f"-I{CSRC / 'sycl/kernels'}"]
    options += [f"-DXPU_FP4_{macro}={value}" for macro, value in macros.items()]
    environment = os.environ | {
        "OCL_ICD_FILENAMES": f"{sys.prefix}/lib/libintelocl.so",
        "SYCL_CACHE_PERSISTENT": "0",
        "SYCL_DUMP_IMAGES": "1",
        "SYCL_DUMP_IMAGES_PREFIX": f"{folder}/{name}.",
    }
    command = [str(dumper), str(CSRC / f"sycl/kernels/{kernel}.cpp"), *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{kernel}: {result.stderr}")
    return next(folder.glob(f"{name}.*spv"))


def machine_code(ocloc: str, module: Path, device: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Kernel name and assembly text of every kernel in a module."""
    dump = folder / f"{module.stem}_{device}"
    dump.mkdir()
    environment = os.environ | {"IGC_ShaderDumpEnable": "1", "IGC_DumpToCustomDir": str(dump)}
    command = [ocloc, "compile", "-spirv_input", "-file", str(module), "-device", device, "-output", str(dump / "binary"), "-q"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{module.stem} for {device}: {result.stdout}{result.stderr}")
    for file in sorted(dump.glob("*.asm")):
        text = file.read_text(errors="replace")
        # ocloc exits with 0 over opcodes that the device does not have, and leaves calls of unknown built-ins to the linker.
        if "INVALID" in text or "illegal" in text:
            sys.exit(f"{file.name}: invalid instructions")
        name = re.search(r"^//\.kernel (\S+)", text, re.MULTILINE)
        if name and "Symbol_Table" not in name.group(1):
            yield name.group(1).removeprefix("__sycl_kernel_"), text
    unresolved = {
        call for file in dump.glob("*_optimized.ll") for call in re.findall(r"^declare .*(@_Z\w+)", file.read_text(), re.M)
    }
    if any("matrix_mad" in call for call in unresolved):
        sys.exit(f"{module.stem} for {device}: the matrix built-in is not resolved: {unresolved}")


def count(text: str) -> tuple[str, str, str]:
    """Instructions, matrix instructions and spilled bytes."""
    header = {key: re.search(rf"^//\.{key} (\d+)", text, re.MULTILINE) for key in ("instCount", "spill size")}
    instructions, spilled = (found.group(1) if found else "0" for found in header.values())
    return instructions, str(len(re.findall(r"^\s*(?:\(.*?\)\s*)?dpasw?\.", text, re.MULTILINE))), spilled


@click.command()
@click.option("--ocloc", required=True, type=click.Path(exists=True, dir_okay=False), help="Intel's offline compiler.")
@click.option("--device", "devices", multiple=True, type=click.Choice(list(DEVICES)), help="Default: all of them.")
def main(ocloc: str, devices: tuple[str, ...]) -> None:
    """Compile every kernel for real GPUs and count instructions."""
    table = Table(title="compiled (ISA), nothing run")
    for column in ("device", "kernel", "dtype", "instructions", "dpas", "spilled bytes"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        dumper = build_dumper(folder)
        for device in devices or DEVICES:
            for kernel, dtypes in KERNELS.items():
                for dtype in dtypes:
                    module = spirv(dumper, folder, kernel, dtype, DEVICES[device])
                    for name, text in machine_code(ocloc, module, device, folder):
                        table.add_row(device, name, dtype, *count(text))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
