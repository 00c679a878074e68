# SPDX-License-Identifier: Apache-2.0
"""Experts that an unquantized model's files have in one tensor for all experts of a layer."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._library import BLOCK
from ..moe import DOWN, GATE_UP, PROJECTIONS, ExpertsKind, experts_kind
from .errors import CheckpointError
from .matrices import FLOATS, Module
from .names import without_conversion
from .quantized import QuantizedLinear
from .tensor_files import TensorFiles

_NAMES = {GATE_UP: ("gate_proj", "up_proj"), DOWN: ("down_proj",)}
_NAMES_BY_CLASS = {"GraniteMoeExperts": {GATE_UP: ("w1", "w3"), DOWN: ("w2",)}}  # what vLLM makes of its tensors, and reads


@dataclass(frozen=True)
class FusedExperts:
    """The experts of a layer."""

    name: str
    """The experts module is called so in the files that are written."""
    in_model: str
    kind: ExpertsKind
    tensors: Mapping[str, str]
    """Each projection, `gate_up_proj` and `down_proj`, has its name in the files here, [E, N, K] or transposed."""
    parts: Mapping[str, tuple[str, ...]]
    """Each projection has the names of one expert's linear layers here that make up its rows."""

    @property
    def is_gpt_oss(self) -> bool:
        """Whether their own format is gpt-oss': rows of gate and up alternate, which no other has."""
        return self.kind.gate.interleaved

    def matrices(self, weight: Tensor) -> Iterator[Tensor]:
        """Every expert's [N, K] of a projection's tensor."""
        return (one.t() if self.kind.is_transposed else one for one in weight)

    def layer(self, projection: str, expert: int) -> str:
        """The name of one expert's projection, by which it is calibrated."""
        return f"{self.in_model}.{expert}.{projection}"


def fused_experts(model: nn.Module, files: TensorFiles, modules: Iterable[Module]) -> list[FusedExperts]:
    """Finds the fused experts among a model's modules that can be quantized.

    Left out are experts whose class or gate is not known, tensors that Transformers transposes or splits as it loads them, and
    biases where the format has no place for them. Raises CheckpointError if a K is no multiple of 32.
    """
    tensors: defaultdict[str, dict[str, Module]] = defaultdict(dict)
    for module in modules:
        if module.projection is not None:
            tensors[module.in_model][module.projection] = module
    as_they_are = set(without_conversion(model, [m.tensor for found in tensors.values() for m in found.values()]))
    fused = []
    for in_model, found in tensors.items():
        source = model.get_submodule(in_model)
        try:
            kind = experts_kind(source)
        except ValueError:
            continue
        has_bias = any(source._parameters.get(f"{name}_bias") is not None for name in PROJECTIONS)
        names = {projection: module.tensor for projection, module in found.items()}
        if (
            len(names) != len(PROJECTIONS)
            or not as_they_are.issuperset(names.values())
            or (has_bias and not kind.gate.interleaved)
        ):
            continue
        for projection, name in names.items():
            _check(files, name, source.get_parameter(projection), kind)
        parts = _NAMES_BY_CLASS.get(type(source).__name__, _NAMES)
        fused.append(FusedExperts(_name(names[GATE_UP], in_model), in_model, kind, names, parts))
    return fused


def _name(tensor: str, in_model: str) -> str:
    owner, _, last = tensor.rpartition(".")
    # Granite has a linear layer of its own in place of the projection: block_sparse_moe.input_linear.weight.
    return owner if last == GATE_UP else f"{owner.rpartition('.')[0]}.{in_model.rpartition('.')[2]}"


def _check(files: TensorFiles, name: str, parameter: Tensor, kind: ExpertsKind) -> None:
    info = files[name]
    if info.dtype not in FLOATS:
        raise CheckpointError(f"{info} has dtype {info.dtype}, expected one of {', '.join(sorted(FLOATS))}")
    if info.shape != tuple(parameter.shape):
        raise CheckpointError(f"{info} has shape {list(info.shape)}, but the model's is {list(parameter.shape)}")
    if info.shape[1 if kind.is_transposed else 2] % BLOCK != 0:
        shape = "[E, K, N]" if kind.is_transposed else "[E, N, K]"
        raise CheckpointError(
            f"{info} has shape {list(info.shape)}, expected {shape} with K a multiple of {BLOCK}: leave it out by ignore"
        )


def split(layer: QuantizedLinear, parts: int) -> Iterator[QuantizedLinear]:
    """A layer's rows in equal parts, each in memory of its own."""
    for codes, scale in zip(layer.codes.chunk(parts), layer.scale.chunk(parts), strict=True):
        yield QuantizedLinear(layer.scheme, codes.clone(), scale.clone())


def stack(layers: Iterable[QuantizedLinear], experts: int) -> tuple[Tensor, Tensor]:
    """Codes [E, N, K/32, 16] and scales [E, N, K/32] of all experts, with no more than one beside them."""
    blocks = scales = torch.empty(0, dtype=torch.uint8)
    for expert, layer in enumerate(layers):
        if expert == 0:
            scales = layer.scale.new_empty(experts, *layer.scale.shape)
            blocks = scales.new_empty(*scales.shape, BLOCK // 2)
        blocks[expert], scales[expert] = layer.codes.view(blocks.shape[1:]), layer.scale
    return blocks, scales
