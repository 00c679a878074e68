# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 doctor`: what is installed, what can run, and whether it computes the right bits."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from .. import reference
from .._library import ops
from .._version import __version__
from ..backends import Backend, backends, cpu_backend, kernel_cache_doubt
from ..functional import Mode, linear, mxint8_quantize, quantize
from .bring_up import advice, bring_up


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    return {
        "xpu_fp4": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "dpcpp-cpp-rt (pip)": _installed("dpcpp-cpp-rt"),
        "intel-opencl-rt (pip)": _installed("intel-opencl-rt"),
        "oneAPI toolkit": os.environ.get("CMPLR_ROOT") or os.environ.get("ONEAPI_ROOT") or "not in the environment",
        "kernel cache": "; but ".join(filter(None, (ops._sycl_cache_dir() or "none", kernel_cache_doubt()))),
        "backend for CPU tensors": ops._cpu_backend(),
    }


@contextmanager
def _serving(name: str) -> Iterator[torch.device]:
    """The device whose tensors this backend serves, inside the context."""
    if name == "xpu":
        yield torch.device("xpu")
    else:
        with cpu_backend(name):
            yield torch.device("cpu")


_MODES: dict[Mode, tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "w4a4": (quantize, reference.quantize),
    "w4a8": (mxint8_quantize, reference.mxint8_quantize),
}
"""The modes that are defined to the bit, with what quantizes their x, by our ops and by the definition."""


def self_test(name: str) -> str | None:
    """Quantize, W4A4 and W4A8 on one backend against the reference: None if all bits agree, else what differs."""
    generator = torch.Generator().manual_seed(0)
    # Exponents wide enough to reach subnormal products; one NaN block.
    spread = torch.randint(-70, 8, (37, 12, 1), generator=generator)
    x = (torch.randn(37, 12, 32, generator=generator) * torch.exp2(spread.float())).flatten(1)
    x[3, 40] = torch.nan
    w, w_scale = reference.quantize(torch.randn(21, 12 * 32, generator=generator))
    for mode, (quantize_x, define_x) in _MODES.items():
        q, scale = define_x(x)
        expected = reference.gemm(q, scale, w, w_scale, torch.float32)
        with _serving(name) as device:
            got_q, got_scale = (t.cpu() for t in quantize_x(x.to(device)))
            got = linear(x.to(device), w.to(device), w_scale.to(device), mode=mode).cpu()
        if not (torch.equal(got_q.view(torch.uint8), q.view(torch.uint8)) and torch.equal(got_scale.view(torch.uint8), scale)):
            return f"{quantize_x.__name__} differs from the reference"
        different = int((got.view(torch.int32) != expected.view(torch.int32)).sum())
        if different:
            return f"{mode.upper()} differs from the reference in {different} of {got.numel()} outputs"
    return None


def _verdict(backend: Backend) -> tuple[str, bool]:
    """What the table says of a backend, and whether that is all right."""
    if not backend.available:
        return f"[yellow]off[/yellow]: {escape(backend.detail)}", True
    try:
        difference = self_test(backend.name)
    except RuntimeError as error:
        difference = str(error)
    if difference is not None:
        return f"[red]self-test failed[/red]: {escape(difference)}", False
    return f"[green]on[/green], self-test passed: {escape(backend.detail)}", True


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _architecture_of_xpu() -> str:
    """Whose kernels torch's current XPU device runs, by what SYCL says of the device of that name; empty: the portable ones."""
    name = torch.xpu.get_device_name()
    kernels = [line.rsplit("kernels of ", 1) for line in ops._sycl_devices() if line.startswith(f"{name};")]
    return next((found[1] for found in kernels if len(found) == 2), "")


def _bring_up_table(device: torch.device, architecture: str) -> tuple[Table, bool]:
    """What each kernel computes, and whether all of it is right."""
    table = Table("kernel", "task", "result", title=f"Kernels of {architecture or 'no architecture'} on {device}")
    table.title_justify = "left"
    results = list(bring_up(device, architecture))
    for kernel, task, wrong in results:
        table.add_row(kernel, task, "[green]right[/green]" if wrong is None else f"[red]wrong[/red]: {escape(wrong)}")
    table.caption = advice(results)
    return table, all(result.wrong is None for result in results)


@click.command("doctor")
@click.option(
    "--kernels",
    "architecture",
    metavar="ARCHITECTURE",
    help="Test all kernels of this architecture (bmg, pvc, ..., portable) on the CPU device; a GPU's own are tested unasked.",
)
@click.option(
    "--require",
    "required",
    multiple=True,
    type=click.Choice(["native", "sycl", "xpu"]),
    help="Fail if this backend is off. Can be repeated.",
)
def command(required: tuple[str, ...], architecture: str | None) -> None:
    """Show versions, devices and backends, and test each backend against the reference; on a GPU, each of its kernels.

    Exit code 0: every backend that is on computes the right bits. 1: one does not; or the backend chosen for CPU tensors, or
    one named by --require, is off.

    On a GPU that nobody has reported yet, please paste the output into an issue.
    """
    console = Console()
    try:
        console.print(_table("Versions and settings", versions()))
        found = backends()
    except RuntimeError as error:  # a setting that names nothing
        sys.exit(str(error).split("\nException raised from")[0])
    verdicts = {name: _verdict(backend) for name, backend in found.items()}
    if found["sycl"].devices:
        console.print(f"{ops._sycl_embedded_programs()} programs were compiled when xpu_fp4 was built")
    console.print(_table("Backends", {name: text for name, (text, _) in verdicts.items()}))
    devices = [device for backend in found.values() for device in backend.devices]
    console.print(_table("Devices", {str(i): device for i, device in enumerate(devices)} or {"-": "SYCL shows none"}))
    failed = [name for name, (_, good) in verdicts.items() if not good]
    for name, kernels_of in {
        "sycl": "" if architecture == "portable" else architecture,
        "xpu": _architecture_of_xpu() if found["xpu"].available else None,
    }.items():
        if kernels_of is not None and found[name].available:
            with _serving(name) as device:
                table, good = _bring_up_table(device, kernels_of)
            console.print(table)
            failed += [] if good else [f"kernels of {kernels_of or 'no architecture'}"]
    failed += [name for name in {*required, ops._cpu_backend()} if not found[name].available]
    if failed:
        console.print(f"[red]Not in order[/red]: {', '.join(sorted(failed))}")
        sys.exit(1)
