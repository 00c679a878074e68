# SPDX-License-Identifier: Apache-2.0
"""Files of a model directory that anybody may have made: which are read, how they are opened, what JSON may hold.

Nothing outside of the directory is read. A file in it may be a link only to another file in it or, in the hub's cache, where
every file is one, to a file in `blobs`.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from .errors import CheckpointError

MOST_JSON = 64 << 20
"""Bytes of a JSON file."""
_MOST_DIGITS = 20  # of an integer: those of 64 bits

_EXPECTED = {
    "object": "an object",
    "array": "an array",
    "str": "a string",
    "int": "an integer",
    "bool": "true or false",
}


def model_files(folder: Path) -> Iterator[Path]:
    """The files of a model directory and of the folders in it, hidden ones aside.

    Raises CheckpointError for a link that leads out of it, a link to a folder, and what is no file: a pipe, a device.
    """
    yield from _files_under(folder, folder)


def check_files(folder: Path) -> None:
    """model_files for its errors: before other libraries read what is in the directory."""
    for _ in model_files(folder):
        pass


def _files_under(folder: Path, root: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _files_under(entry, root)
            continue
        target = _target(entry, root)
        if target.exists() and not target.is_file():
            raise CheckpointError(f"{entry} is no regular file, expected only those in a model directory, and folders")
        yield entry


def open_file(path: Path, root: Path | None = None) -> BinaryIO:
    """Opens a regular file for reading. root: the model directory, by default the file's own.

    Raises FileNotFoundError, OSError, and CheckpointError if it leads out of the directory or is no regular file.
    """
    target = _target(path, root or path.parent)
    # It must not block, since a pipe has no end, and follows no link, since the last one has been followed.
    descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def _target(path: Path, root: Path) -> Path:
    """Says where a file really is."""
    try:
        target, inside = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise CheckpointError(f"{path} leads nowhere: {error}") from error
    places = [inside]
    if inside.parent.name == "snapshots":
        places.append(inside.parent.with_name("blobs"))
    if not any(target.is_relative_to(place) for place in places):
        raise CheckpointError(f"{path} is a link to {target}, out of the model directory: put the file itself there")
    return target


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, with the file's name, if there is none."""
    content = _read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def read_json_list(path: Path) -> list[Any]:
    """The array in a JSON file. Raises CheckpointError, with the file's name, if there is none."""
    content = _read_json(path)
    if not isinstance(content, list):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON array")
    return content


def _read_json(path: Path) -> Any:
    try:
        with open_file(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MOST_JSON:
                raise CheckpointError(f"{path} has {size} bytes, expected JSON of at most {MOST_JSON >> 20} MiB")
            return parse_json(file.read(MOST_JSON + 1), str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def parse_json(content: bytes, where: str) -> Any:
    """Returns what UTF-8 JSON says. Raises CheckpointError, which begins with where, if it is none, or nested too deeply."""
    try:
        return json.loads(content.decode("utf-8"), parse_int=_integer)
    except RecursionError:
        raise CheckpointError(f"{where} is not readable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not readable JSON: {error}") from error


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, expected 64 bits")
    return int(digits)


def check_type(value: Any, expected: Any, where: str) -> None:
    """Raises CheckpointError if a value out of JSON is not of that type, saying where in it what is there instead.

    expected: a type as msgspec takes it. Of a Struct, whose fields are an object's keys, other keys are no matter.
    """
    try:
        msgspec.convert(value, expected)
    except msgspec.ValidationError as error:
        # "Expected `array | null`, got `int` - at `$.ignore`"
        missing = re.search(r"missing required field `(\w+)`", str(error))
        kind, path = re.search(r"^Expected `([^`|]+)|$", str(error)), re.search(r"`\$(.*)`$", str(error))
        found = value
        for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path[1] if path else ""):
            found = found[key] if key else found[int(index)]
        name = (kind[1] or "").strip() if kind else ""
        what = f"an object with {missing[1]}" if missing else _EXPECTED.get(name, str(error))
        raise CheckpointError(f"{where}{path[1] if path else ''} is {repr(found)[:200]}, expected {what}") from None
