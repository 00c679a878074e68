# SPDX-License-Identifier: Apache-2.0
"""Quantizes a model directory into compressed-tensors' MXFP4 format, shard by shard.

Memory: one shard of the input, mapped, and the shard that it becomes. The output directory appears whole, by a rename, when all
is done; until then the work is in `OUT.partial`, which has no config.json, so nothing loads it. A run that was interrupted goes
on where it stopped, after the last shard that was finished.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .._library import BLOCK
from ..functional import Mode, ScaleMode, check_mode, quantize
from . import compressed_tensors
from .description import Scheme
from .errors import CheckpointError
from .models import skeleton
from .patterns import PREFIX, NameSet, Patterns
from .placement import names_in_model
from .reader import CONFIG, quantization_config, read_config
from .tensor_files import INDEX, TensorFiles
from .untrusted import model_files, open_file, read_json

PARTIAL = ".partial"
_JOB = "job.json"
_LOCK = "job.lock"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_FLOATS = {"F16", "BF16", "F32"}
_NAN_SCALE = 255
# Linear layers of single experts, which Transformers' modules fuse.
_EXPERT = re.compile(r"\.experts\.\d+\.")

Progress = Callable[[int, int], None]
"""Called with the bytes of input that are done, and all bytes."""


@dataclass(frozen=True)
class Plan:
    """What quantize_checkpoint will do: the linear layers it quantizes, and those it leaves as they are."""

    source: Path
    files: TensorFiles
    quantized: tuple[str, ...]
    kept: tuple[str, ...]


def plan_quantization(source: str | PathLike[str], ignore: Sequence[str] | None = None) -> Plan:
    """Which linear layers of a Transformers model directory would be quantized.

    Args:
        source: a directory with config.json and safetensors.
        ignore: names of modules, or `re:` and a regex that matches from the beginning of a name; by default lm_head.

    Raises:
        CheckpointError: the model is quantized already, its files are damaged, or a layer's K is no multiple of 32.
        ValueError: an entry of ignore matches no linear layer.
        ImportError: transformers is missing, which knows what the model's modules are.
    """
    source = Path(source)
    found = quantization_config(source)
    if found is not None:
        raise CheckpointError(f"{source} is quantized already, by {found.get('quant_method')!r}: start from its original")
    files = TensorFiles(source)
    linears, others = _linear_layers(source, files)
    names = [*linears, *others]
    kept = {*others, *_ignored(names, ["lm_head"] if ignore is None else ignore, strict=ignore is not None)}
    quantized = [name for name in linears if name not in kept]
    if not quantized:
        raise CheckpointError(f"{source} has no linear layer to quantize; kept: {', '.join(sorted(kept)) or 'none'}")
    for name in quantized:
        _check_weight(files, f"{name}.weight")
    return Plan(source, files, tuple(quantized), tuple(sorted(kept)))


def quantize_checkpoint(
    plan: Plan,
    out: str | PathLike[str],
    *,
    mode: Mode = "w4a4",
    scale_mode: ScaleMode = "even",
    progress: Progress = lambda done, total: None,
) -> Path:
    """Writes the planned MXFP4 checkpoint into the new directory `out`, and returns its path.

    Weights are rounded to nearest, their scales by scale_mode. Tokenizer and other small files are copied. Interrupted, call it
    again with the same arguments to go on.

    Raises:
        ValueError: there is no such mode.
        FileExistsError: `out` is there and not empty.
        CheckpointError: a weight holds NaN or Inf.
        BlockingIOError: another process is writing the same output.
    """
    check_mode(mode)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: give a new directory")
    partial = out.with_name(out.name + PARTIAL)
    with _only_writer(partial):
        _begin_or_resume(partial, _job(plan, mode, scale_mode), {file.name for file in plan.files.files})
        total = sum(file.stat().st_size for file in plan.files.files)
        done = 0
        for file in plan.files.files:
            target = partial / file.name
            if not target.exists():
                _write_shard(plan, file, target, scale_mode)
            done += file.stat().st_size
            progress(done, total)
        _copy_small_files(plan.source, partial)
        _write_index(partial, [partial / file.name for file in plan.files.files])
        config = read_config(plan.source)
        config["quantization_config"] = compressed_tensors.write_config(Scheme(mode, scale_mode), plan.kept)
        _write_atomically(partial / CONFIG, json.dumps(config, indent=2))
        for name in (_JOB, _LOCK):
            (partial / name).unlink()
        _sync_folder(partial)
        partial.rename(out)
        _sync_folder(out.parent)
    return out


def _linear_layers(source: Path, files: TensorFiles) -> tuple[list[str], list[str]]:
    """Names of the linear layers in the files, and of further modules that readers of the format might take for such.

    Those are linear layers whose weight is another module's (tied), and routers.
    """
    model = skeleton(source)
    modules = dict(model.named_modules())
    linears, others = [], []
    found: set[str] = set()
    kinds: set[str] = set()
    for tensor in files:
        name, _, kind = tensor.rpartition(".")
        in_model = next((n for n in names_in_model(model, name) if n in modules), None)
        module = None if in_model is None else modules[in_model]
        found.add(in_model or name)
        if kind != "weight":
            continue
        if type(module) is nn.Linear or (module is None and _EXPERT.search(name)):
            linears.append(name)
        elif len(files[tensor].shape) == 2 and not isinstance(module, nn.Embedding):
            others.append(name)
            kinds.add(type(module).__name__)
    if not linears:
        raise CheckpointError(f"{source} has no nn.Linear to quantize; its weights are in {', '.join(sorted(kinds)) or 'none'}")
    tied = [name for name, module in modules.items() if type(module) is nn.Linear and name not in found]
    return linears, [*others, *tied]


def _ignored(linears: Collection[str], ignore: Sequence[str], *, strict: bool) -> set[str]:
    kept: set[str] = set()
    patterns = Patterns("ignore")
    for pattern in ignore:
        entry = NameSet([pattern], patterns)
        matched = {name for name in linears if name in entry}
        if not matched and strict:
            raise ValueError(f"ignore has {pattern!r}, which matches no linear layer; a regex starts with {PREFIX}")
        kept |= matched
    return kept


def _check_weight(files: TensorFiles, name: str) -> None:
    info = files[name]
    if info.dtype not in _FLOATS:
        raise CheckpointError(f"{info} has dtype {info.dtype}, expected one of {', '.join(sorted(_FLOATS))}")
    if len(info.shape) != 2 or info.shape[1] % BLOCK != 0:
        raise CheckpointError(
            f"{info} has shape {list(info.shape)}, expected [N, K] with K a multiple of {BLOCK}: leave the layer out by ignore"
        )


def _job(plan: Plan, mode: Mode, scale_mode: ScaleMode) -> dict[str, Any]:
    """What a run must have in common with an interrupted one to go on with its shards."""
    stats = {file.name: file.stat() for file in plan.files.files}
    return {
        "source": str(plan.source.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "mode": mode,
        "scale_mode": scale_mode,
        "kept": list(plan.kept),
    }


@contextmanager
def _only_writer(partial: Path) -> Iterator[None]:
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is writing {partial}") from None
        yield


def _begin_or_resume(partial: Path, job: dict[str, Any], shards: set[str]) -> None:
    """Keeps the finished shards of the same job; throws away those of another, and what an interrupted write has left."""
    path = partial / _JOB
    resumed = path.exists() and read_json(path) == job
    kept = {_LOCK, _JOB, *shards} if resumed else {_LOCK}
    for entry in partial.iterdir():
        if entry.name in kept:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if not resumed:
        _write_atomically(path, json.dumps(job))


def _write_shard(plan: Plan, file: Path, target: Path, scale_mode: ScaleMode) -> None:
    quantized = {f"{name}.weight" for name in plan.quantized}
    tensors: dict[str, Tensor] = {}
    for name, info in plan.files.items():
        if info.file != file:
            continue
        tensor = plan.files.tensor(name)
        if name in quantized:
            codes, scale = (t.view(torch.uint8) for t in quantize(tensor, scale_mode))
            if (scale == _NAN_SCALE).any():
                raise CheckpointError(f"{info} holds NaN or Inf")
            module = name.removesuffix(".weight")
            tensors[f"{module}.{compressed_tensors.PACKED}"] = codes
            tensors[f"{module}.{compressed_tensors.SCALE}"] = scale
        else:
            tensors[name] = tensor
    temporary = target.with_name(target.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{target} cannot be written: {error}. Finished shards are kept: make room and run it again") from error
    shutil.copymode(target.with_name(_JOB), temporary)  # safetensors' files are for their owner only
    _publish(temporary, target)


def _copy_small_files(source: Path, partial: Path) -> None:
    # Subfolders hold parts like sentence-transformers' pooling; their config.json and their weights are theirs.
    for path in model_files(source):
        if path.parent == source and (path.name.endswith(_WEIGHT_FILES) or path.name == CONFIG):
            continue
        target = partial / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_file(path, source) as content, target.open("wb") as copy:
            shutil.copyfileobj(content, copy)


def _write_index(partial: Path, shards: list[Path]) -> None:
    if len(shards) == 1 and shards[0].name == "model.safetensors":
        return
    from safetensors import safe_open

    weight_map: dict[str, str] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            weight_map |= dict.fromkeys(opened.keys(), shard.name)
    index = {"metadata": {"total_size": sum(shard.stat().st_size for shard in shards)}, "weight_map": weight_map}
    _write_atomically(partial / INDEX, json.dumps(index, indent=2))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _publish(temporary, path)


def _publish(temporary: Path, path: Path) -> None:
    """Gives a written file its name once its content is on disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
