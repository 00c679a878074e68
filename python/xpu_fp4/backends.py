# SPDX-License-Identifier: Apache-2.0
"""Which backends can run, and which one serves CPU tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from . import _library
from ._library import ops


@dataclass(frozen=True)
class Backend:
    """One of the backends: `native` and `sycl` serve CPU tensors, `xpu` serves XPU tensors."""

    name: str
    available: bool
    detail: str
    """What it runs on or, if it is not available, why."""
    devices: list[str] = field(default_factory=list)


def _native() -> Backend:
    try:
        ops._native_isa()
    except RuntimeError as error:
        return Backend("native", False, _reason(error))
    return Backend("native", True, f"{ops._native_isa()} kernels, {torch.get_num_threads()} threads")


def _sycl() -> Backend:
    try:
        devices: list[str] = ops._sycl_devices()
    except RuntimeError as error:
        return Backend("sycl", False, _reason(error))
    try:
        with cpu_backend("sycl"):
            ops.mxfp4_quantize(torch.empty(0, 32))
    except RuntimeError as error:
        return Backend("sycl", False, _reason(error), devices)
    return Backend("sycl", True, f"the SYCL kernels on Intel's CPU device, runtime {ops._sycl_runtime()}", devices)


def _xpu() -> Backend:
    if torch.version.xpu is None:
        return Backend("xpu", False, f"torch {torch.__version__} is not an XPU build")
    if not _library.XPU_QUEUE.exists():
        return Backend("xpu", False, "xpu_fp4 was built without SYCL")
    if not torch.xpu.is_available():
        return Backend("xpu", False, "torch sees no XPU device")
    names = [torch.xpu.get_device_name(i) for i in range(torch.xpu.device_count())]
    return Backend("xpu", True, "the SYCL kernels on the current stream", names)


def _reason(error: RuntimeError) -> str:
    # TORCH_CHECK may append a C++ backtrace.
    return str(error).split("\nException raised from")[0].removeprefix("xpu_fp4: ")


_PROBES = {"native": _native, "sycl": _sycl, "xpu": _xpu}


def backend(name: str) -> Backend:
    """The state of the backend `native`, `sycl` or `xpu`. Only `sycl` loads the SYCL runtime."""
    return _PROBES[name]()


def backends() -> dict[str, Backend]:
    """The state of every backend, by name. Loads the SYCL runtime if it is there."""
    return {name: backend(name) for name in _PROBES}


def kernel_cache_doubt() -> str | None:
    """Why compiled kernels may not be kept on disk in this process: None if nothing speaks against it."""
    if not _library.XPU_CAME_FIRST:
        return None
    return (
        "torch.xpu was in use before xpu_fp4 was imported: if a kernel had run by then, SYCL keeps no compiled kernels on disk "
        "in this process. Import xpu_fp4 first, or set SYCL_CACHE_PERSISTENT=1 and SYCL_CACHE_DIR"
    )


def cpu_backend_name() -> str:
    """The backend that serves CPU tensors in this thread now: `native` or `sycl`."""
    name: str = ops._cpu_backend()
    return name


@contextmanager
def cpu_backend(name: str) -> Iterator[None]:
    """Serves CPU tensors with the backend `native` or `sycl`, in this thread, inside the context.

    The process's choice is the environment variable XPU_FP4_CPU_BACKEND, `native` by default. Both give the same bits. Raises
    RuntimeError for other names; where the backend cannot run, the ops raise the reason. Not inside a function that
    torch.compile traces: enter it around the call.
    """
    previous = ops._cpu_backend_override()
    ops._set_cpu_backend(name)
    try:
        yield
    finally:
        ops._set_cpu_backend(previous)
