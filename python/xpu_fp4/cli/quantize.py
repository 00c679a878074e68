# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 quantize`: a model directory into an MXFP4 model directory."""

from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoints import Plan, plan_quantization, quantize_checkpoint
from ..functional import Mode, ScaleMode
from .common import DIRECTORY, SCHEME, errors_as_messages, plain


@click.command("quantize")
@click.argument("source", type=DIRECTORY)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--scheme",
    type=SCHEME,
    default="w4a4",
    show_default=True,
    help="What layers make of their inputs: MXFP4, MXINT8 (w4a8), nothing. The weights are the same.",
)
@click.option(
    "--scale-mode",
    type=click.Choice(get_args(ScaleMode)),
    default="even",
    show_default=True,
    help="How scales of MXFP4 are chosen. Other readers than xpu_fp4 know even only, for the inputs of w4a4.",
)
@click.option(
    "--ignore",
    multiple=True,
    help="A further linear layer to leave as it is: its name, or re: and a regex. Can be repeated.",
)
@click.option(
    "--include",
    multiple=True,
    help="A linear layer to quantize although it is kept by default (heads, routers, vision towers), named in the same way.",
)
@errors_as_messages
def command(
    source: Path, out: Path, scheme: Mode, scale_mode: ScaleMode, ignore: tuple[str, ...], include: tuple[str, ...]
) -> None:
    """Quantize the linear layers of the Transformers model in SOURCE into the new directory OUT.

    OUT has compressed-tensors' format, which vLLM, Transformers and xpu_fp4 load. It appears when it is complete. Interrupted,
    run the same command again: finished shards in OUT.partial are kept. Memory: about one shard of SOURCE, and what becomes
    of it.
    """
    console = Console()
    plan = plan_quantization(source, ignore, include)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"Quantizing to MXFP4 ({scheme})", total=None)
        quantize_checkpoint(
            plan,
            out,
            mode=scheme,
            scale_mode=scale_mode,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    _report(console, plan, out)


def _report(console: Console, plan: Plan, out: Path) -> None:
    before = sum(file.stat().st_size for file in plan.files.files)
    after = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    kept = ", ".join(plan.kept) or "none"
    console.print(plain(f"{len(plan.quantized)} linear layers are MXFP4; kept as they are: {kept}"), soft_wrap=True)
    console.print(plain(f"{out}: {decimal(after)}, from {decimal(before)} of weights"), soft_wrap=True)
