# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' `mxfp4-pack-quantized`: `weight_packed` uint8 [N, K/2] and `weight_scale` uint8 [N, K/32] per module.

llm-compressor writes it; vLLM and Transformers read it. A group's `input_activations` make it W4A4 (MXFP4) or W4A8 (int8 in
groups of 32 or 128), their absence W4A16 or, where our own key of the `quantization_config` says so, W4A8. Hadamard transforms
are in the `transform_config`. Layers with an input offset are ours alone: they have a format and names that others refuse.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, cast, get_args

from .._library import BLOCK
from ..functional import Group, Mode
from .description import Layer, Scheme, describe_layer, get_scale_mode
from .errors import CheckpointError
from .keys import is_set, refusal, require_object, unknown_keys
from .patterns import PREFIX, NameSet, Patterns
from .tensor_files import TensorFiles
from .transforms import InputTransforms

METHOD = "compressed-tensors"
FORMAT = "mxfp4-pack-quantized"
OFFSET_FORMAT = "xpu_fp4-input-offset"
"""The format of groups of layers with an input offset. Others know none of that name, and end."""
EXTENSION = "xpu_fp4"
"""A key of quantization_config that other readers skip: an object of _EXTENSION_KEYS and `groups`.

`scale_mode` is the rule for MXFP4 activations, if it is not `even`. `activations`, "mxint8", is what activations that a group
leaves alone are quantized to, and `group` how many of them share a scale. `input_offset`, true, is of layers that have one.
`groups` are objects of the same keys for entries of config_groups, by their names, which go before the others.
"""
_EXTENSION_KEYS = ("scale_mode", "activations", "group", "input_offset")


PACKED, SCALE = "weight_packed", "weight_scale"


class Names(NamedTuple):
    """What a layer's tensors are called, behind its own name and a dot."""

    packed: str
    scale: str
    bias: str
    input_offset: str


# The bias of a layer with an offset holds the offset's share of the output, and is there where the model has none.
_NAMES = {
    False: Names(PACKED, SCALE, "bias", "input_offset"),
    True: Names("offset_weight_packed", "offset_weight_scale", "offset_bias", "input_offset"),
}


def names_of(scheme: Scheme) -> Names:
    """Returns what the tensors of a layer in that scheme are called; input_offset is there only if it has one."""
    return _NAMES[scheme.input_offset]


_MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": BLOCK, "symmetric": True}
_MXINT8 = {"num_bits": 8, "type": "int", "strategy": "group", "symmetric": True}


class _Activations(NamedTuple):
    """How a mode's activations stand in a quantization_config."""

    in_group: dict[str, Any] | None = None  # a group's input_activations, but for what weights have too
    in_extension: str | None = None  # our own key's `activations`


# W4A8 as input_activations would break other readers: compressed-tensors raises where K is no multiple of the group and, of
# scales in uint8, makes every one 1. As it is they compute W4A16, which is as accurate.
_ACTIVATIONS: dict[Mode, _Activations] = {
    "w4a4": _Activations(in_group={"dynamic": True}),
    "w4a8": _Activations(in_extension="mxint8"),
    "w4a16": _Activations(),
}

# What is read here, and what is known to change nothing.
_KEYS = {
    *("quant_method", "format", "config_groups", "ignore", EXTENSION, "transform_config", "kv_cache_scheme", "sparsity_config"),
    *("quantization_status", "global_compression_ratio", "version", "provider"),
    *("run_compressed", "dequantize", "use_optimized_inference"),  # how Transformers loads it
}
_GROUP_KEYS = {"targets", "format", "weights", "input_activations", "output_activations"}
_ARGUMENT_KEYS = {*_MXFP4, "dynamic", "scale_dtype", "zp_dtype", "block_structure", "actorder", "observer", "observer_kwargs"}


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """Returns what a `quantization_config` has that is left aside. Raises CheckpointError for keys that change a layer."""
    InputTransforms(config.get("transform_config"), f"{where}.transform_config")  # for its errors
    sparsity = require_object(config.get("sparsity_config"), f"{where}.sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise refusal(f"{where}.sparsity_config", f"stores sparse weights ({sparsity['format']})")
    if is_set(config.get("moe_sparsity_config")):
        raise refusal(f"{where}.moe_sparsity_config", "gives layers different numbers or kinds of experts")
    _check_extension(config, f"{where}.{EXTENSION}")
    notes = unknown_keys(config, _KEYS)
    if is_set(config.get("kv_cache_scheme")):
        notes.append("kv_cache_scheme (the KV cache is not quantized)")
    for name, group in require_object(config.get("config_groups"), f"{where}.config_groups").items():
        group = require_object(group, f"{where}.config_groups.{name}")
        notes += unknown_keys(group, _GROUP_KEYS, f"config_groups.{name}.")
        for key in ("weights", "input_activations"):
            arguments = require_object(group.get(key), f"{where}.config_groups.{name}.{key}")
            if arguments.get("actorder") in ("group", "dynamic"):
                raise refusal(f"{where}.config_groups.{name}.{key}.actorder", "reorders the columns of weights")
            notes += unknown_keys(arguments, _ARGUMENT_KEYS, f"config_groups.{name}.{key}.")
    return notes


def _check_extension(config: dict[str, Any], where: str) -> None:
    extension = require_object(config.get(EXTENSION), where)
    groups = require_object(extension.get("groups"), f"{where}.groups")
    hints = {where: {key: value for key, value in extension.items() if key != "groups"}}
    hints |= {f"{where}.groups.{name}": require_object(hint, f"{where}.groups.{name}") for name, hint in groups.items()}
    for place, hint in hints.items():
        if unknown := hint.keys() - set(_EXTENSION_KEYS):
            # Whatever they mean, they are ours, and may change results.
            found, known = ", ".join(sorted(unknown)), ", ".join(_EXTENSION_KEYS)
            raise CheckpointError(f"{place} has the keys {found}, expected {known}: a newer xpu_fp4 may know more")
    if strays := groups.keys() - require_object(config.get("config_groups"), where).keys():
        raise CheckpointError(f"{where}.groups has {', '.join(sorted(strays))}, which is not in config_groups")


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers under a `quantization_config` of config.json. Raises CheckpointError for any other scheme than MXFP4."""
    root = f"{files.folder}: quantization_config"
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{files.folder}: quantization_config has no config_groups")
    schemes: dict[str, Scheme] = {}
    for name, group in groups.items():
        weight_only = weight_only_scheme(config, name, root)
        scheme = _read_group(group, config.get("format"), weight_only, f"{root}.config_groups.{name}")
        schemes |= {target: scheme for target in group.get("targets") or []}
    layers = {}
    patterns = Patterns(root)
    ignored = NameSet(config.get("ignore") or [], patterns)
    transforms = InputTransforms(config.get("transform_config"), f"{root}.transform_config")
    for tensor in files:
        module, _, kind = tensor.rpartition(".")
        if not any(kind == names.packed for names in _NAMES.values()):
            continue
        if module in ignored:
            raise CheckpointError(f"{files[tensor]} is packed, but quantization_config.ignore lists {module}")
        scheme = _scheme_of(module, schemes, patterns, files, tensor)
        layers[module] = _read_layer(files, module, scheme, tensor, transforms)
    return layers


def _read_layer(files: TensorFiles, module: str, scheme: Scheme, packed: str, transforms: InputTransforms) -> Layer:
    names = Names(*(f"{module}.{name}" for name in names_of(scheme)))
    if packed != names.packed:
        has = "an" if scheme.input_offset else "no"
        where = f"quantization_config.{EXTENSION}"
        raise CheckpointError(
            f"{files[packed]} is packed, but {where} gives {module} {has} input_offset, expected {names.packed}"
        )
    offset = names.input_offset if scheme.input_offset else None
    layer = describe_layer(files, module, scheme, packed, names.scale, names.bias, input_offset=offset)
    size = transforms.size(module, layer.in_features)
    matrix = transforms.matrix(module, files)
    return replace(layer, scheme=replace(scheme, hadamard=size), constants=() if matrix is None else (matrix,))


def write_config(
    scheme: Scheme, ignore: Iterable[str], exceptions: Mapping[str, Scheme] = MappingProxyType({})
) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers are all in one scheme.

    Args:
        scheme: of all but those in ignore and in exceptions.
        ignore: names of layers that are not quantized: in the files and in the model, since readers go by either.
        exceptions: the schemes of layers that have another, by their names of both kinds.

    Raises CheckpointError for a scheme of FP-Quant's, whose global scale the format has no field for.
    """
    for of in (scheme, *exceptions.values()):
        get_scale_mode(of.scale_mode, "a scheme to be written")
    targets = {replace(scheme, hadamard=0): ["Linear"]}  # transforms are elsewhere
    for name, other in sorted(exceptions.items()):
        targets.setdefault(replace(other, hadamard=0), []).append(name)
    groups = {f"group_{i}": of for i, of in enumerate(targets)}
    ignore = sorted(ignore)
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {name: _write_group(of, targets[of]) for name, of in groups.items()},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    if transforms := _write_transforms(scheme, ignore, exceptions):
        config["transform_config"] = {"config_groups": transforms}
    first, *others = (_write_hint(of) for of in targets)
    hints = {name: hint for name, hint in zip(list(groups)[1:], others, strict=True) if hint != first}
    extension = first | ({"groups": hints} if hints else {})
    return config | ({EXTENSION: extension} if extension else {})


def _write_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    activations = _ACTIVATIONS[scheme.mode].in_group
    # scale_dtype is a field of compressed-tensors' own output, and vLLM's reader of older versions asks for it.
    weights = {**_MXFP4, "dynamic": False, "scale_dtype": "torch.uint8"}
    return {
        "targets": targets,
        "format": OFFSET_FORMAT if scheme.input_offset else FORMAT,
        "weights": weights,
        "input_activations": None if activations is None else {**weights, **activations},
        "output_activations": None,
    }


def _write_hint(scheme: Scheme) -> dict[str, Any]:
    """Returns what a group's object under our own key says of a scheme."""
    hint: dict[str, Any] = {} if scheme.scale_mode == "even" else {"scale_mode": scheme.scale_mode}
    activations = _ACTIVATIONS[scheme.mode].in_extension
    if activations is not None:
        hint |= {"activations": activations, "group": scheme.group}
    return hint | ({"input_offset": True} if scheme.input_offset else {})


def _write_transforms(scheme: Scheme, ignore: list[str], exceptions: Mapping[str, Scheme]) -> dict[str, Any]:
    """Makes one entry for each size: for the scheme's own, all layers but some; for others, layers by name."""
    transforms = {}
    for size in sorted({scheme.hadamard, *(other.hadamard for other in exceptions.values())} - {0}):
        if size == scheme.hadamard:
            others = [name for name, other in exceptions.items() if other.hadamard != size]
            where = {"targets": ["Linear"], "ignore": sorted({*ignore, *others})}
        else:
            where = {"targets": sorted(name for name, other in exceptions.items() if other.hadamard == size), "ignore": []}
        apply = [{"location": "input", "inverse": False, **where}, {"location": "weight_input", "inverse": True, **where}]
        transforms[f"hadamard_{size}"] = {"type": "hadamard", "head_dim": size, "apply": apply}
    return transforms


def weight_only_scheme(config: dict[str, Any], group: str, where: str) -> Scheme:
    """The scheme of an entry of config_groups if it has no input_activations: W4A16, or what our own key has instead."""
    where = f"{where}.{EXTENSION}"
    extension = require_object(config.get(EXTENSION), where)
    groups = require_object(extension.get("groups"), f"{where}.groups")
    if group in groups:
        where = f"{where}.groups.{group}"
        extension = require_object(groups[group], where)
    modes = {activations.in_extension: mode for mode, activations in _ACTIVATIONS.items() if activations.in_group is None}
    name = extension.get("activations")
    if name not in modes:
        raise CheckpointError(f"{where}.activations is {name!r}, expected one of {', '.join(filter(None, modes))}")
    scale_mode = get_scale_mode(extension.get("scale_mode", "even"), where)
    shared = _get_group(extension.get("group", 128), f"{where}.group")
    return Scheme(modes[name], scale_mode, shared, input_offset=bool(extension.get("input_offset")))


def activations_scheme(activations: Any, weight_only: Scheme, where: str) -> Scheme:
    """The scheme of a group out of its input_activations; weight_only where they are null."""
    if activations is None:
        return weight_only
    if not isinstance(activations, dict):
        raise CheckpointError(f"{where} is {activations!r}, expected an object")
    if (activations.get("type"), activations.get("num_bits")) == (_MXINT8["type"], _MXINT8["num_bits"]):
        group = _get_group(activations.get("group_size"), f"{where}.group_size")
        _check_arguments(activations, {**_MXINT8, "group_size": group, "dynamic": True}, "MXINT8", where)
        return Scheme("w4a8", weight_only.scale_mode, group, input_offset=weight_only.input_offset)
    _check_arguments(activations, {**_MXFP4, "dynamic": True}, "MXFP4", where)
    return Scheme("w4a4", weight_only.scale_mode, input_offset=weight_only.input_offset)


def _read_group(group: dict[str, Any], outer_format: str | None, weight_only: Scheme, where: str) -> Scheme:
    format = group.get("format") or outer_format
    expected = OFFSET_FORMAT if weight_only.input_offset else FORMAT
    if format != expected:
        raise CheckpointError(f"{where} has the format {format!r}, expected {expected!r}")
    _check_arguments(group.get("weights"), {**_MXFP4, "dynamic": False}, "MXFP4", f"{where}.weights")
    if group.get("output_activations") is not None:
        raise CheckpointError(f"{where}.output_activations is set, expected null: only inputs of a layer are quantized")
    return activations_scheme(group.get("input_activations"), weight_only, f"{where}.input_activations")


def _get_group(value: Any, where: str) -> Group:
    if value not in get_args(Group):
        raise CheckpointError(f"{where} is {value!r}, expected {' or '.join(map(str, get_args(Group)))}")
    return cast(Group, value)


def _check_arguments(arguments: Any, expected: dict[str, Any], name: str, where: str) -> None:
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{where} is {arguments!r}, expected an object")
    found = {key: arguments.get(key, value if key in ("symmetric", "strategy") else None) for key, value in expected.items()}
    wrong = [f"{key} {found[key]!r}, expected {value!r}" for key, value in expected.items() if found[key] != value]
    if arguments.get("scale_dtype") not in (None, "torch.uint8"):
        wrong.append(f"scale_dtype {arguments['scale_dtype']!r}, expected 'torch.uint8'")
    if wrong:
        raise CheckpointError(f"{where} is not {name}: {'; '.join(wrong)}")


def _scheme_of(module: str, schemes: dict[str, Scheme], patterns: Patterns, files: TensorFiles, tensor: str) -> Scheme:
    """An exact name goes before a regex, the first regex of the alphabet before others, and any before the class.

    So compressed-tensors decides; the order of groups does not matter.
    """
    regexes = sorted(target for target in schemes if target.startswith(PREFIX))
    matching = (target for target in regexes if patterns.matches(module, target.removeprefix(PREFIX)))
    target = module if module in schemes else next(matching, "Linear")
    # The class of what is packed cannot be seen in the files; it is Linear for all that these layers can be.
    if target in schemes:
        return schemes[target]
    raise CheckpointError(f"{files[tensor]} is packed, but no target in quantization_config matches {module}: {list(schemes)}")
