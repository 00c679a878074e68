# SPDX-License-Identifier: Apache-2.0
"""Threads, processes, cold caches, killed writers, full disks and files that shrink, for as long as asked: `make soak`.

Each scenario runs again and again, in turn, until time is up. One that finds wrong bits, an error that it did not expect, a
process that hangs, or memory that grows from one half of the run to the other, ends the soak with exit code 1.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import xpu_fp4
from xpu_fp4 import MXFP4Linear
from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint

SECONDS = 600
"""What a process may take: on a cold cache it compiles its kernels, which took two minutes on a busy machine."""
GROWTH = 64 << 20
"""Bytes that the second half of the run may have more than the first: allocators keep some."""

_PRODUCT = """
import torch, xpu_fp4
torch.manual_seed(0)
w, scale = xpu_fp4.quantize(torch.randn(96, 256), hadamard=64)
y = xpu_fp4.linear(torch.randn(9, 256), w, scale, mode="w4a8", hadamard=64)
print(y.view(torch.int32).sum().item())
"""
_QUANTIZE = """
import sys
from xpu_fp4.checkpoints import plan_quantization, quantize_checkpoint
quantize_checkpoint(plan_quantization(sys.argv[1]), sys.argv[2], mode="w4a8")
"""
_LOAD = """
import sys, xpu_fp4
from xpu_fp4.checkpoints import CheckpointError
try:
    xpu_fp4.load_model(sys.argv[1])
except (CheckpointError, OSError) as error:
    print(f"refused: {error}")
"""


def python(code: str, *arguments: object, **options: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload,no-any-return]


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"a process hung for {SECONDS} s") from None
    return process.returncode, out, err


def model_directory(folder: Path) -> Path:
    """A small Llama in several shards."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
    return folder


class Soak:
    """The scenarios, and what they share."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.pick = random.Random(seed)
        self.source = model_directory(folder / "model")
        self.whole = quantize_checkpoint(plan_quantization(self.source), folder / "whole", mode="w4a8")
        self.product: str | None = None

    def contents(self, folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    def threads_share_a_module(self) -> None:
        """First forward, moving, copying, saving and loading at once give the bits of one thread."""
        torch.manual_seed(1)
        layer = MXFP4Linear.from_linear(torch.nn.Linear(256, 96), mode=self.pick.choice(["w4a4", "w4a8", "w4a16"]), hadamard=32)
        x = torch.randn(5, 256)
        state = layer.state_dict()
        expected = xpu_fp4.linear(
            x, state["weight_packed"], state["weight_scale"], layer.bias, mode=layer.mode, hadamard=layer.hadamard
        )
        wrong: list[str] = []

        def forward() -> None:
            for _ in range(20):
                if not torch.equal(layer(x), expected):
                    wrong.append("other bits")

        def change() -> None:
            for _ in range(5):
                layer.unprepack_()
                layer.load_state_dict(layer.state_dict())
                layer.prepack_()

        def run(work: Callable[[], None]) -> None:
            try:
                work()
            except Exception as error:  # any of them is a finding
                wrong.append(f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=run, args=(work,)) for work in (forward, forward, forward, change)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[0]

    def processes_start_on_a_cold_cache(self) -> None:
        """Processes that compile the SYCL kernels at the same time, or find half of them, get the bits of the native ones."""
        backend = "sycl" if xpu_fp4.backends()["sycl"].available else "native"
        cache = self.folder / "cache"
        if self.pick.random() < 0.3:
            shutil.rmtree(cache, ignore_errors=True)
        elif cache.exists() and (files := [path for path in cache.rglob("*") if path.is_file()]):
            self.pick.choice(files).write_bytes(self.pick.randbytes(100))
        env = {**os.environ, "XDG_CACHE_HOME": str(cache), "XPU_FP4_CPU_BACKEND": backend}
        found = [ended(process) for process in [python(_PRODUCT, env=env) for _ in range(2)]]
        if self.product is None:
            self.product = ended(python(_PRODUCT, env={**os.environ, "XPU_FP4_CPU_BACKEND": "native"}))[1]
        for code, out, err in found:
            assert code == 0, err
            assert out == self.product, "another backend gives other bits"

    def a_writer_is_killed(self) -> None:
        """What is left never loads as a model, and the next run makes the same files."""
        out = self.folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        process = python(_QUANTIZE, self.source, out)
        time.sleep(self.pick.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        code, _, err = ended(python(_QUANTIZE, self.source, out)) if not out.exists() else (0, "", "")
        assert code == 0, err
        assert self.contents(out) == self.contents(self.whole), "resumed, the files are others"

    def a_disk_is_full(self) -> None:
        """An error says so; with room, the same files are made."""
        out = self.folder / "full"
        for path in (out, out.with_name("full.partial")):
            shutil.rmtree(path, ignore_errors=True)
        largest = max(path.stat().st_size for path in self.whole.iterdir())
        most = self.pick.choice([100, 5_000, largest // 2])

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        code, _, err = ended(python(_QUANTIZE, self.source, out, preexec_fn=limit))
        assert code == 1, f"exit code {code} although files end at {most} bytes"
        assert "OSError" in err or "CheckpointError" in err, err[-300:]
        assert not out.exists()
        code, _, err = ended(python(_QUANTIZE, self.source, out))
        assert code == 0, err
        assert self.contents(out) == self.contents(self.whole), "the files are others than with room from the beginning"

    def a_checkpoint_is_cut(self) -> None:
        """A file that shrinks before or while it is loaded is refused, or ends the reader by SIGBUS, as mapped files do."""
        copy = self.folder / "cut"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.whole, copy)
        victim = self.pick.choice(sorted(copy.glob("*.safetensors")))
        process = python(_LOAD, copy)
        time.sleep(self.pick.uniform(0, 4))
        os.truncate(victim, self.pick.randrange(victim.stat().st_size))
        code, _, err = ended(process)
        assert code in (0, -signal.SIGBUS), f"exit code {code}: {err[-300:]}"

    def a_model_loads_and_answers(self) -> None:
        """Loading and computing in this process, whose memory must stay flat."""
        model = xpu_fp4.load_model(self.whole, mode=self.pick.choice([None, "w4a4", "w4a8", "w4a16"]))
        with torch.inference_mode():
            assert model(torch.arange(1, 33)[None]).logits.isfinite().all()

    def scenarios(self) -> list[Callable[[], None]]:
        return [
            self.threads_share_a_module,
            self.processes_start_on_a_cold_cache,
            self.a_writer_is_killed,
            self.a_disk_is_full,
            self.a_checkpoint_is_cut,
            self.a_model_loads_and_answers,
        ]


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@click.command()
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(minutes: float, seed: int) -> None:
    """Run all scenarios in turn until time is up."""
    begin, counts = time.monotonic(), dict[str, int]()
    peaks = [0, 0]
    with tempfile.TemporaryDirectory(prefix="xpu_fp4_soak") as temporary:
        soak = Soak(Path(temporary), seed)
        while (passed := time.monotonic() - begin) < 60 * minutes:
            for scenario in soak.scenarios():
                try:
                    scenario()
                except AssertionError as error:
                    sys.exit(f"{scenario.__name__}, after {counts} from seed {seed}: {error}")
                counts[scenario.__name__] = counts.get(scenario.__name__, 0) + 1
            half = int(passed > 30 * minutes)
            peaks[half] = max(peaks[half], resident())
    print(f"{minutes:g} minutes, seed {seed}: {counts}")
    print(f"resident memory at most, MB: first half {peaks[0] / 1e6:.0f}, second half {peaks[1] / 1e6:.0f}")
    if all(peaks) and peaks[1] > peaks[0] + GROWTH:
        sys.exit("memory grows")


if __name__ == "__main__":
    main()
