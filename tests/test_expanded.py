# SPDX-License-Identifier: Apache-2.0
"""Weights that are expanded once, for products with many rows on GPUs: the same bits, less work in each call."""

import copy
import pickle

import pytest
import torch
import xpu_fp4
from helpers import assert_same_bits, linear_w4a8, random_codes, random_scales, seeded
from torch import Tensor
from xpu_fp4 import Mode, MXFP4Linear

own = torch.ops.xpu_fp4
OPS = {name: getattr(own, name) for name in ("mxfp4_linear_expanded", "mxfp4_linear_w4a8_expanded")}
VARIANTS = ["bmg:large", "bmg:medium", "bmg:small", "bmg", "dg2:large", "dg2:medium", "dg2:small"]
MODES: tuple[Mode, ...] = ("w4a4", "w4a8")
WITHOUT_A_FORM = "only the SYCL kernels for GPUs with a matrix unit have an expanded form"

pytestmark = pytest.mark.usefixtures("requires_sycl")


@pytest.fixture(autouse=True)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU's kernels on the CPU device: `bmg:large`, or what a test asks for."""
    name = str(getattr(request, "param", "bmg:large"))
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", name)
    return name


def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
    return random_codes(n, k, seeded(1)), random_scales(n, k, seeded(2), 117, 137)


def activations(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=seeded(3))


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize(("m", "n", "k"), [(70, 65, 416), (1, 32, 32), (3, 0, 64), (0, 5, 64), (4, 7, 0)])
def test_an_expanded_weight_gives_the_same_bits(variant: str, m: int, n: int, k: int) -> None:
    codes, scale = weight(n, k)
    x, bias = activations(m, k), torch.randn(n, generator=seeded(4))
    expected = {mode: xpu_fp4.linear(x, codes, scale, bias, mode=mode) for mode in MODES}
    of_blocks = linear_w4a8(x, codes, scale, bias, 32)
    with xpu_fp4.cpu_backend("sycl"):
        expanded = xpu_fp4.expand(codes, scale)
        for mode in MODES:
            assert_same_bits(xpu_fp4.linear(x, codes, scale, bias, mode=mode, expanded=expanded), expected[mode])
        y = xpu_fp4.linear(x, codes, scale, bias, mode="w4a8", group=32, expanded=expanded)
        assert_same_bits(y, of_blocks)
    lanes = 8 if variant.startswith("dg2") else 16
    quads, padded = -(-k // 128), -(-n // 32) * 32
    assert expanded.shape[0] == padded // lanes
    assert expanded.numel() == padded * quads * 132 + 4 * (padded // lanes) * (-(-quads // lanes) * lanes)


@pytest.mark.parametrize(("variant", "reads"), [("bmg:large", True), ("bmg:small", False)], indirect=["variant"])
@pytest.mark.parametrize("mode", MODES)
def test_many_rows_read_the_expanded_weight_and_few_the_stored_one(mode: Mode, variant: str, reads: bool) -> None:
    codes, scale = weight(40, 160)
    x = activations(9, 160)
    with xpu_fp4.cpu_backend("sycl"):
        zeros = torch.zeros_like(xpu_fp4.expand(codes, scale))
        y = xpu_fp4.linear(x, codes, scale, mode=mode, expanded=zeros)
    assert (y == 0).all() == reads, variant


def arguments() -> dict[str, Tensor]:
    codes, scale = weight(40, 160)
    with xpu_fp4.cpu_backend("sycl"):
        expanded = xpu_fp4.expand(codes, scale)
    return {"x": activations(5, 160), "weight": codes, "weight_scale": scale, "expanded": expanded, "bias": torch.randn(40)}


def test_the_ops_pass_opcheck() -> None:
    given = arguments()
    with xpu_fp4.cpu_backend("sycl"):
        torch.library.opcheck(own.mxfp4_expand.default, (given["weight"], given["weight_scale"]))
        for op in OPS.values():
            torch.library.opcheck(op.default, (), given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.float(), "expanded must be uint8, got Float"),
        (lambda e: e[:-1], r"expanded has shape \[3, 4288\], expected \[4, 4288\] \(what mxfp4_expand returns"),
        (lambda e: torch.cat([e, e], 1)[:, : e.shape[1]], "expanded must be contiguous"),
        (lambda e: torch.cat([e.new_zeros(1), e.flatten()])[1:].view_as(e), "expanded begins at an address that is no mul"),
    ],
)
@pytest.mark.parametrize("name", OPS)
def test_what_is_not_an_expanded_weight_is_refused(name: str, change: object, message: str) -> None:
    given = arguments()
    assert callable(change)
    with xpu_fp4.cpu_backend("sycl"), pytest.raises(RuntimeError, match=f"{name}: {message}"):
        OPS[name](**given | {"expanded": change(given["expanded"])})


def test_another_devices_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "dg2:large")
    with xpu_fp4.cpu_backend("sycl"), pytest.raises(RuntimeError, match=r"expanded has shape .* on this device"):
        own.mxfp4_linear_expanded(**given)


def test_where_there_is_no_such_form_the_ops_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    with xpu_fp4.cpu_backend("native"), pytest.raises(RuntimeError, match=f"weight cannot be expanded: {WITHOUT_A_FORM}"):
        xpu_fp4.expand(given["weight"], given["weight_scale"])
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "portable")
    for name, op in OPS.items():
        with (
            xpu_fp4.cpu_backend("sycl"),
            pytest.raises(RuntimeError, match=f"{name}: weight cannot be expanded: {WITHOUT_A_FORM}"),
        ):
            op(**given)


def test_the_other_mode_does_not_take_it() -> None:
    given = arguments()
    with pytest.raises(ValueError, match='an expanded weight is for mode "w4a4" or "w4a8", got mode \'w4a16\''):
        xpu_fp4.linear(given["x"], given["weight"], given["weight_scale"], mode="w4a16", expanded=given["expanded"])


# ---- modules ----


def module(mode: xpu_fp4.Mode = "w4a4") -> MXFP4Linear:
    torch.manual_seed(5)
    return MXFP4Linear.from_linear(torch.nn.Linear(160, 40), mode=mode)


def test_a_module_expands_once_and_gives_the_same_bits() -> None:
    x = activations(9, 160)
    expected = copy.deepcopy(module())(x)
    layer = module().prepack_()
    state = layer.state_dict()
    with xpu_fp4.cpu_backend("sycl"):
        assert layer.expand_().is_expanded
        assert not layer.is_prepacked
        assert_same_bits(layer(x), expected)
        assert_same_bits(copy.deepcopy(layer)(x), expected)
        assert_same_bits(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    assert layer.state_dict().keys() == state.keys()


def test_a_changed_weight_is_not_answered_with_the_old_one() -> None:
    layer, other = module(), module()
    other.weight_packed = torch.nn.Parameter(other.weight_packed.flip(0), requires_grad=False)
    with xpu_fp4.cpu_backend("sycl"):
        assert not layer.expand_().float().is_expanded
        layer.expand_().load_state_dict(other.state_dict())
        assert not layer.is_expanded
        layer.expand_().weight_scale = other.weight_scale
        assert not layer.is_expanded
        assert not pickle.loads(pickle.dumps(layer.expand_())).is_expanded
        assert not layer.expand_().prepack_().is_expanded
        with torch.no_grad():
            layer.expand_().weight_packed.copy_(module().weight_packed)
            layer.expand_().weight_packed.copy_(other.weight_packed)
        layer.expand_()
        assert_same_bits(layer(activations(9, 160)), other(activations(9, 160)))


def test_warmup_takes_expanded_weights(variant: str, capfd: pytest.CaptureFixture[str]) -> None:
    with xpu_fp4.cpu_backend("sycl"):
        xpu_fp4.warmup([(40, 33, 96)], device="cpu", expanded=True)
        with pytest.raises(ValueError, match="an expanded weight is for mode"):
            xpu_fp4.warmup([(40, 33, 96)], mode="w4a16", device="cpu", expanded=True)


def test_a_module_of_the_other_mode_refuses() -> None:
    with pytest.raises(ValueError, match="an expanded weight is for mode 'w4a4' or 'w4a8', got a module of mode 'w4a16'"):
        module("w4a16").expand_()


def test_a_model_is_expanded_layer_by_layer() -> None:
    model = torch.nn.Sequential(module(), torch.nn.ReLU(), MXFP4Linear(64, 32, mode="w4a16"))
    with xpu_fp4.cpu_backend("sycl"):
        assert xpu_fp4.expand_(model) is model
    assert model[0].is_expanded
    assert not model[2].is_expanded
