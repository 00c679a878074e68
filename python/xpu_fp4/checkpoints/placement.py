# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint's layers belong in a model, and the MXFP4 modules that go there."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ..modules import MXFP4Linear
from ..moe import DOWN, GATE_UP, PROJECTIONS, MXFP4Experts, experts_kind, is_experts, put
from .description import SCALE_MODES, Checkpoint, Layer
from .errors import CheckpointError
from .names import names_in_model
from .tensor_files import TensorFiles

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)")
STACKS = (
    (GATE_UP, ("gate_proj", "up_proj")),
    (DOWN, ("down_proj",)),
    (GATE_UP, ("w1", "w3")),
    (DOWN, ("w2",)),
)
"""What checkpoints call the linear layers of one expert that make up the rows of a projection of the experts module."""
PARTS = {name: (projection, part) for projection, names in STACKS for part, name in enumerate(names)}


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
    linears: dict[str, MXFP4Linear] = {}
    experts: defaultdict[str, dict[str, Place]] = defaultdict(dict)
    for name, place in places.items():
        if place.projection is None:
            linears[place.module] = _linear(model.get_submodule(place.module), checkpoint, name, place.module)
        else:
            experts[place.module][name] = place
    made = {module: _experts(model, checkpoint, module, mine) for module, mine in experts.items()}
    replacements: dict[str, nn.Module] = {**linears, **made}
    for name, module in replacements.items():
        put(model, name, module)
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
    """Says where in a model's state each of a checkpoint's tensors belongs, None if nowhere.

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
    if (match := EXPERT.fullmatch(name)) and match[3] in PARTS and not _has(model, name):
        projection, part = PARTS[match[3]]
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


def _experts(model: nn.Module, checkpoint: Checkpoint, name: str, places: dict[str, Place]) -> MXFP4Experts:
    module = model.get_submodule(name)
    layers = [checkpoint.layers[layer] for layer in places]
    where = checkpoint.files[layers[0].packed]
    if not is_experts(module):
        kind = type(module).__name__
        raise CheckpointError(
            f"{where} is for experts, but the model's {name} is a {kind}, expected one with {GATE_UP} and {DOWN}"
        )
    if len({layer.scheme for layer in layers}) > 1 or len({layer.bias is None for layer in layers}) > 1:
        raise CheckpointError(f"{where}: the experts of {name} differ in scheme or bias, expected all alike")
    scheme = layers[0].scheme
    if scheme.input_offset:
        raise CheckpointError(f"{where} has an input offset, which is read for linear layers alone, not for experts")
    if scheme.scale_mode not in SCALE_MODES or scheme.weight_global_scale != 1:
        raise CheckpointError(f"{where} is quantized by FP-Quant's rules, which experts cannot follow")
    try:
        transposed = experts_kind(module).is_transposed
        # Stored one by one, gate and up are two layers, whatever the model alternates.
        order = {"is_interleaved": False} if any(place.expert is not None for place in places.values()) else {}
        made = MXFP4Experts.like(module, bias=layers[0].bias is not None, **order, **scheme.arguments_of_experts())
    except ValueError as error:
        raise CheckpointError(f"{where} is for {name}: {error}") from None
    for projection in PROJECTIONS:
        weight = module.get_parameter(projection)
        expected = tuple(weight.transpose(1, 2).shape if transposed else weight.shape)
        mine = {place: checkpoint.layers[layer] for layer, place in places.items() if place.projection == projection}
        shape = _fused_shape(mine, 2 if projection == GATE_UP else 1)
        if shape != expected:
            found = list(shape) or "missing or incomplete"
            raise CheckpointError(f"{where} is for experts, whose {projection} is {found}, but the model's is {list(expected)}")
    return made


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
