# SPDX-License-Identifier: Apache-2.0
"""Writes a model directory that appears whole, by a rename, when all of it is done.

Until then the work is in `OUT.partial`, which has no config.json, so nothing loads it. The same job, run again, goes on with
what an interrupted one has finished.
"""

import fcntl
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .reader import CONFIG
from .tensor_files import INDEX, SINGLE
from .untrusted import read_json

PARTIAL = ".partial"
_JOB = "job.json"
_LOCK = "job.lock"
_DTYPES = {torch.uint8: "U8", torch.bfloat16: "BF16"}  # as safetensors has them


@contextmanager
def new_directory(out: Path, job: dict[str, Any], finished: set[str]) -> Iterator[Path]:
    """The folder to write in, which becomes `out` at the end of the context, or stays as it is after an error.

    Args:
        job: JSON; if an earlier one in the folder was the same, entries of it are kept whose names are in `finished`.

    Raises:
        FileExistsError: `out` is there and not empty.
        BlockingIOError: another process is writing the same output.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: give a new directory")
    partial = out.with_name(out.name + PARTIAL)
    with _only_writer(partial):
        _begin_or_resume(partial, job, finished)
        yield partial
        for name in (_JOB, _LOCK):
            (partial / name).unlink()
        _sync_folder(partial)
        partial.rename(out)
        _sync_folder(out.parent)


@contextmanager
def _only_writer(partial: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is writing {partial}") from None
        yield


def _begin_or_resume(partial: Path, job: dict[str, Any], finished: set[str]) -> None:
    """Keeps what is finished of the same job; throws away that of another, and what an interrupted write has left."""
    path = partial / _JOB
    resumed = path.exists() and read_json(path) == job
    kept = {_LOCK, _JOB, *finished} if resumed else {_LOCK}
    # The configuration goes first: whatever is left beside it would load.
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name != CONFIG):
        if entry.name in kept:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if not resumed:
        write_text(path, json.dumps(job))


def write_tensors(tensors: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
    """A safetensors file that is there when it is whole."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # safetensors' files are for their owner only
    try:
        save_file(tensors, temporary, metadata=metadata)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise _no_room(target, error) from error
    temporary.chmod(mode)
    publish(temporary, target)


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made in pieces, which follow each other in memory: uint8 or bfloat16."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_streamed(tensors: Sequence[StreamedTensor], target: Path, progress: Callable[[int], None]) -> None:
    """A safetensors file that is there when it is whole, with one piece of a tensor in memory; progress gets bytes of data."""
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # so that each is aligned
    temporary = target.with_name(target.name + ".tmp")
    written = 0
    try:
        with temporary.open("wb") as file:
            file.write(_header(tensors))
            for tensor in tensors:
                begin = written
                for piece in tensor.pieces():
                    written += file.write(piece.contiguous().view(torch.uint8).numpy().data)
                    progress(written)
                assert written - begin == tensor.nbytes, tensor.name
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _no_room(target, error) from error
    publish(temporary, target)


def _header(tensors: Sequence[StreamedTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def _no_room(target: Path, error: Exception) -> OSError:
    return OSError(f"{target} cannot be written: {error}. What is finished is kept: make room and run it again")


def write_index(partial: Path, shards: Sequence[Path]) -> None:
    """The index of several shards; a single one of the usual name needs none."""
    if [shard.name for shard in shards] == [SINGLE]:
        return
    weight_map: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), shard.name)
    index = {"metadata": {"total_size": sum(shard.stat().st_size for shard in shards)}, "weight_map": weight_map}
    write_text(partial / INDEX, json.dumps(index, indent=2))


def write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Gives a written file its name once its content is on disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
