# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 quantize`: a model directory into an MXFP4 model directory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import click
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from torch import Tensor

from ..calibration import CheckpointCalibration, LlmCompressorCalibration, calibration_windows, read_chats
from ..checkpoints import Plan, plan_quantization, quantize_checkpoint
from ..checkpoints.description import SCALE_MODES
from ..checkpoints.models import load_tokenizer
from ..checkpoints.quantizer import Calibration
from ..functional import Hadamard, Mode, ScaleMode
from .common import DIRECTORY, FILE, SCHEME, errors_as_messages, plain, progress_bars, progress_task


@click.command("quantize")
@click.argument("source", type=DIRECTORY)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--scheme",
    type=SCHEME,
    default="w4a8",
    show_default=True,
    help="What layers make of their inputs: MXFP4, MXINT8 (w4a8), nothing. The weights are the same.",
)
@click.option(
    "--scale-mode",
    type=click.Choice(SCALE_MODES),
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
@click.option(
    "--hadamard",
    type=click.Choice([str(size) for size in get_args(Hadamard)]),
    default="0",
    show_default=True,
    help="Size of the Hadamard matrices that layers turn their inputs by before they quantize them; 0 for none.",
)
@click.option(
    "--keep-high",
    default="",
    metavar="NAMES",
    help='Layers to run in W4A16, with commas between: "q_proj,k_proj,v_proj". The last parts of their names, whole names, or '
    "re: and a regex.",
)
@click.option(
    "--calibrate",
    "texts",
    multiple=True,
    type=FILE,
    help="A UTF-8 text to round the weights on (GPTQ). Can be repeated.",
)
@click.option(
    "--chat",
    "chats",
    multiple=True,
    type=FILE,
    help='Conversations to calibrate on, in the model\'s chat template: {"messages": [{"role": ..., "content": ...}, ...]} in '
    "each line, or a JSON array of them. Can be repeated.",
)
@click.option(
    "--with",
    "library",
    type=click.Choice(["xpu_fp4", "llm-compressor"]),
    default="xpu_fp4",
    show_default=True,
    help="What calibrates. llm-compressor, where it is installed, knows w4a4 and w4a16, and no offset.",
)
@click.option("--offset", is_flag=True, help="Have each layer subtract the mean of its inputs first. Only xpu_fp4 reads that.")
@click.option(
    "--correct",
    is_flag=True,
    help="Have each layer make up for a part of what those before it have lost, too: nearer to the original, in 1.6 times the "
    "arithmetic.",
)
@click.option("--samples", default=32, show_default=True, type=click.IntRange(min=1), help="Windows to calibrate on.")
@click.option("--length", default=256, show_default=True, type=click.IntRange(min=8), help="Tokens in each.")
@click.option("--seed", default=0, show_default=True, help="Which windows: another seed, others.")
@click.option(
    "--template/--no-template",
    default=True,
    help="Whether half of the windows are conversations made of the text, if the tokenizer has a chat template and there is no "
    "--chat. [default: template]",
)
@errors_as_messages
def command(
    source: Path,
    out: Path,
    scheme: Mode,
    scale_mode: ScaleMode,
    ignore: tuple[str, ...],
    include: tuple[str, ...],
    hadamard: str,
    keep_high: str,
    texts: tuple[Path, ...],
    chats: tuple[Path, ...],
    library: str,
    offset: bool,
    correct: bool,
    samples: int,
    length: int,
    seed: int,
    template: bool,
) -> None:
    """Quantize the linear layers and experts of the Transformers model in SOURCE into the new directory OUT.

    OUT has compressed-tensors' format, gpt-oss its own; vLLM, Transformers and xpu_fp4 load both. It appears when it is
    complete. Interrupted, run the same command again: finished shards in OUT.partial are kept, and finished blocks of a
    calibration. Memory: about one shard of SOURCE, and what becomes of it; to calibrate, one block of the model and what all
    blocks give on the windows.

    Weights are rounded to nearest or, with --calibrate or --chat, such that outputs on the windows change little. For a
    language model: --scheme w4a8 --hadamard 32 --calibrate TEXT --chat CONVERSATIONS --correct.
    """
    console = Console()
    if correct and not (texts or chats):
        raise ValueError("--correct is a way to calibrate: it takes --calibrate or --chat")
    plan = plan_quantization(source, ignore, include)
    calibration = None
    if library != "xpu_fp4" and correct:
        raise click.UsageError(f"--correct is xpu_fp4's own: {library} does not know it")
    if library != "xpu_fp4" and not (texts or chats):
        raise click.UsageError(f"--with {library} needs --calibrate or --chat")
    with progress_bars(console) as progress:
        if texts or chats:
            windows = _windows(source, texts, chats, samples=samples, length=length, seed=seed, template=template)
            calibration = _calibration(library, windows, progress, correct)
        quantize_checkpoint(
            plan,
            out,
            mode=scheme,
            scale_mode=scale_mode,
            hadamard=cast(Hadamard, int(hadamard)),
            offset=offset,
            keep_high=[name.strip() for name in keep_high.split(",") if name.strip()],
            calibration=calibration,
            progress=progress_task(progress, f"Writing MXFP4 ({scheme}), bytes"),
        )
    _report(console, plan, out)


def _calibration(library: str, windows: Tensor, progress: Progress, correct: bool) -> Calibration:
    if library == "llm-compressor":
        return LlmCompressorCalibration(windows)
    return CheckpointCalibration(windows, progress_task(progress, f"Calibrating on {windows.numel()} tokens, blocks"), correct)


def _windows(source: Path, texts: Sequence[Path], chats: Sequence[Path], **options: Any) -> Tensor:
    contents = [_text(path) for path in texts]
    conversations = [conversation for path in chats for conversation in read_chats(path)]
    return calibration_windows(load_tokenizer(source), contents, conversations, **options)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None


def _report(console: Console, plan: Plan, out: Path) -> None:
    before = sum(file.stat().st_size for file in plan.files.files)
    after = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    kept = ", ".join(plan.kept) or "none"
    experts = f" and the experts of {len(plan.experts)} layers" if plan.experts else ""
    console.print(plain(f"{len(plan.quantized)} linear layers{experts} are MXFP4; kept as they are: {kept}"), soft_wrap=True)
    console.print(plain(f"{out}: {decimal(after)}, from {decimal(before)} of weights"), soft_wrap=True)
