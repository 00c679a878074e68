# SPDX-License-Identifier: Apache-2.0
"""The report of `xpu-fp4 eval`: one HTML page, or the plot alone."""

import base64
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.errors import printable

if TYPE_CHECKING:
    from .evaluate import Evaluation

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body {{ font-family: sans-serif; margin: 2em }} td, th {{ padding: 0.1em 1em 0.1em 0; text-align: left }}
td + td, th + th {{ text-align: right }} img {{ max-width: 100% }}</style></head>
<body><h1>{title}</h1>
<table>{figures}</table>
<h2>Signal-to-noise ratio of each layer, dB</h2>
<img alt="signal-to-noise ratio by layer" src="data:image/png;base64,{plot}">
<table><tr><th>layer</th><th>weight</th><th>output</th></tr>{noise}</table>
</body></html>
"""


def write_report(found: "Evaluation", path: Path) -> None:
    """Writes an .html page with tables and the plot, or a .png of the plot. Raises ImportError without matplotlib."""
    plot = _plot(found)
    path.write_bytes(plot if path.suffix == ".png" else _page(found, plot).encode())


def _page(found: "Evaluation", plot: bytes) -> str:
    title = f"{found.folder.name} beside {found.original.name if found.original else 'nothing'}"
    figures = "".join(_row(name, value) for name, value in found.figures.items())
    noise = "".join(_row(layer.name, f"{layer.weight:.1f}", f"{layer.output:.1f}") for layer in found.noise)
    return _PAGE.format(title=escape(title), figures=figures, noise=noise, plot=base64.b64encode(plot).decode())


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{escape(printable(cell))}</td>" for cell in cells) + "</tr>"


def _plot(found: "Evaluation") -> bytes:
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a display
    except ImportError as error:
        raise ImportError(f"matplotlib is needed for a report: pip install 'xpu_fp4[report]' ({error})") from error
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.add_subplot()
    layers = range(len(found.noise))
    axes.plot(layers, [layer.weight for layer in found.noise], ".", label="weight")
    axes.plot(layers, [layer.output for layer in found.noise], ".", label="output")
    axes.set_xlabel("layer, in the order of the model")
    axes.set_ylabel("signal-to-noise ratio, dB")
    axes.set_title(f"{found.folder.name}: " + ", ".join(f"{name} {value}" for name, value in found.figures.items()))
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
