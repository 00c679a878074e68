# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file that anybody may have made, and the bytes of its tensors.

The header is read here and not by gguf's GGUFReader, which believes a file's counts and keeps an array for each value of it.
Every size is checked against the file and against the limits below before anything is read; data is read in pieces, not mapped.
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..checkpoints.untrusted import open_file

MOST_HEADER = 256 << 20
"""Bytes before the data."""
MOST_ENTRIES = 4 << 20
"""All arrays together have no more: tokens and merges of a large vocabulary are a million."""
MOST_NAMES = 1 << 16
"""Keys, and tensors."""
_SHORT = 1024  # numbers of an array that is kept
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # GGUF's types as struct has them


@dataclass(frozen=True)
class Skipped:
    """Stands in the place of an array of strings, or of many numbers."""

    count: int


@dataclass(frozen=True)
class GgufTensor:
    """What a header says of a tensor. The shape is in the order of torch: of a matrix, [N, K]."""

    name: str
    type: str
    """gguf's name of it: F32, BF16, Q8_0, MXFP4, ..."""
    shape: tuple[int, ...]
    row_bytes: int
    """The last dimension takes so many: elements are in blocks along it."""
    begin: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GgufFile(Mapping[str, GgufTensor]):
    """The tensors of a GGUF file by name, and its metadata. To be closed, or used as a context.

    Raises CheckpointError, naming the file and the place: no GGUF, big-endian, a part of several, truncated, or more than the
    limits of this module. ImportError: the package gguf is missing, which knows the types of tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_file(path.resolve())  # whoever names a link means where it leads
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __getitem__(self, name: str) -> GgufTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """The bytes of some rows of a tensor: uint8 [end - begin, row_bytes]."""
        tensor = self[name]
        count = (end - begin) * tensor.row_bytes
        self._file.seek(tensor.begin + begin * tensor.row_bytes)
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.path} has become shorter while it was read")
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(end - begin, tensor.row_bytes)

    def _read_header(self) -> None:
        header = _Header(self)
        if header.take(4) != _MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it does not begin with {_MAGIC.decode()}")
        version = header.scalar("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self.path} has the GGUF version {version:#x}, expected 2 or 3, little-endian")
        tensors, keys = header.scalar("Q"), header.scalar("Q")
        if max(tensors, keys) > MOST_NAMES:
            raise CheckpointError(f"{self.path} has {tensors} tensors and {keys} keys, expected at most {MOST_NAMES} of each")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = header.string()
            if key in self.metadata:
                raise CheckpointError(f"{self.path} has the key {key} twice")
            self.metadata[key] = header.value(header.scalar("I"), key)
        if self.metadata.get("split.count", 0) not in (0, 1):
            raise CheckpointError(f"{self.path} is a part of several: join them first, by llama.cpp's llama-gguf-split --merge")
        described = [self._described(header) for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (1 << i for i in range(20)):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, expected a power of two")
        data = -(-header.position // alignment) * alignment
        self._tensors: dict[str, GgufTensor] = {}
        for tensor in described:
            self._add(tensor, data, alignment)
        if (total := sum(tensor.rows * tensor.row_bytes for tensor in described)) > self._size:
            raise CheckpointError(f"{self.path} has {self._size} bytes, and tensors of {total}: they overlap")

    def _described(self, header: "_Header") -> GgufTensor:
        """A tensor, its begin relative to the data."""
        name = header.string()
        where = f"{self.path}: tensor {name}"
        dimensions = header.scalar("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise CheckpointError(f"{where} has {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}")
        shape = tuple(header.scalar("Q") for _ in range(dimensions))[::-1]
        number, begin = header.scalar("I"), header.scalar("Q")
        type_name, block, block_bytes = _type(number, where)
        if shape[-1] % block != 0 or min(shape) < 1:
            raise CheckpointError(f"{where} is {type_name} of shape {list(shape)}, expected rows of blocks of {block}")
        return GgufTensor(name, type_name, shape, shape[-1] // block * block_bytes, begin)

    def _add(self, tensor: GgufTensor, data: int, alignment: int) -> None:
        where = f"{self.path}: tensor {tensor.name}"
        begin, size = data + tensor.begin, tensor.rows * tensor.row_bytes
        if tensor.begin % alignment != 0 or begin + size > self._size:
            raise CheckpointError(f"{where} has bytes {begin} to {begin + size}, the file {self._size}, aligned to {alignment}")
        if tensor.name in self._tensors:
            raise CheckpointError(f"{where} is there twice")
        self._tensors[tensor.name] = replace(tensor, begin=begin)


class _Header:
    """Reads a header in order, nothing of it before its size is known to be there."""

    def __init__(self, owner: GgufFile) -> None:
        self.position = 0
        self._owner = owner
        self._left = MOST_ENTRIES

    def take(self, size: int) -> bytes:
        self._check(size)
        self.position += size
        return self._owner._file.read(size)

    def scalar(self, format: str) -> Any:
        return struct.unpack(f"<{format}", self.take(struct.calcsize(f"<{format}")))[0]

    def count(self) -> int:
        """The number of an array's entries, each of at least a byte."""
        count: int = self.scalar("Q")
        self._left -= count
        if self._left < 0:
            raise CheckpointError(f"{self._owner.path} has arrays of more than {MOST_ENTRIES} entries together")
        self._check(count)
        return count

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._owner.path} has a name that is no UTF-8: {error}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise CheckpointError(f"{self._owner.path}: {key} has the type {kind}, which GGUF has none of")
        kind, count = self.scalar("I"), self.count()
        if kind == _ARRAY:
            raise CheckpointError(f"{self._owner.path}: {key} is an array of arrays")
        if kind == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))  # not decoded: a token need not be UTF-8
            return Skipped(count)
        values = [self.value(kind, key) for _ in range(count)]
        return values if count <= _SHORT else Skipped(count)

    def _check(self, size: int) -> None:
        if self.position + size > min(self._owner._size, MOST_HEADER):
            raise CheckpointError(
                f"{self._owner.path} has {self._owner._size} bytes, and a header that goes on to {self.position + size}, "
                f"expected at most {MOST_HEADER >> 20} MiB: it is damaged"
            )


def _type(number: int, where: str) -> tuple[str, int, int]:
    """The name of a tensor's type, elements in a block, and its bytes."""
    gguf = require_gguf()
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise CheckpointError(f"{where} has the type {number}, which this version of the package gguf lacks") from None
    return kind.name, block, size


def require_gguf() -> Any:
    """The package gguf. Raises ImportError, with the remedy, if it is missing or has no MXFP4."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"gguf is needed for this: pip install 'xpu_fp4[gguf]' ({error})") from error
    if not hasattr(gguf.GGMLQuantizationType, "MXFP4"):
        raise ImportError("this version of the package gguf has no MXFP4: pip install 'xpu_fp4[gguf]'")
    return gguf
