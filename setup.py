# SPDX-License-Identifier: Apache-2.0
"""Builds the op library `_xpu_C` and, where SYCL is found, its SYCL backend. The metadata is in pyproject.toml."""

import os
import re
import runpy
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"xpu_fp4 is built against the torch it will run with, and torch cannot be imported ({error}).\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )

if int(setuptools.__version__.split(".")[0]) < 77:  # the first that reads pyproject.toml's license
    sys.exit(f'xpu_fp4 needs setuptools>=77, found {setuptools.__version__}: pip install "setuptools>=77"')

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
PACKAGE = "xpu_fp4"
SYCL_BACKEND = "_sycl_backend"
# The numerics count every rounding: no contraction, no reordering.
FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-g0"]
# XPU_FP4_SANITIZE=address,undefined builds for `make sanitize`; -O1, because with -O3 the kernels take many minutes.
if SANITIZERS := os.environ.get("XPU_FP4_SANITIZE", ""):
    SANITIZE = [f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
    FLAGS += ["-O1", "-fno-omit-frame-pointer", *SANITIZE]
# There with XPU_FP4_WITHOUT_AVX512=1 too, where the processor runs no more: sanitized, AVX-512 and AMX take minutes to compile.
WITHOUT_AVX512 = os.environ.get("XPU_FP4_WITHOUT_AVX512", "") == "1"
if WITHOUT_AVX512:
    FLAGS += ["-DXPU_FP4_WITHOUT_AVX512"]
# What a change of makes everything compile again.
HEADERS = sorted(str(path) for path in (ROOT / CSRC).rglob("*") if path.suffix in {".h", ".hpp", ".py"})
TORCH_IS_XPU = torch.version.xpu is not None
# Whether, and for whom, programs are compiled ahead of time: nothing but an XPU torch hands the library to a GPU.
SPIRV_FOR = {"0": None, "1": "gpus", "tests": "tests"}
SPIRV = os.environ.get("XPU_FP4_SPIRV", "") or str(int(TORCH_IS_XPU))
SPIRV_FOLDER, EMBEDDED_SPIRV = Path("build/spirv"), Path("build/spirv.cpp")


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in (CSRC / folder).glob("*.cpp"))


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


def find_sycl() -> Path | None:
    """The prefix with SYCL's headers and library, or None: then only the native kernels are built, and the build says so."""
    if os.environ.get("XPU_FP4_WITH_SYCL", "1") == "0":
        return None
    roots = [root for root in sycl_roots() if (root / "include/sycl/sycl.hpp").exists() and (root / "lib/libsycl.so").exists()]
    if TORCH_IS_XPU:
        roots_of_torch = [root for root in roots if (root / "lib" / torch_sycl()).exists()]
        if not roots_of_torch:
            found = ", ".join(str(file) for root in roots for file in (root / "lib").glob("libsycl.so.?")) or "none"
            sys.exit(
                f"xpu_fp4: {cpp_extension.TORCH_LIB_PATH}/libc10_xpu.so needs {torch_sycl()}, and no SYCL with headers has it "
                f"in {', '.join(map(str, sycl_roots()))}; found: {found}. Build without a toolkit's setvars.sh, with the "
                "intel-sycl-rt that torch asks for; or, without kernels for XPU tensors, with XPU_FP4_WITH_SYCL=0."
            )
        return roots_of_torch[0]
    if not roots:
        print(f"xpu_fp4: no SYCL headers in {', '.join(map(str, sycl_roots()))}: building without the SYCL backend")
        return None
    return roots[0]


def require_settings() -> None:
    if SPIRV not in SPIRV_FOR:
        sys.exit(f"xpu_fp4: XPU_FP4_SPIRV is {SPIRV!r}, expected one of {', '.join(SPIRV_FOR)}")


def require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(f"xpu_fp4 needs a C++20 compiler; {compiler} is not on the PATH. Install g++, or name another one in CXX.")


def sycl_flags(sycl: Path) -> list[str]:
    include = sycl / "include"
    version = re.search(r"__SYCL_COMPILER_VERSION (\d+)", (include / "sycl/version.hpp").read_text())
    assert version is not None
    # Intel's headers warn a lot under g++: system headers. Ninja does not watch those, so the version in the command is what
    # makes the objects of another SYCL old.
    return [*("-isystem", str(include)), *("-isystem", str(include / "sycl")), f"-DXPU_FP4_SYCL_HEADERS={version[1]}"]


def sycl_link(sycl: Path) -> dict[str, list[str]]:
    """The arguments that link an Extension to SYCL's library, which need not lie where a linker looks."""
    return {"libraries": ["sycl"], "library_dirs": [str(sycl / "lib")], "runtime_library_dirs": [str(sycl / "lib")]}


def op_library(sycl: Path | None) -> Extension:
    files = [*sources("cpu", "torch"), str(CSRC / "sycl/loader.cpp")]
    if WITHOUT_AVX512:
        files = [file for file in files if not Path(file).name.startswith(("isa_amx", "isa_avx512"))]
    # at::parallel_for is inline and serial without OpenMP. Not a link option: torch brings the OpenMP runtime that it uses
    # itself, and its functions are found there; a second runtime would have a pool and a thread count of its own.
    flags = [*FLAGS, "-fopenmp"]
    if sycl is not None:
        flags += sycl_flags(sycl)
        flags += [f'-DXPU_FP4_SYCL_LIB_DIR="{sycl / "lib"}"', f'-DXPU_FP4_SYCL_BACKEND_FILE="{SYCL_BACKEND}.abi3.so"']
    link: dict[str, list[str]] = {}
    if TORCH_IS_XPU and sycl is not None:
        # torch's SyclExtension will not do: it links SYCL without a path, and takes the headers of any icpx on the PATH.
        link = sycl_link(sycl)
        link["libraries"].append("c10_xpu")
    else:
        files.remove(str(CSRC / "torch/xpu.cpp"))
    return cpp_extension.CppExtension(
        f"{PACKAGE}._xpu_C",
        files,
        **link,
        extra_compile_args={"cxx": flags},
        extra_link_args=["-ldl", *(SANITIZE if SANITIZERS else [])],
        py_limited_api=True,
        depends=HEADERS,
    )


def script(name: str) -> dict[str, Any]:
    """The functions of csrc/sycl/NAME.py."""
    return runpy.run_path(str(ROOT / CSRC / f"sycl/{name}.py"))


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def sycl_backend(sycl: Path) -> Extension:
    """A library of its own, loaded at first use: `_xpu_C` must load where SYCL is not installed."""
    embedded = Path("build/device_sources.cpp")
    embed = script("embed")
    embed["embed"](embedded)
    pack = SPIRV_FOLDER / SPIRV / "pack"
    embed["embed_spirv"](pack if pack.exists() else None, EMBEDDED_SPIRV)  # the last build's, until this one's is made
    files = [path for path in sources("sycl", "sycl/launch") if Path(path).name != "loader.cpp"]
    return Extension(
        f"{PACKAGE}.{SYCL_BACKEND}",
        [*files, str(embedded), str(EMBEDDED_SPIRV)],
        include_dirs=[str(ROOT / CSRC)],
        extra_compile_args={"cxx": [*FLAGS, *sycl_flags(sycl)]},
        **sycl_link(sycl),
        language="c++",
        py_limited_api=True,
        depends=HEADERS,
    )


def extensions() -> list[Extension]:
    sycl = find_sycl()
    return [op_library(sycl), *([sycl_backend(sycl)] if sycl is not None else [])]


class BuildExtension(cpp_extension.BuildExtension):
    def build_extensions(self) -> None:
        super().build_extensions()
        self.embed_spirv()
        for extension in self.extensions:
            library = Path(self.get_ext_fullpath(extension.name))
            if "libstdc++.so.6" not in needed_libraries(library):
                sys.exit(
                    f"{library} has a C++ runtime of its own, which cannot share exceptions and streams with torch's "
                    "libstdc++.so.6: the first error message would be a crash. Build with another compiler (CXX), or without "
                    "options like -static-libstdc++."
                )

    def embed_spirv(self) -> None:
        """The SYCL backend says what it is made of, compiles that, and is linked once more with what came out."""
        if (whom := SPIRV_FOR[SPIRV]) is None or (sycl := find_sycl()) is None:
            return
        backend = next(extension for extension in self.extensions if extension.name == f"{PACKAGE}.{SYCL_BACKEND}")
        library = Path(self.get_ext_fullpath(backend.name)).resolve()
        pack = script("spirv")["pack"](library, whom, (SPIRV_FOLDER / SPIRV).resolve(), sycl, jobs())
        script("embed")["embed_spirv"](pack, EMBEDDED_SPIRV)
        self.build_extension(backend)


if __name__ == "__main__":
    require_compiler()
    require_settings()
    os.chdir(ROOT)
    setup(
        ext_modules=extensions(),
        # Neither library has a Python interface, so no Python headers are needed and one build serves every Python.
        cmdclass={"build_ext": BuildExtension},
        options={
            "bdist_wheel": {"py_limited_api": "cp310"},
            # Every kind of build finds the object files of the one before, also an editable one.
            "build_ext": {"build_temp": "build/objects"},
        },
    )
