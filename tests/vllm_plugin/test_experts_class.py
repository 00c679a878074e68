# SPDX-License-Identifier: Apache-2.0
"""The class for experts by itself: where it stands beside vLLM's, what its configurations read, what it computes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import mxfp4_w4a16_moe_quant_config
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsMxfp4
from vllm.platforms import PlatformEnum, current_platform
from xpu_fp4 import Backend, reference
from xpu_fp4.checkpoints import CheckpointError, Scheme
from xpu_fp4.checkpoints.compressed_tensors import write_config
from xpu_fp4.integrations.vllm import experts, kernel, register, registration
from xpu_fp4.integrations.vllm.config import ActivationsAwareConfig
from xpu_fp4.integrations.vllm.experts import XpuFp4Experts, are_ours
from xpu_fp4.integrations.vllm.experts_methods import CompressedTensorsExperts, GptOssExperts
from xpu_fp4.weight import PackedExperts

W4A16, W4A8, W4A4 = Scheme("w4a16"), Scheme("w4a8"), Scheme("w4a4")
NAME = "model.layers.0.mlp.experts"
AUTO: Any = SimpleNamespace(moe_backend="auto")


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.fixture
def with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUExpertsMxfp4, "_supports_current_device", staticmethod(lambda: True))


@pytest.fixture
def on_xpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM and the class believe that this is an XPU, an Xe2, on which ours can run."""
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.XPU)
    monkeypatch.setattr(kernel, "backend", lambda name: Backend(name, True, ""))
    monkeypatch.setattr(experts, "_is_xe2_or_xe3", lambda: True)
    monkeypatch.setattr(experts, "_class_of", lambda backend: type("XPUExpertsMxFp4", (), {}))
    kernel.platform_backend.cache_clear()
    yield
    kernel.platform_backend.cache_clear()


def test_on_a_cpu_without_amx_ours_is_the_only_one() -> None:
    assert all(are_ours(AUTO, scheme) for scheme in (W4A16, W4A8, W4A4))


def test_with_amx_vllms_comes_first_for_what_it_computes(with_amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not are_ours(AUTO, W4A16)
    assert are_ours(AUTO, W4A8)
    assert are_ours(AUTO, W4A4)
    assert are_ours(AUTO, W4A16, vllm_has_cpu_class=False)
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "CPUExpertsMxfp4")
    assert are_ours(AUTO, W4A16)


@pytest.mark.usefixtures("with_amx")
def test_asking_for_mxint8_asks_for_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_FP4_ACTIVATIONS", "mxint8")
    assert are_ours(AUTO, W4A16)


def test_on_xpu_vllms_comes_first(on_xpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not are_ours(AUTO, W4A16)
    assert not are_ours(AUTO, W4A4)
    assert are_ours(AUTO, W4A8)
    assert are_ours(AUTO, Scheme("w4a16", hadamard=32)), "vLLM would leave the transform out"
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "XPUExpertsMxFp4")
    assert are_ours(AUTO, W4A4)


def test_on_an_xpu_that_vllms_does_not_run_on_ours_is_the_only_one(on_xpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_is_xe2_or_xe3", lambda: False)
    assert are_ours(AUTO, W4A16)


def test_ours_can_be_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not are_ours(SimpleNamespace(moe_backend="cpu"), W4A16)
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "XpuFp4Experts")
    assert not are_ours(AUTO, W4A16)


def test_quark_is_let_through_on_xpu(on_xpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "supported_quantization", ["fp8", "compressed-tensors"])
    monkeypatch.setattr(registration, "register_linear_kernel", lambda *args: None)
    registration.register_kernel_and_config()
    assert "quark" in current_platform.supported_quantization
    current_platform.verify_quantization("quark")


# ---- what the checkpoint says ----


def routed_experts() -> Any:
    layer: Any = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name = "gate_proj", "up_proj", "down_proj"
    layer.moe_config = AUTO
    return layer


def config_of(scheme: Scheme, exceptions: dict[str, Scheme] | None = None) -> ActivationsAwareConfig:
    config: ActivationsAwareConfig = ActivationsAwareConfig.from_config(write_config(scheme, ["lm_head"], exceptions or {}))
    return config


@pytest.mark.parametrize(
    "scheme", [W4A16, W4A4, W4A8, Scheme("w4a8", group=32), Scheme("w4a8", hadamard=32), Scheme("w4a16", hadamard=64)], ids=str
)
def test_a_layer_of_experts_gets_the_scheme_of_its_projections(scheme: Scheme) -> None:
    method = config_of(scheme).get_quant_method(routed_experts(), NAME)
    assert isinstance(method, CompressedTensorsExperts)
    assert method.scheme == scheme


def test_a_request_keeps_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_FP4_ACTIVATIONS", "mxint8")
    method = config_of(Scheme("w4a4", hadamard=32)).get_quant_method(routed_experts(), NAME)
    assert method.scheme == Scheme("w4a8", hadamard=32)


def test_experts_that_ours_cannot_compute_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=f"{NAME} has input offsets, which checkpoints of xpu_fp4 have for linear layers"):
        config_of(Scheme("w4a16", input_offset=True)).get_quant_method(routed_experts(), NAME)
    mixed = config_of(Scheme("w4a16", hadamard=32), {f"{NAME}.0.down_proj": Scheme("w4a16", hadamard=64)})
    with pytest.raises(ValueError, match=r"All MoE projections need to have same|projections have different transforms"):
        mixed.get_quant_method(routed_experts(), NAME)
    layer: Any = SimpleNamespace(activation=MoEActivation.SILU, swiglu_limit=7.0)
    with pytest.raises(ValueError, match=f"{NAME}: silu with a limit, 7.0, is not among xpu_fp4's activations"):
        GptOssExperts(AUTO, W4A16, NAME).process_weights_after_loading(layer)


def test_a_shard_that_cuts_a_block_is_refused_or_padded() -> None:
    def same(self: Any, hidden: int, inner: int, *others: object) -> tuple[int, int]:
        return hidden, inner

    with mock.patch.object(FusedMoEMethodBase, "maybe_roundup_sizes", same):
        with pytest.raises(ValueError, match=f"{NAME}: a shard of the experts has 48 intermediate columns, .* multiple of 32"):
            CompressedTensorsExperts(AUTO, W4A16, NAME).maybe_roundup_sizes(64, 48, torch.bfloat16, None)
        with pytest.raises(ValueError, match="expected a multiple of 64"):
            CompressedTensorsExperts(AUTO, Scheme("w4a4", hadamard=64), NAME).maybe_roundup_sizes(64, 96, torch.bfloat16, None)
        assert GptOssExperts(AUTO, W4A16, NAME).maybe_roundup_sizes(64, 720, torch.bfloat16, None) == (64, 736)


# ---- what it computes ----


TOKENS, HIDDEN, INNER, EXPERTS = 7, 64, 32, 4
EXPERT_MAP = torch.tensor([1, -1, 0, 3, -1, 2, -1, -1], dtype=torch.int32)


def random_experts(scheme: Scheme) -> tuple[PackedExperts, XpuFp4Experts]:
    """Stored weights, and our class with their scales and random biases."""
    w13, w13_scale = _quantized(EXPERTS, 2 * INNER, HIDDEN)
    w2, w2_scale = _quantized(EXPERTS, HIDDEN, INNER)
    biases = torch.randn(EXPERTS, 2 * INNER), torch.randn(EXPERTS, HIDDEN)
    names = ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "activation_situ_beta", "activation_situ_linear_beta")
    moe: Any = SimpleNamespace(**dict.fromkeys(names))
    weights = PackedExperts.stored(w13, w13_scale, w2, w2_scale)
    ours = XpuFp4Experts(moe, mxfp4_w4a16_moe_quant_config(w13_scale, w2_scale, *biases))
    ours.serve(weights, scheme)
    return weights, ours


def random_tokens() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(-1, len(EXPERT_MAP), (TOKENS, 1), dtype=torch.int32)
    return torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, 1), ids


def apply(ours: XpuFp4Experts, w1: Tensor, w2: Tensor, x: Tensor, r: Tensor, ids: Tensor, *, on_input: bool = False) -> Tensor:
    output, none = torch.empty_like(x), torch.empty(0)
    gate = MoEActivation.SWIGLUOAI
    ours.apply(output, x, w1, w2, r, ids, gate, len(EXPERT_MAP), EXPERT_MAP, None, None, none, none, None, on_input)
    return output


@pytest.mark.parametrize("form", ["stored", "prepacked"])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("scheme", [W4A4, W4A8], ids=str)
def test_it_computes_the_op_for_a_layer(form: str, on_input: bool, scheme: Scheme) -> None:
    weights, ours = random_experts(scheme)
    x, r, ids = random_tokens()
    w1, w2 = weights.tensors[0], weights.tensors[2]
    if form == "prepacked":
        held = weights.prepacked()
        ours.serve(held, scheme)
        w1, w2 = held.tensors
    expected = weights.layer(
        x,
        ids,
        torch.ones_like(r) if on_input else r,
        ours.w1_bias,
        ours.w2_bias,
        gate=experts._GATES[MoEActivation.SWIGLUOAI],
        mode=scheme.mode,
        expert_map=EXPERT_MAP,
    )
    assert torch.equal(apply(ours, w1, w2, x, r, ids, on_input=on_input), expected)


def test_dynamo_traces_the_experts_without_a_break() -> None:
    weights, ours = random_experts(W4A8)
    given = (weights.tensors[0], weights.tensors[2], *random_tokens())
    compiled = torch.compile(lambda *tensors: apply(ours, *tensors), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*given), apply(ours, *given))


def _quantized(count: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    codes, scale = reference.quantize(torch.randn(count, n, k))
    return codes, scale
