# SPDX-License-Identifier: Apache-2.0
"""The one description of an MXFP4 checkpoint, whatever format it came in."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from .._library import BLOCK
from ..functional import Group, Hadamard, Mode, ScaleMode, check_mode, options_of
from .errors import CheckpointError
from .tensor_files import TensorFiles, TensorInfo
from .transforms import InputTransforms


@dataclass(frozen=True)
class Scheme:
    """How a layer computes: the mode, and how it quantizes activations, by the names of `xpu_fp4.linear`'s arguments."""

    mode: Mode
    scale_mode: ScaleMode = "even"
    group: Group = 128
    hadamard: Hadamard = 0
    input_offset: bool = False
    """Whether the layer has one: a tensor of its own."""
    weight_global_scale: float = 1.0

    def arguments(self) -> dict[str, Any]:
        """The mode, its own options and the transform: what `linear` and MXFP4Linear take, but for the offset."""
        names = ("mode", *options_of(self.mode), "hadamard", "weight_global_scale")
        return {name: getattr(self, name) for name in names}

    def arguments_of_experts(self) -> dict[str, Any]:
        """Gives what `xpu_fp4.experts` and MXFP4Experts take: a layer of experts has no global scale."""
        return {name: value for name, value in self.arguments().items() if name != "weight_global_scale"}

    def __str__(self) -> str:
        options = [*options_of(self.mode), *(["hadamard"] if self.hadamard else [])]
        offset = ["input offset"] if self.input_offset else []
        return " ".join([self.mode, *(f"{name} {getattr(self, name)}" for name in options), *offset])


@dataclass(frozen=True)
class Layer:
    """A quantized weight: codes [*, N, K/2] and scales [*, N, K/32], both uint8, * nothing or the number of experts."""

    name: str
    """Dotted name of the module or, for the experts that share one tensor, of the projection."""
    shape: tuple[int, ...]
    """[N, K] or [E, N, K]: of the weight that the codes stand for."""
    scheme: Scheme
    packed: str
    scale: str
    bias: str | None
    input_offset: str | None = None
    constants: tuple[str, ...] = ()
    """Tensors whose values are known without them, and were checked: the matrix of a transform, FP-Quant's global scales."""

    @property
    def tensors(self) -> set[str]:
        """Names of all that the files have of the layer."""
        own = (self.packed, self.scale, self.bias, self.input_offset, *self.constants)
        return {name for name in own if name is not None}

    @property
    def in_features(self) -> int:
        return self.shape[-1]

    @property
    def out_features(self) -> int:
        return self.shape[-2]


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: its tensors, and which of them are MXFP4 weights."""

    folder: Path
    format: str
    """`compressed-tensors`, `quark`, `auto-round`, `fp_quant` or `mxfp4` (gpt-oss): config.json's quant_method."""
    files: TensorFiles
    layers: dict[str, Layer]
    transforms: InputTransforms
    """What the quantization_config transforms, among it the inputs of `layers`."""
    left_aside: tuple[str, ...]
    """Keys of the quantization_config that are not acted on, each with the reason."""

    def in_mode(self, mode: Mode | None) -> "Checkpoint":
        """Puts every layer into that mode, weights unchanged; None: as it is. Raises ValueError if there is no such mode."""
        if mode is None:
            return self
        check_mode(mode)
        layers = {name: replace(layer, scheme=replace(layer.scheme, mode=mode)) for name, layer in self.layers.items()}
        return replace(self, layers=layers)

    def weight(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes uint8 [*, N, K/2] and scales uint8 [*, N, K/32] of a layer, memory-mapped."""
        layer = self.layers[name]
        *leading, k = layer.shape
        packed = self.files.tensor(layer.packed).view(*leading, k // 2)
        return packed, self.files.tensor(layer.scale).view(*leading, k // BLOCK)

    def bias(self, name: str) -> Tensor | None:
        return self._optional(self.layers[name].bias)

    def input_offset(self, name: str) -> Tensor | None:
        return self._optional(self.layers[name].input_offset)

    def _optional(self, tensor: str | None) -> Tensor | None:
        return None if tensor is None else self.files.tensor(tensor)

    def other_tensors(self) -> Iterator[str]:
        """Names of the tensors that belong to no layer of `layers`."""
        used = {name for layer in self.layers.values() for name in layer.tensors}
        return (name for name in self.files if name not in used)


def describe_layer(
    files: TensorFiles,
    name: str,
    scheme: Scheme,
    packed: str,
    scale: str,
    bias: str,
    *,
    input_offset: str | None = None,
    experts: bool = False,
) -> Layer:
    """A layer out of the names of its tensors.

    Codes are uint8 [*, N, K/2] or, as gpt-oss has them, [*, N, K/32, 16]; scales uint8 [*, N, K/32]; * is E if `experts`. An
    offset is float32 [K], and needs a bias, which else may be missing. Raises CheckpointError, naming file and tensor, if a
    tensor is missing or does not fit.
    """
    codes, scales = _bytes(files, packed), _bytes(files, scale)
    leading = 2 if experts else 1
    rows = codes.shape[:leading]
    if len(codes.shape) == leading + 2 and codes.shape[-1] == BLOCK // 2:
        k = codes.shape[-2] * BLOCK
    elif len(codes.shape) == leading + 1:
        k = 2 * codes.shape[-1]
    else:
        raise CheckpointError(f"{codes} has shape {list(codes.shape)}, expected {'[E, N, K/2]' if experts else '[N, K/2]'}")
    if k % BLOCK != 0:
        raise CheckpointError(f"{codes} has shape {list(codes.shape)}, so K is {k}, expected a multiple of {BLOCK}")
    if scales.shape != (*rows, k // BLOCK):
        expected = [*rows, k // BLOCK]
        raise CheckpointError(
            f"{scales} has shape {list(scales.shape)}, expected {expected} beside {packed} {list(codes.shape)}"
        )
    if bias in files and files[bias].shape != rows:
        raise CheckpointError(f"{files[bias]} has shape {list(files[bias].shape)}, expected {list(rows)}")
    if input_offset is not None:
        _check_offset(files, input_offset, k)
        _find(files, bias)
    return Layer(name, (*rows, k), scheme, packed, scale, bias if bias in files else None, input_offset)


SCALE_MODES: tuple[ScaleMode, ...] = ("floor", "ceil", "even", "rceil")
"""The rules by which weights are written and that checkpoints name; FP-Quant's are for its own alone."""


def get_scale_mode(value: Any, where: str) -> ScaleMode:
    """The value, if it is one of SCALE_MODES. Raises CheckpointError, saying where it stands, if not."""
    if value not in SCALE_MODES:
        raise CheckpointError(f"{where} has the scale mode {value!r}, expected one of {', '.join(SCALE_MODES)}")
    return cast(ScaleMode, value)


def _check_offset(files: TensorFiles, name: str, k: int) -> None:
    info = _find(files, name)
    if info.dtype != "F32" or info.shape != (k,):
        raise CheckpointError(f"{info} is {info.dtype} {list(info.shape)}, expected F32 [{k}]")


def _bytes(files: TensorFiles, name: str) -> TensorInfo:
    info = _find(files, name)
    if info.dtype != "U8":
        raise CheckpointError(f"{info} has dtype {info.dtype}, expected U8")
    return info


def _find(files: TensorFiles, name: str) -> TensorInfo:
    if name not in files:
        raise CheckpointError(f"{files.folder} has no tensor {name}")
    return files[name]
