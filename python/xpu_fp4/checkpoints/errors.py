# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint, said with the names of the file and the tensor."""

_LONGEST = 2000


def printable(text: str) -> str:
    """The text with every character escaped that a terminal may take for more than itself: controls, directions, line ends.

    Names in a model directory are anybody's. Text of more than 2,000 characters is cut.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[:_LONGEST])
    return shown if len(text) <= _LONGEST else f"{shown}..."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: damaged, inconsistent, or of a kind that is none of ours. One printable line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
