# SPDX-License-Identifier: Apache-2.0
"""Builds xpu_fp4 under a torch that says it is an XPU build: `build.py FOLDER` makes FOLDER/torch and FOLDER/package.

The stand-in takes the place of torch's libc10_xpu.so, in a copy of torch's folder of libraries; torch_xpu.py loads it, as an
XPU torch would. SYCL is that of pip's packages, and no variable says where it is: setup.py must.
"""

import os
import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
# What a toolkit's setvars.sh sets, and with it hides what setup.py forgets.
SETVARS = ("CMPLR_ROOT", "ONEAPI_ROOT", "CPATH", "LIBRARY_PATH", "LD_LIBRARY_PATH")


def say_xpu() -> None:
    """Before cpp_extension is imported: it looks for SYCL then."""
    for name in SETVARS:
        os.environ.pop(name, None)
    torch.version.xpu = "20260000"
    torch.xpu._is_compiled = lambda: True


def build_stand_in(libraries: Path) -> None:
    """A folder like torch's own, with libc10_xpu.so."""
    from torch.utils import cpp_extension

    assert cpp_extension.SYCL_HOME is not None, "torch does not find pip's intel-sycl-rt"
    sycl = Path(cpp_extension.SYCL_HOME)
    # A CPU build of torch lacks this generated header, which holds nothing that Linux needs.
    header = libraries / "include/c10/xpu/impl/xpu_cmake_macros.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    if not header.exists():  # a new one would have everything compiled again
        header.touch()
    for library in Path(cpp_extension.TORCH_LIB_PATH).glob("*.so*"):
        link = libraries / library.name
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    cpp_extension.load(
        name="libc10_xpu",
        sources=[str(Path(__file__).with_name("stand_in.cpp"))],
        extra_cflags=[
            *("-std=c++20", "-O1", "-w", "-fvisibility=hidden", f"-I{libraries}/include"),
            *("-isystem", f"{sycl}/include", "-isystem", f"{sycl}/include/sycl"),
        ],
        extra_ldflags=["-Wl,-soname,libc10_xpu.so", f"-L{sycl}/lib", "-lsycl", f"-Wl,-rpath,{sycl}/lib"],
        build_directory=str(libraries),
        is_python_module=False,
    )
    cpp_extension.TORCH_LIB_PATH = str(libraries)


def main(folder: Path) -> None:
    say_xpu()
    build_stand_in(folder / "torch")
    os.environ["XPU_FP4_SPIRV"] = "tests"  # the default, all programs of all GPUs, takes minutes
    sys.argv = ["setup.py", "--quiet", "build", "--build-lib", str(folder / "package")]
    runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
