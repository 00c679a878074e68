# SPDX-License-Identifier: Apache-2.0
"""Takes calibration data through a model block by block, whatever the model does around and between its blocks.

Before a block is run, the model's own forward is: as far as that block, with the results of the blocks before it in place of
their computation. So every block gets what the model gives it: masks, positions, what an encoder made.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

_EXPERT = re.compile(r"(.*experts)\.\d+\.(.*)")

Batch = Tensor | Mapping[str, Any]
"""What a model is called with: its first argument, or keyword arguments."""


@dataclass(frozen=True)
class Call:
    """What a block is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module) -> Any:
        return block(*self.args, **self.kwargs)


class _Reached(Exception):
    """Ends a forward that has come far enough."""


def block_lists(model: nn.Module, linears: Collection[str]) -> list[dict[str, nn.Module]]:
    """The outermost ModuleLists that have linears of these names in their entries; each entry by its name in the model."""
    lists: list[dict[str, nn.Module]] = []
    prefixes: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(prefixes):
            continue
        blocks = {f"{name}.{key}": block for key, block in module.named_children()}
        if any(linear.startswith(f"{block}.") for block in blocks for linear in linears):
            lists.append(blocks)
            prefixes += (f"{name}.",)
    return lists


def walk(
    model: nn.Module,
    batches: Sequence[Batch],
    lists: Sequence[dict[str, nn.Module]],
    process: Callable[[str, nn.Module, list[Call]], list[Any]],
) -> None:
    """Calls process(name, block, calls) for each block in the order of the forward; it returns the block's result of each call.

    A block that a forward reaches several times is processed with its first call. One that is not reached is left out.
    """
    results: dict[nn.Module, list[Any]] = {}  # of each finished list's or block's last run, a result for each batch
    pending = list(lists)
    while pending:
        first = [next(iter(blocks.values())) for blocks in pending]
        reached = next((_reach(model, batch, i, first, results) for i, batch in enumerate(batches)), None)
        position = 0 if reached is None else first.index(reached[0])
        blocks = pending.pop(position)
        finished: list[nn.Module] = []
        for name, block in blocks.items():
            calls = [_reach(model, batch, i, [block], results) for i, batch in enumerate(batches)]
            found = [call[1] for call in calls if call is not None]
            if len(found) < len(batches):
                continue
            outputs = process(name, block, found)
            finished.append(block)
            # Whatever the model passes on from block to block is in the last one's result.
            results |= dict.fromkeys(finished, outputs)


def _reach(
    model: nn.Module, batch: Batch, index: int, wanted: Sequence[nn.Module], results: Mapping[nn.Module, list[Any]]
) -> tuple[nn.Module, Call] | None:
    """The first of the wanted blocks that a forward calls, and with what; None if it calls none of them."""
    found: list[tuple[nn.Module, Call]] = []

    def stop(block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            found.append((block, Call(args, kwargs)))
            raise _Reached

        return forward

    def known(result: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: result

    with ExitStack() as patches:
        for block, outputs in results.items():
            patches.enter_context(_forward_of(block, known(outputs[index])))
        for block in wanted:
            patches.enter_context(_forward_of(block, stop(block)))
        with suppress(_Reached):
            model(**batch) if isinstance(batch, Mapping) else model(batch)
    return found[0] if found else None


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Has the module compute something else for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def stages(block: nn.Module, linears: Collection[str], call: Call) -> list[list[list[str]]]:
    """The linears of a block in the order in which it calls them: stages of groups of names.

    The linears of a group have the same input. A stage has one group or, of experts, one for each of them, since which of them
    are called is up to the data. Linears that are not called are left out, unless other experts' are.
    """
    inputs: dict[str, Tensor] = {}  # held, so that none takes another's memory

    def zeros_of(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            inputs.setdefault(name, x)
            return x.new_zeros(*x.shape[:-1], linear.out_features)

        return forward

    with ExitStack() as patches:
        for name in linears:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            patches.enter_context(_forward_of(linear, zeros_of(name, linear)))
        call.run(block)
    groups: dict[Any, list[str]] = {}
    for name, x in inputs.items():
        groups.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)
    found: list[list[list[str]]] = []
    stage_of: dict[str, list[list[str]]] = {}
    for group in groups.values():
        role = _role(group[0])
        if role not in stage_of:
            found.append([])
            stage_of |= dict.fromkeys(map(_role, group), found[-1])
        stage_of[role].append(group)
    for name in linears:
        if name not in inputs and _role(name) in stage_of:
            stage_of[_role(name)].append([name])
    return found


def _role(name: str) -> str:
    """The same for what all experts of a layer have."""
    match = _EXPERT.fullmatch(name)
    return f"{match[1]}.{match[2]}" if match else name


def feed_inputs(block: nn.Module, calls: Sequence[Call], receivers: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Runs the block on every call, as far as the last of the named linears, and gives inputs [T, K] to their receivers."""
    missing: set[str] = set()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            receivers[name](args[0].detach().flatten(0, -2))
            missing.discard(name)
            if not missing:
                raise _Reached

        return hook

    hooks = [block.get_submodule(name).register_forward_pre_hook(watch(name)) for name in receivers]
    try:
        for call in calls:
            missing.update(receivers)
            with suppress(_Reached):
                call.run(block)
    finally:
        for hook in hooks:
            hook.remove()


def record(block: nn.Module, calls: Sequence[Call], linears: Collection[str]) -> tuple[dict[str, list[Tensor]], list[Any]]:
    """What the block gives on every call, and the inputs [T, K] of each of the named linears on the way, in order.

    Linears multiply in float32: of bfloat16, torch multiplies an element at a time on processors without instructions for it.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in linears}

    def recording(name: str, linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            inputs[name].append(x.detach().flatten(0, -2))
            bias = None if linear.bias is None else linear.bias.float()
            return functional.linear(x.float(), linear.weight.float(), bias).to(x.dtype)

        return forward

    with ExitStack() as patches:
        for name in linears:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            patches.enter_context(_forward_of(linear, recording(name, linear)))
        return inputs, [call.run(block) for call in calls]
