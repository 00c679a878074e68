# SPDX-License-Identifier: Apache-2.0
"""Experts in MXFP4 in place of those of Transformers' models, whose modules are known by their classes. Needs torch alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._library import BLOCK
from .functional import Group, Hadamard, Mode, ScaleMode, check_mode, dequantize, options_of, quantize
from .packed_module import PackedModule, frozen
from .reference import transform
from .weight import Gate, PackedExperts

GATE_UP, DOWN = "gate_up_proj", "down_proj"
PROJECTIONS = (GATE_UP, DOWN)
SILU_HALVES = Gate()


@dataclass(frozen=True)
class ExpertsKind:
    """How an experts module of Transformers stores its weights and what it computes."""

    gate: Gate
    is_transposed: bool
    """Weights are [E, K, N]; otherwise [E, N, K]."""
    router_on_input: bool = False


def is_experts(module: nn.Module) -> bool:
    """Whether a module has the weights of all experts of a layer, each in one tensor."""
    return all(isinstance(p := module._parameters.get(name), Tensor) and p.dim() == 3 for name in PROJECTIONS)


def experts_kind(module: nn.Module) -> ExpertsKind:
    """The kind of an experts module, by its class: shapes do not tell, since H may be 2I.

    Raises ValueError, which names the class, if what joins gate and up is none of `xpu_fp4.experts`' activations.
    """
    made: Any = module
    name = type(module).__name__
    if name == "GptOssExperts":
        return ExpertsKind(Gate("swiglu_oai", interleaved=True, alpha=made.alpha, limit=made.limit), made.is_transposed)
    if name == "Llama4TextExperts":
        _check_silu(module)
        return ExpertsKind(SILU_HALVES, is_transposed=True, router_on_input=True)
    # Transformers' decorator gives a class that has none the gate that multiplies act_fn(first half) and second half.
    apply_gate = getattr(type(module), "_apply_gate", None)
    is_halves = getattr(apply_gate, "__name__", None) == "_default_apply_gate" and made.is_concatenated
    if not is_halves or getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"the experts are {name}, whose gate is none of those that are known: silu_mul and gpt-oss' swiglu_oai"
        )
    _check_silu(module)
    return ExpertsKind(SILU_HALVES, made.is_transposed)


def is_known(module: nn.Module) -> bool:
    """Whether a module has experts of a known kind."""
    try:
        return is_experts(module) and experts_kind(module) is not None
    except ValueError:
        return False


def _check_silu(module: nn.Module) -> None:
    activation = type(cast(Any, module).act_fn).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"the experts are {type(module).__name__} with the activation {activation}, expected SiLU")


def experts_in(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts modules of a model, by their names."""
    return ((name, module) for name, module in model.named_modules(remove_duplicate=False) if is_experts(module))


class MXFP4Experts(PackedModule[PackedExperts]):
    """Every expert's `down(gate(gate_up(x)))` for the tokens routed to it, by one op, its two weights in MXFP4.

    Parameters have the names and the layout of gpt-oss: for NAME `gate_up_proj` (N = 2I, K = H) and `down_proj` (N = H, K = I),
    `NAME_blocks` uint8 [E, N, K/32, 16], `NAME_scales` uint8 [E, N, K/32] and, if there are biases, `NAME_bias` [E, N]. With
    input offsets there is `NAME_input_offset` float32 [K], the same for all experts. A new module is all zeros. On the CPU the
    first forward moves blocks and scales into the native kernels' layout, as MXFP4Linear does; threads may share a module in
    the same way.

    Args:
        experts, hidden, intermediate: E, H and I; H and I are multiples of 32 and of hadamard.
        bias: whether there are biases.
        gate: what joins gate and up, and how the rows of `gate_up_proj` are ordered.
        router_on_input: whether routing weights multiply the tokens on their way in.
        mode, scale_mode, group, hadamard: as for MXFP4Linear.
        input_offset: whether there are offsets, of both products.
        device, dtype: of the parameters; dtype is the biases'.
    """

    _stored_names = tuple(f"{name}_{part}" for name in PROJECTIONS for part in ("blocks", "scales"))
    _prepacked_names = ("_prepacked_gate_up", "_prepacked_down")
    _offset_names = tuple(f"{name}_input_offset" for name in PROJECTIONS)
    _prepacked_gate_up: Tensor | None
    _prepacked_down: Tensor | None

    def __init__(
        self,
        experts: int,
        hidden: int,
        intermediate: int,
        bias: bool = False,
        *,
        gate: Gate = SILU_HALVES,
        router_on_input: bool = False,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
        group: Group = 128,
        hadamard: Hadamard = 0,
        input_offset: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_mode(mode)
        self.num_experts, self.hidden, self.intermediate = experts, hidden, intermediate
        self.gate, self.router_on_input = gate, router_on_input
        self.mode, self.scale_mode, self.group, self.hadamard = mode, scale_mode, group, hadamard
        for name, (n, k) in self.shapes().items():
            if k % max(BLOCK, hadamard) != 0:
                raise ValueError(f"{name} has K = {k}, expected a multiple of {max(BLOCK, hadamard)}")
            blocks = torch.zeros(experts, n, k // BLOCK, BLOCK // 2, dtype=torch.uint8, device=device)
            self.register_parameter(f"{name}_blocks", frozen(blocks))
            self.register_parameter(f"{name}_scales", frozen(blocks.new_zeros(experts, n, k // BLOCK)))
            made = frozen(torch.zeros(experts, n, device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"{name}_bias", made)
            offset = frozen(torch.zeros(k, device=device, dtype=torch.float32)) if input_offset else None
            self.register_parameter(f"{name}_input_offset", offset)

    @classmethod
    def like(
        cls,
        source: nn.Module,
        *,
        bias: bool | None = None,
        is_interleaved: bool | None = None,
        **options: Any,  # noqa: ANN401
    ) -> "MXFP4Experts":
        """Makes one on the meta device, in place of an experts module of Transformers, with its shapes, gate and training mode.

        Args:
            bias: whether there are biases; None: if the source has them.
            is_interleaved: whether rows of gate and up alternate; None: if the source's do.
            options: mode, scale_mode, group, hadamard and input_offset.

        Raises:
            ValueError: the source is of a class whose gate is not known, or K is no multiple of 32 or of hadamard.
        """
        kind = experts_kind(source)
        experts, hidden, intermediate = shape_of(source, kind)
        gate = kind.gate if is_interleaved is None else replace(kind.gate, interleaved=is_interleaved)
        has_bias = f"{GATE_UP}_bias" in source._parameters if bias is None else bias
        dtype = source.get_parameter(GATE_UP).dtype
        how: dict[str, Any] = {"gate": gate, "router_on_input": kind.router_on_input, "device": "meta", "dtype": dtype}
        return cls(experts, hidden, intermediate, has_bias, **how, **options).train(source.training)

    @classmethod
    def from_experts(
        cls,
        source: nn.Module,
        *,
        mode: Mode = "w4a4",
        scale_mode: ScaleMode = "even",
        group: Group = 128,
        hadamard: Hadamard = 0,
    ) -> "MXFP4Experts":
        """Quantizes the weights of an experts module of Transformers (round to nearest). Copies the biases.

        Raises:
            ValueError: as `like` does.
        """
        made = cls.like(source, mode=mode, scale_mode=scale_mode, group=group, hadamard=hadamard)
        transposed = experts_kind(source).is_transposed
        for name, (n, k) in made.shapes().items():
            weight = source.get_parameter(name).detach()
            blocks = torch.empty(made.num_experts, n, k // BLOCK, BLOCK // 2, dtype=torch.uint8, device=weight.device)
            scales = blocks.new_empty(blocks.shape[:-1])
            for expert, of_one in enumerate(weight):  # one at a time, so that no more than one is there in another layout
                codes, scale = quantize(of_one.t() if transposed else of_one, scale_mode, hadamard=hadamard)
                blocks[expert], scales[expert] = codes.view(torch.uint8).view(blocks.shape[1:]), scale.view(torch.uint8)
            made.register_parameter(f"{name}_blocks", frozen(blocks))
            made.register_parameter(f"{name}_scales", frozen(scales))
            if (bias := source._parameters.get(f"{name}_bias")) is not None:
                made.register_parameter(f"{name}_bias", frozen(bias.detach().clone()))
        return made

    def shapes(self) -> dict[str, tuple[int, int]]:
        """N and K of both weights, by their names."""
        return {GATE_UP: (2 * self.intermediate, self.hidden), DOWN: (self.hidden, self.intermediate)}

    def flatten_blocks(self) -> None:
        """Gives codes the shape [E, N, K/2], in which those of single experts are stacked, until `fold_blocks`."""
        for name in PROJECTIONS:
            blocks = self.get_parameter(f"{name}_blocks")
            blocks.data = blocks.data.flatten(2)

    def fold_blocks(self) -> None:
        """Gives codes their shape [E, N, K/32, 16] back, if they have another."""
        for name in PROJECTIONS:
            blocks = self.get_parameter(f"{name}_blocks")
            blocks.data = blocks.data.view(*blocks.shape[:2], -1, BLOCK // 2)

    def _weight(self) -> PackedExperts:
        if self._prepacked_gate_up is not None and self._prepacked_down is not None:
            strips = self._prepacked_gate_up, self._prepacked_down
            return PackedExperts("prepacked", *self._shape(), strips)
        gate_up, gate_up_scales, down, down_scales = (
            self._to_local(cast(Tensor, self._parameters[name])) for name in self._stored_names
        )
        return PackedExperts.stored(gate_up.flatten(2), gate_up_scales, down.flatten(2), down_scales)

    def _shape(self) -> tuple[int, int, int]:
        """E, H and I of what this process has."""
        return self.num_experts, self.hidden, self.intermediate

    def _bias(self, name: str) -> Tensor | None:
        return self._parameters[f"{name}_bias"]

    def _offset(self, name: str) -> Tensor | None:
        return self._parameters[f"{name}_input_offset"]

    def _stored(self) -> tuple[Tensor, ...]:
        gate_up, gate_up_scales, down, down_scales = self._weight().stored_tensors()
        blocks = (codes.unflatten(2, (-1, BLOCK // 2)) for codes in (gate_up, down))
        return tuple(map(self._from_local, (next(blocks), gate_up_scales, next(blocks), down_scales)))

    def dequantized_weights(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Gives, by name, the weights [E, N, K] that blocks and scales stand for, turned back if there is a Hadamard."""
        with self._locked():
            gate_up, gate_up_scales, down, down_scales = self._stored()
        pairs = {GATE_UP: (gate_up, gate_up_scales), DOWN: (down, down_scales)}
        values = {name: dequantize(blocks.flatten(2), scales) for name, (blocks, scales) in pairs.items()}
        return {name: transform(value, self.hadamard).to(dtype) for name, value in values.items()}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens [T, H], the experts chosen for each [T, top_k] and their weights [T, top_k] -> [T, H].

        An index below 0, or of E and more, which Transformers gives to slots of other ranks, adds nothing.
        """
        return self._layer(hidden_states, top_k_index, top_k_weights)

    def _layer(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._snapshot().layer(
            x,
            ids,
            weights,
            self._bias(GATE_UP),
            self._bias(DOWN),
            gate=self.gate,
            mode=self.mode,
            scale_mode=self.scale_mode,
            group=self.group,
            hadamard=self.hadamard,
            router_on_input=self.router_on_input,
            w13_offset=self._offset(GATE_UP),
            w2_offset=self._offset(DOWN),
        )

    def extra_repr(self) -> str:
        how = ", ".join(f"{name}={getattr(self, name)}" for name in ("mode", *options_of(self.mode)))
        how += f", hadamard={self.hadamard}" if self.hadamard else ""
        how += ", input_offset=True" if self._offset(DOWN) is not None else ""
        shape = f"experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}"
        return f"{shape}, bias={self._parameters[f'{GATE_UP}_bias'] is not None}, {self.gate}, {how}"


def shape_of(source: nn.Module, kind: ExpertsKind) -> tuple[int, int, int]:
    """E, H and I of an experts module of Transformers."""
    experts, first, second = source.get_parameter(DOWN).shape
    return (experts, second, first) if kind.is_transposed else (experts, first, second)


class RoutedOnInput(nn.Module):
    """Llama 4's layer, whose router weights the tokens that go in, and which computes what is routed.

    Transformers' own gives every token, times 0 where it is not routed, to every expert.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.top_k: int = cast(Any, source).top_k
        self.router = cast(nn.Module, source.router)
        self.shared_expert = cast(nn.Module, source.shared_expert)
        self.experts = cast(nn.Module, source.experts)
        self.train(source.training)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[..., H] -> [T, H], and the router's logits [T, E]."""
        hidden_states = hidden_states.flatten(0, -2)
        scores, logits = self.router(hidden_states)  # 0 where a token is not routed
        weights, ids = scores.topk(self.top_k, dim=-1)
        return self.shared_expert(hidden_states) + self.experts(hidden_states, ids, weights), logits


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of a model's of that name, and what it needs around it."""
    owner, _, attribute = name.rpartition(".")
    layer = model.get_submodule(owner)
    setattr(layer, attribute, module)
    if getattr(module, "router_on_input", False) and not isinstance(layer, RoutedOnInput):
        above, _, name_of_layer = owner.rpartition(".")
        setattr(model.get_submodule(above), name_of_layer, RoutedOnInput(layer))
