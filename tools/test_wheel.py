# SPDX-License-Identifier: Apache-2.0
"""Installs a wheel into clean environments, one for each Python version that is named, and runs the tests of ops there.

Usage: test_wheel.py WHEEL SYCL VERSION..., as in dist/xpu_fp4-*.whl build/wheel-sycl 3.10 3.12. SYCL is the prefix of another
major version than pip installs beside the wheel: the same package must compute on both.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["ops", "ops_refused", "quantize", "mxint8", "transform", "gemm", "linears", "w4a8", "backends", "prepack", "experts"]
WHERE = "import xpu_fp4; print(xpu_fp4.__version__, 'in', xpu_fp4.__file__)"
RUNTIME = "import torch, xpu_fp4; xpu_fp4.backends(); print(torch.ops.xpu_fp4._sycl_backend_file())"


def interpreter(version: str) -> str | None:
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for python in [shutil.which(f"python{version}"), *map(str, installed)]:
        if python and subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return python
    return None


def test(wheel: Path, other_sycl: Path, version: str) -> str:
    """The outcome in words; exits where a test fails."""
    python = interpreter(version)
    if python is None:
        return "SKIPPED, this Python is not installed"
    folder = ROOT / "build/test-wheel" / version
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    own = str(folder / "bin/python")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    install = [own, "-m", "pip", "install", "--quiet", f"{wheel}[sycl]", "numpy", "pytest", "ml_dtypes", "setuptools>=77"]
    installed = subprocess.run(install, env=environment, capture_output=True, text=True)
    if "No matching distribution found for torch==" in installed.stderr:
        return "SKIPPED, pip's index has no wheel of this torch for it"
    if installed.returncode != 0:
        sys.exit(installed.stderr)
    files = [str(ROOT / f"tests/test_{name}.py") for name in TESTS]
    subprocess.run([own, "-c", WHERE], cwd=folder, env=environment, check=True)
    pytest = [own, "-m", "pytest", "-m", "not large"]
    subprocess.run([*pytest, *files], cwd=ROOT, env=environment | {"XPU_FP4_REQUIRE_SYCL": "1"}, check=True)
    environment |= {"XPU_FP4_REQUIRE_SYCL": "1", "XPU_FP4_SYCL_LIB_DIR": str(other_sycl.resolve() / "lib")}
    subprocess.run([own, "-c", RUNTIME], cwd=folder, env=environment, check=True)
    subprocess.run([*pytest, *(file for file in files if "backends" not in file)], cwd=ROOT, env=environment, check=True)
    shutil.rmtree(folder)  # several GB
    return "passed"


if __name__ == "__main__":
    given, sycl, *versions = sys.argv[1:]
    outcomes = {version: test(Path(given).resolve(), Path(sycl), version) for version in versions}
    print(*(f"Python {version}: {outcome}" for version, outcome in outcomes.items()), sep="\n")
    if "passed" not in outcomes.values():
        sys.exit("the wheel was tested nowhere")
