# SPDX-License-Identifier: Apache-2.0
"""What `xpu-fp4 eval` shows: tables on the terminal, and the report, one HTML page or the plot alone."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..checkpoints.questions import is_right
from . import page
from .common import plain

if TYPE_CHECKING:
    from .evaluate import Evaluation, Report


def figures_table(found: "Report") -> Table:
    """A row for each figure, a column for each model, empty where it has none."""
    table = Table(title_justify="left")
    table.add_column("")
    for evaluation in found.models:
        table.add_column(plain(evaluation.name), overflow="fold")
    for title in dict.fromkeys(title for evaluation in found.models for title in evaluation.figures):
        table.add_row(title, *(plain(evaluation.figures.get(title, "")) for evaluation in found.models))
    return table


def noise_table(evaluation: "Evaluation") -> Table:
    table = Table(title=plain(f"{evaluation.name}: signal-to-noise ratio, dB"), title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("weight", justify="right")
    table.add_column("output", justify="right")
    for layer in evaluation.noise:
        table.add_row(plain(layer.name), f"{layer.weight:.1f}", f"{layer.output:.1f}")
    return table


def _answers_table(found: "Report") -> Table:
    table = Table("question")
    for evaluation in found.models:
        table.add_column(plain(evaluation.name))
    for index, question in enumerate(found.questions):
        answers = [evaluation.answers[index] for evaluation in found.models]
        styles = ["" if is_right(answer, question.expected) else "red" for answer in answers]
        table.add_row(plain(question.question), *(Text(plain(a).plain, s) for a, s in zip(answers, styles, strict=True)))
    return table


def require_matplotlib() -> None:
    """Raises ImportError that says what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(f"matplotlib is needed for a report: pip install 'xpu_fp4[report]' ({error})") from error


def write_report(found: "Report", path: Path) -> None:
    """Writes an .html page with tables and the plot, or a .png of the plot. Raises ImportError without matplotlib."""
    require_matplotlib()
    plot = _plot(found)
    if path.suffix == ".png":
        path.write_bytes(plot)
        return
    answers = [page.heading("Answers"), page.table(_answers_table(found))] if found.questions else []
    parts = [
        page.table(figures_table(found)),
        *answers,
        page.heading("Signal-to-noise ratio of each layer, dB"),
        page.picture(plot, "signal-to-noise ratio by layer"),
        *(page.table(noise_table(evaluation)) for evaluation in found.models if evaluation.noise),
    ]
    page.write(path, ", ".join(evaluation.name for evaluation in found.models), parts)


def _plot(found: "Report") -> bytes:
    from matplotlib.figure import Figure  # not pyplot, which would look for a display

    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, what in zip(figure.subplots(2, sharex=True), ("weight", "output"), strict=True):
        for evaluation in found.models:
            if evaluation.noise:
                noise = [getattr(layer, what) for layer in evaluation.noise]
                axes.plot(range(len(noise)), noise, ".-", linewidth=0.5, label=evaluation.name)
        axes.set_ylabel(f"{what}: signal-to-noise ratio, dB")
        axes.grid(alpha=0.3)
    axes.set_xlabel("layer, in the order of the model")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
