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
import hashlib, torch, xpu_fp4
torch.manual_seed(0)
x, (weight, scale) = torch.randn(7, 160).bfloat16(), xpu_fp4.quantize(torch.randn(40, 160))
y = torch.ops.xpu_fp4.mxfp4_linear(x, weight, scale)
print(xpu_fp4.__file__, torch._C._dispatch_has_kernel_for_dispatch_key("xpu_fp4::mxfp4_linear", "XPU"))
print(hashlib.sha256(y.view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def bits(package: Path, **env: str) -> tuple[str, str]:
    """Runs a fresh process, which prints the package, whether it serves XPU tensors, and a hash of a product of CPU tensors."""
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


def test_each_library_finds_sycl_by_itself() -> None:
    for library in ("_xpu_C", "_sycl_backend"):
        file = XPU_BUILD / f"xpu_fp4/{library}.abi3.so"
        needed = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
        found = [line for line in needed.splitlines() if "libsycl.so" in line]
        assert len(found) == 1
        assert "not found" not in found[0]
