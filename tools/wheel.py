# SPDX-License-Identifier: Apache-2.0
"""Builds the source distribution and, from it, the wheel for the torch at hand; repairs and checks it. `make wheel` runs this.

Nothing is fetched. One wheel serves CPUs and XPUs with torch's minor version: it has a SYCL backend for each --sycl.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "manylinux_2_34_x86_64"
# torch's and SYCL's libraries come with their own packages.
OTHERS = ("libc10*.so", "libtorch*.so", "libsycl.so.*")
MINOR = ".".join(torch.__version__.split(".")[:2])
# What the wheel says and the source distribution leaves open: it fits this torch alone.
FOR_THIS_TORCH = {
    "pyproject.toml": ('"torch>=2.8"', f'"torch=={MINOR}.*"'),
    "python/xpu_fp4/_version.py": (r'__version__ = "([^"]+)"', rf'__version__ = "\1+torch{MINOR}"'),
}


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(command, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}:\n{result.stdout}")
    return result.stdout


def build(folder: Path, kind: str, source: Path, **environment: str) -> Path:
    """A distribution of kind `sdist` or `wheel`, by the environment's own packages."""
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder, source, **environment)
    (found,) = folder.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return found


def check_sdist(sdist: Path) -> None:
    """It has every file of the repository but those of its hosting."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "-C", ROOT, "ls-files").splitlines()
    if missing := [name for name in tracked if name not in names and not name.startswith((".ci/", ".git"))]:
        sys.exit(f"{sdist.name} lacks {', '.join(missing)}")


def build_wheel(sdist: Path, folder: Path, environment: dict[str, str]) -> Path:
    """From the files of the source distribution alone."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = (path for path in folder.iterdir() if path.is_dir())
    for name, (pattern, replacement) in FOR_THIS_TORCH.items():
        text, count = re.subn(pattern, replacement, (tree / name).read_text(), count=1)
        if count != 1:
            sys.exit(f"{name} has no {pattern}")
        (tree / name).write_text(text)
    plain = build(folder / "plain", "wheel", tree, **environment)
    options = [f"--exclude={library}" for library in OTHERS]
    print(run("auditwheel", "repair", "--plat", PLATFORM, *options, "--wheel-dir", folder / "repaired", plain, **environment))
    (wheel,) = (folder / "repaired").glob("*.whl")
    return wheel


def check(wheel: Path, folder: Path, sycls: int) -> None:
    """It has all that it is to have, and nothing that says which machine built it."""
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    libraries = {Path(name).name for name in files if name.endswith(".so")}
    backends = {name for name in libraries if name.startswith("_sycl_backend_")}
    if libraries - backends != {"_xpu_C.abi3.so", "_xpu_queue.abi3.so"} or len(backends) != sycls:
        sys.exit(f"{wheel.name} has the libraries {', '.join(sorted(libraries))}")
    if missing := [name for name in ("LICENSE", "NOTICE") if not any(file.endswith(f"licenses/{name}") for file in files)]:
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
    paths = {str(path).encode() for path in (ROOT, folder, Path(sys.prefix), Path(sys.base_prefix), Path.home())} - {b"/usr"}
    if found := [f"{path.decode()} in {name}" for name, content in files.items() for path in paths if path in content]:
        sys.exit(f"{wheel.name} has paths of this machine: {', '.join(found)}")
    print(run("abi3audit", "--strict", "--verbose", wheel))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sycl", action="append", required=True, help="a prefix with SYCL, of each major version that is to be served"
    )
    parser.add_argument("--again", action="store_true", help="build it twice, in two folders, and compare")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--work", type=Path, default=ROOT / "build/wheel")
    options = parser.parse_args()
    folder = options.work.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(options.out, ignore_errors=True)
    time = run("git", "-C", ROOT, "log", "-1", "--format=%ct").strip()
    environment = {
        "SOURCE_DATE_EPOCH": time,
        "XPU_FP4_RELOCATABLE": "1",
        "XPU_FP4_SPIRV": os.environ.get("XPU_FP4_SPIRV", "1"),
        "XPU_FP4_SYCL_ROOTS": os.pathsep.join(str(Path(root).resolve()) for root in options.sycl),
    }
    sdist = build(options.out, "sdist", ROOT, SOURCE_DATE_EPOCH=time)
    check_sdist(sdist)
    wheels = [build_wheel(sdist, folder / name, environment) for name in ("once", "again")[: 1 + options.again]]
    for wheel in wheels:
        check(wheel, folder, len(options.sycl))
    digests = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
    if len(digests) > 1:
        sys.exit(f"built twice, {wheels[0].name} is not the same")
    shutil.copy(wheels[0], options.out)
    print(*sorted(options.out.iterdir()), f"sha256 {digests.pop()}", "twice" if options.again else "once", sep="\n")


if __name__ == "__main__":
    main()
