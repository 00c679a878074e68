# SPDX-License-Identifier: Apache-2.0
"""Plots of a record, with matplotlib: a step of its own, so that measuring needs no more than torch."""

import io
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import Case
from .report import rate_limits
from .runner import Record, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A contender has one colour in all plots; raw and repacked weights share it and differ in the line.
COLOURS = {
    "w4a4-linear": "tab:blue",
    "w4a4-gemm": "tab:cyan",
    "w4a8-linear": "black",
    "w4a8-gemm": "dimgray",
    "w4a16-linear": "tab:green",
    "torch-bf16": "tab:red",
    "torch-f32": "tab:pink",
    "torch-int8": "tab:orange",
    "emulation": "tab:gray",
    "torchao-mx": "tab:brown",
    "torchao-mxfp8": "rosybrown",
    "ggml-mxfp4": "tab:purple",
    "ggml-mxfp4-repacked": "tab:olive",
}
_PREPACKED = "-prepacked"


def _style(name: str) -> dict[str, Any]:
    raw = name.removesuffix(_PREPACKED)
    return {
        "color": COLOURS[raw],
        "marker": "o" if raw.startswith("w4") else "x",
        "linestyle": ":" if raw.startswith("w4") and raw == name else "-",
        "label": name,
    }


def _products(record: Record, cases: list[Case]) -> dict[str, list[Result]]:
    """The results of each of the products in these cases, by rows."""
    chosen: dict[str, list[Result]] = {}
    for result in sorted(record.results, key=lambda result: result.case.m):
        if result.case in cases and result.contender.removesuffix(_PREPACKED) in COLOURS:
            chosen.setdefault(result.contender, []).append(result)
    return chosen


def square_cases(record: Record) -> list[Case]:
    """Gaussian products of one weight and thread count with the most numbers of rows: what time against M is drawn from."""
    products = [c for c in record.cases if c.experts is None and c.data == "gaussian" and c.suite != "convert"]
    groups = Counter((c.suite, c.n, c.k, c.threads) for c in products)
    if not groups:
        return []
    suite, n, k, threads = groups.most_common(1)[0][0]
    return sorted(c for c in products if (c.suite, c.n, c.k, c.threads) == (suite, n, k, threads))


def _draw_times(axes: "Axes", record: Record, cases: list[Case]) -> None:
    for name, results in _products(record, cases).items():
        axes.plot([r.case.m for r in results], [r.seconds * 1e3 for r in results], **_style(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("M, rows of activations")
    axes.set_ylabel("ms, median")
    axes.set_title(f"N = {cases[0].n}, K = {cases[0].k}, {cases[0].threads} threads")


def _draw_roofline(axes: "Axes", record: Record, cases: list[Case]) -> None:
    """Operations a second over operations a byte, where the bytes are the weight as each contender keeps it and x and y."""
    lowest, highest = 1.0, 1.0
    for name, results in _products(record, cases).items():
        moved = [r.bytes + 2 * r.case.m * (r.case.n + r.case.k) for r in results]
        intensity = [r.ops / b for r, b in zip(results, moved, strict=True)]
        lowest, highest = min(lowest, *intensity), max(highest, *intensity)
        axes.plot(intensity, [r.ops / r.seconds / 1e9 for r in results], **_style(name))
    rates = rate_limits(record, cases[0].threads)
    read = rates.get("limit-read")
    points = [lowest * (highest / lowest) ** (i / 200) for i in range(201)]
    for name, peak in rates.items():
        if name == "limit-read" or "copy" in name or read is None:
            continue
        axes.plot(points, [min(peak, x * read) / 1e9 for x in points], color="black", linewidth=1, zorder=0)
        axes.annotate(name.removeprefix("limit-"), (highest, peak / 1e9), ha="right", va="bottom", fontsize=8)
    if read is not None:
        axes.annotate(f"memory, {read / 1e9:.3g} GB/s", (lowest, lowest * read / 1e9), rotation=35, va="bottom", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of weights, activations and result")
    axes.set_ylabel("GOPS")
    axes.set_title(f"Roofline, M = {cases[0].m} to {cases[-1].m}")


def pictures(record: Record) -> dict[str, bytes]:
    """The plots `roofline` and `time` as PNG; none if the record has no products. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    cases = square_cases(record)
    if not cases:
        return {}
    drawn = {}
    for what, draw_on in (("roofline", _draw_roofline), ("time", _draw_times)):
        figure = Figure(figsize=(10, 5.5), layout="constrained")
        axes = figure.subplots()
        draw_on(axes, record, cases)
        axes.grid(True, which="both", alpha=0.2)
        figure.legend(loc="outside right upper", fontsize=8)
        figure.suptitle(f"{record.machine['processor']}, executed", fontsize=9)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
        drawn[what] = content.getvalue()
    return drawn


def draw(record: Record, stem: Path) -> list[Path]:
    """Writes STEM-roofline.png and STEM-time.png, those that `pictures` has, and returns them."""
    written = []
    for what, content in pictures(record).items():
        path = stem.with_name(f"{stem.name}-{what}.png")
        path.write_bytes(content)
        written.append(path)
    return written
