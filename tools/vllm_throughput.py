# SPDX-License-Identifier: Apache-2.0
"""vLLM's own throughput benchmark over several checkpoints in alternation: the best run of each, and its ratio to the first's.

python tools/vllm_throughput.py bf16=DIR w4a4=DIR --rounds 2 -- --dtype bfloat16 --enforce-eager

What follows `--` goes to `vllm bench throughput`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table


def tokens_per_second(model: str, options: list[str]) -> float:
    """Input and output tokens per second of one run. Exits with vLLM's log where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = ["vllm", "bench", "throughput", "--model", model, "--output-json", str(result), *options]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if run.returncode != 0:
            sys.exit(f"{run.stdout}\n{' '.join(command)} failed")
        return float(json.loads(result.read_text())["tokens_per_second"])


def split_name(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    for value in values:
        if not all(value.partition("=")):
            raise click.BadParameter(f"{value!r} is not NAME=DIRECTORY")
    return dict(value.split("=", 1) for value in values)


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and what follows `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


@click.command(help=__doc__)
@click.argument("models", nargs=-1, required=True, callback=split_name, metavar="NAME=DIRECTORY...")
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1), help="Runs of each model.")
@click.pass_context
def main(context: click.Context, models: dict[str, str], rounds: int) -> None:
    console = Console()
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for name in track([name for _ in range(rounds) for name in models], "Measuring", console=console):
        speeds[name].append(tokens_per_second(models[name], context.obj))
    first = max(next(iter(speeds.values())))
    table = Table("model", "tokens/s of each run", "best", "ratio")
    for name, runs in speeds.items():
        table.add_row(name, ", ".join(f"{run:.1f}" for run in runs), f"{max(runs):.1f}", f"{max(runs) / first:.2f}")
    console.print(table)


if __name__ == "__main__":
    own, vllms = split_arguments(sys.argv[1:])
    main(own, obj=vllms)
