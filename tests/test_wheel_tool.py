# SPDX-License-Identifier: Apache-2.0
"""What tools/wheel.py refuses to publish. `make wheel` builds one; this does not."""

import runpy
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "xpu_fp4/_xpu_C.abi3.so": b"",
    "xpu_fp4/_xpu_queue.abi3.so": b"",
    "xpu_fp4/_sycl_backend_8.abi3.so": b"",
    "xpu_fp4/_sycl_backend_9.abi3.so": b"",
    "xpu_fp4-0.1.0.dist-info/licenses/LICENSE": b"",
    "xpu_fp4-0.1.0.dist-info/licenses/NOTICE": b"",
}


def check(folder: Path, files: dict[str, bytes]) -> None:
    tool: dict[str, Any] = runpy.run_path(str(ROOT / "tools/wheel.py"))
    tool["check"].__globals__["run"] = lambda *command: ""  # abi3audit
    with zipfile.ZipFile(folder / "xpu_fp4.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    tool["check"](folder / "xpu_fp4.whl", folder, 2)


def test_a_whole_wheel_passes(tmp_path: Path) -> None:
    check(tmp_path, FILES)


@pytest.mark.parametrize("name", ["xpu_fp4/_xpu_queue.abi3.so", "xpu_fp4/_sycl_backend_8.abi3.so"])
def test_a_library_that_lacks_is_noticed(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit, match="has the libraries"):
        check(tmp_path, {file: content for file, content in FILES.items() if file != name})


def test_an_earlier_builds_library_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has the libraries .*_sycl_backend\.abi3\.so"):
        check(tmp_path, FILES | {"xpu_fp4/_sycl_backend.abi3.so": b""})


def test_a_notice_that_lacks_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="lacks NOTICE"):
        check(tmp_path, {file: content for file, content in FILES.items() if not file.endswith("NOTICE")})


def test_a_path_of_this_machine_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"paths of this machine: .* in xpu_fp4/_xpu_C\.abi3\.so"):
        check(tmp_path, FILES | {"xpu_fp4/_xpu_C.abi3.so": f"\0{ROOT}/csrc/torch/checks.cpp\0".encode()})
