# SPDX-License-Identifier: Apache-2.0
"""MXFP4Linear and quantize_ as parts of a model."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import xpu_fp4
from helpers import assert_same_bits, seeded
from torch import Tensor, nn
from xpu_fp4 import Group, Mode, MXFP4Linear

K, N = 96, 40
ops = torch.ops.xpu_fp4


def model() -> nn.Module:
    shared = nn.Linear(K, K)
    layers = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(K, K, bias=False))
    return nn.ModuleDict({"body": layers, "lm_head": nn.Linear(K, N)})


def as_seen(x: Tensor, mode: Mode) -> Tensor:
    """Returns what a linear of that mode multiplies in the place of x."""
    if mode == "w4a4":
        return xpu_fp4.dequantize(*xpu_fp4.quantize(x))
    if mode == "w4a8":
        return xpu_fp4.mxint8_dequantize(*xpu_fp4.mxint8_quantize(x))
    return x


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_computes_with_the_quantized_weight(mode: Mode, bias: bool) -> None:
    linear = nn.Linear(K, N, bias=bias)
    module = MXFP4Linear.from_linear(linear, mode=mode)
    x = torch.randn(2, 3, K)
    q, scale = xpu_fp4.quantize(linear.weight.detach())
    torch.testing.assert_close(module.dequantized_weight(), xpu_fp4.dequantize(q, scale), rtol=0, atol=0)
    assert torch.equal(module(x), xpu_fp4.linear(x, q, scale, linear.bias, mode=mode))
    expected = nn.functional.linear(as_seen(x, mode), module.dequantized_weight(), linear.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_state_dict_is_the_compressed_tensors_format(mode: Mode) -> None:
    state = MXFP4Linear.from_linear(nn.Linear(K, N), mode=mode).state_dict()
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    assert described == {
        "weight_packed": (torch.uint8, (N, K // 2)),
        "weight_scale": (torch.uint8, (N, K // 32)),
        "bias": (torch.float32, (N,)),
    }


@pytest.mark.parametrize("mode", get_args(Mode))
def test_copies_compute_the_same(tmp_path: Path, mode: Mode) -> None:
    module = MXFP4Linear.from_linear(nn.Linear(K, N), mode=mode, scale_mode="ceil", group=32)
    x = torch.randn(4, K)
    loaded = MXFP4Linear(K, N, mode=mode, scale_mode="ceil", group=32)
    loaded.load_state_dict(module.state_dict())
    torch.save(module, tmp_path / "module.pt")
    saved = torch.load(tmp_path / "module.pt", weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved, loaded, module.to("cpu")):
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)


def test_dtype_moves_touch_only_the_bias() -> None:
    module = MXFP4Linear.from_linear(nn.Linear(K, N)).to(torch.bfloat16)
    assert module.bias is not None
    assert (module.weight_packed.dtype, module.weight_scale.dtype, module.bias.dtype) == (
        torch.uint8,
        torch.uint8,
        torch.bfloat16,
    )
    assert module(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device_builds_without_memory() -> None:
    module = MXFP4Linear(K, N, device="meta")
    assert module(torch.randn(3, K, device="meta")).shape == (3, N)
    assert not module.to_empty(device="cpu").weight_packed.is_meta


def test_a_new_module_gives_zeros() -> None:
    assert torch.equal(MXFP4Linear(K, N)(torch.randn(2, K)), torch.zeros(2, N))


@pytest.mark.parametrize("mode", get_args(Mode))
def test_representation_names_the_formats(mode: Mode) -> None:
    how = {"w4a4": "mode=w4a4, scale_mode=rceil", "w4a8": "mode=w4a8, group=32", "w4a16": "mode=w4a16"}[mode]
    module = MXFP4Linear(K, N, bias=False, mode=mode, scale_mode="rceil", group=32)
    assert repr(module) == f"MXFP4Linear(in_features={K}, out_features={N}, bias=False, {how})"


@pytest.mark.parametrize("group", get_args(Group))
def test_group_is_that_of_activations(group: Group) -> None:
    generator = seeded(group)
    x = torch.randn(3, K, generator=generator) * torch.exp2(torch.arange(K) // 32 * 4)
    linear = nn.Linear(K, N)
    codes, scale = xpu_fp4.quantize(linear.weight.detach())
    expected = ops.mxfp4_linear_w4a8(x, codes, scale, linear.bias, group)
    assert not torch.equal(expected, ops.mxfp4_linear_w4a8(x, codes, scale, linear.bias, 160 - group))
    module = MXFP4Linear.from_linear(linear, mode="w4a8", group=group)
    (in_a_model,) = xpu_fp4.quantize_(nn.Sequential(copy.deepcopy(linear)), mode="w4a8", group=group)
    for result in (module(x), module.prepack_()(x), in_a_model(x)):
        assert_same_bits(result, expected)


def test_mode_may_be_set_later() -> None:
    linear, x = nn.Linear(K, N), torch.randn(4, K)
    module = MXFP4Linear.from_linear(linear)
    module(x)
    for mode in get_args(Mode):
        module.mode = mode
        assert_same_bits(module(x), MXFP4Linear.from_linear(linear, mode=mode)(x))


def test_quantize_replaces_all_linears_but_the_head() -> None:
    original = model()
    quantized = xpu_fp4.quantize_(copy.deepcopy(original), progress=True)
    kinds = {name: type(m) for name, m in quantized.named_modules(remove_duplicate=False) if "." in name or name == "lm_head"}
    assert kinds == {
        "body.0": MXFP4Linear,
        "body.1": nn.ReLU,
        "body.2": MXFP4Linear,
        "body.3": MXFP4Linear,
        "lm_head": nn.Linear,
    }
    assert quantized.get_submodule("body.0") is quantized.get_submodule("body.2"), "a shared layer stays shared"


def test_quantize_asks_the_filter_with_dotted_names() -> None:
    asked: list[str] = []

    def only_the_last(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return name == "body.3"

    quantized = xpu_fp4.quantize_(model(), mode="w4a16", filter_fn=only_the_last)
    assert sorted(asked) == ["body.0", "body.2", "body.3", "lm_head"]
    assert [n for n, m in quantized.named_modules() if isinstance(m, MXFP4Linear)] == ["body.3"]


def test_quantize_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="model is itself"):
        xpu_fp4.quantize_(nn.Linear(K, N))
    odd = nn.Sequential(nn.Linear(K, 40), nn.Linear(40, N))
    with pytest.raises(ValueError, match="1 has in_features 40, expected a multiple of 32"):
        xpu_fp4.quantize_(odd)
    assert type(odd[0]) is nn.Linear, "nothing is replaced before all is known to fit"
    with pytest.raises(ValueError, match="in_features is 40"):
        MXFP4Linear(40, N)
    with pytest.raises(ValueError, match="mode is 'w8a8'"):
        MXFP4Linear(K, N, mode="w8a8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode is 'w8a8'"):
        xpu_fp4.linear(torch.ones(K), torch.zeros(N, K // 2), torch.zeros(N, 3), mode="w8a8")  # type: ignore[arg-type]


def test_quantize_names_the_matrices_that_it_leaves() -> None:
    attention = nn.Sequential(nn.Linear(K, K), nn.MultiheadAttention(K, 2))
    with pytest.warns(UserWarning, match=r"79% of the parameters are not quantized, in no nn.Linear: 1.in_proj_weight, 1.out"):
        xpu_fp4.quantize_(attention)
    with pytest.warns(UserWarning, match=r"Sequential has no nn.Linear, nothing is quantized"):
        xpu_fp4.quantize_(nn.Sequential(nn.Conv1d(K, K, 1), nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xpu_fp4.quantize_(nn.Sequential(nn.Embedding(40, K), nn.Linear(K, N), nn.Conv2d(K, K, 1), nn.LayerNorm(K)))


# ---- code outside that looks at a layer's weight ----


@pytest.mark.parametrize("bias", [True, False])
def test_weight_is_the_dequantized_weight(bias: bool) -> None:
    module = MXFP4Linear.from_linear(nn.Linear(K, N, bias=bias, dtype=torch.bfloat16))
    expected = module.dequantized_weight(torch.bfloat16)
    for _ in range(2):  # as it is stored, and prepacked
        weight = module.weight
        assert isinstance(weight, Tensor)
        assert (weight.shape, weight.dtype, weight.device) == (expected.shape, expected.dtype, expected.device)
        for read in (weight.float(), weight.data.float(), weight.detach().float(), torch.zeros(N, K).copy_(weight)):
            assert torch.equal(read, expected.float())
        x = torch.randn(3, K, dtype=torch.bfloat16)
        assert type(weight @ x.T) is Tensor
        assert torch.equal(weight @ x.T, expected @ x.T)
        module(x)
    assert "weight" not in module.state_dict()
    assert module.to(torch.float16).weight.dtype == torch.float16
    assert copy.deepcopy(module).weight.dtype == torch.float16
    assert module.to("meta").weight.is_meta


def test_weight_costs_nothing_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module = MXFP4Linear(K, N)
    monkeypatch.setattr(MXFP4Linear, "dequantized_weight", None)
    assert (module.weight.dtype, module.weight.shape, module.weight.device.type) == (torch.float32, (N, K), "cpu")


def test_weight_cannot_be_written() -> None:
    module = MXFP4Linear.from_linear(nn.Linear(K, N))
    before = module.dequantized_weight()
    writes: list[Callable[[], object]] = [
        lambda: nn.init.normal_(module.weight),
        lambda: module.weight.copy_(torch.zeros(N, K)),
        lambda: module.weight.__setitem__(0, 0.0),
        lambda: setattr(module.weight, "data", torch.zeros(N, K)),
        lambda: torch.add(before, before, out=module.weight),
        lambda: setattr(module, "weight", nn.Parameter(torch.zeros(N, K))),
        lambda: setattr(module, "weight", torch.zeros(N, K)),
    ]
    for write in writes:
        with pytest.raises((RuntimeError, AttributeError), match="can only be read: set these instead"):
            write()
    assert torch.equal(module.dequantized_weight(), before)


def test_an_encoder_layer_of_torch_computes_in_its_layers() -> None:
    """It has one fused operation on its layers' weights in eval mode, which would not quantize activations."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 64)
    with pytest.warns(UserWarning, match=r"self_attn.in_proj_weight"):
        xpu_fp4.quantize_(encoder)
    calls: list[str] = []
    for name, module in encoder.named_modules():
        if isinstance(module, MXFP4Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.inference_mode():
        assert encoder(x).isfinite().all()
    assert calls == [f"layers.{layer}.linear{i}" for layer in (0, 1) for i in (1, 2)]
