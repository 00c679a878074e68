# SPDX-License-Identifier: Apache-2.0
"""Writes what the library carries of its kernels into C++ files: their sources, and the SPIR-V that was made of them.

Usage: embed.py SOURCES.cpp SPIRV.cpp, without any SPIR-V
"""

import hashlib
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent
DELIMITER = "xpu_fp4"  # of the raw string literals


def sources() -> dict[str, Path]:
    """Name by which a kernel includes the file -> file."""
    kernels = {path.name: path for path in (CSRC / "sycl" / "kernels").glob("*.[ch]pp")}
    headers = {f"format/{path.name}": path for path in (CSRC / "format").glob("*.h")}
    return dict(sorted({**kernels, **headers}.items()))


def render() -> str:
    entries = "".join(f'    {{"{name}", R"{DELIMITER}({path.read_text()}){DELIMITER}"}},\n' for name, path in sources().items())
    return (
        "// Written by csrc/sycl/embed.py.\n"
        '#include "sycl/device_sources.h"\n\n'
        "namespace xpu_fp4::syclrt {\n"
        f"const std::vector<DeviceSource> kDeviceSources = {{\n{entries}}};\n"
        "}  // namespace xpu_fp4::syclrt\n"
    )


def write(output: Path, text: str) -> None:
    """Leaves an output that is up to date alone, so that nothing is rebuilt."""
    if not output.exists() or output.read_text() != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


def embed(output: Path) -> None:
    write(output, render())


def embed_spirv(pack: Path | None, output: Path) -> None:
    """`pack`: a file of csrc/sycl/spirv.py's. Its hash makes the object file of another one old."""
    content = "" if pack is None else f'.incbin \\"{pack.resolve()}\\"'
    digest = "none" if pack is None else hashlib.sha256(pack.read_bytes()).hexdigest()
    write(
        output,
        f"""// Written by csrc/sycl/embed.py: {digest}.
asm(".section .rodata\\n.balign 8\\n"
    ".globl xpu_fp4_spirv_begin\\n.hidden xpu_fp4_spirv_begin\\nxpu_fp4_spirv_begin:\\n"
    "{content}\\n"
    ".globl xpu_fp4_spirv_end\\n.hidden xpu_fp4_spirv_end\\nxpu_fp4_spirv_end:\\n"
    ".byte 0\\n.text\\n");
""",
    )


if __name__ == "__main__":
    embed(Path(sys.argv[1]))
    embed_spirv(None, Path(sys.argv[2]))
