# SPDX-License-Identifier: Apache-2.0
"""A drop-in for nn.Linear whose weight is MXFP4."""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ._library import BLOCK
from .functional import (
    GLOBAL_SCALES,
    Group,
    Hadamard,
    Mode,
    ScaleMode,
    check_mode,
    dequantize,
    modes_of,
    options_of,
    quantize,
)
from .packed_module import PackedModule, frozen
from .reference import transform
from .weight import PackedWeight

_WEIGHTS = ("weight_packed", "weight_scale")
_READ_ONLY = "MXFP4Linear.weight is made of weight_packed and weight_scale, and can only be read: set these instead"


class _DequantizedWeight(Tensor):
    """An MXFP4Linear's weight, with elements only while an operation reads them."""

    _is_hf_initialized = True  # so that Transformers, while it loads a model, does not fill it with random numbers
    _module: "MXFP4Linear"

    @classmethod
    def of(cls, module: "MXFP4Linear", dtype: torch.dtype, device: torch.device) -> "_DequantizedWeight":
        shape = (module.out_features, module.in_features)
        weight: _DequantizedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._module = module
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        # Results are plain tensors. That there is this method makes torch's encoder layer call its layers, instead of one fused
        # operation on their weights, which would not quantize activations.
        if func in (Tensor.__setitem__, Tensor.data.__set__):  # type: ignore[attr-defined]
            raise RuntimeError(_READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a static method
        cls,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: Any = (),  # noqa: ANN401
        kwargs: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, cls) and argument.is_write:
                raise RuntimeError(_READ_ONLY)
        args, kwargs = tree_map_only(cls, lambda weight: weight._module.dequantized_weight(weight.dtype), (args, kwargs))
        return func(*args, **kwargs)


class MXFP4Linear(PackedModule[PackedWeight]):
    """y = x @ W^T + bias with W in MXFP4; x is quantized to MXFP4 (mode `w4a4`), to MXINT8 (`w4a8`) or not (`w4a16`).

    Parameters carry the names and the layout of compressed-tensors' `mxfp4-pack-quantized`, so a state_dict is that checkpoint
    format: `weight_packed` uint8 [N, K/2], `weight_scale` uint8 [N, K/32] (2^(byte - 127)), `bias` [N]. A new module is all
    zeros.

    On the CPU the first forward (in eval or train mode, but not one that torch.compile or torch.jit traces) moves the weight
    into the native kernels' layout, which it keeps instead: see `prepack_`. Then `weight_packed` and `weight_scale` are no
    longer parameters; reading them, `state_dict` and `load_state_dict` go on as before. On a GPU the weight stays as it is;
    `expand_` keeps a second form beside it.

    Threads may share a module: run its first forward together, and copy, pickle, move, save, load, prepack and expand it
    meanwhile. Where the weight stays as it is, loading and moving change tensors in place, as nn.Linear does.

    `weight` is there for code that looks at a layer's weight from outside: its shape, dtype and device cost nothing, but every
    operation that reads its elements dequantizes all of them. Writing to it is an error.

    With `hadamard` or an `input_offset` [K] (a parameter, float32), x is transformed first, as `xpu_fp4.quantize` says. Then
    the weight is that of the transformed input, and the bias has the offset's share of the output; `weight` is turned back.

    Args:
        in_features, out_features: K (a multiple of 32) and N.
        bias: whether there is one.
        mode: `w4a4`, `w4a8` or `w4a16`. The weight is the same, so the attribute may be set later.
        scale_mode: the scale rule for x in mode `w4a4`.
        group: how many elements of x share a scale in mode `w4a8`, 32 or 128.
        hadamard: the size of the Hadamard matrices that x is multiplied with, 32, 64 or 128, which divides K; 0 for none.
        input_offset: whether there is one.
        weight_global_scale: what codes and scales stand for, over the weight: 3 in FP-Quant's checkpoints of `abs_max`.
        device, dtype: of the parameters; dtype is the bias's, and that of `weight`.
    """

    _stored_names = _WEIGHTS
    _offset_names = ("input_offset",)
    _prepacked_names = ("_prepacked",)
    _prepacked: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
        group: Group = 128,
        hadamard: Hadamard = 0,
        input_offset: bool = False,
        weight_global_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features % BLOCK != 0:
            raise ValueError(f"in_features is {in_features}, expected a multiple of {BLOCK}")
        check_mode(mode)
        if hadamard not in get_args(Hadamard):
            raise ValueError(f"hadamard is {hadamard!r}, expected 0 (none), 32, 64 or 128")
        if hadamard and in_features % hadamard != 0:
            raise ValueError(f"in_features is {in_features}, expected a multiple of hadamard, {hadamard}")
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        self.scale_mode = scale_mode
        self.group = group
        self.hadamard = hadamard
        self.weight_global_scale = weight_global_scale
        self._dtype = dtype or torch.get_default_dtype()
        self._expanded: Tensor | None
        self.register_buffer("_expanded", None, persistent=False)
        self.weight_packed = frozen(torch.zeros(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.weight_scale = frozen(torch.zeros(out_features, in_features // BLOCK, dtype=torch.uint8, device=device))
        self.bias = frozen(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        offset = torch.zeros(in_features, device=device, dtype=torch.float32) if input_offset else None
        self.input_offset = None if offset is None else frozen(offset)

    @classmethod
    def from_linear(
        cls,
        source: nn.Linear,
        *,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
        group: Group = 128,
        hadamard: Hadamard = 0,
    ) -> "MXFP4Linear":
        """Quantizes the weight of an nn.Linear (round to nearest, scale_mode for its scales too). Copies the bias."""
        module = cls(
            source.in_features,
            source.out_features,
            source.bias is not None,
            mode=mode,
            scale_mode=scale_mode,
            group=group,
            hadamard=hadamard,
            weight_global_scale=GLOBAL_SCALES.get(scale_mode, 1.0),
            device="meta",
            dtype=source.weight.dtype,
        )
        codes, scale = quantize(source.weight.detach(), scale_mode, hadamard=hadamard)
        module.weight_packed = frozen(codes.view(torch.uint8))
        module.weight_scale = frozen(scale.view(torch.uint8))
        if source.bias is not None:
            module.bias = frozen(source.bias.detach().clone())
        return module.train(source.training)

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] that the codes and scales stand for, to be read only. Slow: each operation on it dequantizes it."""
        with self._locked():
            device = self._weight().tensors[0].device
        return _DequantizedWeight.of(self, self._dtype, device)

    @property
    def is_expanded(self) -> bool:
        """Whether the weight is also kept in the form that W4A4 and W4A8 products for many rows read on a GPU."""
        return self._expanded is not None

    def expand_(self) -> "MXFP4Linear":
        """Expands the weight once, for products with many rows, which otherwise do so in each forward.

        Results are the same bits. Takes 1.03 bytes an element beside the weight's 0.53. Moving the module, copying or pickling
        it, loading a state_dict or setting a weight drops it. A weight that is changed in place needs a new call, which expands
        it anew.

        Raises:
            ValueError: mode is `w4a16`.
            RuntimeError: the weight's device has no such form (see `xpu_fp4.expand`).
        """
        modes = modes_of("expanded")
        if self.mode not in modes:
            expected = " or ".join(map(repr, modes))
            raise ValueError(f"an expanded weight is for mode {expected}, got a module of mode {self.mode!r}")
        with self._locked():
            self.unprepack_()
            self._expanded = self._weight().expanded().tensors[-1]
        return self

    def _weight(self) -> PackedWeight:
        """The weight in the form that it has now; with the lock held, since it takes several reads."""
        if self._prepacked is not None:
            return PackedWeight("prepacked", *self._shape(), (self._prepacked,))
        return PackedWeight.stored(self._to_local(self.weight_packed), self._to_local(self.weight_scale), self._expanded)

    def _stored(self) -> tuple[Tensor, Tensor]:
        """What the parameters hold or, of a prepacked module, would hold; with the lock held."""
        codes, scale = self._weight().stored_tensors()
        return self._from_local(codes), self._from_local(scale)

    def _hold_prepacked(self, weight: PackedWeight) -> None:
        super()._hold_prepacked(weight)
        self._expanded = None

    def _as_stored(self) -> None:
        super()._as_stored()
        self._expanded = None

    def _shape(self) -> tuple[int, int]:
        """N and K of what this process has."""
        return self.out_features, self.in_features

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight":
            raise AttributeError(_READ_ONLY)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # What another device's kernels could not read does not belong into a file.
        state = super().__getstate__()
        return state | {"_buffers": state["_buffers"] | {"_expanded": None}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MXFP4Linear":
        with self._locked():
            super()._apply(fn, recurse)
            self._dtype = fn(torch.empty(1, dtype=self._dtype)).dtype  # also where there is no bias
        return self

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes and scales stand for; of a layer with a Hadamard, turned back in float32."""
        with self._locked():
            codes, scale = self._stored()
        if self.hadamard == 0 and self.weight_global_scale == 1:
            return dequantize(codes, scale, dtype)
        return transform(dequantize(codes, scale) / self.weight_global_scale, self.hadamard).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32, float16 or bfloat16 -> [..., N] of the same dtype."""
        return self._multiply(x, self.bias)

    def _multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self._snapshot().linear(
            x,
            bias,
            mode=self.mode,
            scale_mode=self.scale_mode,
            group=self.group,
            hadamard=self.hadamard,
            input_offset=None if self.input_offset is None else self._to_local(self.input_offset),
            weight_global_scale=self.weight_global_scale,
        )

    def _snapshot(self) -> PackedWeight:
        strips = self._prepacked  # read once, and without a wait: it may go
        return super()._snapshot() if strips is None else PackedWeight("prepacked", *self._shape(), (strips,))

    def extra_repr(self) -> str:
        how = ", ".join(f"{name}={getattr(self, name)}" for name in ("mode", *options_of(self.mode)))
        how += f", hadamard={self.hadamard}" if self.hadamard else ""
        how += ", input_offset=True" if self.input_offset is not None else ""
        how += f", weight_global_scale={self.weight_global_scale:g}" if self.weight_global_scale != 1 else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {how}"
