# SPDX-License-Identifier: Apache-2.0
"""Threads share a module: whatever one of them does to it, a forward gives the same bits, and nothing fails."""

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import xpu_fp4
from helpers import assert_same_bits, at_once, seeded
from torch import Tensor, nn
from xpu_fp4 import MXFP4Linear
from xpu_fp4.weight import PackedWeight

N, K = 208, 1024
ROUNDS = 5

Operation = Callable[[MXFP4Linear, dict[str, Tensor]], object]


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Threads take turns within a change of form, not only between two of them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def source() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N).bfloat16()


def activations() -> Tensor:
    return torch.randn(3, K, generator=seeded(1)).bfloat16()


def assert_gives(module: MXFP4Linear, x: Tensor, want: Tensor) -> None:
    assert_same_bits(module(x), want)


def assert_state_is(module: MXFP4Linear, state: dict[str, Tensor]) -> None:
    got = module.state_dict()
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert_same_bits(got[name], tensor)


def compute(module: MXFP4Linear, state: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        module(activations())


def read_weight(module: MXFP4Linear, state: dict[str, Tensor]) -> None:
    assert_same_bits(module.weight_packed, state["weight_packed"])
    assert_same_bits(module.weight_scale, state["weight_scale"])


def set_weight(module: MXFP4Linear, state: dict[str, Tensor]) -> None:
    module.weight_packed = nn.Parameter(state["weight_packed"].clone(), requires_grad=False)


OPERATIONS: dict[str, Operation] = {
    "forward": compute,
    "state_dict": lambda module, state: assert_state_is(module, state),
    "load_state_dict": lambda module, state: module.load_state_dict(state),
    "load_state_dict, assigned": lambda module, state: module.load_state_dict(copy.deepcopy(state), assign=True),
    "to": lambda module, state: module.to("cpu"),
    "prepack_": lambda module, state: module.prepack_(),
    "unprepack_": lambda module, state: module.unprepack_(),
    "deepcopy": lambda module, state: assert_state_is(copy.deepcopy(module), state),
    "pickle": lambda module, state: assert_state_is(pickle.loads(pickle.dumps(module)), state),
    "parameters": lambda module, state: list(module.named_parameters()),
    "reading a weight": read_weight,
    "setting a weight": set_weight,
    "dequantized_weight": lambda module, state: module.dequantized_weight(),
}


@pytest.mark.parametrize("first", [True, False], ids=["first forward", "later forward"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_forwards_meanwhile_give_the_same_bits(name: str, first: bool, source: nn.Linear) -> None:
    operation, x = OPERATIONS[name], activations()
    want = MXFP4Linear.from_linear(source)(x)
    for _ in range(ROUNDS):
        module = MXFP4Linear.from_linear(source)
        state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        if not first:
            module(x)
        at_once(*[partial(assert_gives, module, x, want)] * 3, partial(operation, module, state))
        assert_state_is(module, state)


@pytest.mark.parametrize("name", OPERATIONS)
def test_changes_of_form_meanwhile_are_seen_by_nobody(name: str, source: nn.Linear) -> None:
    """Every operation beside one thread that prepacks and one that undoes it."""
    for _ in range(ROUNDS):
        module = MXFP4Linear.from_linear(source)
        state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
        at_once(module.prepack_, module.unprepack_, *[partial(OPERATIONS[name], module, state)] * 2)
        assert_state_is(module, state)


def test_a_forward_that_comes_during_a_load_never_keeps_half_of_a_weight(source: nn.Linear) -> None:
    """The native kernels' layout is made of the old weight or of the new one."""
    x, old, new = activations(), MXFP4Linear.from_linear(source), MXFP4Linear(K, N, dtype=torch.bfloat16)
    states = [{key: tensor.clone() for key, tensor in module.state_dict().items()} for module in (old, new)]
    wanted = [old(x), new(x)]

    # The bias is loaded as nn.Linear's is.
    states[1]["bias"] = states[0]["bias"]
    wanted[1] = xpu_fp4.linear(x, *states[1].values())

    def load(module: MXFP4Linear) -> None:
        for state in reversed(states):
            module.load_state_dict(state)

    def forward(module: MXFP4Linear) -> None:
        y = module(x)
        assert any(torch.equal(y, want) for want in wanted)

    for _ in range(ROUNDS):
        module = MXFP4Linear.from_linear(source)
        at_once(*[partial(forward, module)] * 3, partial(load, module))


def test_expanding_meanwhile(requires_sycl: None, monkeypatch: pytest.MonkeyPatch, source: nn.Linear) -> None:
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg:large")
    x = activations()
    want = MXFP4Linear.from_linear(source)(x)
    module = MXFP4Linear.from_linear(source)
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}

    def at_once_on_sycl(*works: Callable[[], object]) -> None:
        def run(work: Callable[[], object]) -> None:
            with xpu_fp4.cpu_backend("sycl"):  # a thread's own choice
                work()

        at_once(*[partial(run, work) for work in works])

    forward = partial(assert_gives, module, x, want)
    at_once_on_sycl(forward, forward, module.expand_, module.prepack_)
    at_once_on_sycl(forward, forward, module.expand_, lambda: set_weight(module, state))
    at_once_on_sycl(forward, module.expand_, lambda: assert_state_is(copy.deepcopy(module), state), module.unprepack_)


def test_a_packed_weight_stays_what_it_is(source: nn.Linear) -> None:
    codes, scale = (t.view(torch.uint8) for t in xpu_fp4.quantize(source.weight.detach()))
    stored = PackedWeight.stored(codes, scale)
    prepacked = stored.prepacked()
    assert (stored.form, prepacked.form, prepacked.n, prepacked.k) == ("stored", "prepacked", N, K)
    with pytest.raises(AttributeError):
        stored.form = "prepacked"  # type: ignore[misc]
    assert_same_bits(prepacked.linear(activations()), stored.linear(activations()))
    for got, want in zip(prepacked.stored_tensors(), (codes, scale), strict=True):
        assert_same_bits(got, want)
    assert prepacked.best() is prepacked
    assert stored.best().form == "prepacked"
    with xpu_fp4.cpu_backend("sycl"):
        assert stored.best() is stored
