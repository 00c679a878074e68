# SPDX-License-Identifier: Apache-2.0
"""Has the SYCL backend compile its programs ahead of time, and packs their SPIR-V for embed.py.

The library says which programs there are and compiles them, as it would at run time; SYCL writes their SPIR-V to files. No GPU
is needed, but some SYCL device: Intel's OpenCL CPU device.
"""

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path


def keys(library: ctypes.CDLL, whom: str) -> list[str]:
    """Of the programs for `gpus` or for `tests`, in csrc/sycl/variants.cpp's order."""
    library.xpu_fp4_sycl_keys.restype = ctypes.c_char_p
    found: bytes = library.xpu_fp4_sycl_keys(whom.encode())
    return found.decode().split()


def compile_share(library: ctypes.CDLL, whom: str, folder: Path, share: int, shares: int) -> None:
    """Leaves KEY.spv in the folder for every so-manieth program that is not there."""
    compile_program = library.xpu_fp4_sycl_compile
    compile_program.restype = ctypes.c_char_p
    for index, key in list(enumerate(keys(library, whom)))[share::shares]:
        module = folder / f"{key}.spv"
        if module.exists():
            continue
        failure = compile_program(whom.encode(), index)
        dumped = list(folder.glob(f"share{share}.*"))
        # With it all is well: what comes after it is the CPU device's compiler, which does not take programs for GPUs.
        if len(dumped) != 1:
            sys.exit(failure.decode() if failure else f"{len(dumped)} files of SPIR-V")
        dumped[0].rename(module)


def pack(library: Path, whom: str, folder: Path, sycl: Path, jobs: int) -> Path:
    """The file that holds all programs, each after its key and its size in bytes and padded to 8 of them.

    `folder` keeps the modules of earlier builds, so that those are not compiled again; `sycl` is SYCL's prefix.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("share*"):
        leftover.unlink()
    driver = sycl / "lib/libintelocl.so"
    environment = {"OCL_ICD_FILENAMES": str(driver)} if driver.exists() else {}
    environment |= os.environ
    # Processes of their own, which find SYCL's library even if the backend does not say where it is.
    paths = [str(sycl / "lib"), os.environ.get("LD_LIBRARY_PATH")]
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, str(library), whom]
    workers = []
    for share in range(jobs):
        dump = {"SYCL_DUMP_IMAGES": "1", "SYCL_DUMP_IMAGES_PREFIX": f"{folder}/share{share}.", "SYCL_CACHE_PERSISTENT": "0"}
        arguments = [str(folder), str(share), str(jobs)]
        workers.append(subprocess.Popen(command + arguments, env=environment | dump, stderr=subprocess.PIPE, text=True))
    logs = [worker.communicate()[1] for worker in workers]  # of all: an unknown built-in of the GPU is a warning
    if failures := [log for log, worker in zip(logs, workers, strict=True) if worker.returncode != 0]:
        sys.exit(f"xpu_fp4: SPIR-V cannot be made; XPU_FP4_SPIRV=0 builds without it.\n{failures[0]}")
    wanted = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    for module in folder.glob("*.spv"):
        if module.stem not in wanted:
            module.unlink()
    packed = bytearray()
    for key in wanted:
        module_bytes = (folder / f"{key}.spv").read_bytes()
        packed += struct.pack("<QQ", int(key, 16), len(module_bytes)) + module_bytes + bytes(-len(module_bytes) % 8)
    result = folder / "pack"
    result.write_bytes(packed)
    return result


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(*keys(ctypes.CDLL(sys.argv[1]), sys.argv[2]))
    else:
        compile_share(ctypes.CDLL(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
