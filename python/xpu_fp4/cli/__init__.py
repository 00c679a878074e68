# SPDX-License-Identifier: Apache-2.0
"""The command line, `xpu-fp4`."""

import click

from .._version import __version__
from . import bench, convert, doctor, evaluate, explain, generate, inspect, quantize


@click.group()
@click.version_option(__version__)
def main() -> None:
    """Models in MXFP4 on x86-64 CPUs and Intel GPUs."""


for module in (doctor, explain, bench, quantize, convert, inspect, evaluate, generate):
    main.add_command(module.command)

__all__ = ["bench", "convert", "doctor", "evaluate", "explain", "generate", "inspect", "main", "quantize"]
