# SPDX-License-Identifier: Apache-2.0
"""What the commands on model directories share."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..checkpoints.errors import printable
from ..functional import Mode

P = ParamSpec("P")
R = TypeVar("R")

DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
SCHEME = click.Choice(get_args(Mode))

run_in_scheme = click.option(
    "--scheme", "mode", type=SCHEME, help="How layers compute, on the same weights. [default: as DIR has it for each]"
)
"""For the commands that load a model, its `mode`."""


def wide_console() -> Console:
    """Tables with a line for each layer keep their lines where no terminal limits them."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def progress_bars(console: Console) -> Progress:
    """A context, in which progress_task draws."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)


def progress_task(progress: Progress, title: str) -> Callable[[int, int], None]:
    """A line of progress, which is there from its first step on; to be called with what is done, and all."""
    task = progress.add_task(title, total=None, visible=False)
    return lambda done, total: progress.update(task, completed=done, total=total, visible=True)


def plain(text: str) -> Text:
    """Text with names out of a model directory, for rich: nothing in it is markup or reaches the terminal raw."""
    return Text(printable(text))


def errors_as_messages(command: Callable[P, R]) -> Callable[P, R]:
    """Bad input and missing packages end a command with one line and exit code 1, not with a traceback."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException("\n".join(map(printable, str(error).splitlines()))) from error

    return wrapped
