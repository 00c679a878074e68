# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 eval`: how good MXFP4 models are, beside the model that they were made from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from ..checkpoints import load_model
from ..checkpoints.evaluation import (
    LanguageScores,
    LayerNoise,
    embedding_similarity,
    language_scores,
    layer_noise,
    sentence_embeddings,
)
from ..checkpoints.models import load_original, load_tokenizer, require_transformers
from ..checkpoints.questions import Question, answer_all, is_right, read_questions
from ..checkpoints.reader import read_checkpoint
from ..functional import Mode
from .common import DIRECTORY, FILE, errors_as_messages, plain, run_in_scheme, wide_console
from .report import figures_table, noise_table, require_matplotlib, write_report

NOISE_TOKENS = 256
NOISE_SENTENCES = 16
ORIGINAL = "original"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Evaluation:
    """What was found of one model; `figures` are a column of the first table, by the titles of its rows."""

    name: str
    figures: dict[str, str] = field(default_factory=dict)
    noise: list[LayerNoise] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found of all models, the original last where it is given."""

    models: list[Evaluation]
    questions: Sequence[Question] = ()


@dataclass(frozen=True)
class Models:
    """Quantized models by their names, and the original if it is given."""

    quantized: dict[str, Any]
    original: Any
    tokenizer: Any

    def all(self) -> dict[str, Any]:
        return self.quantized if self.original is None else self.quantized | {ORIGINAL: self.original}


@click.command("eval")
@click.argument("folders", metavar="DIR...", type=DIRECTORY, nargs=-1, required=True)
@click.option(
    "--text",
    required=True,
    type=FILE,
    help="UTF-8. A language model's perplexity is taken over its beginning; for other models, each line is a sentence.",
)
@click.option("--original", type=DIRECTORY, help="The unquantized model, to compare with.")
@click.option(
    "--questions",
    type=FILE,
    help="For a language model to answer: in each line a JSON object with a question, and expected, a list of words of which "
    "one is in a right answer.",
)
@click.option("--window", default=1024, show_default=True, type=click.IntRange(min=2), help="Tokens in a window.")
@click.option("--windows", default=4, show_default=True, type=click.IntRange(min=1), help="Windows at most.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Of all that is not quantized, in every model. On processors without instructions for it, bfloat16 takes ten times as "
    "long as float32. [default: each model's own]",
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a report too: .html with tables and a plot, or .png with the plot of noise by layer.",
)
@run_in_scheme
@errors_as_messages
@torch.inference_mode()
def command(
    folders: tuple[Path, ...],
    text: Path,
    original: Path | None,
    questions: Path | None,
    window: int,
    windows: int,
    dtype: str | None,
    report: Path | None,
    mode: Mode | None,
) -> None:
    """Evaluate the MXFP4 models in each DIR, made of one model by different recipes.

    Language models: perplexity and, with --questions, how many answers are right. Any other: cosine similarity of sentence
    embeddings (mean of the last hidden states) with the original's. With --original also the Kullback-Leibler divergence from
    its distributions of next tokens, how often both hold the same one for the likeliest, and the signal-to-noise ratio, in
    decibel, of each layer's weight and of its output.
    """
    if report is not None and (report.suffix not in (".html", ".png") or original is None):
        raise click.UsageError("--report needs a name that ends in .html or .png, and --original")
    if report is not None:
        require_matplotlib()
    asked = [] if questions is None else read_questions(questions)
    transformers = require_transformers()
    transformers.logging.disable_progress_bar()
    console = wide_console()
    content = text.read_text(encoding="utf-8")
    with console.status("Loading"):
        models = _load(folders, original, mode, dtype or "auto")
    found = Report(
        [_begin(*named, folder, mode) for named, folder in zip(models.quantized.items(), folders, strict=True)], asked
    )
    if all(model.can_generate() for model in models.quantized.values()):
        _language_models(found, models, _windows(models.tokenizer, content, window, windows), console)
    elif asked:
        raise click.UsageError("--questions are for language models, which DIR is not")
    elif original is not None:
        _embedding_models(found, models, [line for line in content.splitlines() if line.strip()])
    else:
        raise click.UsageError("DIR is no language model: give --original to compare sentence embeddings with")
    _print(found, console)
    if report is not None:
        write_report(found, report)
        console.print(plain(f"Report: {report}"), soft_wrap=True)


def _load(folders: Sequence[Path], original: Path | None, mode: Mode | None, dtype: str) -> Models:
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names) or ORIGINAL in names:
        raise ValueError(f"DIR is {', '.join(names)}, expected different directories, none of them named {ORIGINAL}")
    quantized = {name: load_model(folder, mode=mode, dtype=dtype) for name, folder in zip(names, folders, strict=True)}
    unquantized = None if original is None else load_original(original, dtype).eval()
    wanted = next(iter(quantized.values())) if unquantized is None else unquantized
    for folder, model in zip(folders, quantized.values(), strict=True):
        if type(model) is type(wanted):
            continue
        if unquantized is not None:
            given, expected = type(wanted).__name__, type(model).__name__
            raise ValueError(f"--original is a {given}, expected a {expected} as in {folder}")
        raise ValueError(f"{folder} is a {type(model).__name__}, expected a {type(wanted).__name__} like the first DIR")
    return Models(quantized, unquantized, load_tokenizer(folders[0]))


def _begin(name: str, model: Any, folder: Path, mode: Mode | None) -> Evaluation:
    schemes = {str(layer.scheme) for layer in read_checkpoint(folder).in_mode(mode).layers.values()}
    return Evaluation(name, {"scheme": ", ".join(sorted(schemes)), "dtype": _dtype(model)})


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _windows(tokenizer: Any, content: str, window: int, windows: int) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(content, return_tensors="pt", verbose=False).input_ids[0]
    count = min(windows, len(ids) // window)
    if count == 0:
        raise ValueError(f"--text has {len(ids)} tokens, expected at least one window of {window}")
    return ids[: count * window].view(count, window)


def _language_models(found: Report, models: Models, ids: torch.Tensor, console: Console) -> None:
    quantized = list(models.quantized.values())
    with console.status(f"Perplexity over {ids.numel()} tokens"):
        scores = language_scores(quantized, ids, models.original)
    if models.original is not None:
        for evaluation, model in zip(found.models, quantized, strict=True):
            evaluation.noise = layer_noise(models.original, model, lambda model: model(ids[:1, :NOISE_TOKENS]))
        found.models.append(Evaluation(ORIGINAL, {"dtype": _dtype(models.original)}))
    for evaluation, score in zip(found.models, scores, strict=True):
        evaluation.figures |= _figures(score, ids)
    if found.questions:
        _ask(found, models, console)


def _figures(score: LanguageScores, ids: torch.Tensor) -> dict[str, str]:
    figures = {"tokens": f"{ids.numel()} in windows of {ids.shape[1]}", "perplexity": f"{score.perplexity:.2f}"}
    if score.divergence is not None and score.agreement is not None:
        figures["divergence from the original, nats"] = f"{score.divergence:.4f}"
        figures["same likeliest token"] = f"{score.agreement:.1%}"
    return figures


def _ask(found: Report, models: Models, console: Console) -> None:
    for evaluation, (name, model) in zip(found.models, models.all().items(), strict=True):
        with console.status(plain(f"{name}: {len(found.questions)} questions")):
            evaluation.answers = answer_all(model, models.tokenizer, [question.question for question in found.questions])
    rights = {e.name: [is_right(a, q.expected) for a, q in zip(e.answers, found.questions, strict=True)] for e in found.models}
    for evaluation in found.models:
        right = rights[evaluation.name]
        evaluation.figures["right answers"] = f"{sum(right)} of {len(right)}"
        if models.original is not None and evaluation.name != ORIGINAL:
            kept = [mine for mine, theirs in zip(right, rights[ORIGINAL], strict=True) if theirs]
            share = f"{sum(kept) / len(kept):.0%}" if kept else "-"
            evaluation.figures["of those that the original has right"] = share


def _embedding_models(found: Report, models: Models, sentences: list[str]) -> None:
    if not sentences:
        raise ValueError("--text has no sentences")
    expected = sentence_embeddings(models.original, models.tokenizer, sentences)
    for evaluation, model in zip(found.models, models.quantized.values(), strict=True):
        similarity = embedding_similarity(sentence_embeddings(model, models.tokenizer, sentences), expected)
        evaluation.figures |= {
            "sentences": str(len(sentences)),
            "cosine similarity, mean": f"{similarity.mean():.4f}",
            "cosine similarity, least": f"{similarity.min():.4f}",
        }
        evaluation.noise = layer_noise(
            models.original, model, lambda model: sentence_embeddings(model, models.tokenizer, sentences[:NOISE_SENTENCES])
        )


def _print(found: Report, console: Console) -> None:
    console.print(figures_table(found))
    for evaluation in found.models:
        if evaluation.noise:
            console.print(noise_table(evaluation))
