#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Puts the figures of docs/demo.json, which `make demo DEMO=docs/demo.json` measures, into README: a table and a picture."""

import json
import re
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
DATA, PICTURE = ROOT / "docs/demo.json", ROOT / "docs/demo.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- demo -->", "<!-- end demo -->"

Record = dict[str, Any]
COLOURS = {"original": "black", "W4A16": "tab:green", "W4A8": "tab:blue", "W4A4": "tab:orange"}


def table(record: Record) -> str:
    """The run as Markdown, with the machine and the command that it came from."""
    lines = [
        "| recipe | perplexity | emulated | right answers | linear weights, MB | prefill, tokens/s | decode, tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["recipes"]:
        emulated = "" if row["expected"] is None else f"{row['expected']:.1f}"
        right = "" if row["right"] is None else f"{row['right']} of {record['questions']}"
        speeds = f"{row['megabytes']:.1f} | {row['prefill']:.0f} | {row['decode']:.1f}"
        lines.append(f"| {row['recipe']} | {row['perplexity']:.2f} | {emulated} | {right} | {speeds} |")
    machine = record["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['native kernels']} kernels, torch {machine['torch']}"
    note = f" Then {record['note']}." if record.get("note") else ""
    lines += [
        "",
        f"Executed by `make demo`: SmolLM2-135M-Instruct, {where}, the rest of the model in {record['dtype']}, revision "
        f"{machine['revision']}.{note}",
    ]
    return "\n".join(lines)


def page_with(page: str, record: Record) -> str:
    """The page with the table between its markers."""
    found = re.sub(f"({BEGIN}).*({END})", lambda m: f"{m[1]}\n\n{table(record)}\n\n{m[2]}", page, count=1, flags=re.DOTALL)
    if BEGIN not in page or END not in page:
        raise ValueError(f"no {BEGIN} followed by {END}")
    return found


def draw(record: Record, picture: Path) -> None:
    """Draws perplexity against speed, in prefill and in decode, as SVG. The same figures give the same file."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "demo", "font.size": 9}
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axis, speed in zip(axes, ("prefill", "decode"), strict=True):
        for row in record["recipes"]:
            name, _, calibrated = row["recipe"].partition(", ")
            colour = COLOURS[name]
            fill = colour if calibrated or name == "original" else "white"
            axis.scatter(row[speed], row["perplexity"], s=50, edgecolors=colour, facecolors=fill, zorder=2)
        axis.set_xlabel(f"{speed}, tokens/s: more is better")
        axis.set_xlim(0, 1.1 * max(row[speed] for row in record["recipes"]))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity: less is better")
    axes[0].set_ylim(0, 1.1 * max(row["perplexity"] for row in record["recipes"]))
    marks = [Line2D([], [], linestyle="", marker="o", color=colour, label=name) for name, colour in COLOURS.items()]
    hollow = Line2D([], [], linestyle="", marker="o", color="gray", markerfacecolor="white", label="rounded to nearest")
    filled = Line2D([], [], linestyle="", marker="o", color="gray", label="calibrated")
    axes[0].legend(handles=[*marks, hollow, filled], fontsize=8, loc="upper left", ncols=1)
    machine = record["machine"]
    figure.suptitle(
        f"SmolLM2-135M-Instruct, {machine['processor']}, {machine['cores']} cores, {machine['native kernels']} kernels"
    )
    figure.savefig(picture, metadata={"Date": None, "Creator": None, "Description": fingerprint(record)})
    plt.close(figure)


def fingerprint(record: Record) -> str:
    """The figures that a picture shows, in the file itself, so that a test sees whether it is theirs."""
    return json.dumps([[row["recipe"], row["perplexity"], row["prefill"], row["decode"]] for row in record["recipes"]])


@click.command()
def main() -> None:
    """Write README's table and docs/demo.svg from docs/demo.json."""
    record = json.loads(DATA.read_text(encoding="utf-8"))
    README.write_text(page_with(README.read_text(encoding="utf-8"), record), encoding="utf-8")
    draw(record, PICTURE)


if __name__ == "__main__":
    main()
