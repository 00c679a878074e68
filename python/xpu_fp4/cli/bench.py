# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 bench`: times our ops beside their peers and the machine's limits."""

import json
import os
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..bench import cases, plots, report, runner
from ..bench.measure import Stopwatch
from . import page as html

Numbers = tuple[int, ...]

WIDTH = 112  # of the tables, at least


def numbers(_: click.Context, parameter: click.Parameter, text: str | None) -> Numbers:
    try:
        numbers = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise click.BadParameter(f"{text!r}, expected numbers above 0 with commas between, like 1,16,512", param=parameter)
    return numbers


def _read(path: Path) -> runner.Record:
    try:
        return runner.Record.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path}: {error}") from error


def _print(record: runner.Record) -> None:
    terminal = Console()
    console = Console(width=max(terminal.width, WIDTH))
    for case in record.cases:
        console.print(report.case_table(record, case))
    if report.has_targets(record):
        console.print(report.targets_table(record))
    if record.absent:
        console.print(report.absent_table(record))
    warning = report.disturbance(record)
    if warning:
        console.print(warning, style="bold red")


_NEEDS_MATPLOTLIB = "plots need matplotlib ({}). Install it: pip install xpu_fp4[bench]"

_REPORT = click.option(
    "--report",
    "report_path",
    metavar="FILE.html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one HTML page too: tables that sort, and plots. Needs matplotlib (the extra `bench`).",
)


def _check_report(path: Path | None) -> None:
    """Before anything is measured."""
    if path is None:
        return
    if path.suffix != ".html":
        raise click.BadParameter(f"{str(path)!r}, expected a name that ends in .html", param_hint="--report")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise click.ClickException(_NEEDS_MATPLOTLIB.format(error)) from error


def _write_report(record: runner.Record, path: Path) -> None:
    suites = dict.fromkeys(case.suite for case in record.cases)
    cases = {suite: [report.case_table(record, case) for case in record.cases if case.suite == suite] for suite in suites}
    parts = [html.paragraph(line.strip("*"), "red" if line.startswith("**") else "") for line in report.machine_lines(record)]
    if report.has_targets(record):
        parts.append(html.table(report.targets_table(record)))
    parts += [html.picture(content, f"plot: {what}") for what, content in plots.pictures(record).items()]
    for suite, tables in cases.items():
        parts += [html.table(report.suite_table(record, suite)), html.folded(f"Each case of {suite}", map(html.table, tables))]
    html.write(path, f"{record.settings.get('command', 'xpu-fp4 bench')}, executed", parts)


def _command_line(context: click.Context) -> str:
    """The command that repeats this run: the options that differ from their defaults."""
    words = ["xpu-fp4 bench"]
    for parameter in context.command.params:
        value = context.params[parameter.name or ""]
        if parameter.name in ("json_path", "report_path") or value == parameter.get_default(context) or value in ((), None):
            continue
        flag = parameter.opts[0]
        if parameter.name == "m":
            words.append(f"{flag} {','.join(map(str, value))}")
        else:
            words += [f"{flag} {one}" for one in (value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


@click.group("bench", invoke_without_command=True)
@click.option(
    "--suite",
    "suites",
    multiple=True,
    type=click.Choice([*cases.SUITES, "all"]),
    default=("targets",),
    show_default=True,
    help="Which shapes. Can be repeated.",
)
@click.option("--m", callback=numbers, metavar="M,M,...", help="Rows of activations, instead of the suite's own.")
@click.option("--threads", type=click.IntRange(min=1), default=None, help="Default: what torch uses.")
@click.option("--seconds", type=click.FloatRange(min=0), default=6.0, show_default=True, help="Time for each case.")
@click.option("--data", type=click.Choice(cases.DATA), default="gaussian", show_default=True, help="How scales are spread.")
@click.option("--device", type=click.Choice(["cpu", "xpu"]), default="cpu", show_default=True)
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="cpu: the time that the processor gave to one thread, for a machine with other work.",
)
@click.option("--only", multiple=True, metavar="TEXT", help="Contenders whose name has this in it. Can be repeated.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
@_REPORT
@click.pass_context
def command(
    context: click.Context,
    suites: tuple[str, ...],
    m: Numbers,
    threads: int | None,
    seconds: float,
    data: cases.Data,
    device: str,
    clock: str,
    only: tuple[str, ...],
    json_path: Path | None,
    report_path: Path | None,
) -> None:
    """Time our ops beside torch's, torchao's and ggml's, and beside what the processor and its memory can do.

    All contenders of a case take turns, so compare ratios; times depend on the machine. Every call takes another copy of the
    weight, so that weights come from memory. Quantizing x is inside the time of the linears and outside that of the gemms.
    """
    if context.invoked_subcommand is not None:
        return
    if device == "xpu" and not torch.xpu.is_available():
        raise click.BadParameter("torch sees no XPU device", param_hint="--device")
    _check_report(report_path)
    names = cases.SUITES if "all" in suites else suites
    threads = threads or torch.get_num_threads()
    if clock == "cpu" and (threads != 1 or device != "cpu"):
        raise click.UsageError("--clock cpu needs --threads 1 --device cpu: it is the time of the calling thread alone")
    watch = Stopwatch(time.thread_time) if clock == "cpu" else None
    try:
        planned = [case for name in dict.fromkeys(names) for case in cases.suite(name, threads, data, m)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    who = [c for c in runner.contenders(device) if not only or any(text in c.name for text in only)]
    if not who:
        raise click.BadParameter(f"no contender has one of {', '.join(only)} in its name", param_hint="--only")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(planned))

        def show(case: cases.Case) -> None:
            progress.update(task, description=f"{case.suite}: {case}", advance=1)

        record = runner.run(planned, who, seconds=seconds, device=device, watch=watch, progress=show)
    record.settings["command"] = _command_line(context)
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(record.to_json(), indent=1) + "\n")
    if report_path is not None:
        _write_report(record, report_path)
    _print(record)


@command.command("show")
@click.argument("path", metavar="FILE.json", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_REPORT
def show(path: Path, report_path: Path | None) -> None:
    """Print the tables of a record again."""
    _check_report(report_path)
    record = _read(path)
    if report_path is not None:
        _write_report(record, report_path)
    _print(record)


@command.command("plot")
@click.argument("path", metavar="FILE.json", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--page",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Put tables and plots into this Markdown file, between the markers that name FILE.",
)
def plot(path: Path, page: Path | None) -> None:
    """Draw a record: FILE-roofline.png and FILE-time.png. Needs matplotlib (the extra `bench`)."""
    record = _read(path)
    try:
        pictures = plots.draw(record, path.with_suffix(""))
    except ImportError as error:
        raise click.ClickException(_NEEDS_MATPLOTLIB.format(error)) from error
    if page is not None:
        addresses = [os.path.relpath(picture, page.parent) for picture in pictures]
        try:
            text = report.insert(page.read_text(), path.stem, report.markdown(record, addresses))
        except ValueError as error:
            raise click.ClickException(f"{page}: {error}") from error
        page.write_text(text)
    for picture in pictures:
        click.echo(picture)
