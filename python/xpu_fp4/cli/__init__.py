# SPDX-License-Identifier: Apache-2.0
"""The command line, `xpu-fp4`."""

import click

from .._version import __version__
from . import bench, doctor


@click.group()
@click.version_option(__version__)
def main() -> None:
    """MXFP4 for PyTorch on Intel XPUs and CPUs."""


main.add_command(bench.command)
main.add_command(doctor.command)

__all__ = ["bench", "doctor", "main"]
