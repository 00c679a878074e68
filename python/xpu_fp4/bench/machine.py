# SPDX-License-Identifier: Apache-2.0
"""What a run was made on. Nothing that names the machine or its owner."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from .._library import ops
from .._version import __version__
from . import peers

_FLAGS = re.compile(r"^(avx2|avx_vnni|avx512(f|bw|vl|_vnni|_vbmi|_bf16|_fp16)|amx_\w+|f16c|fma|sve2?|i8mm|bf16|asimddp)$")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _processor() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def caches() -> dict[str, int]:
    """Bytes of each data cache that one core sees, by name: L1, L2, L3. Empty where the system does not tell."""
    found = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = int(size[:-1]) * _UNITS[size[-1]] if size[-1] in _UNITS else int(size)
    return found


def memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def revision() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" if it is changed; None outside of one."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        tracked = subprocess.run([*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if tracked.returncode != 0:
            return None
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: str = "cpu") -> dict[str, object]:
    """The machine, the libraries and our own build, for the JSON."""
    processor = _processor()
    found: dict[str, object] = {
        "processor": processor.get("model name", platform.processor() or platform.machine()),
        "family, model, stepping": [processor.get(key) for key in ("cpu family", "model", "stepping")],
        "instruction sets": sorted(flag for flag in processor.get("flags", "").split() if _FLAGS.match(flag)),
        "cores": usable_cores(),
        "cache bytes": caches(),
        "memory bytes": memory(),
        "virtual": "hypervisor" in processor.get("flags", "").split(),
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torch vectors": torch.backends.cpu.get_cpu_capability(),
        "xpu_fp4": __version__,
        "revision": revision(),
        "backend for CPU tensors": ops._cpu_backend(),
        "native kernels": ops._native_isa(),
        "peers": peers.versions(),
    }
    if device == "xpu":
        found["device"] = torch.xpu.get_device_name()
    return found
