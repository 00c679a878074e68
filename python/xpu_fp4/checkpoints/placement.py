# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint's layers belong in a model, and the MXFP4 modules that go there."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..modules import MXFP4Linear
from .description import Checkpoint, Layer, Scheme
from .errors import CheckpointError
from .experts import DOWN, GATE_UP, MXFP4Experts
from .names import names_in_model
from .tensor_files import TensorFiles

# The linear layers of one expert, as checkpoints name them: the projection of the experts module, and which part of its rows.
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
_PARTS = {
    "gate_proj": (GATE_UP, 0),
    "up_proj": (GATE_UP, 1),
    "down_proj": (DOWN, 0),
    "w1": (GATE_UP, 0),
    "w3": (GATE_UP, 1),
    "w2": (DOWN, 0),
}


@dataclass(frozen=True)
class Place:
    """A layer's place: a linear layer or, where there is a projection, all or one of the experts in an experts module."""

    module: str
    projection: str | None = None
    expert: int | None = None
    part: int = 0


def replace_layers(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Place]:
    """Puts MXFP4 modules, on the meta device, where the checkpoint has quantized layers; returns where each layer is.

    Layers that the model leaves out (multi-token prediction) have no place. Nothing is replaced if any other does not fit.
    Raises CheckpointError, naming the layer, if one does not.
    """
    places = _places(model, checkpoint)
    _refuse_other_transforms(model, checkpoint, {place.module for place in places.values()})
    modules: dict[str, nn.Module] = {}
    experts: defaultdict[str, dict[str, Place]] = defaultdict(dict)
    for name, place in places.items():
        if place.projection is None:
            modules[place.module] = _linear(model.get_submodule(place.module), checkpoint, name, place.module)
        else:
            experts[place.module][name] = place
    makers = {module: _experts(model, checkpoint, module, mine) for module, mine in experts.items()}
    modules |= {module: maker() for module, maker in makers.items()}  # all of them fit
    for name, module in modules.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, module)
    return places


def _places(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Place]:
    # The rules for names are for those of weights.
    weights = {name: name if len(layer.shape) == 3 else f"{name}.weight" for name, layer in checkpoint.layers.items()}
    names = names_in_model(model, weights.values())
    places = {}
    for name, weight in weights.items():
        candidates = [candidate.removesuffix(".weight") for candidate in names[weight]]
        found = (_place(model, checkpoint.layers[name], candidate) for candidate in candidates)
        place = next((place for place in found if _has(model, place.module)), None)
        if place is not None:
            places[name] = place
        elif not any(_leaves_out(model, candidate) for candidate in candidates):
            kind = type(model).__name__
            raise CheckpointError(f"{checkpoint.folder} quantizes {name}, but {kind} has no module of that name")
    return places


def _refuse_other_transforms(model: nn.Module, checkpoint: Checkpoint, placed: Collection[str]) -> None:
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in placed:
            checkpoint.transforms.refuse_at(name, [kind.__name__ for kind in type(module).__mro__])


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, the ones that are not saved too."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.data for name, tensor in named}


def find_tensors(model: nn.Module, files: TensorFiles, tensors: Iterable[str]) -> dict[str, str | None]:
    """Where in a model's state each of a checkpoint's tensors belongs, None if nowhere.

    Raises CheckpointError, naming the tensor, if one has another shape than the model's: some would broadcast, and Transformers
    lets some pass.
    """
    state = state_of(model)
    places = {}
    for name, candidates in names_in_model(model, tensors).items():
        places[name] = found = next((candidate for candidate in candidates if candidate in state), None)
        info = files[name]
        if found is not None and info.shape != tuple(state[found].shape):
            raise CheckpointError(
                f"{info} has shape {list(info.shape)}, but the model's {found} has {list(state[found].shape)}"
            )
    return places


def _place(model: nn.Module, layer: Layer, name: str) -> Place:
    if len(layer.shape) == 3:
        owner, _, projection = name.rpartition(".")
        return Place(owner, projection)
    if (match := _EXPERT.fullmatch(name)) and match[3] in _PARTS and not _has(model, name):
        projection, part = _PARTS[match[3]]
        return Place(match[1], projection, int(match[2]), part)
    return Place(name)


def _leaves_out(model: nn.Module, name: str) -> bool:
    """Whether the model is made without this layer: one beyond the end of a list, or one that Transformers knows of."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    if any(re.search(pattern, f"{name}.weight") for pattern in patterns):
        return True
    module = model
    for part in name.split("."):
        children = dict(module.named_children())
        if part not in children:
            return isinstance(module, nn.ModuleList) and part.isdecimal()
        module = children[part]
    return False


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _linear(module: nn.Module, checkpoint: Checkpoint, name: str, name_in_model: str) -> MXFP4Linear:
    layer = checkpoint.layers[name]
    where = checkpoint.files[layer.packed]
    if type(module) is not nn.Linear:
        kind = type(module).__name__
        raise CheckpointError(f"{where} is quantized, but the model's {name_in_model} is a {kind}, expected nn.Linear")
    if layer.shape != tuple(module.weight.shape):
        shape = list(module.weight.shape)
        raise CheckpointError(f"{where} is for a weight {list(layer.shape)}, but the model's {name_in_model} is {shape}")
    offset = layer.scheme.input_offset  # whose share of the output is in a bias
    if not offset and (layer.bias is None) != (module.bias is None):
        has, lacks = ("model", "checkpoint") if layer.bias is None else ("checkpoint", "model")
        raise CheckpointError(f"{where}: the {has} has a bias for {name_in_model}, the {lacks} has none")
    return MXFP4Linear(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        **layer.scheme.arguments(),
        input_offset=offset,
        device="meta",
        dtype=module.weight.dtype,
    ).train(module.training)


@dataclass(frozen=True)
class _MakeExperts:
    source: nn.Module
    shapes: dict[str, tuple[int, ...]]
    scheme: Scheme
    bias: bool

    def __call__(self) -> MXFP4Experts:
        dtype = self.source.get_parameter(GATE_UP).dtype
        made = MXFP4Experts(self.source, self.shapes, self.scheme, bias=self.bias, device="meta", dtype=dtype)
        return made.train(self.source.training)


def _experts(model: nn.Module, checkpoint: Checkpoint, name: str, places: dict[str, Place]) -> _MakeExperts:
    module = model.get_submodule(name)
    layers = [checkpoint.layers[layer] for layer in places]
    where = checkpoint.files[layers[0].packed]
    if not hasattr(module, "_apply_gate") or not all(isinstance(getattr(module, p, None), Tensor) for p in (GATE_UP, DOWN)):
        kind = type(module).__name__
        raise CheckpointError(
            f"{where} is for experts, but the model's {name} is a {kind}, expected one with {GATE_UP} and {DOWN}"
        )
    if len({layer.scheme for layer in layers}) > 1 or len({layer.bias is None for layer in layers}) > 1:
        raise CheckpointError(f"{where}: the experts of {name} differ in scheme or bias, expected all alike")
    if layers[0].scheme.input_offset:
        raise CheckpointError(f"{where} has an input offset, which experts cannot have")
    shapes = {}
    for projection in (GATE_UP, DOWN):
        weight = module.get_parameter(projection)
        expected = tuple(weight.transpose(1, 2).shape if getattr(module, "is_transposed", False) else weight.shape)
        mine = {place: checkpoint.layers[layer] for layer, place in places.items() if place.projection == projection}
        shapes[projection] = _fused_shape(mine, 2 if projection == GATE_UP else 1)
        if shapes[projection] != expected:
            found = list(shapes[projection]) or "missing or incomplete"
            raise CheckpointError(f"{where} is for experts, whose {projection} is {found}, but the model's is {list(expected)}")
    return _MakeExperts(module, shapes, layers[0].scheme, layers[0].bias is not None)


def _fused_shape(layers: dict[Place, Layer], parts: int) -> tuple[int, ...]:
    """[E, N, K] of all experts together; nothing if some are missing or differ."""
    shapes = {layer.shape for layer in layers.values()}
    if len(shapes) != 1:
        return ()
    shape = shapes.pop()
    if len(shape) == 3:
        return shape
    count = max(place.expert or 0 for place in layers) + 1
    n, k = shape
    return (count, parts * n, k) if len(layers) == count * parts else ()
