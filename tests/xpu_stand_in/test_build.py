# SPDX-License-Identifier: Apache-2.0
"""What setup.py builds under an XPU torch, with SYCL from pip and no variable that says where, links, loads and computes."""

import os
import subprocess
import sys
from pathlib import Path

import xpu_fp4

CPU_BUILD = Path(__file__).resolve().parents[2] / "python"
XPU_BUILD = Path(xpu_fp4.__file__).parents[1]
BITS = """
import ctypes, hashlib, os, torch
if "xpu_stand_in" in os.environ.get("LD_LIBRARY_PATH", ""): ctypes.CDLL("libc10_xpu.so")
import xpu_fp4
torch.manual_seed(0)
x, (weight, scale) = torch.randn(7, 160).bfloat16(), xpu_fp4.quantize(torch.randn(40, 160))
arguments = x, weight, scale
if hasattr(torch.ops.xpu_stand_in, "to_device"):
    stand_in = torch.ops.xpu_stand_in
    y = torch.ops.xpu_fp4.mxfp4_linear(*(stand_in.to_device(tensor, 0) for tensor in arguments))
    stand_in.synchronize(0, 0)
    assert torch.equal(stand_in.to_host(y), torch.ops.xpu_fp4.mxfp4_linear(*arguments))
y = torch.ops.xpu_fp4.mxfp4_linear(*arguments)
print(xpu_fp4.__file__, "libsycl" in open("/proc/self/maps").read())
print(hashlib.sha256(y.view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def bits(package: Path, **env: str) -> tuple[str, str]:
    """Runs a fresh process, which prints the package, whether SYCL is loaded, and a hash of a product of CPU tensors.

    Where XPU tensors exist, a product of those has the same bits.
    """
    result = subprocess.run(
        [sys.executable, "-c", BITS], env={**os.environ, "PYTHONPATH": str(package), **env}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    where, digest = result.stdout.splitlines()
    return where, digest


def test_cpu_tensors_get_the_bits_of_a_cpu_build() -> None:
    xpu, cpu = bits(XPU_BUILD, LD_BIND_NOW="1"), bits(CPU_BUILD, LD_LIBRARY_PATH="")
    assert xpu[0] == f"{XPU_BUILD}/xpu_fp4/__init__.py True"
    assert cpu[0] == f"{CPU_BUILD}/xpu_fp4/__init__.py False"
    assert xpu[1] == cpu[1]


def test_a_cpu_build_serves_xpu_tensors() -> None:
    assert bits(CPU_BUILD) == (f"{CPU_BUILD}/xpu_fp4/__init__.py True", bits(XPU_BUILD)[1])


def test_the_op_library_is_the_same_for_every_torch() -> None:
    of_xpu, of_cpu = ((build / "xpu_fp4/_xpu_C.abi3.so").read_bytes() for build in (XPU_BUILD, CPU_BUILD))
    assert of_xpu == of_cpu


def test_the_sycl_backend_finds_sycl_by_itself() -> None:
    (file,) = (XPU_BUILD / "xpu_fp4").glob("_sycl_backend_*.abi3.so")
    needed = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
    found = [line for line in needed.splitlines() if "libsycl.so" in line]
    assert len(found) == 1
    assert "not found" not in found[0]
