# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' `transform_config`: the Hadamard transforms at the inputs of layers.

Weights are stored transformed, so a transform of weights (`weight_input`, `weight_output`) is done with. One at an `input`
is the layer's own, in each forward. All others would have to be done outside of layers.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch

from ..functional import Hadamard
from ..reference import transform
from .errors import CheckpointError
from .keys import is_set, refusal, require_object
from .patterns import NameSet, Patterns
from .tensor_files import TensorFiles

_CLASS = "Linear"  # what is packed: it cannot be seen in the files
_KEYS = {"type", "apply", "head_dim", "randomize", "requires_grad", "precision"}
_APPLY_KEYS = {"location", "targets", "ignore", "inverse"}
_OFFLINE = {"weight_input", "weight_output"}


class _Modules:
    """Modules by their names, patterns of names, and classes."""

    def __init__(self, entries: list[str] | str | None, patterns: Patterns) -> None:
        entries = [entries] if isinstance(entries, str) else entries or []
        self._names, self._entries = NameSet(entries, patterns), frozenset(entries)

    def has(self, module: str, classes: Iterable[str]) -> bool:
        return module in self._names or not self._entries.isdisjoint(classes)


@dataclass(frozen=True)
class _Transform:
    """The transform of one entry of config_groups at the inputs of the modules that are its targets."""

    name: str
    size: Hadamard
    targets: _Modules
    ignored: _Modules

    def is_at(self, module: str, classes: Iterable[str]) -> bool:
        return self.targets.has(module, classes) and not self.ignored.has(module, classes)


class InputTransforms:
    """The transforms at inputs that a `transform_config` asks for. where: what an error's message begins with.

    Raises CheckpointError, naming the key: a transform that is not in the stored weights and no Hadamard transform, in blocks
    of 32, 64 or 128, at a module's input.
    """

    def __init__(self, config: Any, where: str) -> None:
        self._where = where
        self._transforms = list(_read(require_object(config, where), where))

    def size(self, layer: str, in_features: int) -> Hadamard:
        """The size of the transform at a quantized layer's input, 0 if there is none. CheckpointError if it does not fit."""
        found = self._at(layer, (_CLASS,))
        if len(found) > 1:
            names = ", ".join(transform.name for transform in found)
            raise CheckpointError(f"{self._where}.config_groups has several transforms at the input of {layer}: {names}")
        size: Hadamard = found[0].size if found else 0
        if size and in_features % size != 0:
            what = f"{layer}, whose K is {in_features}, expected a multiple of it"
            raise CheckpointError(f"{self._where}.config_groups.{found[0].name}.head_dim is {size} for {what}")
        return size

    def matrix(self, layer: str, files: TensorFiles) -> str | None:
        """The name of the tensor, if there is one, that holds the matrix of the transform at a layer's input.

        Layers share it, and files hold it once or never. Raises CheckpointError if it is not the matrix that it is to be.
        """
        for found in self._at(layer, (_CLASS,)):
            name = f"{layer}.{found.name}_input.weight"
            if name in files:
                _check_matrix(files, name, found.size)
                return name
        return None

    def refuse_at(self, module: str, classes: Collection[str]) -> None:
        """Raises CheckpointError if a module that is not quantized, of these classes and bases, has a transform."""
        for found in self._at(module, classes):
            what = f"applies a Hadamard transform at the input of {module}, which is not quantized"
            raise refusal(f"{self._where}.config_groups.{found.name}", what)

    def _at(self, module: str, classes: Iterable[str]) -> list[_Transform]:
        return [transform for transform in self._transforms if transform.is_at(module, classes)]


def _read(config: dict[str, Any], where: str) -> Iterator[_Transform]:
    _check_keys(config, {"config_groups"}, where)
    patterns = Patterns(where)
    for name, scheme in require_object(config.get("config_groups"), f"{where}.config_groups").items():
        here = f"{where}.config_groups.{name}"
        scheme = require_object(scheme, here)
        for apply in scheme.get("apply") or []:
            apply = require_object(apply, f"{here}.apply")
            if apply.get("location") in _OFFLINE:
                continue
            size = _check_online(scheme, apply, here)
            targets, ignored = (_Modules(apply.get(key), patterns) for key in ("targets", "ignore"))
            yield _Transform(name, size, targets, ignored)


def _check_online(scheme: dict[str, Any], apply: dict[str, Any], where: str) -> Hadamard:
    """The size of the transform that a layer has to compute; CheckpointError if it cannot."""
    kind, location, size = scheme.get("type"), apply.get("location"), scheme.get("head_dim")
    what = f"applies a {kind} transform (a rotation) at every {location} of {apply.get('targets')}"
    if location != "input" or kind != "hadamard":
        raise refusal(where, what)
    if size not in get_args(Hadamard) or size == 0:
        blocks = "over the whole width" if size is None else f"in blocks of {size}"
        raise refusal(f"{where}.head_dim", f"{what}, {blocks} instead of 32, 64 or 128,")
    if is_set(scheme.get("randomize")):
        raise refusal(f"{where}.randomize", f"{what}, whose matrix is permuted,")
    _check_keys(scheme, _KEYS, where)
    _check_keys(apply, _APPLY_KEYS, f"{where}.apply")
    return cast(Hadamard, size)


def _check_keys(found: dict[str, Any], known: Collection[str], where: str) -> None:
    # What is unknown here may change the transform.
    if unknown := sorted(key for key, value in found.items() if key not in known and is_set(value)):
        raise CheckpointError(f"{where} has the keys {', '.join(unknown)}, expected {', '.join(sorted(known))}")


def _check_matrix(files: TensorFiles, name: str, size: Hadamard) -> None:
    info = files[name]
    with torch.device("cpu"):  # Transformers reads while it is another
        expected = transform(torch.eye(size), size).sign()
    matrix = files.tensor(name).float() if info.shape == (size, size) else -expected
    # Writers differ in whether the factor of the root is in it.
    if not matrix[0, 0] > 0 or not torch.equal(matrix / matrix[0, 0], expected):
        raise CheckpointError(
            f"{info} is not Sylvester's Hadamard matrix [{size}, {size}], which its transform_config asks for"
        )
