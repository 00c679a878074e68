# SPDX-License-Identifier: Apache-2.0
"""The tensors of a model directory: one safetensors file, or several under an index. Headers are read, data is mapped."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError
from .untrusted import check_files, check_type, open_file, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor. dtype is safetensors' name of it: U8, BF16, F32, ..."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name}"


class TensorFiles(Mapping[str, TensorInfo]):
    """The tensors in a directory, by name.

    Raises CheckpointError, naming the file: none there, a shard missing or truncated, a shard without a tensor that the index
    promises, a tensor in two shards, a link that leads out of the directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_dir():
            check_files(folder)
        self.files = _files_in(folder)
        self._infos: dict[str, TensorInfo] = {}
        for file in self.files:
            self._current = (file, opened := _open(file))
            for name in opened.keys():  # noqa: SIM118  # safetensors' handle is no mapping
                if name in self._infos:
                    raise CheckpointError(f"{file}: tensor {name} is also in {self._infos[name].file}")
                view = opened.get_slice(name)
                self._infos[name] = TensorInfo(name, file, view.get_dtype(), tuple(view.get_shape()))
        _check_index(folder, self._infos)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def tensor(self, name: str) -> Tensor:
        """The tensor, its memory mapped from the file: pages are read when touched. Writing to it does not reach the file."""
        file = self[name].file
        # One file at a time stays open: mapped pages are resident memory for as long as they are mapped.
        if self._current[0] != file:
            self._current = (file, _open(file))
        tensor: Tensor = self._current[1].get_tensor(name)
        return tensor


def _files_in(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        return _indexed_files(folder)
    found = sorted(folder.glob("*.safetensors"))
    if folder / SINGLE in found:
        return [folder / SINGLE]
    if len(found) == 1:
        return found
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory")
    if found:
        raise CheckpointError(f"{folder} has {len(found)} safetensors files and neither {INDEX} nor {SINGLE}")
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} has {pickles[0]} and no safetensors files: pickles run code of their author's and are not read; if you "
            "trust them, from_pretrained and save_pretrained of transformers convert the model"
        )
    raise CheckpointError(f"{folder} has no safetensors files")


def check_metadata(folder: Path) -> None:
    """Raises CheckpointError where an index has no object as metadata, to which Transformers adds."""
    if (folder / INDEX).exists():
        check_type(read_json(folder / INDEX).get("metadata"), dict[str, Any], f"{folder / INDEX}: metadata")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map: dict[str, str] = read_json(folder / INDEX).get("weight_map")  # type: ignore[assignment]  # checked now
    where = f"{folder / INDEX} has no weight_map from tensor names to file names: weight_map"
    check_type(weight_map, dict[str, str], where)
    return weight_map


def _indexed_files(folder: Path) -> list[Path]:
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} names the file {name!r}, expected a name in the same directory")
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} does not exist, but {INDEX} names it")
    return [folder / name for name in names]


def _check_index(folder: Path, infos: Mapping[str, TensorInfo]) -> None:
    if not (folder / INDEX).exists():
        return
    for name, file in _weight_map(folder).items():
        if name not in infos or infos[name].file.name != file:
            raise CheckpointError(f"{folder / file} has no tensor {name}, but {INDEX} says so")


def _open(file: Path) -> Any:
    try:
        with open_file(file) as opened:
            # safetensors takes a name only: this one is the file that was checked, whatever its own name has become.
            return safe_open(f"/proc/self/fd/{opened.fileno()}", framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error
