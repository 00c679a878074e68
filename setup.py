# SPDX-License-Identifier: Apache-2.0
"""Builds the op library `_xpu_C` and, where SYCL is found, its SYCL backend. The metadata is in pyproject.toml."""

import os
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"xpu_fp4 is built against the torch it will run with, and torch cannot be imported ({error}).\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
PACKAGE = "xpu_fp4"
SYCL_BACKEND = "_sycl_backend"
# The numerics count every rounding: no contraction, no reordering.
FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-g0"]
# What a change of makes everything compile again.
HEADERS = sorted(str(path) for path in (ROOT / CSRC).rglob("*") if path.suffix in {".h", ".hpp", ".py"})
TORCH_IS_XPU = torch.version.xpu is not None


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in (CSRC / folder).glob("*.cpp"))


def sycl_roots() -> list[Path]:
    """Where SYCL may be, the most binding first: what an XPU torch runs on, a oneAPI toolkit, pip packages."""
    env = os.environ
    roots = [cpp_extension.SYCL_HOME] if TORCH_IS_XPU else []
    roots += [env.get("CMPLR_ROOT"), env.get("ONEAPI_ROOT") and f"{env['ONEAPI_ROOT']}/compiler/latest", sys.prefix]
    return [Path(root) for root in roots if root]


def find_sycl() -> Path | None:
    """The prefix with SYCL's headers and library, or None: then only the native kernels are built, and say so."""
    if os.environ.get("XPU_FP4_WITH_SYCL", "1") == "0":
        return None
    for root in sycl_roots():
        if (root / "include/sycl/sycl.hpp").exists() and (root / "lib/libsycl.so").exists():
            return root
    print(f"xpu_fp4: no SYCL headers in {', '.join(map(str, sycl_roots()))}: building without the SYCL backend")
    return None


def require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(f"xpu_fp4 needs a C++20 compiler; {compiler} is not on the PATH. Install g++, or name another one in CXX.")


def sycl_flags(sycl: Path) -> list[str]:
    # Intel's headers warn a lot under g++: system headers.
    return ["-isystem", str(sycl / "include"), "-isystem", str(sycl / "include/sycl")]


def op_library(sycl: Path | None) -> Extension:
    files = [path for path in sources("cpu", "torch") if TORCH_IS_XPU or Path(path).name != "xpu.cpp"]
    # at::parallel_for is inline and serial without OpenMP. Not a link option: torch brings the OpenMP runtime that it uses
    # itself, and its functions are found there; a second runtime would have a pool and a thread count of its own.
    flags = [*FLAGS, "-fopenmp"]
    if sycl is not None:
        flags += sycl_flags(sycl)
        flags += [f'-DXPU_FP4_SYCL_LIB_DIR="{sycl / "lib"}"', f'-DXPU_FP4_SYCL_BACKEND_FILE="{SYCL_BACKEND}.abi3.so"']
    make = cpp_extension.SyclExtension if TORCH_IS_XPU else cpp_extension.CppExtension
    return make(
        f"{PACKAGE}._xpu_C",
        [*files, str(CSRC / "sycl/loader.cpp")],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-ldl"],
        py_limited_api=True,
        depends=HEADERS,
    )


def sycl_backend(sycl: Path) -> Extension:
    """A library of its own, loaded at first use: `_xpu_C` must load where SYCL is not installed."""
    embedded = Path("build/device_sources.cpp")
    runpy.run_path(str(ROOT / CSRC / "sycl/embed.py"))["embed"](ROOT / embedded)
    files = [path for path in sources("sycl", "sycl/launch") if Path(path).name != "loader.cpp"]
    return Extension(
        f"{PACKAGE}.{SYCL_BACKEND}",
        [*files, str(embedded)],
        include_dirs=[str(ROOT / CSRC)],
        extra_compile_args={"cxx": [*FLAGS, *sycl_flags(sycl)]},
        library_dirs=[str(sycl / "lib")],
        libraries=["sycl"],
        language="c++",
        py_limited_api=True,
        depends=HEADERS,
    )


def extensions() -> list[Extension]:
    sycl = find_sycl()
    return [op_library(sycl), *([sycl_backend(sycl)] if sycl is not None else [])]


if __name__ == "__main__":
    require_compiler()
    os.chdir(ROOT)
    setup(
        ext_modules=extensions(),
        # Neither library has a Python interface, so no Python headers are needed and one build serves every Python.
        cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(no_python_abi_suffix=False)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
