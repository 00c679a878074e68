# SPDX-License-Identifier: Apache-2.0
"""Builds and loads the stand-in for PyTorch's XPU device.

It makes the process one with XPU tensors: `make test` runs these tests in a process of their own, other runs collect none of
them.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xpu_fp4
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/xpu_stand_in"
BACKEND = "_sycl_backend.abi3.so"
SOURCES = (
    "torch/xpu.cpp",
    "torch/checks.cpp",
    "torch/operands.cpp",
    "torch/ops_convert.cpp",
    "torch/ops_product.cpp",
    "torch/compat.cpp",
    "sycl/loader.cpp",
)

if os.environ.get("XPU_FP4_XPU_STAND_IN") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> Any:  # noqa: ANN401, torch's namespace of ops
    """The ops of stand_in.cpp."""
    sycl = xpu_fp4.backends()["sycl"]
    assert sycl.available, sycl.detail
    prefix = Path(torch.ops.xpu_fp4._sycl_runtime()).parent.parent
    FOLDER.mkdir(parents=True, exist_ok=True)
    # The loader looks beside its own library.
    (FOLDER / BACKEND).unlink(missing_ok=True)
    (FOLDER / BACKEND).symlink_to(Path(xpu_fp4.__file__).with_name(BACKEND))
    cpp_extension.load(
        name="xpu_stand_in",
        sources=[str(Path(__file__).with_name("stand_in.cpp")), *(str(ROOT / "csrc" / source) for source in SOURCES)],
        extra_cflags=[
            *("-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp", f"-I{ROOT / 'csrc'}"),
            *("-isystem", f"{prefix}/include", "-isystem", f"{prefix}/include/sycl"),
            # The CPU build of torch lacks the generated xpu_cmake_macros.h, which holds nothing that Linux needs.
            "-DC10_USING_CUSTOM_GENERATED_MACROS",
            f"-DXPU_FP4_SYCL_LIB_DIR='\"{prefix}/lib\"'",
            f"-DXPU_FP4_SYCL_BACKEND_FILE='\"{BACKEND}\"'",
        ],
        extra_ldflags=[f"-L{prefix}/lib", "-lsycl", f"-Wl,-rpath,{prefix}/lib"],
        build_directory=str(FOLDER),
        is_python_module=False,
    )
    return torch.ops.xpu_stand_in
