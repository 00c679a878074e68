# SPDX-License-Identifier: Apache-2.0
"""Builds the op library `_xpu_C` and, where SYCL is found, its SYCL backends. The metadata is in pyproject.toml."""

import os
import runpy
import shutil
import subprocess
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
SYCL_BACKEND = "_sycl_backend_{major}"  # csrc/sycl/loader.cpp looks for these names
XPU_QUEUE = "_xpu_queue"
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
# A wheel has no path of the machine that built it: not of its SYCL, nor, through __FILE__, in the messages of torch's checks.
RELOCATABLE = os.environ.get("XPU_FP4_RELOCATABLE", "") == "1"
if RELOCATABLE:
    site_packages = str(Path(torch.__file__).resolve().parents[1])
    FLAGS += [f"-ffile-prefix-map={folder}=." for folder in dict.fromkeys((sys.prefix, site_packages, str(ROOT)))]
# What a change of makes everything compile again.
HEADERS = sorted(str(path) for path in (ROOT / CSRC).rglob("*") if path.suffix in {".h", ".hpp", ".py"})


def script(name: str) -> dict[str, Any]:
    """The functions of csrc/sycl/NAME.py."""
    return runpy.run_path(str(ROOT / CSRC / f"sycl/{name}.py"))


FIND = script("find")
find_sycl, needed_libraries = FIND["find_sycl"], FIND["needed_libraries"]
# Whether, and for whom, programs are compiled ahead of time: nothing but an XPU torch hands the library to a GPU.
SPIRV_FOR = {"0": None, "1": "gpus", "tests": "tests"}
SPIRV = os.environ.get("XPU_FP4_SPIRV", "") or str(int(FIND["TORCH_IS_XPU"]))
SPIRV_FOLDER = Path("build/spirv")
STUBS = Path("build/stubs")


def sources(*folders: str) -> list[str]:
    return sorted(str(path) for folder in folders for path in (CSRC / folder).glob("*.cpp"))


def require_settings() -> None:
    if SPIRV not in SPIRV_FOR:
        sys.exit(f"xpu_fp4: XPU_FP4_SPIRV is {SPIRV!r}, expected one of {', '.join(SPIRV_FOR)}")


def require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(f"xpu_fp4 needs a C++20 compiler; {compiler} is not on the PATH. Install g++, or name another one in CXX.")


def sycl_flags(sycl: Path) -> list[str]:
    # Intel's headers warn a lot under g++: system headers. Ninja does not watch those, so the version in the command is what
    # makes the objects of another SYCL old; csrc/sycl/programs.cpp holds that it is the version that was compiled.
    include = sycl / "include"
    version = FIND["version_of"](sycl, r"__SYCL_COMPILER_VERSION (\d+)")
    flags = ["-isystem", str(include), "-isystem", str(include / "sycl"), f"-DXPU_FP4_SYCL_HEADERS={version}"]
    return [*flags, f"-ffile-prefix-map={sycl}=sycl"] if RELOCATABLE else flags


def op_library() -> Extension:
    """It is the same with and without SYCL, and whether torch is an XPU build or not."""
    files = [*sources("cpu", "torch"), str(CSRC / "sycl/loader.cpp")]
    files.remove(str(CSRC / "torch/xpu_queue.cpp"))
    if WITHOUT_AVX512:
        files = [file for file in files if not Path(file).name.startswith(("isa_amx", "isa_avx512"))]
    return cpp_extension.CppExtension(
        f"{PACKAGE}._xpu_C",
        files,
        # at::parallel_for is inline and serial without OpenMP. Not a link option: torch brings the OpenMP runtime that it uses
        # itself, and its functions are found there; a second runtime would have a pool and a thread count of its own.
        extra_compile_args={"cxx": [*FLAGS, "-fopenmp"]},
        extra_link_args=["-ldl", *(SANITIZE if SANITIZERS else [])],
        py_limited_api=True,
        depends=HEADERS,
    )


def xpu_queue(sycl: Path) -> Extension:
    """What needs torch's XPU library, which only an XPU torch has: linked to an empty one."""
    return cpp_extension.CppExtension(
        f"{PACKAGE}.{XPU_QUEUE}",
        [str(CSRC / "torch/xpu_queue.cpp")],
        include_dirs=[str(ROOT / STUBS / "include")],
        extra_compile_args={"cxx": [*FLAGS, *sycl_flags(sycl)]},
        # Some systems' linkers leave out a library that has none of the symbols asked for.
        extra_link_args=["-Wl,--no-as-needed", f"-L{ROOT / STUBS}", "-lc10_xpu"],
        py_limited_api=True,
        depends=HEADERS,
    )


def write_stubs() -> None:
    """An empty libc10_xpu.so, and the one header of torch's XPU library that other builds of torch lack."""
    name = Path("c10/xpu/impl/xpu_cmake_macros.h")  # it says nothing that Linux needs
    stub = STUBS / "include" / name
    stub.parent.mkdir(parents=True, exist_ok=True)
    if any(Path(folder, name).exists() for folder in cpp_extension.include_paths()):
        stub.unlink(missing_ok=True)
    elif not stub.exists():  # a new one would have what includes it compiled again
        stub.touch()
    compiler = os.environ.get("CXX", "g++").split()
    library = STUBS / "libc10_xpu.so"
    subprocess.run([*compiler, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{library.name}", "-o", library], check=True)


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def embedded_spirv(major: int) -> Path:
    return Path(f"build/spirv_{major}.cpp")


def spirv_folder(major: int) -> Path:
    return SPIRV_FOLDER / str(major) / SPIRV


def sycl_backend(major: int, sycl: Path) -> Extension:
    """A library of its own, loaded at first use: `_xpu_C` must load where SYCL is not installed."""
    embedded = Path("build/device_sources.cpp")
    embed = script("embed")
    embed["embed"](embedded)
    pack = spirv_folder(major) / "pack"
    embed["embed_spirv"](pack if pack.exists() else None, embedded_spirv(major))  # the last build's, until this one's is made
    files = [path for path in sources("sycl", "sycl/launch") if Path(path).name != "loader.cpp"]
    return Extension(
        f"{PACKAGE}.{SYCL_BACKEND.format(major=major)}",
        [*files, str(embedded), str(embedded_spirv(major))],
        include_dirs=[str(ROOT / CSRC)],
        extra_compile_args={"cxx": [*FLAGS, *sycl_flags(sycl)]},
        libraries=["sycl"],
        library_dirs=[str(sycl / "lib")],  # which need not be where a linker looks
        runtime_library_dirs=[] if RELOCATABLE else [str(sycl / "lib")],
        language="c++",
        py_limited_api=True,
        depends=HEADERS,
    )


def extensions() -> list[Extension]:
    found = find_sycl()
    backends = [sycl_backend(major, sycl) for major, sycl in found.items()]
    return [op_library(), *(xpu_queue(sycl) for sycl in [*found.values()][:1]), *backends]


class BuildExtension(cpp_extension.BuildExtension):
    include_dirs: list[str]
    build_temp: str

    def initialize_options(self) -> None:
        super().initialize_options()
        # Every kind of build finds the object files of the one before: an editable one would throw them away, whatever the
        # options of setup() say (setuptools 84).
        self.build_temp = "build/objects"

    def finalize_options(self) -> None:
        super().finalize_options()
        # setuptools adds the virtual environment's headers, before all that are named as a system's: a SYCL there would come
        # before the one that was found. So does this variable of a toolkit's.
        environment = os.path.join(sys.exec_prefix, "include")
        self.include_dirs = [folder for folder in self.include_dirs if folder != environment]
        if folders := os.environ.pop("CPATH", None):
            kept = [folder for folder in folders.split(os.pathsep) if not Path(folder, "sycl/sycl.hpp").exists()]
            if kept:
                os.environ["CPATH"] = os.pathsep.join(kept)

    def build_extensions(self) -> None:
        write_stubs()
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
        self.remove_leftovers(library.parent)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.remove_leftovers(ROOT / "python" / PACKAGE)

    def remove_leftovers(self, folder: Path) -> None:
        """Those of earlier builds: their interface may be another, and whatever lies there is loaded or packed."""
        built = {Path(self.get_ext_filename(extension.name)).name for extension in self.extensions}
        for leftover in folder.glob("_*.abi3.so"):
            if leftover.name not in built:
                leftover.unlink()

    def build_extension(self, extension: Extension) -> None:
        # Backends have their sources in common, but not their objects.
        shared = self.build_temp
        self.build_temp = os.path.join(shared, extension.name.rpartition(".")[2])
        super().build_extension(extension)
        self.build_temp = shared

    def embed_spirv(self) -> None:
        """The SYCL backends say what they are made of, compile that, and are linked once more with what came out."""
        if (whom := SPIRV_FOR[SPIRV]) is None:
            return
        for major, sycl in find_sycl().items():
            name = SYCL_BACKEND.format(major=major)
            backend = next(extension for extension in self.extensions if extension.name == f"{PACKAGE}.{name}")
            library = Path(self.get_ext_fullpath(backend.name)).resolve()
            pack = script("spirv")["pack"](library, whom, spirv_folder(major).resolve(), sycl, jobs())
            script("embed")["embed_spirv"](pack, embedded_spirv(major))
            self.build_extension(backend)


if __name__ == "__main__":
    require_compiler()
    require_settings()
    os.chdir(ROOT)
    setup(
        ext_modules=extensions(),
        # No library has a Python interface, so no Python headers are needed and one build serves every Python.
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
