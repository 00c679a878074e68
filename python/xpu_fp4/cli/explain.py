# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 explain`: which kernel each layer takes on a device, why, how long it takes and in how much memory."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .._library import ops
from ..bench.explained import measure
from ..checkpoints.description import Scheme
from ..explanation import Layer, Linear, Plan, dtype_of, explain, gpu_or_none, layers_of, patterns
from ..functional import Mode
from .bench import Numbers, numbers
from .common import DIRECTORY, SCHEME, errors_as_messages, plain, wide_console

_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Row(NamedTuple):
    """A line of the table: layers alike, with so many rows."""

    layer: Layer
    names: list[str]
    plan: Plan
    seconds: float | None


def _shapes(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[tuple[int, int, int]]:
    matches = [_SHAPE.fullmatch(text) for text in texts]
    for text, match in zip(texts, matches, strict=True):
        if match is None:
            raise click.BadParameter(f"{text!r}, expected MxNxK, like 16x4096x4096", param=parameter)
    return [(int(m[1]), int(m[2]), int(m[3])) for m in matches if m is not None]


@click.command("explain")
@click.argument("folder", metavar="[DIR]", type=DIRECTORY, required=False)
@click.option("--shape", "shapes", multiple=True, metavar="MxNxK", callback=_shapes, help="A product instead. Can be repeated.")
@click.option("--m", callback=numbers, metavar="M,M,...", default="1,16,512", show_default=True, help="Rows for DIR's layers.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="cpu; an instruction set of the native kernels (amx, avx512_vbmi, avx512_vnni, avx_vnni, avx2, portable); or a "
    "GPU's architecture (dg2, pvc, lnl-m, bmg, ptl, cri). Neither need be here.",
)
@click.option("--scheme", "mode", type=SCHEME, help="How layers compute. [default: as DIR has it for each; of a shape, all]")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), help="Of activations. [default: DIR's, or bfloat16]")
@click.option("--top-k", type=click.IntRange(min=1), help="Experts that a token chooses. [default: as config.json has it]")
@click.option("--expanded", is_flag=True, help="For a GPU: the weights of w4a4 and w4a8 are kept expanded.")
@click.option("--engines", type=click.IntRange(min=1), help="Vector engines of the GPU. [default: a usual card's]")
@click.option("--measure", "measured", is_flag=True, help="Run each on this CPU, with weights of that shape.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table, with every kernel that is launched.")
@errors_as_messages
def command(
    folder: Path | None,
    shapes: list[tuple[int, int, int]],
    m: Numbers,
    device: str,
    mode: Mode | None,
    dtype: str | None,
    top_k: int | None,
    expanded: bool,
    engines: int | None,
    measured: bool,
    as_json: bool,
) -> None:
    """Say which kernel the MXFP4 layers of the model in DIR take, and why others are passed over.

    What is said comes from the code that chooses kernels in each call, asked without running it. Of DIR, headers are read
    alone. Layers of equal shape and scheme are one line.

    Times of GPUs are modelled: what the choice of a kernel weighs, by data sheets and counted machine code, for the card that
    is named; w4a16 and experts: what the matrix unit or memory takes at least. Launches, and the quantizing of activations, are
    not in them. Times of this CPU are measured, with --measure.
    """
    if (folder is None) != bool(shapes):
        raise click.UsageError("expected either DIR or --shape")
    _check_device(device, expanded, engines, measured)
    kind = _DTYPES[dtype] if dtype else torch.bfloat16 if folder is None else dtype_of(folder)
    wanted = _wanted(folder, shapes, m, mode, top_k)
    try:
        plans = [explain(layer, n, device, dtype=kind, expanded=expanded, engines=engines or 0) for layer, _, n in wanted]
    except RuntimeError as error:
        raise click.ClickException(str(error).split("\nException raised from")[0]) from error
    rows = []
    for (layer, names, n), plan in zip(wanted, plans, strict=True):
        rows.append(Row(layer, names, plan, measure(layer, n, kind) if measured else plan.modelled_seconds))
    if as_json:
        click.echo(json.dumps(_as_json(device, rows, measured), indent=2))
    else:
        _print(wide_console(), device, rows, measured)


def _check_device(device: str, expanded: bool, engines: int | None, measured: bool) -> None:
    gpu = gpu_or_none(device) is not None
    if engines is not None and not gpu:
        raise click.UsageError(f"--engines is for a GPU's architecture, got --device {device}")
    if device == "cpu" and ops._cpu_backend() != "native":
        raise click.UsageError("XPU_FP4_CPU_BACKEND is sycl: explain knows the native kernels, and those of GPUs")
    if measured and device not in ("cpu", ops._native_isa()):
        raise click.UsageError(f"--measure runs the kernels of this CPU, {ops._native_isa()}; got --device {device}")


def _wanted(
    folder: Path | None, shapes: Iterable[tuple[int, int, int]], m: Numbers, mode: Mode | None, top_k: int | None
) -> list[tuple[Layer, list[str], int]]:
    """Each layer with its names and a number of rows."""
    if folder is not None:
        return [(layer, names, n) for layer, names in layers_of(folder, mode, top_k).items() for n in m]
    modes: tuple[Mode, ...] = (mode,) if mode else get_args(Mode)
    return [(Linear(n, k, Scheme(one)), [], rows) for rows, n, k in shapes for one in modes]


def _as_json(device: str, rows: Iterable[Row], measured: bool) -> dict[str, Any]:
    lines = []
    for layer, names, plan, seconds in rows:
        line = {
            "layers": names,
            **dataclasses.asdict(layer),
            "scheme": layer.scheme.arguments(),
            **dataclasses.asdict(plan),
            "modelled_seconds": plan.modelled_seconds,
        }
        lines.append(line | ({"measured_seconds": seconds} if measured else {}))
    return {"device": device, "layers": lines}


def _print(console: Console, device: str, rows: list[Row], measured: bool) -> None:
    table = Table(title=_title(device, rows), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("layers", "shape", "scheme") if rows[0].names else ("shape", "scheme"):
        table.add_column(column, overflow="fold")
    table.add_column("rows", justify="right")
    for column in ("kernel", "variant"):
        table.add_column(column, overflow="fold")
    how = "measured" if measured else "modelled"
    for column in ("weights", "scratch", how, "why"):
        table.add_column(column, justify="right", no_wrap=True)
    reasons: dict[str, int] = {}
    before: Layer | None = None
    for layer, names, plan, seconds in rows:
        why = reasons.setdefault(plan.passed_over, len(reasons) + 1) if plan.passed_over else None
        of = [_names(names), str(layer), str(layer.scheme)][not names :]
        of = [""] * len(of) if layer == before else of
        scratch = "-" if plan.scratch_bytes is None else decimal(plan.scratch_bytes)
        cells = [str(plan.rows), plan.kernel, plan.variant, decimal(plan.weight_bytes), scratch, _time(seconds)]
        table.add_row(*map(plain, of), *cells, "" if why is None else f"({why})")
        before = layer
    console.print(table)
    if reasons:
        console.print("Passed over:")
    for reason, number in reasons.items():
        console.print(plain(f"({number}) {reason}"), soft_wrap=True)
    for line in _totals(rows, how):
        console.print(line, soft_wrap=True)


def _title(device: str, rows: Iterable[Row]) -> str:
    card = next((row.plan.device for row in rows if row.plan.device is not None), None)
    if card is None:
        return f"{device}: {ops._native_isa()} kernels" if device == "cpu" else f"{device} kernels"
    return f"{card.architecture}, modelled as {card.card}: {card.engines} vector engines, {card.bandwidth / 1e9:.0f} GB/s"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"{pattern} ({count})" if count > 1 else pattern for pattern, count in patterns(names).items())


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _totals(rows: list[Row], how: str) -> Iterable[str]:
    """Of all layers of a model: the memory of their weights, and their time for each number of rows."""
    if not rows[0].names:
        return
    weights: Mapping[Layer, int] = {row.layer: len(row.names) * row.plan.weight_bytes for row in rows}
    yield f"All layers: weights {decimal(sum(weights.values()))}"
    for rows_each in dict.fromkeys(row.plan.rows for row in rows):
        times = [len(row.names) * row.seconds for row in rows if row.plan.rows == rows_each and row.seconds is not None]
        if times:
            yield f"All layers, {rows_each} row{'s' * (rows_each > 1)}: {_time(sum(times))} ({how})"
