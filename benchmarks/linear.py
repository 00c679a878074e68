# SPDX-License-Identifier: Apache-2.0
"""Linear layers on the CPU: ours beside torch's bf16 and int8, in one run. Compare ratios; times depend on the machine.

Usage: python benchmarks/linear.py [--threads N]; XPU_FP4_CPU_ISA=portable chooses the kernels.
"""

import time
from collections.abc import Callable

import click
import torch
import xpu_fp4
from rich.console import Console
from rich.table import Table

SHAPES = ((1, 4096, 4096), (16, 4096, 4096), (512, 4096, 4096))


def best_time(run: Callable[[], object], seconds: float = 1.0) -> float:
    """Seconds of the fastest call within the given time, after one call to warm up."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def contenders(m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    x, weight = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16)
    q, scale = xpu_fp4.quantize(weight)
    x8, w8 = torch.randint(-99, 99, (m, k), dtype=torch.int8), torch.randint(-99, 99, (k, n), dtype=torch.int8)
    return {
        "torch bf16": lambda: torch.nn.functional.linear(x, weight),
        "torch int8, no scales": lambda: torch._int_mm(x8, w8),
        "xpu_fp4 W4A4": lambda: xpu_fp4.linear(x, q, scale),
        "xpu_fp4 W4A16": lambda: xpu_fp4.linear(x, q, scale, mode="w4a16"),
    }


@click.command()
@click.option("--threads", default=torch.get_num_threads(), show_default=True)
def main(threads: int) -> None:
    """Time linear layers."""
    torch.set_num_threads(threads)
    table = Table(title=f"executed; {xpu_fp4.backends()['native'].detail}")
    for column in ("M x N x K", "who", "ms", "GOPS", "speed / bf16"):
        table.add_column(column, justify="left" if column == "who" else "right")
    for m, n, k in SHAPES:
        times = {who: best_time(run) for who, run in contenders(m, n, k).items()}
        for who, t in times.items():
            speed = f"{2 * m * n * k / t / 1e9:.1f}"
            table.add_row(f"{m} x {n} x {k}", who, f"{t * 1e3:.2f}", speed, f"{times['torch bf16'] / t:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
