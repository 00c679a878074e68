# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 inspect`: what is in an MXFP4 model directory."""

import dataclasses
import json
from pathlib import Path

import click
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..checkpoints import Checkpoint, open_checkpoint
from ..checkpoints.statistics import ScaleStatistics, scale_statistics
from .common import DIRECTORY, errors_as_messages, plain, wide_console

_BARS = " ▁▂▃▄▅▆▇█"


@click.command("inspect")
@click.argument("folder", metavar="DIR", type=DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table, with whole histograms.")
@errors_as_messages
def command(folder: Path, as_json: bool) -> None:
    """Show the layers of the MXFP4 model in DIR: shape, scheme, and what their scales look like.

    The histogram counts blocks by the exponent of their scale. A pair (quad) of consecutive blocks is aligned if its exponents
    differ by at most 3: then its sum is exact in integers, the kernels' fast path, which a tile takes if its 32 rows are
    aligned.
    """
    checkpoint = open_checkpoint(folder)
    statistics = {name: scale_statistics(checkpoint.weight(name)[1]) for name in checkpoint.layers}
    if as_json:
        click.echo(json.dumps(_as_json(checkpoint, statistics), indent=2))
    else:
        _print(checkpoint, statistics)


def _as_json(checkpoint: Checkpoint, statistics: dict[str, ScaleStatistics]) -> dict[str, object]:
    layers = {
        name: {"shape": layer.shape, **layer.scheme.arguments(), **dataclasses.asdict(statistics[name])}
        for name, layer in checkpoint.layers.items()
    }
    return {"format": checkpoint.format, "layers": layers, "other_tensors": list(checkpoint.other_tensors())}


def _print(checkpoint: Checkpoint, statistics: dict[str, ScaleStatistics]) -> None:
    console = wide_console()
    title = plain(f"{checkpoint.folder}: {checkpoint.format}, {len(checkpoint.layers)} MXFP4 layers")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for column in ("shape", "scheme", "scales 2^"):
        table.add_column(column, no_wrap=True)
    for column in ("pairs", "quads", "pairs\nin tiles", "quads\nin tiles"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, layer in checkpoint.layers.items():
        found = statistics[name]
        shares = (f"{share:.3f}" for share in (found.pairs, found.quads, found.tile_pairs, found.tile_quads))
        table.add_row(plain(name), "x".join(map(str, layer.shape)), str(layer.scheme), histogram(found), *shares)
    console.print(table)
    console.print(f"{len(list(checkpoint.other_tensors()))} other tensors")


def histogram(found: ScaleStatistics) -> str:
    """The histogram in one line: the lowest exponent, a bar for each, the highest; and how many scales are NaN."""
    invalid = f" {found.invalid} NaN" if found.invalid else ""
    if not found.histogram:
        return invalid.strip()
    low, high, most = min(found.histogram), max(found.histogram), max(found.histogram.values())
    bars = "".join(_BARS[-(-8 * found.histogram.get(e, 0) // most)] for e in range(low, high + 1))
    return f"{low} {bars} {high}{invalid}"
