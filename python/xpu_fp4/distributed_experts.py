# SPDX-License-Identifier: Apache-2.0
"""MXFP4Experts over ranks: styles for `torch.distributed.tensor.parallel.parallelize_module`.

    parallelize_module(model, mesh, expert_parallel_plan(model))

Every rank gets all tokens and their routing, and has the whole result. Parameters become DTensors, which `state_dict` has as
`torch.distributed.checkpoint` takes them. FSDP2's `fully_shard` takes MXFP4Experts as it is, before the first forward.

Not imported by `import xpu_fp4`.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .distributed import gather
from .moe import DOWN, GATE_UP, PROJECTIONS, MXFP4Experts
from .reference import canonical_nan, fma, gate, transform
from .weight import PackedWeight

Combine = Literal["ordered", "sum"]


class _ShardedExperts(MXFP4Experts):
    """Experts whose parameters are DTensors, all cut along one dimension."""

    mesh: DeviceMesh
    placement: Shard

    def _to_local(self, parameter: Tensor) -> Tensor:
        local: Tensor = cast(DTensor, parameter).to_local()
        return local

    def _from_local(self, tensor: Tensor) -> Tensor:
        return DTensor.from_local(tensor, self.mesh, [self.placement], run_check=False)

    def _bias(self, name: str) -> Tensor | None:
        bias = self._parameters[f"{name}_bias"]
        return None if bias is None else self._to_local(bias)


class _ExpertParallel(_ShardedExperts):
    combine: Combine

    def _shape(self) -> tuple[int, int, int]:
        return self.num_experts // self.mesh.size(), self.hidden, self.intermediate

    def _may_prepack(self) -> bool:
        return True  # the DTensors are its own

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        here = self.num_experts // self.mesh.size()
        ids = top_k_index - self.mesh.get_local_rank() * here  # those of other ranks are below 0, or beyond
        if self.combine == "sum":
            first, *others = gather(self._layer(hidden_states, ids, top_k_weights), self.mesh)
            total = first.float()
            for other in others:
                total = total + other.float()
            return total.to(hidden_states.dtype)
        held = self._snapshot()
        slots = _Slots(hidden_states, ids, top_k_weights, here, self)
        gate_up, down = zip(*map(held.expert, range(here)), strict=True)
        up = slots.multiply(slots.x, gate_up, self._bias(GATE_UP), self._offset(GATE_UP))
        hidden = gate(up, **self.gate.options())
        v = slots.multiply_h(hidden, down, self._bias(DOWN), self._offset(DOWN))
        # Bits, so that adding the nothing of other ranks changes none.
        all_slots = slots.spread(v).view(torch.int32)
        dist.all_reduce(all_slots, group=self.mesh.get_group())
        return slots.combine(all_slots.view(torch.float32), (top_k_index >= 0) & (top_k_index < self.num_experts))


class _ColumnParallel(_ShardedExperts):
    def _may_prepack(self) -> bool:
        return False  # what a rank has is no layer by itself

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        stored = [self._to_local(cast(Tensor, self._parameters[name])) for name in self._stored_names]
        gate_up, down = (
            [PackedWeight.stored(codes, scale) for codes, scale in zip(blocks.flatten(2), scales, strict=True)]
            for blocks, scales in (stored[:2], stored[2:])
        )
        slots = _Slots(hidden_states, top_k_index, top_k_weights, self.num_experts, self)
        up = gather(slots.multiply(slots.x, gate_up, self._bias(GATE_UP), self._offset(GATE_UP)), self.mesh)
        hidden = gate(torch.cat(up, -1), **self.gate.options())
        v = gather(slots.multiply_h(hidden, down, self._bias(DOWN), self._offset(DOWN)), self.mesh)
        return slots.combine(slots.spread(torch.cat(v, -1)), slots.is_known)


class _Slots:
    """The rows of a layer that a rank computes, one for each slot of a token that has an expert here, composed of linears."""

    def __init__(self, x: Tensor, ids: Tensor, weights: Tensor, experts: int, module: MXFP4Experts) -> None:
        self.dtype, self.shape, self.module = x.dtype, ids.shape, module
        self.weights = weights.float()
        self.is_known = (ids >= 0) & (ids < experts)
        self.token, self.slot = self.is_known.nonzero(as_tuple=True)
        self.expert = ids[self.token, self.slot]
        self.x = x[self.token]
        if module.router_on_input:
            self.x = (self.weights[self.token, self.slot, None] * self.x.float()).to(x.dtype)

    def multiply(
        self,
        x: Tensor,
        weights: Sequence[PackedWeight],
        bias: Tensor | None,
        offset: Tensor | None,
        *,
        is_transformed: bool = False,
    ) -> Tensor:
        """Each row of x [S, K], transformed if it is not yet, times its expert's weight [N, K] -> [S, N] of x's dtype."""
        m = self.module
        how: dict[str, Any] = {} if is_transformed else {"hadamard": m.hadamard, "input_offset": offset}
        y = x.new_empty(len(x), weights[0].n if weights else 0)
        for expert in self.expert.unique().tolist():
            rows = self.expert == expert
            y[rows] = weights[expert].linear(
                x[rows], None if bias is None else bias[expert], mode=m.mode, scale_mode=m.scale_mode, group=m.group,
                **how,
            )  # fmt: skip
        return y

    def multiply_h(self, h: Tensor, weights: Sequence[PackedWeight], bias: Tensor | None, offset: Tensor | None) -> Tensor:
        """`multiply` with a float32 result, which float32 rows have; their values are those of h."""
        if self.module.mode == "w4a16":  # which rounds what it turned to the rows' dtype
            h = transform(h, self.module.hadamard, offset).to(h.dtype)
        return self.multiply(h.float(), weights, bias, offset, is_transformed=self.module.mode == "w4a16")

    def spread(self, v: Tensor) -> Tensor:
        """v [S, H] -> [T, top_k, H], zeros where a slot has no row."""
        out = v.new_zeros(*self.shape, v.shape[-1])
        out[self.token, self.slot] = v
        return out

    def combine(self, v: Tensor, is_known: Tensor) -> Tensor:
        """The sum over slots of weight * v, float32 [T, top_k, H], by ascending slot, an fma each, rounded once."""
        weights = torch.ones_like(self.weights) if self.module.router_on_input else self.weights
        acc = torch.zeros_like(v[:, 0])
        for slot in range(v.shape[1]):
            acc = torch.where(is_known[:, slot, None], fma(weights[:, slot, None], v[:, slot], acc), acc)
        return canonical_nan(acc.to(self.dtype))


class _Style(ParallelStyle):
    def _shard(self, module: nn.Module, mesh: DeviceMesh, kind: type[_ShardedExperts], placement: Shard) -> None:
        sharded = cast(_ShardedExperts, module).unprepack_()
        for name in (*sharded._stored_names, *(f"{projection}_bias" for projection in PROJECTIONS)):
            parameter = sharded._parameters[name]
            if parameter is not None:
                distributed = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=self.src_data_rank)
                setattr(module, name, nn.Parameter(distributed, requires_grad=False))
        # parallelize_module keeps the module that it gave us, so it is changed, not replaced.
        module.__class__ = kind
        sharded.mesh, sharded.placement = mesh, placement


class ExpertParallel(_Style):
    """Each rank has E / ranks of the experts, one after another.

    With combine `ordered` the ranks exchange what each slot gives, float32 [T, top_k, H], and add it by ascending slot: the
    bits of one process. The products of a rank are those of single linears. With `sum` each rank runs its layer, and the ranks'
    results, rounded to x's dtype, are added in float32 in the order of ranks and rounded once: less to exchange, other bits.

    Applying it raises TypeError for a module that is no MXFP4Experts, and ValueError if E does not divide by the ranks.
    """

    def __init__(self, *, combine: Combine = "sum") -> None:
        self.combine = combine

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        experts, ranks = _checked(module, device_mesh).num_experts, device_mesh.size()
        if experts % ranks != 0:
            raise ValueError(f"{experts} experts do not divide by {ranks} ranks")
        self._shard(module, device_mesh, _ExpertParallel, Shard(0))
        module.combine = self.combine  # type: ignore[assignment]
        return module


class ColumnParallelExperts(_Style):
    """Each rank has 2I / ranks of the rows of every expert's gate_up_proj and H / ranks of those of down_proj.

    What both products give is gathered, so the bits are those of one process. Products are those of single linears.

    Applying it raises TypeError for a module that is no MXFP4Experts, and ValueError if 2I or H does not divide by the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, (n, _) in _checked(module, device_mesh).shapes().items():
            if n % device_mesh.size() != 0:
                raise ValueError(f"{name} has {n} rows, which do not divide by {device_mesh.size()} ranks")
        self._shard(module, device_mesh, _ColumnParallel, Shard(1))
        return module


def expert_parallel_plan(model: nn.Module, *, combine: Combine = "sum") -> dict[str, ParallelStyle]:
    """A plan for parallelize_module that gives every MXFP4Experts of a model to ExpertParallel.

    Raises ValueError if the model has none.
    """
    plan: dict[str, ParallelStyle] = {
        name: ExpertParallel(combine=combine) for name, module in model.named_modules() if isinstance(module, MXFP4Experts)
    }
    if not plan:
        raise ValueError(f"{type(model).__name__} has no MXFP4Experts")
    return plan


def _checked(module: nn.Module, mesh: DeviceMesh) -> MXFP4Experts:
    if type(module) is not MXFP4Experts:
        raise TypeError(f"the module is a {type(module).__name__}, expected MXFP4Experts")
    if mesh.ndim != 1:
        raise ValueError(f"the mesh has {mesh.ndim} dimensions, expected 1: take one of them, mesh[name]")
    return module
