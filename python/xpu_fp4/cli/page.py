# SPDX-License-Identifier: Apache-2.0
"""One HTML page that needs no other file and no network: tables that sort by a click on a heading, and pictures."""

import base64
import hashlib
from collections.abc import Iterable
from html import escape
from pathlib import Path

from rich.markup import render
from rich.table import Table
from rich.text import Text

from ..checkpoints.errors import printable

# Cells that begin with a number, after signs such as ≥, go by its value, and what has none comes last. A second click turns the
# order.
_SCRIPT = """
for (const heading of document.querySelectorAll("th")) {
  heading.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0], column = heading.cellIndex;
    const text = row => row.cells[column].textContent;
    const number = row => parseFloat(text(row).replace(/^[^-.\\w]+/, ""));
    const sign = heading.ariaSort === "ascending" ? -1 : 1;
    const missing = row => isNaN(number(row)), rows = [...body.rows], numeric = rows.some(row => !missing(row));
    rows.sort((a, b) => !numeric ? sign * text(a).localeCompare(text(b)) :
      missing(a) || missing(b) ? missing(a) - missing(b) : sign * (number(a) - number(b)));
    for (const other of heading.parentNode.cells) other.ariaSort = null;
    heading.ariaSort = sign > 0 ? "ascending" : "descending";
    body.append(...rows);
  });
}
"""
_STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 80em } table { border-collapse: collapse; margin: 0.5em 0 1.5em }
td, th { padding: 0.15em 1em 0.15em 0; text-align: left; vertical-align: top } td.right, th.right { text-align: right }
th { cursor: pointer; border-bottom: 1px solid #888 } th[aria-sort="ascending"]::after { content: " \\25B2" }
th[aria-sort="descending"]::after { content: " \\25BC" } img { max-width: 100% }
.bold { font-weight: bold } .dim { color: #777 } .red { color: #a00 } .green { color: #060 } summary { cursor: pointer }
"""
_CLASSES = {"bold", "dim", "red", "green"}
"""The styles of rich that a row or a cell may have here."""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Names in a page may come out of anybody's model directory: no script but this one runs, and nothing is fetched.
_POLICY = f"default-src 'none'; img-src data:; style-src {_hash(_STYLE)}; script-src {_hash(_SCRIPT)}"


def write(path: Path, title: str, parts: Iterable[str]) -> None:
    """Writes a page of HTML parts, in that order."""
    lines = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>",
        f"<body><h1>{_text(title)}</h1>",
        *parts,
        f"<script>{_SCRIPT}</script></body></html>\n",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def heading(text: str) -> str:
    return f"<h2>{_text(text)}</h2>"


def paragraph(text: str, style: str = "") -> str:
    return f"<p{_class(style)}>{_text(text)}</p>"


def picture(png: bytes, alternative: str) -> str:
    """The bytes of a PNG file, and the words that stand for it where it is not seen."""
    return f'<img alt="{_text(alternative)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def folded(summary: str, parts: Iterable[str]) -> str:
    """Parts that a click shows."""
    return f"<details><summary>{_text(summary)}</summary>{''.join(parts)}</details>"


def table(of: Table) -> str:
    """The same table as on the terminal, with the styles of its rows and of cells that are Text."""
    aligned = ["right" if column.justify == "right" else "" for column in of.columns]
    cells = [[_cell("th", column.header, how) for column, how in zip(of.columns, aligned, strict=True)]]
    for row in zip(*(column.cells for column in of.columns), strict=True):
        cells.append([_cell("td", cell, how) for cell, how in zip(row, aligned, strict=True)])
    styles = ["", *(str(row.style or "") for row in of.rows)]
    head, *body = (f"<tr{_class(style)}>{''.join(line)}</tr>" for style, line in zip(styles, cells, strict=True))
    title = f"<h3>{_text(_plain(of.title))}</h3>" if of.title else ""
    return f"{title}<table><thead>{head}</thead><tbody>{''.join(body)}</tbody></table>"


def _cell(tag: str, content: object, aligned: str) -> str:
    style = str(content.style) if isinstance(content, Text) else ""
    return f"<{tag}{_class(aligned, style)}>{_text(_plain(content))}</{tag}>"


def _plain(content: object) -> str:
    return content.plain if isinstance(content, Text) else render(str(content)).plain


def _class(*styles: str) -> str:
    known = [style for style in styles if style in _CLASSES or style == "right"]
    return f' class="{" ".join(known)}"' if known else ""


def _text(text: str) -> str:
    return escape(printable(text))
