# SPDX-License-Identifier: Apache-2.0
"""compressed-tensors' `mxfp4-pack-quantized`: `weight_packed` uint8 [N, K/2] and `weight_scale` uint8 [N, K/32] per module.

llm-compressor writes it; vLLM and Transformers read it. A group's `input_activations` make it W4A4 (MXFP4) or W4A8 (int8 in
groups of 32 or 128), their absence W4A16 or, where our own key of the `quantization_config` says so, W4A8.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast, get_args

from .._library import BLOCK
from ..functional import Group, Mode
from .description import Layer, Scheme, describe_layer, get_scale_mode
from .errors import CheckpointError
from .keys import is_set, refusal, require_object, unknown_keys
from .patterns import PREFIX, NameSet, Patterns
from .tensor_files import TensorFiles

METHOD = "compressed-tensors"
FORMAT = "mxfp4-pack-quantized"
PACKED, SCALE = "weight_packed", "weight_scale"


class Names(NamedTuple):
    """What a layer's tensors are called, behind its own name and a dot."""

    packed: str
    scale: str
    bias: str
    input_offset: str


def names_of(scheme: Scheme) -> Names:
    """What the tensors of a layer in that scheme are called; input_offset is there only if it has one."""
    return Names(PACKED, SCALE, "bias", "input_offset")


EXTENSION = "xpu_fp4"
"""A key of quantization_config that other readers skip: an object of _EXTENSION_KEYS.

`scale_mode` is the rule for MXFP4 activations, if it is not `even`. `activations`, "mxint8", is what activations that a group
leaves alone are quantized to, and `group` how many of them share a scale.
"""
_EXTENSION_KEYS = ("scale_mode", "activations", "group")

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
# Transforms at these locations are in the stored weights already.
_OFFLINE = {"weight_input", "weight_output"}


def check_keys(config: dict[str, Any], where: str) -> list[str]:
    """What is left aside of a `quantization_config`. Raises CheckpointError for keys that change what a layer computes."""
    _refuse_transforms(config.get("transform_config"), f"{where}.transform_config")
    sparsity = require_object(config.get("sparsity_config"), f"{where}.sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise refusal(f"{where}.sparsity_config", f"stores sparse weights ({sparsity['format']})")
    if is_set(config.get("moe_sparsity_config")):
        raise refusal(f"{where}.moe_sparsity_config", "gives layers different numbers or kinds of experts")
    if unknown := require_object(config.get(EXTENSION), f"{where}.{EXTENSION}").keys() - set(_EXTENSION_KEYS):
        # Whatever they mean, they are ours, and may change results.
        found, known = ", ".join(sorted(unknown)), ", ".join(_EXTENSION_KEYS)
        raise CheckpointError(f"{where}.{EXTENSION} has the keys {found}, expected {known}: a newer xpu_fp4 may know more")
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


def _refuse_transforms(config: Any, where: str) -> None:
    for name, scheme in require_object(require_object(config, where).get("config_groups"), f"{where}.config_groups").items():
        scheme = require_object(scheme, f"{where}.config_groups.{name}")
        for apply in scheme.get("apply") or []:
            location = require_object(apply, f"{where}.config_groups.{name}.apply").get("location")
            if location not in _OFFLINE:
                what = f"applies a {scheme.get('type')} transform (a rotation) at every {location} of {apply.get('targets')}"
                raise refusal(f"{where}.config_groups.{name}", what)


def read_layers(config: dict[str, Any], files: TensorFiles) -> dict[str, Layer]:
    """The layers under a `quantization_config` of config.json. Raises CheckpointError for any other scheme than MXFP4."""
    weight_only = weight_only_scheme(config, f"{files.folder}: quantization_config")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{files.folder}: quantization_config has no config_groups")
    schemes: dict[str, Scheme] = {}
    for name, group in groups.items():
        where = f"{files.folder}: quantization_config.config_groups.{name}"
        scheme = _read_group(group, config.get("format"), weight_only, where)
        schemes |= {target: scheme for target in group.get("targets") or []}
    layers = {}
    patterns = Patterns(f"{files.folder}: quantization_config")
    ignored = NameSet(config.get("ignore") or [], patterns)
    for tensor in files:
        module, _, kind = tensor.rpartition(".")
        if kind != PACKED:
            continue
        if module in ignored:
            raise CheckpointError(f"{files[tensor]} is packed, but quantization_config.ignore lists {module}")
        scheme = _scheme_of(module, schemes, patterns, files, tensor)
        layers[module] = describe_layer(files, module, scheme, tensor, f"{module}.{SCALE}", f"{module}.bias")
    return layers


def write_config(scheme: Scheme, ignore: Iterable[str], exceptions: Mapping[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config` of a model whose linear layers, but the ones in `ignore`, are all in one scheme."""
    activations = _ACTIVATIONS[scheme.mode]
    # scale_dtype is a field of compressed-tensors' own output, and vLLM's reader of older versions asks for it.
    weights = {**_MXFP4, "dynamic": False, "scale_dtype": "torch.uint8"}
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": FORMAT,
                "weights": weights,
                "input_activations": None if activations.in_group is None else {**weights, **activations.in_group},
                "output_activations": None,
            }
        },
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    extension: dict[str, Any] = {} if scheme.scale_mode == "even" else {"scale_mode": scheme.scale_mode}
    if activations.in_extension is not None:
        extension |= {"activations": activations.in_extension, "group": scheme.group}
    return config | ({EXTENSION: extension} if extension else {})


def weight_only_scheme(config: dict[str, Any], where: str) -> Scheme:
    """The scheme of the groups without input_activations: W4A16, or what our own key has instead."""
    where = f"{where}.{EXTENSION}"
    extension = require_object(config.get(EXTENSION), where)
    modes = {activations.in_extension: mode for mode, activations in _ACTIVATIONS.items() if activations.in_group is None}
    name = extension.get("activations")
    if name not in modes:
        raise CheckpointError(f"{where}.activations is {name!r}, expected one of {', '.join(filter(None, modes))}")
    scale_mode = get_scale_mode(extension.get("scale_mode", "even"), where)
    return Scheme(modes[name], scale_mode, _get_group(extension.get("group", 128), f"{where}.group"))


def activations_scheme(activations: Any, weight_only: Scheme, where: str) -> Scheme:
    """The scheme of a group out of its input_activations; weight_only where they are null."""
    if activations is None:
        return weight_only
    if not isinstance(activations, dict):
        raise CheckpointError(f"{where} is {activations!r}, expected an object")
    if (activations.get("type"), activations.get("num_bits")) == (_MXINT8["type"], _MXINT8["num_bits"]):
        group = _get_group(activations.get("group_size"), f"{where}.group_size")
        _check_arguments(activations, {**_MXINT8, "group_size": group, "dynamic": True}, "MXINT8", where)
        return Scheme("w4a8", weight_only.scale_mode, group)
    _check_arguments(activations, {**_MXFP4, "dynamic": True}, "MXFP4", where)
    return Scheme("w4a4", weight_only.scale_mode)


def _read_group(group: dict[str, Any], outer_format: str | None, weight_only: Scheme, where: str) -> Scheme:
    format = group.get("format") or outer_format
    if format != FORMAT:
        raise CheckpointError(f"{where} has the format {format!r}, expected {FORMAT!r}")
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
