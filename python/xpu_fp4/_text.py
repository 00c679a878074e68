# SPDX-License-Identifier: Apache-2.0
"""Words for messages."""

from collections.abc import Collection


def shorten(names: Collection[str]) -> str:
    """The first three, and how many there are more."""
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
