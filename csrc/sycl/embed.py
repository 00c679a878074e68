# SPDX-License-Identifier: Apache-2.0
"""Writes the device sources into a C++ file: the library carries them and compiles them on the user's machine.

Usage: embed.py OUTPUT.cpp
"""

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


def embed(output: Path) -> None:
    """Leaves an output that is up to date alone, so that nothing is rebuilt."""
    text = render()
    if not output.exists() or output.read_text() != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


if __name__ == "__main__":
    embed(Path(sys.argv[1]))
