# SPDX-License-Identifier: Apache-2.0
"""For setup.py: where SYCL is, in which version, and which one torch asks for."""

import os
import re
import struct
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

TORCH_IS_XPU = torch.version.xpu is not None


def sycl_roots() -> list[Path]:
    """Lists where SYCL may be, the most binding first: what an XPU torch runs on, a oneAPI toolkit, pip packages."""
    env = os.environ
    roots = [cpp_extension.SYCL_HOME] if TORCH_IS_XPU else []
    roots += [env.get("CMPLR_ROOT"), env.get("ONEAPI_ROOT") and f"{env['ONEAPI_ROOT']}/compiler/latest", sys.prefix]
    return [Path(root) for root in dict.fromkeys(roots) if root]


def needed_libraries(library: Path) -> list[str]:
    """Returns what `readelf -d` shows as NEEDED, of a 64-bit little-endian ELF file."""
    image = library.read_bytes()
    (headers,), (size, count) = struct.unpack_from("<Q", image, 0x20), struct.unpack_from("<HH", image, 0x36)
    # type, flags, offset, address, physical address, size in the file
    segments = [struct.unpack_from("<IIQQQQ", image, headers + i * size) for i in range(count)]
    dynamic = next(segment for segment in segments if segment[0] == 2)  # PT_DYNAMIC
    entries = list(struct.iter_unpack("<QQ", image[dynamic[2] : dynamic[2] + dynamic[5] // 16 * 16]))
    address = next(value for tag, value in entries if tag == 5)  # DT_STRTAB
    strings = next(s[2] + address - s[3] for s in segments if s[0] == 1 and s[3] <= address < s[3] + s[5])  # PT_LOAD
    starts = [strings + value for tag, value in entries if tag == 1]  # DT_NEEDED
    return [image[start : image.index(0, start)].decode() for start in starts]


def torch_sycl() -> str:
    """The file name of the SYCL library that torch's XPU library is linked to: a process can have only one version."""
    library = Path(cpp_extension.TORCH_LIB_PATH, "libc10_xpu.so")
    return next(name for name in needed_libraries(library) if name.startswith("libsycl.so"))


def has_sycl(root: Path) -> bool:
    return (root / "include/sycl/sycl.hpp").exists() and (root / "lib/libsycl.so").exists()


def find_sycl() -> dict[int, Path]:
    """The prefixes with SYCL's headers and library, by the library's major version, the newest first.

    One, or as many as XPU_FP4_SYCL_ROOTS names. None: then only the native kernels are built, and the build says so.
    """
    if os.environ.get("XPU_FP4_WITH_SYCL", "1") == "0":
        return {}
    if named := os.environ.get("XPU_FP4_SYCL_ROOTS"):
        roots = [Path(root).resolve() for root in named.split(os.pathsep)]
        if missing := [str(root) for root in roots if not has_sycl(root)]:
            sys.exit(f"xpu_fp4: XPU_FP4_SYCL_ROOTS names {', '.join(missing)}, without SYCL's headers and library")
    else:
        roots = [root for root in sycl_roots() if has_sycl(root)]
    if TORCH_IS_XPU:
        roots_of_torch = [root for root in roots if (root / "lib" / torch_sycl()).exists()]
        if not roots_of_torch:
            found = ", ".join(str(file) for root in roots for file in (root / "lib").glob("libsycl.so.?")) or "none"
            sys.exit(
                f"xpu_fp4: {cpp_extension.TORCH_LIB_PATH}/libc10_xpu.so needs {torch_sycl()}, and no SYCL with headers has it "
                f"in {', '.join(map(str, sycl_roots()))}; found: {found}. Build without a toolkit's setvars.sh, with the "
                "intel-sycl-rt that torch asks for; or, without kernels for XPU tensors, with XPU_FP4_WITH_SYCL=0."
            )
        if not named:
            roots = roots_of_torch
    if not roots:
        print(f"xpu_fp4: no SYCL headers in {', '.join(map(str, sycl_roots()))}: building without the SYCL backend")
    majors = [int(version_of(root, r"__LIBSYCL_MAJOR_VERSION (\d+)")) for root in roots[: None if named else 1]]
    if len(set(majors)) < len(majors):
        sys.exit(f"xpu_fp4: XPU_FP4_SYCL_ROOTS is {named}: two have the same major version of libsycl.so")
    return dict(sorted(zip(majors, roots, strict=False), reverse=True))


def version_of(sycl: Path, pattern: str) -> str:
    found = re.search(pattern, (sycl / "include/sycl/version.hpp").read_text())
    assert found is not None, pattern
    return found[1]
