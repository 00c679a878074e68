# SPDX-License-Identifier: Apache-2.0
"""What modules of MXFP4 weights share: parameters as checkpoints store them, in another layout once they are used."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from .weight import PackedExperts, PackedWeight

Packed = TypeVar("Packed", PackedWeight, PackedExperts)


class PackedModule(nn.Module, Generic[Packed]):
    """A module of MXFP4 weights: parameters as checkpoints store them, until its first forward moves them into another layout.

    Threads may share it, so every change of the form holds a lock, and what others may be reading is replaced as a whole.
    """

    _stored_names: tuple[str, ...]
    """Parameters that are gone while the module is prepacked; reading them, state_dict and load_state_dict go on as before."""
    _prepacked_names: tuple[str, ...]
    """Buffers that are there in their place."""
    _offset_names: tuple[str, ...]
    """Parameters that stay float32 in a model that is cast."""
    _is_managed = False

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()
        for name in self._prepacked_names:
            self.register_buffer(name, None, persistent=False)

    def _weight(self) -> Packed:
        """The weights in the form that they have now; with the lock held, since it takes several reads."""
        raise NotImplementedError

    def _stored(self) -> tuple[Tensor, ...]:
        """What the parameters hold or, of a prepacked module, would hold; with the lock held."""
        raise NotImplementedError

    @property
    def is_prepacked(self) -> bool:
        """Whether the weights are in the native kernels' layout now."""
        return getattr(self, self._prepacked_names[0]) is not None

    def prepack_(self: "Module") -> "Module":
        """Moves the weights into the native kernels' layout, in place of the parameters; results are the same bits.

        Memory stays what it was, with N rounded up to a multiple of 16 and K to one of 128. The weights must be on the CPU
        (RuntimeError). Does nothing the second time.
        """
        with self._locked():
            self._hold_prepacked(self._weight().prepacked())
        return self

    def unprepack_(self: "Module") -> "Module":
        """Makes the stored weights parameters again: to shard them, to move the module to another device."""
        with self._locked():
            if self.is_prepacked:
                # A dict of its own, and before the strips go: other threads may be reading either.
                weights = zip(self._stored_names, map(frozen, self._stored()), strict=True)
                self._parameters = {**dict(weights), **self._parameters}
                for name in self._prepacked_names:
                    setattr(self, name, None)
        return self

    def _locked(self) -> AbstractContextManager[object]:
        """What every change of the weights' form holds. A trace cannot take a lock, and changes no form."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def _hold_prepacked(self, weight: Packed) -> None:
        # The strips are there before the parameters go, and those go with their dict: other threads may be reading either.
        for name, tensor in zip(self._prepacked_names, weight.tensors, strict=True):
            setattr(self, name, tensor)
        self._parameters = {name: p for name, p in self._parameters.items() if name not in self._stored_names}

    def _as_stored(self) -> None:
        """The parameters, and nothing that was made of them; with the lock held."""
        self.unprepack_()

    def _to_local(self, parameter: Tensor) -> Tensor:
        """What the kernels take of a parameter."""
        return parameter

    def _from_local(self, tensor: Tensor) -> Tensor:
        return tensor

    def _snapshot(self) -> Packed:
        """The weights for one forward, whatever other threads do to the module meanwhile. The first one prepacks them."""
        with self._locked():
            weight = self._weight()
            tracing = torch.jit.is_tracing()  # type: ignore[attr-defined]  # torch.jit has no __all__
            if not self.is_prepacked and self._may_prepack() and not (torch.compiler.is_compiling() or tracing):
                weight = weight.best()
                if weight.form == "prepacked":
                    self._hold_prepacked(weight)
            return weight

    def _may_prepack(self) -> bool:
        """Whether the parameters are the module's own and real: no DTensor or other subclass, no fake."""
        return not self._is_managed and type(self._parameters[self._stored_names[0]]) is nn.Parameter

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401, as nn.Module's
        # Called for what is not found: parameters and, of a prepacked module, the weights that it has not as such.
        if name not in self._stored_names:
            return super().__getattr__(name)
        with self._locked():
            return self._stored()[self._stored_names.index(name)] if self.is_prepacked else super().__getattr__(name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self._stored_names:
            return super().__setattr__(name, value)  # type: ignore[arg-type]  # nn.Module takes any value
        with self._locked():
            self._as_stored()
            # Whoever puts a tensor subclass there, like FSDP its DTensors, manages the weight from then on.
            self._is_managed |= type(value) not in (nn.Parameter, Tensor)
            super().__setattr__(name, value)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        with self._locked():
            state = self.__dict__ | {"_parameters": self._parameters.copy(), "_buffers": self._buffers.copy()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lock = threading.RLock()
        super().__setstate__(state)

    def _apply(self: "Module", fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Module":
        # .to(), .cuda(), .share_memory() and the like are for the weights as they are stored.
        with self._locked():
            self._as_stored()
            offsets = [(name, p.data) for name in self._offset_names if (p := self._parameters.get(name)) is not None]
            super()._apply(fn, recurse)
            for name, offset in offsets:
                moved = cast(nn.Parameter, self._parameters[name])
                if moved.dtype != offset.dtype:
                    self._parameters[name] = frozen(offset.to(moved.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._locked():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if self.is_prepacked:
                destination.update(zip((prefix + name for name in self._stored_names), self._stored(), strict=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        with self._locked():
            self._as_stored()
            super()._load_from_state_dict(state_dict, prefix, *args)


Module = TypeVar("Module", bound=PackedModule[Any])


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that takes no gradient."""
    return nn.Parameter(tensor, requires_grad=False)
