# SPDX-License-Identifier: Apache-2.0
"""What setup.py takes for SYCL, compiles against, and leaves behind."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution, Extension

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The names of setup.py; the tests' own folder is the current one, and no variable says where SYCL is."""
    for name in ("XPU_FP4_SYCL_ROOTS", "XPU_FP4_WITH_SYCL", "XPU_FP4_SPIRV", "CMPLR_ROOT", "ONEAPI_ROOT", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def fake_sycl(root: Path, major: int, version: int) -> Path:
    for file in ("include/sycl/sycl.hpp", "lib/libsycl.so"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    text = f"#define __LIBSYCL_MAJOR_VERSION {major}\n#define __SYCL_COMPILER_VERSION {version}\n"
    (root / "include/sycl/version.hpp").write_text(text)
    return root


def test_a_toolkit_comes_before_the_environments_sycl_in_every_step(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of headers too, though compilers are told of the environment's, and of a toolkit's variable, before."""
    toolkit = fake_sycl(tmp_path / "toolkit", 7, 20200101)
    environment = fake_sycl(tmp_path / "environment", 6, 20190101)
    monkeypatch.setenv("CMPLR_ROOT", str(toolkit))
    monkeypatch.setenv("CPATH", str(environment / "include"))
    monkeypatch.setattr(sys, "exec_prefix", str(environment))  # setuptools adds its headers
    assert setup["find_sycl"]() == {7: toolkit}
    Path("probe.cpp").write_text("""
        #include <sycl/version.hpp>
        #include <stdexcept>
        static_assert(__SYCL_COMPILER_VERSION == XPU_FP4_SYCL_HEADERS);
        void fail() { throw std::runtime_error(""); }
    """)
    flags = {"cxx": setup["sycl_flags"](toolkit)}
    probe = Extension("xpu_fp4._probe", ["probe.cpp"], extra_compile_args=flags, language="c++", py_limited_api=True)
    command = setup["BuildExtension"](Distribution({"ext_modules": [probe]}))
    command.build_lib, command.build_temp = "lib", "objects"
    leftover = Path("lib/xpu_fp4/_sycl_backend.abi3.so")
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    command.ensure_finalized()
    command.run()
    assert [file.name for file in leftover.parent.iterdir()] == ["_probe.abi3.so"], "an earlier build's would be loaded"


def test_one_backend_for_each_sycl_that_is_named(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    eight, nine = fake_sycl(tmp_path / "eight", 8, 1), fake_sycl(tmp_path / "nine", 9, 2)
    monkeypatch.setenv("XPU_FP4_SYCL_ROOTS", f"{eight}{os.pathsep}{nine}")
    assert list(setup["find_sycl"]().items()) == [(9, nine), (8, eight)]
    again = fake_sycl(tmp_path / "again", 9, 3)
    monkeypatch.setenv("XPU_FP4_SYCL_ROOTS", f"{nine}{os.pathsep}{again}")
    with pytest.raises(SystemExit, match="the same major version"):
        setup["find_sycl"]()
    monkeypatch.setenv("XPU_FP4_SYCL_ROOTS", f"{nine}{os.pathsep}{tmp_path / 'nowhere'}")
    with pytest.raises(SystemExit, match=f"names {tmp_path / 'nowhere'}, without"):
        setup["find_sycl"]()
