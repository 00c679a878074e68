# SPDX-License-Identifier: Apache-2.0
"""A drop-in for nn.Linear whose weight is MXFP4."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .backends import cpu_backend_name
from .functional import Mode, ScaleMode, check_mode, dequantize, expand, linear, linear_prepacked, prepack, quantize, unprepack

_WEIGHTS = ("weight_packed", "weight_scale")


class MXFP4Linear(nn.Module):
    """y = x @ W^T + bias with W in MXFP4 and, in mode `w4a4`, x quantized to MXFP4 on the way in.

    Parameters carry the names and the layout of compressed-tensors' `mxfp4-pack-quantized`, so a state_dict is that checkpoint
    format: `weight_packed` uint8 [N, K/2], `weight_scale` uint8 [N, K/32] (2^(byte - 127)), `bias` [N]. A new module is all
    zeros.

    On the CPU the first forward (in eval or train mode, but not one that torch.compile traces) moves the weight into the native
    kernels' layout, which it keeps instead: see `prepack_`. Then `weight_packed` and `weight_scale` are no longer parameters;
    reading them, `state_dict` and `load_state_dict` go on as before. On a GPU the weight stays as it is; `expand_` keeps a
    second form beside it.

    Args:
        in_features, out_features: K (a multiple of 32) and N.
        bias: whether there is one.
        mode: `w4a4` or `w4a16`.
        scale_mode: the scale rule for x in mode `w4a4`.
        device, dtype: of the parameters; dtype is the bias's.
    """

    _is_managed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features % 32 != 0:
            raise ValueError(f"in_features is {in_features}, expected a multiple of 32")
        check_mode(mode)
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        self.scale_mode = scale_mode
        self.weight_packed = _frozen(torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.weight_scale = _frozen(torch.zeros(out_features, in_features // 32, dtype=torch.uint8, device=device))
        self.bias = _frozen(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._prepacked: Tensor | None
        self.register_buffer("_prepacked", None, persistent=False)
        self._expanded: Tensor | None
        self.register_buffer("_expanded", None, persistent=False)

    @classmethod
    def from_linear(
        cls,
        source: nn.Linear,
        *,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
    ) -> "MXFP4Linear":
        """Quantizes the weight of an nn.Linear (round to nearest, scale_mode for its scales too). Copies the bias."""
        module = cls(
            source.in_features,
            source.out_features,
            source.bias is not None,
            mode=mode,
            scale_mode=scale_mode,
            device="meta",
        )
        codes, scale = quantize(source.weight.detach(), scale_mode)
        module.weight_packed = _frozen(codes.view(torch.uint8))
        module.weight_scale = _frozen(scale.view(torch.uint8))
        if source.bias is not None:
            module.bias = _frozen(source.bias.detach().clone())
        return module.train(source.training)

    @property
    def is_prepacked(self) -> bool:
        """Whether the weight is in the native kernels' layout now."""
        return self._prepacked is not None

    def prepack_(self) -> "MXFP4Linear":
        """Moves the weight into the native kernels' layout, in place of the two parameters; results are the same bits.

        Memory stays what it was, with N rounded up to a multiple of 16 and K to one of 128. The weight must be on the CPU
        (RuntimeError). Does nothing the second time.
        """
        if self._prepacked is None:
            self._drop_expanded()
            self._prepacked = prepack(*self._stored_weight())
            for name in _WEIGHTS:
                delattr(self, name)
        return self

    def unprepack_(self) -> "MXFP4Linear":
        """Makes `weight_packed` and `weight_scale` parameters again: to shard them, to move the module to another device."""
        if self._prepacked is not None:
            tensors = self._unprepacked()
            self._prepacked = None
            for name, tensor in zip(_WEIGHTS, tensors, strict=True):
                setattr(self, name, _frozen(tensor))
        return self

    @property
    def is_expanded(self) -> bool:
        """Whether the weight is also kept in the form that W4A4 products for many rows read on a GPU."""
        return self._expanded is not None

    def expand_(self) -> "MXFP4Linear":
        """Expands the weight once, for products with many rows, which otherwise do so in each forward.

        Results are the same bits. Takes 1.03 bytes an element beside the weight's 0.53. Moving the module, copying or pickling
        it, loading a state_dict or setting a weight drops it. A weight that is changed in place needs a new call, which expands
        it anew.

        Raises:
            ValueError: mode is not `w4a4`.
            RuntimeError: the weight's device has no such form (see `xpu_fp4.expand`).
        """
        if self.mode != "w4a4":
            raise ValueError(f"an expanded weight is for mode 'w4a4', got a module of mode {self.mode!r}")
        self.unprepack_()
        self._expanded = expand(*self._stored_weight())
        return self

    def _stored_weight(self) -> tuple[Tensor, Tensor]:
        return self.weight_packed.detach(), self.weight_scale.detach()

    def _unprepacked(self) -> tuple[Tensor, Tensor]:
        assert self._prepacked is not None
        return unprepack(self._prepacked, self.out_features, self.in_features)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401, as nn.Module's
        # Called for what is not found: of a prepacked module also the weights.
        if name in _WEIGHTS and self.__dict__.get("_buffers", {}).get("_prepacked") is not None:
            return self._unprepacked()[_WEIGHTS.index(name)]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        # Whoever puts a tensor subclass there, like FSDP its DTensors, manages the weight from then on.
        if name in _WEIGHTS:
            self._is_managed |= type(value) not in (nn.Parameter, Tensor)
            self._drop_expanded()
        super().__setattr__(name, value)  # type: ignore[arg-type]  # nn.Module takes any value

    def _drop_expanded(self) -> None:
        if self.__dict__.get("_buffers", {}).get("_expanded") is not None:
            self._expanded = None

    def __getstate__(self) -> dict[str, Any]:
        # What another device's kernels could not read does not belong into a file.
        return self.__dict__ | {"_buffers": self._buffers | {"_expanded": None}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MXFP4Linear":
        # .to(), .cuda(), .share_memory() and the like are for the weight as it is stored.
        self.unprepack_()
        self._drop_expanded()
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._prepacked is not None:
            destination.update(zip((prefix + name for name in _WEIGHTS), self._unprepacked(), strict=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        self.unprepack_()
        self._drop_expanded()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes and scales stand for."""
        return dequantize(self.weight_packed, self.weight_scale, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32, float16 or bfloat16 -> [..., N] of the same dtype."""
        unpacked = self._prepacked is None and self._expanded is None
        if unpacked and not torch.compiler.is_compiling() and self._can_prepack():
            self.prepack_()
        mode, scale_mode = self.mode, self.scale_mode
        if self._prepacked is not None:
            return linear_prepacked(x, self._prepacked, self.out_features, self.bias, mode=mode, scale_mode=scale_mode)
        weight = (self.weight_packed, self.weight_scale)
        return linear(x, *weight, self.bias, mode=mode, scale_mode=scale_mode, expanded=self._expanded)

    def _can_prepack(self) -> bool:
        return not self._is_managed and _can_prepack(self.weight_packed)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"mode={self.mode}, scale_mode={self.scale_mode}"
        )


def _can_prepack(weight: Tensor) -> bool:
    """Plain CPU memory of the native kernels' own: not a DTensor or another subclass, not a fake."""
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and cpu_backend_name() == "native"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
