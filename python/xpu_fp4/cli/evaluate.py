# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 eval`: how good an MXFP4 model is, beside the model that it was made from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from ..checkpoints import load_model
from ..checkpoints.evaluation import LayerNoise, embedding_similarity, layer_noise, perplexity, sentence_embeddings
from ..checkpoints.models import load_original, load_tokenizer, require_transformers
from ..checkpoints.reader import read_checkpoint
from ..functional import Mode
from .common import DIRECTORY, errors_as_messages, plain, run_in_scheme, wide_console

NOISE_TOKENS = 256
NOISE_SENTENCES = 16


@dataclass
class Evaluation:
    """What was found; `figures` are the lines of the first table, by their titles."""

    folder: Path
    original: Path | None
    figures: dict[str, str] = field(default_factory=dict)
    noise: list[LayerNoise] = field(default_factory=list)


@click.command("eval")
@click.argument("folder", metavar="DIR", type=DIRECTORY)
@click.option(
    "--text",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="UTF-8. A language model's perplexity is taken over its beginning; for other models, each line is a sentence.",
)
@click.option("--original", type=DIRECTORY, help="The unquantized model, to compare with.")
@click.option("--window", default=1024, show_default=True, type=click.IntRange(min=2), help="Tokens in a window.")
@click.option("--windows", default=4, show_default=True, type=click.IntRange(min=1), help="Windows at most.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a report too: .html with tables and a plot, or .png with the plot of noise by layer.",
)
@run_in_scheme
@errors_as_messages
@torch.inference_mode()
def command(
    folder: Path, text: Path, original: Path | None, window: int, windows: int, report: Path | None, mode: Mode | None
) -> None:
    """Evaluate the MXFP4 model in DIR.

    A language model: perplexity. Any other: cosine similarity of sentence embeddings (mean of the last hidden states) with the
    original's. With --original also the signal-to-noise ratio, in decibel, of each layer's weight and of its output.
    """
    if report is not None and (report.suffix not in (".html", ".png") or original is None):
        raise click.UsageError("--report needs a name that ends in .html or .png, and --original")
    transformers = require_transformers()
    transformers.logging.disable_progress_bar()
    console = wide_console()
    content = text.read_text(encoding="utf-8")
    with console.status("Loading"):
        quantized = load_model(folder, mode=mode)
        unquantized = None if original is None else load_original(original).eval()
    tokenizer = load_tokenizer(folder)
    if unquantized is not None and type(unquantized) is not type(quantized):
        raise ValueError(f"--original is a {type(unquantized).__name__}, expected a {type(quantized).__name__} as in {folder}")
    schemes = {str(layer.scheme) for layer in read_checkpoint(folder).in_mode(mode).layers.values()}
    found = Evaluation(folder, original, {"scheme": ", ".join(sorted(schemes))})
    if quantized.can_generate():
        _language_model(found, quantized, unquantized, _windows(tokenizer, content, window, windows), console)
    elif unquantized is not None:
        _embedding_model(found, quantized, unquantized, tokenizer, [line for line in content.splitlines() if line.strip()])
    else:
        raise click.UsageError("DIR is no language model: give --original to compare sentence embeddings with")
    _print(found, console)
    if report is not None:
        from .report import write_report

        write_report(found, report)
        console.print(plain(f"Report: {report}"), soft_wrap=True)


def _windows(tokenizer: Any, content: str, window: int, windows: int) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]
    count = min(windows, len(ids) // window)
    if count == 0:
        raise ValueError(f"--text has {len(ids)} tokens, expected at least one window of {window}")
    return ids[: count * window].view(count, window)


def _language_model(found: Evaluation, quantized: Any, original: Any, ids: torch.Tensor, console: Console) -> None:
    found.figures["tokens"] = f"{ids.numel()} in windows of {ids.shape[1]}"
    with console.status(f"Perplexity over {ids.numel()} tokens"):
        found.figures["perplexity"] = f"{perplexity(quantized, ids):.2f}"
        if original is not None:
            found.figures["perplexity of the original"] = f"{perplexity(original, ids):.2f}"
            found.noise = layer_noise(original, quantized, lambda model: model(ids[:1, :NOISE_TOKENS]))


def _embedding_model(found: Evaluation, quantized: Any, original: Any, tokenizer: Any, sentences: list[str]) -> None:
    if not sentences:
        raise ValueError("--text has no sentences")
    expected = sentence_embeddings(original, tokenizer, sentences)
    similarity = embedding_similarity(sentence_embeddings(quantized, tokenizer, sentences), expected)
    found.figures["sentences"] = str(len(sentences))
    found.figures["cosine similarity, mean"] = f"{similarity.mean():.4f}"
    found.figures["cosine similarity, least"] = f"{similarity.min():.4f}"
    found.noise = layer_noise(
        original, quantized, lambda model: sentence_embeddings(model, tokenizer, sentences[:NOISE_SENTENCES])
    )


def _print(found: Evaluation, console: Console) -> None:
    table = Table(title=plain(str(found.folder)), show_header=False, title_justify="left")
    for name, value in found.figures.items():
        table.add_row(name, value)
    console.print(table)
    if not found.noise:
        return
    table = Table(title="Signal-to-noise ratio, dB", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("weight", justify="right")
    table.add_column("output", justify="right")
    for layer in found.noise:
        table.add_row(plain(layer.name), f"{layer.weight:.1f}", f"{layer.output:.1f}")
    console.print(table)
