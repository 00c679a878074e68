# SPDX-License-Identifier: Apache-2.0
"""The report of `xpu-fp4 eval`: one HTML page, or the plot alone."""

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.errors import printable
from ..checkpoints.questions import is_right

if TYPE_CHECKING:
    from .evaluate import Evaluation, Report

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 2em }} td, th {{ padding: 0.1em 1em 0.1em 0; text-align: left }}
img {{ max-width: 100% }} .wrong {{ color: #a00 }}</style></head>
<body><h1>{title}</h1>
<table>{figures}</table>
{answers}
<h2>Signal-to-noise ratio of each layer, dB</h2>
<img alt="signal-to-noise ratio by layer" src="data:image/png;base64,{plot}">
{noise}
</body></html>
"""


def write_report(found: "Report", path: Path) -> None:
    """Writes an .html page with tables and the plot, or a .png of the plot. Raises ImportError without matplotlib."""
    plot = _plot(found)
    path.write_bytes(plot if path.suffix == ".png" else _page(found, plot).encode())


def _page(found: "Report", plot: bytes) -> str:
    from .evaluate import rows

    names = [evaluation.name for evaluation in found.models]
    figures = _row(["", *names], "th") + "".join(_row([title, *entries]) for title, entries in rows(found).items())
    return _PAGE.format(
        title=escape(printable(", ".join(names))),
        figures=figures,
        answers=_answers(found),
        noise="".join(map(_noise, (evaluation for evaluation in found.models if evaluation.noise))),
        plot=base64.b64encode(plot).decode(),
    )


def _answers(found: "Report") -> str:
    if not found.questions:
        return ""
    lines = [_row(["question", *(evaluation.name for evaluation in found.models)], "th")]
    for index, question in enumerate(found.questions):
        answers = [evaluation.answers[index] for evaluation in found.models]
        cells = [_cell(question.question)]
        cells += [_cell(answer, "td" if is_right(answer, question.expected) else 'td class="wrong"') for answer in answers]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f"<h2>Answers</h2><table>{''.join(lines)}</table>"


def _noise(evaluation: "Evaluation") -> str:
    lines = [_row([layer.name, f"{layer.weight:.1f}", f"{layer.output:.1f}"]) for layer in evaluation.noise]
    title = escape(printable(evaluation.name))
    return f"<h3>{title}</h3><table>{_row(['layer', 'weight', 'output'], 'th')}{''.join(lines)}</table>"


def _row(cells: Iterable[str], tag: str = "td") -> str:
    return "<tr>" + "".join(_cell(cell, tag) for cell in cells) + "</tr>"


def _cell(text: str, tag: str = "td") -> str:
    return f"<{tag}>{escape(printable(text))}</{tag.split()[0]}>"


def _plot(found: "Report") -> bytes:
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ImportError as error:
        raise ImportError(f"matplotlib is needed for a report: pip install 'xpu_fp4[report]' ({error})") from error
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
