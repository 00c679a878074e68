# SPDX-License-Identifier: Apache-2.0
"""Which kernels the layers of a model take on a device, asked of the C++ that chooses them. Nothing is loaded or run."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ._library import BLOCK, ops
from .checkpoints.description import Checkpoint, Scheme
from .checkpoints.errors import CheckpointError
from .checkpoints.reader import read_checkpoint, read_config
from .functional import Mode, modes_of

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")
"""What config.json calls the experts that a token chooses."""
_EXPERT = re.compile(r"(.*\.experts)(?:\.(\d+))?\.(\w+)")
_DOWN = ("down_proj", "w2")


@dataclass(frozen=True)
class Linear:
    """A product with an MXFP4 weight [n, k]."""

    n: int
    k: int
    scheme: Scheme

    def elements(self, rows: int) -> int:
        """Elements of weights that a call with so many rows multiplies with."""
        return self.n * self.k

    def multiplications(self, rows: int) -> int:
        return rows * self.n * self.k

    def __str__(self) -> str:
        return f"{self.n}x{self.k}"


@dataclass(frozen=True)
class Experts:
    """A layer of experts, W13 [2 intermediate, hidden] and W2 [hidden, intermediate] each, of which a token chooses top_k."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    scheme: Scheme

    def elements(self, rows: int) -> int:
        """As of Linear, where tokens spread evenly."""
        return min(self.experts, rows * self.top_k) * 3 * self.hidden * self.intermediate

    def multiplications(self, rows: int) -> int:
        return rows * self.top_k * 3 * self.hidden * self.intermediate

    def __str__(self) -> str:
        return f"{self.top_k} of {self.experts} experts, {self.hidden}x{self.intermediate}"


Layer = Linear | Experts


@dataclass(frozen=True)
class Device:
    """What modelled times are of: a product of a GPU architecture (csrc/sycl/explain.cpp)."""

    architecture: str
    card: str
    engines: int
    lanes: int
    ghz: float
    bandwidth: float
    """Bytes a second."""
    matrix_clocks: float
    """Of an engine, for a matrix instruction: 8 rows by `lanes` columns by 32 int8 or 16 bfloat16."""

    def multiplications(self, mode: Mode) -> float:
        """In a second, at most."""
        depth = 16 if mode == "w4a16" else 32
        return self.engines * self.ghz * 1e9 * 8 * self.lanes * depth / self.matrix_clocks


@dataclass(frozen=True)
class Launch:
    """A kernel of a call."""

    kernel: str
    variant: str
    work_groups: int
    group_lanes: int


@dataclass(frozen=True)
class Plan:
    """How a layer is computed with so many rows."""

    rows: int
    kernel: str
    variant: str
    passed_over: str
    """Why others are not taken."""
    weight_bytes: int
    """Of the weights, in the form that is read."""
    scratch_bytes: int | None
    """That a call allocates at most at a time, beside operands and output; None where that is not known before it runs."""
    modelled_seconds: float | None
    device: Device | None = None
    """What the modelled time is of."""
    launches: tuple[Launch, ...] = ()


def gpu_or_none(device: str) -> str | None:
    """The name of a GPU's architecture; None for `cpu` and for an instruction set of the native kernels."""
    return None if device == "cpu" or device in ops._native_isas() else device


def explain(
    layer: Layer, rows: int, device: str, *, dtype: torch.dtype = torch.bfloat16, expanded: bool = False, engines: int = 0
) -> Plan:
    """How a device computes a layer for [rows, k] of dtype.

    Args:
        device: `cpu` for the native kernels of this processor; the name of an instruction set that they are compiled for, such
            as `avx512_vnni`; or that of a GPU's architecture, such as `bmg`, which need not be there.
        expanded: whether a GPU keeps the weight of w4a4 and w4a8 expanded, as `expand` makes it.
        engines: vector engines of the GPU, 0 for those of a usual product of the architecture.

    Raises:
        RuntimeError: no such device, or the SYCL runtime, which a GPU's architecture needs, is not installed.
    """
    if isinstance(layer, Experts):
        return _explain_experts(layer, rows, device, dtype, engines)
    how = layer.scheme
    expanded = expanded and how.mode in modes_of("expanded")
    answer = ops._explain_linear(
        device, rows, layer.n, layer.k, dtype, how.mode, how.scale_mode, how.group, how.hadamard, how.input_offset,
        how.weight_global_scale, expanded, engines,
    )  # fmt: skip
    return _plan(layer, rows, json.loads(answer))


def _explain_experts(layer: Experts, rows: int, device: str, dtype: torch.dtype, engines: int) -> Plan:
    how = layer.scheme
    if gpu_or_none(device) is not None:
        answer = ops._explain_experts(
            device, rows, layer.top_k, layer.experts, layer.hidden, layer.intermediate, dtype, how.mode, how.scale_mode,
            how.group, how.hadamard, how.input_offset, engines,
        )  # fmt: skip
        return _plan(layer, rows, json.loads(answer))
    # The native kernels multiply each expert's rows by themselves.
    slots = rows * layer.top_k
    each = -(-slots // min(slots, layer.experts))
    up = explain(Linear(2 * layer.intermediate, layer.hidden, how), each, device, dtype=dtype)
    down = explain(Linear(layer.hidden, layer.intermediate, how), each, device, dtype=dtype)
    return replace(
        up,
        rows=rows,
        variant=f"{each} row{'s' * (each > 1)} an expert: {up.variant}",
        weight_bytes=layer.experts * (up.weight_bytes + down.weight_bytes),
        scratch_bytes=None,
    )


def _plan(layer: Layer, rows: int, answer: Mapping[str, Any]) -> Plan:
    device = None if answer["device"] is None else Device(**answer["device"])
    return Plan(
        rows,
        answer["kernel"],
        answer["variant"],
        answer["passed_over"],
        answer["weight_bytes"],
        answer["scratch_bytes"],
        None if device is None else _seconds(layer, rows, device, answer["clocks"]),
        device,
        tuple(Launch(**launch) for launch in answer["launches"]),
    )


def _seconds(layer: Layer, rows: int, device: Device, clocks: float | None) -> float:
    """What the choice of the kernel weighed; where it weighed nothing, what the matrix unit and memory take at least."""
    if clocks is not None:
        return clocks / (device.ghz * 1e9)
    packed = layer.elements(rows) * (BLOCK // 2 + 1) / BLOCK
    return max(packed / device.bandwidth, layer.multiplications(rows) / device.multiplications(layer.scheme.mode))


# ---- what a model directory holds ----


def layers_of(folder: Path, mode: Mode | None = None, top_k: int | None = None) -> dict[Layer, list[str]]:
    """The MXFP4 layers of a model directory by their shapes and schemes, each with its names; reads headers alone.

    mode: that they compute in; None: as the directory has it. top_k: experts that a token chooses; None: as config.json has it.

    Raises:
        CheckpointError: it is no MXFP4 model, or it has experts and nothing says how many a token chooses.
    """
    checkpoint = read_checkpoint(folder).in_mode(mode)
    found: dict[Layer, list[str]] = {}
    experts: dict[str, list[str]] = {}
    for name, layer in checkpoint.layers.items():
        match = _EXPERT.fullmatch(name)
        if match is not None:
            experts.setdefault(match[1], []).append(name)
        else:
            found.setdefault(Linear(layer.out_features, layer.in_features, layer.scheme), []).append(name)
    for owner, names in experts.items():
        found.setdefault(_experts(checkpoint, owner, names, top_k), []).append(owner)
    return found


def _experts(checkpoint: Checkpoint, owner: str, names: Iterable[str], top_k: int | None) -> Experts:
    down = [name for name in names if name.endswith(_DOWN)]
    if not down:
        raise CheckpointError(f"{checkpoint.folder}: {owner} has none of {', '.join(_DOWN)}, so its sizes are not known")
    layer = checkpoint.layers[down[0]]
    count = layer.shape[0] if len(layer.shape) == 3 else len(down)
    chosen = top_k or _top_k(checkpoint.folder)
    if not 1 <= chosen <= count:
        raise CheckpointError(f"{checkpoint.folder}: a token chooses {chosen} experts, expected 1 to the {count} of {owner}")
    return Experts(count, chosen, layer.out_features, layer.in_features, layer.scheme)


def _top_k(folder: Path) -> int:
    config = read_config(folder)
    for part in (config, config.get("text_config") or {}):
        for key in _TOP_K:
            if isinstance(part.get(key), int):
                return int(part[key])
    raise CheckpointError(f"{folder}/config.json does not say how many experts a token chooses: expected one of {_TOP_K}")


def dtype_of(folder: Path) -> torch.dtype:
    """What config.json says of the model's dtype; bfloat16 where that is none of our ops'."""
    config = read_config(folder)
    name = config.get("dtype") or config.get("torch_dtype")
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return known.get(name, torch.bfloat16) if isinstance(name, str) else torch.bfloat16


def patterns(names: Iterable[str]) -> dict[str, int]:
    """Names with a star for each number in them, and how many have that form."""
    counts: dict[str, int] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return counts
