# SPDX-License-Identifier: Apache-2.0
"""Quantizes a model directory, shard by shard: into gpt-oss' format if that is its experts' own, else compressed-tensors'.

Memory: one shard of the input, mapped, and the shard that it becomes. A run that was interrupted goes on where it stopped,
after the last shard that was finished.
"""

import json
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, get_args

from torch import Tensor

from .._library import BLOCK
from .._text import shorten
from ..functional import Hadamard, Mode, ScaleMode, check_mode
from . import compressed_tensors, gpt_oss, schemas
from .description import Scheme, get_scale_mode
from .errors import CheckpointError, printable
from .fused import FusedExperts, fused_experts, split, stack
from .matrices import FLOATS, Module, modules_with_matrices
from .models import skeleton
from .output import new_directory, write_index, write_tensors, write_text
from .patterns import PREFIX, NameSet, Patterns
from .quantized import QuantizedLinear, round_to_nearest, schemes_of
from .reader import CONFIG, quantization_config, read_config
from .tensor_files import TensorFiles
from .untrusted import check_type, model_files, open_file, read_json_list

_CALIBRATED = ".calibrated"  # hidden, since no hidden folder of a source is copied
_WEIGHT_FILES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot"),
    *(".tflite", ".mlmodel", ".npz", ".nemo", ".index.json"),
)

Progress = Callable[[int, int], None]
"""Called with the bytes of input that are done, and all bytes."""


@dataclass(frozen=True)
class Plan:
    """What quantize_checkpoint will do: the linear layers and experts it quantizes, and the modules it leaves as they are.

    Kept are linear layers, by default or by ignore, and all other modules that have a matrix but for embeddings.
    """

    source: Path
    files: TensorFiles
    quantized: tuple[str, ...]
    kept: tuple[str, ...]
    ignore: tuple[str, ...]
    """What is kept, by its names in the files and in the model, which readers go by."""
    in_model: Mapping[str, str]
    """The names of the quantized layers in the model, by those in the files; of experts that it fuses it has no modules."""
    experts: tuple[FusedExperts, ...] = ()
    """What the files have in one tensor for all experts of a layer, and is quantized."""

    @property
    def is_gpt_oss(self) -> bool:
        """Whether the output has gpt-oss' format, in which experts are all that is quantized."""
        return any(experts.is_gpt_oss for experts in self.experts)


def plan_quantization(
    source: str | PathLike[str], ignore: Sequence[str] | None = None, include: Sequence[str] | None = None
) -> Plan:
    """Says which linear layers and experts of a Transformers model directory would be quantized.

    Of gpt-oss these are the experts, since its own format has nothing else. Kept by default, since readers of the format hold
    them in high precision: output heads, routers and gates of experts, layers with fewer than 32 rows, what brings images and
    sound to a language model, and layers that the model leaves out (multi-token prediction).

    Args:
        source: a directory with config.json and safetensors.
        ignore: further linear layers to keep, by their names in the files, or `re:` and a regex that matches from the beginning
            of a name.
        include: linear layers to quantize although they are kept by default, named in the same way.

    Raises:
        CheckpointError: the model is quantized already, its files are damaged, or a layer's K is no multiple of 32.
        ValueError: an entry of ignore or include matches no linear layer, or include has one of gpt-oss.
        ImportError: transformers is missing, which knows what the model's modules are.

    Matrices that are in no linear layer or known kind of experts, and layers of which readers fuse a kept one with a quantized
    one, are named in a warning.
    """
    source = Path(source)
    found = quantization_config(source)
    if found is not None:
        raise CheckpointError(f"{source} is quantized already, by {found.get('quant_method')!r}: start from its original")
    files = TensorFiles(source)
    model = skeleton(source)
    modules = modules_with_matrices(model, files)
    ignored = _matching(modules, ignore or (), "ignore")
    experts = tuple(fused_experts(model, files, [m for m in modules if m.name not in ignored]))
    fused = {of.in_model for of in experts}
    linears = [module for module in modules if module.is_linear]
    wanted = _matching([m for m in modules if m.is_linear or m.in_model in fused], include or (), "include")
    others = [module for module in modules if module.in_model not in fused]
    kept = {module.name for module in others if not module.is_linear or (module.by_default and module.name not in wanted)}
    if any(of.is_gpt_oss for of in experts):
        kept |= {module.name for module in linears}
        if unwanted := wanted & kept:
            raise ValueError(f"include has {shorten(sorted(unwanted))}, but gpt-oss' format has experts alone")
    kept |= ignored
    quantized = [module.name for module in linears if module.name not in kept]
    if not quantized and not experts:
        raise CheckpointError(f"{source} has no linear layer to quantize; kept: {', '.join(sorted(kept)) or 'none'}")
    for name in quantized:
        _check_weight(files, f"{name}.weight")
    _warn_of_others(source, [module for module in others if module.name not in ignored])
    _warn_of_fused(source, linears, kept)
    names = {name for module in modules if module.name in kept for name in (module.name, module.in_model)}
    in_model = {module.name: module.in_model for module in linears if module.name not in kept}
    return Plan(source, files, tuple(quantized), tuple(sorted(kept)), tuple(sorted(names)), in_model, experts)


class Calibration(Protocol):
    """Rounds layers of a plan on data. It may take long, so it keeps what it has in a folder, and goes on from there."""

    def check(self, schemes: Mapping[str, Scheme]) -> None:
        """Raises ValueError, before anything is written, for a scheme that it cannot do."""
        ...

    def job(self) -> dict[str, Any]:
        """JSON that tells it from others: with the same, what is in the folder is the same."""
        ...

    def run(self, plan: Plan, schemes: Mapping[str, Scheme], folder: Path) -> Mapping[str, QuantizedLinear]:
        """Returns what becomes of layers, by their names in the files, and of fused experts by those of `FusedExperts.layer`.

        Of those that are not there, nothing is known.
        """
        ...


def quantize_checkpoint(
    plan: Plan,
    out: str | PathLike[str],
    *,
    mode: Mode = "w4a8",
    scale_mode: ScaleMode = "even",
    hadamard: Hadamard = 0,
    offset: bool = False,
    keep_high: Sequence[str] = (),
    calibration: Calibration | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Writes the planned MXFP4 checkpoint into the new directory `out`, and returns its path.

    Weights are rounded to nearest or, with a calibration, by GPTQ; their scales are by scale_mode. Tokenizer and other small
    files are copied. Interrupted, call it again with the same arguments to go on.

    Args:
        mode, scale_mode, hadamard: as for MXFP4Linear, but without FP-Quant's rules.
        offset: whether each layer subtracts its inputs' mean, which takes a calibration.
        keep_high: layers that compute in W4A16, by the last part of their names, the whole name in the files, or `re:` and a
            regex; all fused experts of a layer are one, `...experts`.
        calibration: what `xpu_fp4.calibration.CheckpointCalibration`, or LlmCompressorCalibration, makes of token ids.

    Raises:
        ValueError: there is no such mode, an entry of keep_high names no layer, an offset without a calibration, a layer whose
            K is no multiple of hadamard, a scheme that the calibration cannot do, a hadamard or keep_high for gpt-oss, whose
            format has no place for either.
        FileExistsError: `out` is there and not empty.
        CheckpointError: a weight holds NaN or Inf.
        BlockingIOError: another process is writing the same output.
    """
    check_mode(mode)
    if offset and calibration is None:
        raise ValueError("offset is the mean of a layer's inputs: it takes a calibration")
    scheme = Scheme(mode, get_scale_mode(scale_mode, "quantize_checkpoint"), hadamard=hadamard, input_offset=offset)
    schemes = schemes_of([*plan.quantized, *(experts.name for experts in plan.experts)], scheme, keep_high)
    _check_hadamard(plan, hadamard)
    if plan.is_gpt_oss and (hadamard or keep_high):
        what = "hadamard" if hadamard else "keep_high"
        raise ValueError(f"{what} is given, but gpt-oss' format has no place for it: expected one scheme without a Hadamard")
    if calibration is not None:
        calibration.check(schemes)
    out = Path(out)
    job = _job(plan, mode, scale_mode) | {"hadamard": hadamard, "offset": offset, "keep_high": list(keep_high)}
    job |= {} if calibration is None else {"calibration": calibration.job()}
    with new_directory(out, job, {_CALIBRATED, *(file.name for file in plan.files.files)}) as partial:
        calibrated: Mapping[str, QuantizedLinear] = {}
        if calibration is not None:
            (partial / _CALIBRATED).mkdir(exist_ok=True)
            calibrated = calibration.run(plan, schemes, partial / _CALIBRATED)
        total = sum(file.stat().st_size for file in plan.files.files)
        done = 0
        for file in plan.files.files:
            target = partial / file.name
            if not target.exists():
                _write_shard(plan, file, target, schemes, calibrated)
            done += file.stat().st_size
            progress(done, total)
        _copy_small_files(plan.source, partial)
        write_index(partial, [partial / file.name for file in plan.files.files])
        config = read_config(plan.source)
        config["quantization_config"] = _describe(plan, scheme, schemes, calibrated)
        write_text(partial / CONFIG, json.dumps(config, indent=2))
        shutil.rmtree(partial / _CALIBRATED, ignore_errors=True)
    return out


def _describe(
    plan: Plan, scheme: Scheme, schemes: Mapping[str, Scheme], calibrated: Mapping[str, QuantizedLinear]
) -> dict[str, Any]:
    """The quantization_config."""
    if plan.is_gpt_oss:
        return gpt_oss.write_config(scheme, plan.ignore)
    in_model = {name: (name, plan.in_model[name]) for name in plan.quantized}
    # Fused experts are written as linear layers, which a pattern names.
    in_model |= {e.name: (_each_of(e.name), _each_of(e.in_model)) for e in plan.experts}
    written = {name: _scheme_written(name, schemes, calibrated) for name in schemes}
    exceptions = {n: s for name, s in written.items() if s != scheme for n in in_model[name]}
    return compressed_tensors.write_config(scheme, plan.ignore, exceptions)


def _each_of(experts: str) -> str:
    return rf"{PREFIX}{re.escape(experts)}\.\d+\."


def _scheme_written(name: str, schemes: Mapping[str, Scheme], calibrated: Mapping[str, QuantizedLinear]) -> Scheme:
    return calibrated[name].scheme if name in calibrated else replace(schemes[name], input_offset=False)


def _check_hadamard(plan: Plan, hadamard: Hadamard) -> None:
    if hadamard not in get_args(Hadamard):
        raise ValueError(f"hadamard is {hadamard!r}, expected 0 (none), 32, 64 or 128")
    columns = {f"{name}.weight": -1 for name in plan.quantized}
    columns |= {name: -2 if e.kind.is_transposed else -1 for e in plan.experts for name in e.tensors.values()}
    for name, axis in columns.items() if hadamard else ():
        info = plan.files[name]
        if info.shape[axis] % hadamard != 0:
            shape = {2: "[N, K]", 3: "[E, N, K]" if axis == -1 else "[E, K, N]"}[len(info.shape)]
            raise ValueError(
                f"{info} has shape {list(info.shape)}, expected {shape} with K a multiple of hadamard, {hadamard}: choose a "
                "smaller one, or leave the layer out by ignore"
            )


def _matching(modules: Iterable[Module], patterns: Sequence[str], argument: str) -> set[str]:
    matching: set[str] = set()
    compiled = Patterns(argument)
    for pattern in patterns:
        entry = NameSet([pattern], compiled)
        matched = {module.name for module in modules if module.name in entry}
        if not matched:
            raise ValueError(f"{argument} has {pattern!r}, which matches no linear layer; a regex starts with {PREFIX}")
        matching |= matched
    return matching


def _warn_of_others(source: Path, modules: Iterable[Module]) -> None:
    others = [module for module in modules if not module.is_linear and not module.by_default]
    if others:
        share = sum(module.numel for module in others) / sum(module.numel for module in modules)
        names = shorten([module.name for module in others])
        message = f"{source}: {share:.0%} of the weights are not quantized, in no linear layer: {names}"
        warnings.warn(printable(message), stacklevel=3)


def _warn_of_fused(source: Path, linears: Iterable[Module], kept: Collection[str]) -> None:
    layers: defaultdict[str, dict[bool, list[str]]] = defaultdict(lambda: {True: [], False: []})
    for module in linears:
        layers[module.fused][module.name in kept].append(module.name)
    mixed = [f"{shorten(of[True])} beside {shorten(of[False])}" for of in layers.values() if of[True] and of[False]]
    if mixed:
        message = f"{source}: vLLM cannot load a fused layer of two precisions, kept is {shorten(mixed)}"
        warnings.warn(printable(message), stacklevel=3)


def _check_weight(files: TensorFiles, name: str) -> None:
    info = files[name]
    if info.dtype not in FLOATS:
        raise CheckpointError(f"{info} has dtype {info.dtype}, expected one of {', '.join(sorted(FLOATS))}")
    if len(info.shape) != 2 or info.shape[1] % BLOCK != 0:
        raise CheckpointError(
            f"{info} has shape {list(info.shape)}, expected [N, K] with K a multiple of {BLOCK}: leave the layer out by ignore"
        )


def _job(plan: Plan, mode: Mode, scale_mode: ScaleMode) -> dict[str, Any]:
    """Returns what a run must have in common with an interrupted one to go on with its shards."""
    stats = {file.name: file.stat() for file in plan.files.files}
    return {
        "source": str(plan.source.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "mode": mode,
        "scale_mode": scale_mode,
        "kept": list(plan.kept),
    }


def _write_shard(
    plan: Plan, file: Path, target: Path, schemes: Mapping[str, Scheme], calibrated: Mapping[str, QuantizedLinear]
) -> None:
    tensors: dict[str, Tensor] = {}
    fused = {tensor: (experts, projection) for experts in plan.experts for projection, tensor in experts.tensors.items()}
    for name, info in plan.files.items():
        if info.file != file:
            continue
        tensor = plan.files.tensor(name)
        module, _, kind = name.rpartition(".")
        if name in fused:
            experts, projection = fused[name]
            tensors |= _tensors_of_experts(experts, projection, tensor, schemes[experts.name], calibrated, str(info))
            continue
        if name.removesuffix("_bias") in fused:
            tensors[name] = _bias_of_experts(*fused[name.removesuffix("_bias")], tensor, calibrated)
            continue
        if module in schemes and kind == "weight":
            tensors |= _tensors_of(module, calibrated.get(module) or round_to_nearest(tensor, schemes[module], str(info)))
        elif not (module in calibrated and kind == "bias" and calibrated[module].bias is not None):
            tensors[name] = tensor
    write_tensors(tensors, target, {"format": "pt"})


def _tensors_of(module: str, layer: QuantizedLinear) -> dict[str, Tensor]:
    names = compressed_tensors.names_of(layer.scheme)
    parts = {
        names.packed: layer.codes,
        names.scale: layer.scale,
        names.bias: layer.bias,
        names.input_offset: layer.input_offset,
    }
    return {f"{module}.{name}": part for name, part in parts.items() if part is not None}


def _tensors_of_experts(
    experts: FusedExperts,
    projection: str,
    weight: Tensor,
    scheme: Scheme,
    calibrated: Mapping[str, QuantizedLinear],
    where: str,
) -> dict[str, Tensor]:
    layers = (
        calibrated.get(experts.layer(projection, expert)) or round_to_nearest(matrix, scheme, where)
        for expert, matrix in enumerate(experts.matrices(weight))
    )
    if experts.is_gpt_oss:
        blocks, scales = stack(layers, len(weight))
        name = experts.tensors[projection]
        return {f"{name}{gpt_oss.PACKED}": blocks, f"{name}{gpt_oss.SCALE}": scales}
    names = experts.parts[projection]
    tensors: dict[str, Tensor] = {}
    for expert, layer in enumerate(layers):
        for part, rows in zip(names, split(layer, len(names)), strict=True):
            tensors |= _tensors_of(f"{experts.name}.{expert}.{part}", rows)
    return tensors


def _bias_of_experts(experts: FusedExperts, projection: str, bias: Tensor, calibrated: Mapping[str, QuantizedLinear]) -> Tensor:
    """[E, N], each expert's as the calibration has left it."""
    rows = bias.clone()
    for expert in range(len(bias)):
        layer = calibrated.get(experts.layer(projection, expert))
        if layer is not None and layer.bias is not None:
            rows[expert] = layer.bias
    return rows


def _copy_small_files(source: Path, partial: Path) -> None:
    """Copies all but hidden files, the configuration, and weights: the model's, and the same in other formats."""
    parts = _parts(source)
    for path in model_files(source):
        name = path.relative_to(source)
        is_weights = path.name.endswith(_WEIGHT_FILES) and name.parts[0] not in parts
        is_ours = partial in path.parents  # the output may be in the source
        if is_weights or is_ours or name == Path(CONFIG):
            continue
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_file(path, source) as content, target.open("wb") as copy:
            shutil.copyfileobj(content, copy)


def _parts(source: Path) -> set[str]:
    """Folders of further modules around the model, with weights of their own, as sentence-transformers has them."""
    path = source / "modules.json"
    modules = read_json_list(path) if path.exists() else []
    check_type(modules, list[schemas.Part], f"{path}: modules")
    return {module["path"] for module in modules if module.get("path")}
