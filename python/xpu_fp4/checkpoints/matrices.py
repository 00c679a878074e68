# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model have matrices, and which of them readers of MXFP4 checkpoints hold in high precision."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .._library import BLOCK
from ..moe import PROJECTIONS, is_experts
from .names import names_in_model
from .tensor_files import TensorFiles, TensorInfo

FLOATS = {"F16", "BF16", "F32"}
_FEW_ROWS = 32
_HEAD = re.compile(r"(.*\.)?lm_head")
_ROUTER = re.compile(r"(.*\.)?(gate|shared_expert_gate|\w*router\w*)(\..*)?")
# Between a tower and its language model.
_PROJECTOR = re.compile(r".*(projector|merger|connector|resampler|embed_vision|embed_audio).*")
_EXPERT = re.compile(r"(.*\.experts)\.\d+\..*")
# Linear layers that vLLM makes one of.
_FUSED = (
    *(("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj")),
    *(("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa")),
)


@dataclass(frozen=True)
class Module:
    """A module with a matrix."""

    name: str
    """The name that files have for it."""
    in_model: str
    is_linear: bool
    """Whether it is an nn.Linear or, of experts that Transformers fuses, was one."""
    rows: int
    numel: int
    by_default: bool
    """Whether it is kept by default or, if it is not linear, nobody would expect it to be quantized."""
    tensor: str = ""
    """The matrix, in the files; none of a tied weight."""
    projection: str | None = None
    """A matrix of all experts of a layer has this name in their module."""

    @property
    def fused(self) -> str:
        """Returns one name for all matrices that readers make one layer of."""
        if match := _EXPERT.fullmatch(self.in_model):
            return match[1]
        owner, _, name = self.in_model.rpartition(".")
        return f"{owner}.{next((shards[0] for shards in _FUSED if name in shards), name)}"


def modules_with_matrices(model: nn.Module, files: TensorFiles) -> list[Module]:
    """Modules in the files that have a weight of two or more dimensions, embeddings aside, and linear layers with tied weights.

    model is what the files are of, and may be on the meta device. A module with several such weights is there several times.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = names_in_model(model, files)
    found = [module for tensor in files if (module := _describe(modules, files[tensor], names[tensor])) is not None]
    rows: Counter[str] = Counter()
    for module in found:
        rows[module.fused] += module.rows
    is_kept = _kept_by_default(model)
    found = [
        replace(module, by_default=module.by_default or is_kept(module.in_model) or rows[module.fused] < _FEW_ROWS)
        for module in found
    ]
    loaded = {module.in_model for module in found}
    tied = [name for name, module in modules.items() if type(module) is nn.Linear and name not in loaded]
    return [*found, *(Module(name, name, is_linear=False, rows=0, numel=0, by_default=True) for name in tied)]


def _describe(modules: dict[str, nn.Module], info: TensorInfo, candidates: list[str]) -> Module | None:
    """The module that a tensor is a matrix of; None if it is none, or an embedding."""
    kind = candidates[0].rpartition(".")[2]
    owners = [candidate.rpartition(".")[0] for candidate in candidates]
    in_model = next((owner for owner in owners if owner in modules), None)
    projection = kind if in_model is not None and is_experts(modules[in_model]) and kind in PROJECTIONS else None
    if in_model is None:
        in_model = next((o for o in owners if (match := _EXPERT.fullmatch(o)) and match[1] in modules), None)
        is_linear = kind == "weight" and in_model is not None
        by_default = False
    else:
        module = modules[in_model]
        is_linear = kind == "weight" and type(module) is nn.Linear
        by_default = not is_linear and (isinstance(module, _ConvNd) or not _fits(info.shape))
        if isinstance(module, nn.Embedding):
            return None
    if not is_linear and (len(info.shape) < 2 or info.dtype not in FLOATS):
        return None
    rows = info.shape[0] if is_linear else _FEW_ROWS
    name = info.name.rpartition(".")[0]
    return Module(name, in_model or owners[0], is_linear, rows, math.prod(info.shape), by_default, info.name, projection)


def _fits(shape: tuple[int, ...]) -> bool:
    """Whether a weight looks like one, or several, that could be quantized."""
    return len(shape) in (2, 3) and shape[-1] % BLOCK == 0 and shape[-2] >= _FEW_ROWS


def _kept_by_default(model: nn.Module) -> Callable[[str], bool]:
    """Whether a module of a model is an output head, a router, or what brings images and sound to a language model."""
    base = getattr(model, "base_model_prefix", "")
    base = f"{base}." if base and hasattr(model, base) else ""
    towers: tuple[str, ...] = ()
    if "text" in _inputs(model):
        towers = tuple(f"{name}." for name, module in model.named_modules() if "text" not in _inputs(module))

    def is_kept(name: str) -> bool:
        if not name.startswith(base) or _HEAD.fullmatch(name) or _ROUTER.fullmatch(name):
            return True
        return name.startswith(towers) or (bool(towers) and _PROJECTOR.fullmatch(name) is not None)

    return is_kept


def _inputs(module: nn.Module) -> str | Sequence[str]:
    """Returns what a model of Transformers takes: text, image, audio, ..."""
    return getattr(module, "input_modalities", "text")
