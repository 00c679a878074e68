# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism for MXFP4Linear: styles for `torch.distributed.tensor.parallel.parallelize_module`.

    plan = {"up": ColumnParallel(), "down": RowParallel()}
    parallelize_module(model, mesh, plan)
    parallelize_module(llama, mesh, tensor_parallel_plan(llama))  # by Transformers' own plan

Parameters become DTensors, so `state_dict` is what torch.distributed.checkpoint saves and loads, at any number of ranks.
Load into it as torch does: `torch.distributed.checkpoint.load(state)`, then `model.load_state_dict(state)`.

FSDP2's `fully_shard` takes MXFP4Linear as it is, before the first forward (or after `unprepack_`); it needs nothing from here.
Experts are in `distributed_experts`.

Not imported by `import xpu_fp4`.
"""

import re
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from ._library import BLOCK
from .modules import _WEIGHTS, MXFP4Linear


class _ShardedLinear(MXFP4Linear):
    """An MXFP4Linear whose weight is a DTensor, or this rank's shard of it in the native kernels' layout."""

    mesh: DeviceMesh
    placement: Shard

    def _shape(self) -> tuple[int, int]:
        shape = [self.out_features, self.in_features]
        shape[self.placement.dim] //= self.mesh.size()
        return shape[0], shape[1]

    def _to_local(self, parameter: Tensor) -> Tensor:
        local: Tensor = cast(DTensor, parameter).to_local()
        return local

    def _from_local(self, tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, self.mesh, [self.placement], run_check=False)

    def _may_prepack(self) -> bool:
        return True  # the DTensors are its own

    def _local(self, parameter: Tensor | None) -> Tensor | None:
        return parameter.to_local() if isinstance(parameter, DTensor) else None


def gather(shard: Tensor, mesh: DeviceMesh) -> list[Tensor]:
    """Every rank's, in the order of ranks."""
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    dist.all_gather(shards, shard.contiguous(), group=mesh.get_group())
    return shards


class _ColumnParallelLinear(_ShardedLinear):
    gather_output: bool

    def forward(self, x: Tensor) -> Tensor:
        y = self._multiply(x, self._local(self.bias))
        return torch.cat(gather(y, self.mesh), dim=-1) if self.gather_output else y


class _RowParallelLinear(_ShardedLinear):
    split_input: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.split_input:
            x = x.chunk(self.mesh.size(), dim=-1)[self.mesh.get_local_rank()]
        # float32 in, float32 out: the values of x stay what they are, and the partial sum is not rounded.
        y, *others = gather(self._multiply(x.float(), None), self.mesh)
        for other in others:
            y = y + other
        bias = self._local(self.bias)
        if bias is not None:
            y = y + bias.float()
        return y.to(x.dtype)


class _Style(ParallelStyle):
    """What both styles do: check, distribute the parameters, and change the module's class in place."""

    def _shard(self, module: nn.Module, mesh: DeviceMesh, kind: type[_ShardedLinear], weight: Shard) -> nn.Module:
        sharded = cast(_ShardedLinear, module)
        sharded.unprepack_()
        # What has an element for each row of the weight, and what has one for each column, is sharded with them or whole.
        rows, columns = (Shard(0) if weight.dim == dim else Replicate() for dim in (0, 1))
        placements: dict[str, Placement] = {**dict.fromkeys(_WEIGHTS, weight), "bias": rows, "input_offset": columns}
        for name, placement in placements.items():
            parameter = getattr(module, name)
            if parameter is not None:
                distributed = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=self.src_data_rank)
                setattr(module, name, nn.Parameter(distributed, requires_grad=False))
        # parallelize_module keeps the module that it gave us, so it is changed, not replaced.
        module.__class__ = kind
        sharded.mesh, sharded.placement = mesh, weight
        return module


class ColumnParallel(_Style):
    """Each rank has N / ranks of the rows of the weight [N, K], so of the outputs, and gets all of x.

    Bit for bit the same as one process. A rank's output is its share [..., N / ranks], in rank order, as RowParallel takes it;
    with gather_output it is the whole [..., N].

    Applying it raises TypeError for a module that is no MXFP4Linear, and ValueError if N does not divide by the ranks.
    """

    def __init__(self, *, gather_output: bool = False) -> None:
        self.gather_output = gather_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        n, ranks = _checked(module, device_mesh).out_features, device_mesh.size()
        if n % ranks != 0:
            raise ValueError(f"out_features {n} does not divide by {ranks} ranks")
        self._shard(module, device_mesh, _ColumnParallelLinear, Shard(0))
        module.gather_output = self.gather_output  # type: ignore[assignment]
        return module


class RowParallel(_Style):
    """Each rank has K / ranks of the columns of the weight [N, K], cut between blocks, and gets that share of x.

    The result is defined to the bit in modes `w4a4` and `w4a8`, and is another one than that of one process: each rank's
    partial sum is the mode's product over its own K / ranks in float32 (quads of blocks begin at its first block; no bias); the
    partial sums are added in float32 in the order of ranks, ((p0 + p1) + p2) + ..., then the bias, and the result is rounded
    once to x's dtype. The sums are gathered, not all-reduced, since the order of additions in an all-reduce depends on its
    algorithm.

    In mode `w4a8` a rank quantizes its share of x in groups that begin at its first element. Where K / ranks is a multiple of
    128 they are the groups of one process, with the same codes and scales; elsewhere those next to a cut are others.

    x is the share of this rank [..., K / ranks], as ColumnParallel leaves it; with split_input it is the whole [..., K].

    Applying it raises TypeError for a module that is no MXFP4Linear, and ValueError if a share of K is no multiple of 32 or of
    the module's `hadamard`: a block has one scale, and a transform's block mixes all its elements, so neither can be cut.
    """

    def __init__(self, *, split_input: bool = False) -> None:
        self.split_input = split_input

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        linear = _checked(module, device_mesh)
        k, ranks = linear.in_features, device_mesh.size()
        share = f"in_features {k} on {ranks} ranks is {k / ranks:g} for each"
        if k % (BLOCK * ranks) != 0:
            raise ValueError(f"{share}, expected a multiple of {BLOCK}: a block has one scale and cannot be cut")
        if linear.hadamard and k % (linear.hadamard * ranks) != 0:
            what = f"{linear.hadamard}: a block of the Hadamard transform cannot be cut"
            raise ValueError(f"{share}, expected a multiple of {what}")
        self._shard(module, device_mesh, _RowParallelLinear, Shard(1))
        module.split_input = self.split_input  # type: ignore[assignment]
        return module


_STYLES_OF_TRANSFORMERS = {
    "colwise": lambda: ColumnParallel(),
    "colwise_gather_output": lambda: ColumnParallel(gather_output=True),
    "colwise_rep": lambda: ColumnParallel(gather_output=True),
    "rowwise": lambda: RowParallel(),
    "rowwise_split_input": lambda: RowParallel(split_input=True),
    "rowwise_rep": lambda: RowParallel(split_input=True),
}


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """A plan for parallelize_module out of the plan that a Transformers model brings, for its MXFP4Linear modules.

    Other modules stay whole on every rank. Raises ValueError if the model has no plan, or a style in it is none of ours: to
    leave one layer out of a plan would break its neighbours.
    """
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    if not plan:
        raise ValueError(f"{type(model).__name__} has no tensor parallel plan")
    found: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        style = next((style for pattern, style in plan.items() if _means(pattern, name)), None)
        if style is None or not isinstance(module, MXFP4Linear):
            continue
        if style not in _STYLES_OF_TRANSFORMERS:
            raise ValueError(f"{name} has the style {style!r}, expected one of {', '.join(_STYLES_OF_TRANSFORMERS)}")
        found[name] = _STYLES_OF_TRANSFORMERS[style]()
    return found


def _means(pattern: str, name: str) -> bool:
    """Whether a pattern of Transformers' plans, where * is a number, means that name."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) is not None


def _checked(module: nn.Module, mesh: DeviceMesh) -> MXFP4Linear:
    if type(module) is not MXFP4Linear:
        raise TypeError(f"the module is a {type(module).__name__}, expected MXFP4Linear")
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions, expected 1: take the tensor-parallel one, mesh[name]")
    return module
