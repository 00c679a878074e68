# SPDX-License-Identifier: Apache-2.0
"""Choosing backends, doing without SYCL, the doctor, and the source that only an XPU build compiles."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import xpu_fp4
from click.testing import CliRunner
from xpu_fp4 import _library, reference
from xpu_fp4.cli import bring_up, doctor, main

ROOT = Path(__file__).resolve().parent.parent
ops = torch.ops.xpu_fp4


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_contexts_nest_and_are_undone_by_errors() -> None:
    before = ops._cpu_backend()
    with xpu_fp4.cpu_backend("sycl"):
        with xpu_fp4.cpu_backend("native"):
            assert ops._cpu_backend() == "native"
        assert ops._cpu_backend() == "sycl"
    with pytest.raises(KeyError), xpu_fp4.cpu_backend("sycl"):
        raise KeyError
    assert ops._cpu_backend() == before
    with (
        pytest.raises(RuntimeError, match='the CPU backend is "cuda", expected "native" or "sycl"'),
        xpu_fp4.cpu_backend("cuda"),
    ):
        pass


def test_a_context_holds_for_its_thread_only() -> None:
    seen: list[str] = []
    with xpu_fp4.cpu_backend("sycl"):
        thread = threading.Thread(target=lambda: seen.append(ops._cpu_backend()))
        thread.start()
        thread.join()
    assert seen == ["native"]


def test_environment_chooses_for_the_process() -> None:
    code = "import torch, xpu_fp4; print(torch.ops.xpu_fp4._cpu_backend())"
    assert python(code, XPU_FP4_CPU_BACKEND="sycl").stdout.strip() == "sycl"
    wrong = python("import torch, xpu_fp4; xpu_fp4.quantize(torch.ones(32))", XPU_FP4_CPU_BACKEND="gpu")
    assert 'XPU_FP4_CPU_BACKEND is "gpu", expected "native" or "sycl"' in wrong.stderr
    wrong = python("import torch, xpu_fp4; xpu_fp4.quantize(torch.ones(32))", XPU_FP4_CPU_ISA="mmx")
    assert 'XPU_FP4_CPU_ISA is "mmx"' in wrong.stderr
    reported = python("import xpu_fp4; print(xpu_fp4.backends()['native'].detail)", XPU_FP4_CPU_ISA="mmx")
    assert 'XPU_FP4_CPU_ISA is "mmx"' in reported.stdout


def test_import_neither_loads_sycl_nor_asks_for_a_backend() -> None:
    code = "import xpu_fp4; maps = open('/proc/self/maps').read(); print('libsycl' in maps, '_sycl_backend' in maps)"
    assert python(code, XPU_FP4_CPU_BACKEND="gpu").stdout.strip() == "False False"


def test_without_a_sycl_runtime_the_native_backend_works_and_sycl_says_why(tmp_path: Path) -> None:
    nowhere = {"XPU_FP4_SYCL_LIB_DIR": str(tmp_path)}
    code = "import torch, xpu_fp4; print(xpu_fp4.dequantize(*xpu_fp4.quantize(torch.ones(32))).sum().item())"
    assert python(code, **nowhere).stdout.strip() == "32.0"
    chosen = python(code, XPU_FP4_CPU_BACKEND="sycl", **nowhere)
    assert chosen.returncode != 0, "no silent fallback"
    assert "no SYCL runtime" in chosen.stderr or "built without SYCL" in chosen.stderr
    report = python("from xpu_fp4.cli import main; main(['doctor'])", COLUMNS="300", **nowhere)
    assert report.returncode == 0
    assert "dpcpp-cpp-rt" in report.stdout
    required = python("from xpu_fp4.cli import main; main(['doctor', '--require', 'sycl'])", **nowhere)
    assert required.returncode == 1


def test_a_second_sycl_runtime_is_refused(backend: str, tmp_path: Path) -> None:
    if backend == "native":
        pytest.skip("about the sycl backend")
    loaded = ops._sycl_runtime()
    code = f"import ctypes; ctypes.CDLL({loaded!r}); import torch, xpu_fp4; xpu_fp4.quantize(torch.ones(32))"
    result = python(code, XPU_FP4_CPU_BACKEND="sycl", XPU_FP4_SYCL_LIB_DIR=str(tmp_path))
    assert result.returncode == 1
    assert f"the process has loaded {loaded}" in result.stderr


def test_without_a_cpu_device_the_sycl_backend_says_what_is_missing(backend: str) -> None:
    if backend == "native":
        pytest.skip("about the sycl backend")
    code = "import torch, xpu_fp4; xpu_fp4.quantize(torch.ones(32))"
    result = python(code, XPU_FP4_CPU_BACKEND="sycl", ONEAPI_DEVICE_SELECTOR="level_zero:gpu")
    assert result.returncode == 1
    assert "SYCL has no CPU device" in result.stderr
    assert "ONEAPI_DEVICE_SELECTOR" in result.stderr


def test_the_kernel_cache_is_where_the_user_wants_it(backend: str, tmp_path: Path) -> None:
    if backend == "native":
        pytest.skip("about the sycl backend")
    code = "import torch, xpu_fp4; xpu_fp4.quantize(torch.ones(32)); print(torch.ops.xpu_fp4._sycl_cache_dir())"
    environment = {"XPU_FP4_CPU_BACKEND": "sycl", "XPU_FP4_CACHE_DIR": str(tmp_path / "here")}
    result = python(f"import os; os.environ.pop('SYCL_CACHE_DIR', None); {code}", **environment)
    assert result.stdout.strip() == str(tmp_path / "here"), result.stderr
    assert list((tmp_path / "here").rglob("*.bin")), "compiled kernels are on disk"


def test_many_threads_may_start_the_backend_at_once(backend: str) -> None:
    """A new process has whoever comes first load the runtime and build the kernels."""
    code = """
import threading, torch, xpu_fp4
x = torch.randn(64, 256); results = []
threads = [threading.Thread(target=lambda: results.append(xpu_fp4.quantize(x)[0].view(torch.uint8))) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print(len(results), all(torch.equal(r, results[0]) for r in results))
"""
    result = python(code, XPU_FP4_CPU_BACKEND=backend)
    assert result.stdout.strip() == "8 True", result.stderr


def test_native_kernels_use_torchs_threads() -> None:
    code = """
import os, torch, xpu_fp4
x, (q, scale) = torch.randn(256, 64), xpu_fp4.quantize(torch.randn(256, 64))
started = []
for threads in (1, 5):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    xpu_fp4.linear(x, q, scale)
    started.append(len(os.listdir("/proc/self/task")) - before)
print(started)
"""
    result = python(code, OMP_NUM_THREADS="1")
    assert result.stdout.strip() == "[0, 4]", result.stdout + result.stderr


def test_a_forked_child_computes(backend: str) -> None:
    code = """
import os, torch, xpu_fp4
x = torch.randn(40, 64); expected = xpu_fp4.quantize(x)[0].view(torch.uint8)
pid = os.fork()
if pid == 0:
    import signal; signal.alarm(60)
    os._exit(0 if torch.equal(xpu_fp4.quantize(x)[0].view(torch.uint8), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    result = python(code, XPU_FP4_CPU_BACKEND=backend, OMP_NUM_THREADS="1")
    assert result.stdout.strip() == "0", result.stderr


def test_backends_are_reported() -> None:
    found = xpu_fp4.backends()
    assert set(found) == {"native", "sycl", "xpu"}
    assert found["native"].available
    assert all(backend.detail for backend in found.values())
    assert found["sycl"].devices or not found["sycl"].available


def test_doctor_is_content_with_this_machine() -> None:
    result = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in ("torch", "kernel cache", "native", "self-test passed"):
        assert word in result.output


def test_doctor_and_warmup_say_that_torch_used_the_xpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "XPU_CAME_FIRST", True)
    monkeypatch.setattr(torch.xpu, "synchronize", lambda: None)
    assert "before xpu_fp4 was imported" in doctor.versions()["kernel cache"]
    with pytest.warns(UserWarning, match="Import xpu_fp4 first"):
        xpu_fp4.warmup([], device="xpu")
    monkeypatch.setattr(_library, "XPU_CAME_FIRST", False)
    assert "before" not in doctor.versions()["kernel cache"]


def test_what_torch_did_with_the_xpu_is_noticed_at_import() -> None:
    code = "import torch; torch.xpu.is_initialized = lambda: True; import xpu_fp4; print(xpu_fp4._library.XPU_CAME_FIRST)"
    assert python(code).stdout.strip() == "True"
    assert python(code, SYCL_CACHE_PERSISTENT="1").stdout.strip() == "False"
    assert python(code.replace("lambda: True", "lambda: False")).stdout.strip() == "False"


def test_doctor_notices_wrong_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_bit_off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = reference.quantize(x)
        q[0, 0] ^= 1
        return q, scale

    monkeypatch.setitem(doctor._MODES, "w4a4", (one_bit_off, reference.quantize))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "self-test failed" in result.output


@pytest.mark.usefixtures("requires_sycl")
def test_doctor_tests_an_architectures_kernels() -> None:
    """The portable ones: those of a GPU's take minutes to compile here. tests/test_sycl_variants.py runs them."""
    result = CliRunner().invoke(main, ["doctor", "--kernels", "portable"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert result.output.count(" right ") == 8, result.output


def test_doctor_runs_both_ways_of_few_rows_and_says_which_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner's GPU whose int4 operand is another than we think, in every task that has it."""

    def task(device: torch.device, rows: int) -> str | None:
        wrong = os.environ["XPU_FP4_SYCL_VARIANT"] == "bmg:small" and os.environ["XPU_FP4_WEIGHT_OPERAND"] == "int4"
        return "8 of 8 values differ" if wrong else None

    for tasks in (bring_up._TASKS, bring_up._EXPANDED, bring_up._QUANTIZERS):
        for name in tasks:
            monkeypatch.setitem(tasks, name, lambda device, rows: None)
    monkeypatch.setitem(bring_up._TASKS, "W4A8", task)
    monkeypatch.delenv("XPU_FP4_WEIGHT_OPERAND", raising=False)
    results = list(bring_up.bring_up(torch.device("cpu"), "bmg"))
    assert [result[:2] for result in results if result.wrong] == [("small", "W4A8")]
    assert {result.task for result in results if result.kernel == "small, int8"} == {"W4A4", "W4A8"}
    assert "XPU_FP4_WEIGHT_OPERAND" not in os.environ
    assert "set XPU_FP4_WEIGHT_OPERAND=int8" in (bring_up.advice(results) or "")
    assert bring_up.advice([bring_up.Result(kernel, task, None) for kernel, task, _ in results]) is None
    both = [bring_up.Result(kernel, task, "wrong") for kernel, task, _ in results]
    assert bring_up.advice(both) is None


@pytest.mark.usefixtures("requires_sycl")
def test_doctor_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.gemm
    monkeypatch.setattr(reference, "gemm", lambda *given: right(*given) + (given[4] == torch.bfloat16))
    result = CliRunner().invoke(main, ["doctor", "--kernels", "portable"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert result.output.count("differ from the reference") == 4, result.output
    assert "Not in order: kernels of no architecture" in result.output


@pytest.mark.usefixtures("requires_sycl")
def test_doctor_names_architectures_that_there_are() -> None:
    result = CliRunner().invoke(main, ["doctor", "--kernels", "nvl"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert 'XPU_FP4_SYCL_VARIANT is "nvl:small", expected' in " ".join(result.output.split())


def fake_library(file: Path, soname: str) -> Path:
    subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{soname}", "-o", file], check=True)
    return file


@pytest.mark.usefixtures("requires_sycl")
def test_another_sycl_runtime_in_the_process_is_refused(tmp_path: Path) -> None:
    other = fake_library(tmp_path / "libsycl.so.7", "libsycl.so.7")
    result = python(f"import ctypes, xpu_fp4; ctypes.CDLL({str(other)!r}); print(xpu_fp4.backends()['sycl'])")
    assert "available=False" in result.stdout, result.stderr
    assert f"another SYCL runtime, {other}, than the libsycl.so." in result.stdout


@pytest.mark.usefixtures("requires_sycl")
def test_the_backend_is_that_of_the_runtime(tmp_path: Path) -> None:
    """Of the one in the process, else the newest that there is; one without a version, of older builds, is passed over."""
    package = tmp_path / "xpu_fp4"
    shutil.copytree(Path(xpu_fp4.__file__).parent, package)
    (package / "_sycl_backend.abi3.so").write_text("nothing that could be loaded")
    for major in (7, 99):
        fake_library(package / f"_sycl_backend_{major}.abi3.so", "a backend without a plugin")
    runtime, _ = (fake_library(tmp_path / name, name) for name in ("libsycl.so.7", "libsycl.so.99"))
    ask = "import torch, xpu_fp4; sycl = xpu_fp4.backends()['sycl']; print(sycl.available, sycl.detail, xpu_fp4.__file__)"
    found = python(f"{ask}; print(torch.ops.xpu_fp4._sycl_backend_file())", PYTHONPATH=str(tmp_path))
    assert found.stdout.startswith("True "), found.stdout + found.stderr
    ours = Path(ops._sycl_backend_file())
    assert found.stdout.splitlines()[-1] == str(package / ours.name)
    of_process = python(f"import ctypes; ctypes.CDLL({str(runtime)!r}); {ask}", PYTHONPATH=str(tmp_path))
    assert of_process.stdout.startswith(f"False {package}/_sycl_backend_7.abi3.so has no xpu_fp4_sycl_plugin")
    of_folder = python(ask, PYTHONPATH=str(tmp_path), XPU_FP4_SYCL_LIB_DIR=str(tmp_path))
    assert of_folder.stdout.startswith(f"False {package}/_sycl_backend_99.abi3.so has no xpu_fp4_sycl_plugin")


def test_without_a_backend_sycl_says_that_it_was_not_built(tmp_path: Path) -> None:
    package = tmp_path / "xpu_fp4"
    shutil.copytree(Path(xpu_fp4.__file__).parent, package, ignore=shutil.ignore_patterns("_sycl_backend_*", "_xpu_queue*"))
    result = python("import xpu_fp4; print(xpu_fp4.backends()['sycl'].detail)", PYTHONPATH=str(tmp_path))
    assert result.stdout.startswith("built without SYCL"), result.stderr
