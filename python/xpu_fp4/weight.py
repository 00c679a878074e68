# SPDX-License-Identifier: Apache-2.0
"""Weights in the form that they are kept in: what modules, their shards and vLLM's layers multiply with."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .backends import cpu_backend_name
from .functional import (
    Activation,
    Form,
    Group,
    Hadamard,
    Mode,
    ScaleMode,
    expand,
    multiply,
    prepack,
    unprepack,
)
from .functional_experts import experts, experts_prepacked, prepack_experts, unprepack_experts


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """An MXFP4 weight [n, k]. It is never changed: another form is another object, so whoever holds one may go on using it.

    Its tensors, by form:
        stored: codes uint8 [n, k/2] and scales uint8 [n, k/32], as in checkpoints.
        prepacked: what `xpu_fp4.prepack` makes of both.
        expanded: codes, scales and what `xpu_fp4.expand` makes of both.
    """

    form: Form
    n: int
    k: int
    tensors: tuple[Tensor, ...]

    @classmethod
    def stored(cls, codes: Tensor, scale: Tensor, expanded: Tensor | None = None) -> "PackedWeight":
        """Out of a checkpoint's tensors and, if it is there, what `expand` made of them."""
        n, k = codes.shape[0], 2 * codes.shape[1]
        return cls("stored", n, k, (codes, scale)) if expanded is None else cls("expanded", n, k, (codes, scale, expanded))

    def stored_tensors(self) -> tuple[Tensor, Tensor]:
        """Codes and scales; of a prepacked weight they are made anew."""
        if self.form == "prepacked":
            return unprepack(self.tensors[0], self.n, self.k)
        return self.tensors[0], self.tensors[1]

    def prepacked(self) -> "PackedWeight":
        """Gives the form of the native CPU kernels. RuntimeError if the weight is not on the CPU."""
        if self.form == "prepacked":
            return self
        return PackedWeight("prepacked", self.n, self.k, (prepack(*self.stored_tensors()),))

    def expanded(self) -> "PackedWeight":
        """Gives the form for products of many rows on a GPU. RuntimeError where there is none (see `xpu_fp4.expand`)."""
        codes, scale = self.stored_tensors()
        return PackedWeight.stored(codes, scale, expand(codes, scale))

    def best(self) -> "PackedWeight":
        """The fastest form that takes no more memory: prepacked where the native CPU kernels serve the weight."""
        is_stored_on_cpu = self.form == "stored" and self.tensors[0].device.type == "cpu"
        return self.prepacked() if is_stored_on_cpu and cpu_backend_name() == "native" else self

    def linear(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
        group: Group = 128,
        hadamard: Hadamard = 0,
        input_offset: Tensor | None = None,
        weight_global_scale: float = 1.0,
    ) -> Tensor:
        """x [..., k] -> [..., n]: `xpu_fp4.linear`, with the same bits in every form."""
        operands: tuple[Tensor | int, ...] = (*self.tensors, self.n) if self.form == "prepacked" else self.tensors
        how = {"scale_mode": scale_mode, "group": group}
        return multiply(self.form, operands, x, bias, mode, hadamard, input_offset, weight_global_scale, **how)


@dataclass(frozen=True)
class Gate:
    """What joins an expert's gate and up, and where its rows of w13 are; see `xpu_fp4.experts`."""

    activation: Activation = "silu_mul"
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    def options(self) -> dict[str, Any]:
        """The arguments of `xpu_fp4.experts` and of `reference.gate`."""
        return {
            "activation": self.activation,
            "interleaved": self.interleaved,
            "alpha": self.alpha,
            "limit": self.limit,
        }


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The MXFP4 weights of E experts, w13 [2I, H] and w2 [H, I] each. Never changed: another form is another object.

    Its tensors, by form:
        stored: w13 uint8 [E, 2I, H/2], its scales uint8 [E, 2I, H/32], w2 uint8 [E, H, I/2], its scales uint8 [E, H, I/32].
        prepacked: w13 and w2, each what `xpu_fp4.prepack_experts` makes of codes and scales.
    """

    form: Form
    experts: int
    hidden: int
    intermediate: int
    tensors: tuple[Tensor, ...]

    @classmethod
    def stored(cls, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> "PackedExperts":
        """Out of a checkpoint's tensors. E, H and I are those of w2 [E, H, I/2]."""
        return cls("stored", w2.shape[0], w2.shape[1], 2 * w2.shape[2], (w13, w13_scale, w2, w2_scale))

    def stored_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w13, its scales, w2, its scales; of prepacked experts they are made anew."""
        if self.form == "stored":
            w13, w13_scale, w2, w2_scale = self.tensors
            return w13, w13_scale, w2, w2_scale
        w13, w2 = self.tensors
        return (
            *unprepack_experts(w13, 2 * self.intermediate, self.hidden),
            *unprepack_experts(w2, self.hidden, self.intermediate),
        )

    def prepacked(self) -> "PackedExperts":
        """Gives the form of the native CPU kernels. RuntimeError if the weights are not on the CPU."""
        if self.form == "prepacked":
            return self
        w13, w13_scale, w2, w2_scale = self.tensors
        packed = prepack_experts(w13, w13_scale), prepack_experts(w2, w2_scale)
        return PackedExperts("prepacked", self.experts, self.hidden, self.intermediate, packed)

    def best(self) -> "PackedExperts":
        """The fastest form that takes no more memory: prepacked where the native CPU kernels serve the weights."""
        is_stored_on_cpu = self.form == "stored" and self.tensors[0].device.type == "cpu"
        return self.prepacked() if is_stored_on_cpu and cpu_backend_name() == "native" else self

    def expert(self, expert: int) -> tuple[PackedWeight, PackedWeight]:
        """Returns one expert's w13 and w2."""
        if self.form == "prepacked":
            w13, w2 = (tensor[expert] for tensor in self.tensors)
            gate_up = PackedWeight("prepacked", 2 * self.intermediate, self.hidden, (w13,))
            return gate_up, PackedWeight("prepacked", self.hidden, self.intermediate, (w2,))
        w13, w13_scale, w2, w2_scale = (tensor[expert] for tensor in self.tensors)
        return PackedWeight.stored(w13, w13_scale), PackedWeight.stored(w2, w2_scale)

    def layer(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        *,
        gate: Gate = Gate(),
        mode: Mode = "w4a16",
        scale_mode: ScaleMode = "even",
        group: Group = 128,
        hadamard: Hadamard = 0,
        expert_map: Tensor | None = None,
        router_on_input: bool = False,
        w13_offset: Tensor | None = None,
        w2_offset: Tensor | None = None,
    ) -> Tensor:
        """x [T, H] -> [T, H]: `xpu_fp4.experts`, with the same bits in every form."""
        options: dict[str, Any] = {
            **gate.options(),
            "mode": mode, "scale_mode": scale_mode, "group": group, "hadamard": hadamard,
            "expert_map": expert_map, "router_on_input": router_on_input,
            "w13_offset": w13_offset, "w2_offset": w2_offset,
        }  # fmt: skip
        if self.form == "prepacked":
            w13, w2 = self.tensors
            return experts_prepacked(x, topk_ids, topk_weights, w13, w2, self.intermediate, w13_bias, w2_bias, **options)
        return experts(x, topk_ids, topk_weights, *self.stored_tensors(), w13_bias, w2_bias, **options)
