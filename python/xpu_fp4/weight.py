# SPDX-License-Identifier: Apache-2.0
"""A weight in the form that it is kept in: what the module, its shards and vLLM's layers multiply with."""

from dataclasses import dataclass

from torch import Tensor

from .backends import cpu_backend_name
from .functional import Form, Group, Hadamard, Mode, ScaleMode, expand, multiply, prepack, unprepack


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
        """For the native CPU kernels. RuntimeError if the weight is not on the CPU."""
        if self.form == "prepacked":
            return self
        return PackedWeight("prepacked", self.n, self.k, (prepack(*self.stored_tensors()),))

    def expanded(self) -> "PackedWeight":
        """For products with many rows on a GPU. RuntimeError where there is no such form (see `xpu_fp4.expand`)."""
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
