# SPDX-License-Identifier: Apache-2.0
"""The kernel class by itself: what vLLM asks it, what it answers, what it computes."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import vllm.model_executor.kernels.linear as linear_kernels
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import MxFp4LinearLayerConfig, XPUMxFp4LinearKernel, init_mxfp4_linear_kernel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kMxfp4Dynamic
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import PlatformEnum, current_platform
from vllm.plugins import load_general_plugins
from xpu_fp4 import Backend, cpu_backend, reference
from xpu_fp4.checkpoints import CheckpointError, Scheme
from xpu_fp4.checkpoints.compressed_tensors import names_of, write_config
from xpu_fp4.integrations.vllm import kernel, register, registration
from xpu_fp4.integrations.vllm.config import ActivationsAwareConfig, CompressedTensorsMxfp4
from xpu_fp4.integrations.vllm.kernel import XpuFp4LinearKernel, key_of

K, N = 160, 48  # five blocks
KEYS = [None, kMxfp4Dynamic, key_of(Scheme("w4a8")), key_of(Scheme("w4a8", group=32))]
DEFINED: dict[Scheme, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    Scheme("w4a4"): reference.quantize,
    Scheme("w4a8"): reference.mxint8_quantize,
    Scheme("w4a8", group=32): partial(reference.mxint8_quantize, group=32),
}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def kernels_of(platform: PlatformEnum) -> list[type]:
    return list(linear_kernels._POSSIBLE_MXFP4_KERNELS[platform])


@pytest.fixture
def on_xpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM and the kernel believe that this is an XPU on which ours can run."""
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.XPU)
    monkeypatch.setattr(kernel, "backend", lambda name: Backend(name, True, ""))
    kernel.platform_backend.cache_clear()
    yield
    kernel.platform_backend.cache_clear()


def layer_with(weight: Tensor, scale: Tensor) -> Any:
    layer: Any = nn.Module()
    layer.prefix = "model.layers.0.mlp.down_proj"
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    return layer


def random_layer() -> tuple[Any, Tensor, Tensor]:
    weight, scale = reference.quantize(torch.randn(N, K))
    layer = layer_with(weight.clone(), scale.clone())
    return layer, weight, scale


ROTATED: dict[str, Any] = {
    "transform_config": {
        "quant_method": "compressed-tensors",
        "transform_config": {
            "config_groups": {"v": {"type": "hadamard", "apply": [{"location": "input", "targets": ["Linear"]}]}}
        },
    },
    "algo_config": {"quant_method": "quark", "algo_config": [{"name": "rotation", "r4": True}]},
}


@pytest.mark.parametrize("key", ROTATED)
@pytest.mark.parametrize("where", ["model", "language model"])
def test_a_rotated_checkpoint_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, key: str, where: str) -> None:
    inner = SimpleNamespace(quantization_config=ROTATED[key])
    outer = inner if where == "model" else SimpleNamespace()
    outer.get_text_config = lambda: inner
    loading = SimpleNamespace(model_config=SimpleNamespace(model="some/model", hf_config=outer))
    monkeypatch.setattr(kernel, "get_current_vllm_config_or_none", lambda: loading)
    with pytest.raises(ValueError, match=rf"some/model/config.json: quantization_config.{key}.* xpu_fp4 cannot do"):
        init_mxfp4_linear_kernel(activation_quant_key=kMxfp4Dynamic)
    inner.quantization_config = ROTATED[key] | {key: None}
    assert isinstance(init_mxfp4_linear_kernel(activation_quant_key=kMxfp4Dynamic), XpuFp4LinearKernel)


def test_registering_again_changes_nothing() -> None:
    register()
    load_general_plugins()
    assert kernels_of(PlatformEnum.CPU).count(XpuFp4LinearKernel) == 1
    assert kernels_of(PlatformEnum.XPU) == [XPUMxFp4LinearKernel, XpuFp4LinearKernel]


def test_on_xpu_the_built_in_kernel_comes_first_and_ours_takes_what_it_refuses(
    on_xpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert type(init_mxfp4_linear_kernel(kMxfp4Dynamic)) is XPUMxFp4LinearKernel
    assert type(init_mxfp4_linear_kernel(None)) is XpuFp4LinearKernel
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "XPUMxFp4LinearKernel")
    assert type(init_mxfp4_linear_kernel(kMxfp4Dynamic)) is XpuFp4LinearKernel


def test_a_backend_that_is_off_is_named_with_its_reason(on_xpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "backend", lambda name: Backend(name, False, "torch sees no XPU device"))
    with pytest.raises(ValueError, match="xpu_fp4's xpu backend is off: torch sees no XPU device"):
        init_mxfp4_linear_kernel(None)


def test_another_platform_is_named(on_xpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.CUDA)
    supported, reason = XpuFp4LinearKernel.is_supported()
    assert not supported
    assert reason is not None
    assert "platforms cpu and xpu" in reason


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_all_activation_formats_are_ours(key: object) -> None:
    assert XpuFp4LinearKernel.can_implement(MxFp4LinearLayerConfig(key)) == (True, None)
    assert type(init_mxfp4_linear_kernel(key)) is XpuFp4LinearKernel


def test_other_activation_formats_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"XpuFp4LinearKernel: the checkpoint asks for activations quantized as .*f8e4m3"):
        init_mxfp4_linear_kernel(kFp8DynamicTokenSym)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("leading", [(7,), (2, 3), (0,), (1,)])
@pytest.mark.parametrize("scheme", DEFINED, ids=str)
def test_defined_schemes_have_the_bits_of_the_definition(
    scheme: Scheme, dtype: torch.dtype, with_bias: bool, leading: tuple[int, ...]
) -> None:
    layer, weight, scale = random_layer()
    served = init_mxfp4_linear_kernel(key_of(scheme))
    served.process_weights_after_loading(layer)
    x = torch.randn(*leading, K).to(dtype)
    bias = torch.randn(N).to(dtype) if with_bias else None
    expected = reference.gemm(*DEFINED[scheme](x.flatten(0, -2)), weight, scale, dtype, bias)
    assert torch.equal(served.apply_weights(layer, x, bias), expected.view(*leading, N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("leading", [(7,), (2, 3)])
def test_w4a16_is_within_its_bound(dtype: torch.dtype, with_bias: bool, leading: tuple[int, ...]) -> None:
    layer, weight, scale = random_layer()
    served = init_mxfp4_linear_kernel(None)
    served.process_weights_after_loading(layer)
    x = torch.randn(*leading, K).to(dtype)
    bias = torch.randn(N).to(dtype) if with_bias else torch.zeros(N, dtype=dtype)
    w = reference.values(weight, scale)
    exact = x.double() @ w.t() + bias.double()
    bound = 2**-22 * K**0.5 * (x.double().abs() @ w.abs().t()) + exact.abs() * torch.finfo(dtype).eps
    got = served.apply_weights(layer, x, bias if with_bias else None)
    assert got.dtype == dtype
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_sycl_backend_serves_the_checkpoints_own_layout_with_the_same_bits(key: object) -> None:
    layer, weight, scale = random_layer()
    served, x = init_mxfp4_linear_kernel(key), torch.randn(5, K)
    served.process_weights_after_loading(layer)
    unpacked = layer_with(weight, scale)
    with cpu_backend("sycl"):
        served.process_weights_after_loading(unpacked)
    assert unpacked.weight.shape == weight.shape
    assert torch.equal(served.apply_weights(unpacked, x), served.apply_weights(layer, x))


@pytest.mark.parametrize(("key", "expands"), [(kMxfp4Dynamic, True), (key_of(Scheme("w4a8")), True), (None, False)], ids=str)
def test_a_gpu_expands_the_weights_where_it_is_asked_to(key: object, expands: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = random_layer()
    served, x = init_mxfp4_linear_kernel(key), torch.randn(40, K)
    monkeypatch.setenv("XPU_FP4_SYCL_VARIANT", "bmg:large")
    with cpu_backend("sycl"):
        served.process_weights_after_loading(layer)
        without = served.apply_weights(layer, x)
        monkeypatch.setenv("XPU_FP4_EXPAND_WEIGHTS", "1")
        served.process_weights_after_loading(layer)
        assert (layer.xpu_fp4_expanded is not None) == expands
        assert torch.equal(served.apply_weights(layer, x), without)


# ---- what a checkpoint says, and a request instead of it ----


MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": True}


def config_with(activations: object, hint: object) -> ActivationsAwareConfig:
    group = {"targets": ["Linear"], "weights": MXFP4, "input_activations": activations}
    described = {"format": "mxfp4-pack-quantized", "config_groups": {"group_0": group}, "ignore": [], "xpu_fp4": hint}
    config: ActivationsAwareConfig = ActivationsAwareConfig.from_config(described)
    return config


@pytest.mark.parametrize(
    ("activations", "hint", "expected"),
    [
        (None, None, Scheme("w4a16")),
        (None, {"scale_mode": "floor"}, Scheme("w4a16")),
        (None, {"activations": "mxint8", "group": 128}, Scheme("w4a8")),
        (None, {"activations": "mxint8", "group": 32, "scale_mode": "floor"}, Scheme("w4a8", group=32)),
        (MXFP4 | {"dynamic": True}, {"activations": "mxint8"}, Scheme("w4a4")),
        (INT8, None, Scheme("w4a8", group=32)),
        (INT8 | {"group_size": 128, "scale_dtype": "torch.uint8"}, {"activations": "mxint8", "group": 32}, Scheme("w4a8")),
    ],
)
def test_a_checkpoint_says_what_becomes_of_activations(activations: object, hint: object, expected: Scheme) -> None:
    scheme = config_with(activations, hint).get_scheme(nn.Linear(K, N), "model.layers.0.mlp.down_proj")
    assert scheme is not None
    assert isinstance(scheme, CompressedTensorsMxfp4) == (expected.mode != "w4a4")
    assert scheme.kernel.config.activation_quant_key == key_of(expected)


@pytest.mark.parametrize(
    ("activations", "hint", "message"),
    [
        (INT8 | {"group_size": 64}, None, "input_activations of mlp.down_proj.group_size is 64, expected 32 or 128"),
        (INT8 | {"dynamic": False}, None, "is not MXINT8: dynamic False, expected True"),
        (None, {"activations": "mxint4"}, "quantization_config.xpu_fp4.activations is 'mxint4', expected one of mxint8"),
    ],
)
def test_other_activations_are_named(activations: object, hint: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        config_with(activations, hint).get_scheme(nn.Linear(K, N), "mlp.down_proj")


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_request_goes_before_what_the_checkpoint_says_and_is_logged_once(
    key: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XPU_FP4_ACTIVATIONS", "mxint8")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to pytest
    kernel._announce.cache_clear()
    with caplog.at_level(logging.INFO, "vllm.xpu_fp4"):
        init_mxfp4_linear_kernel(key)
        served = init_mxfp4_linear_kernel(key)
    layer, weight, scale = random_layer()
    served.process_weights_after_loading(layer)
    x = torch.randn(5, K)
    expected = reference.gemm(*reference.mxint8_quantize(x), weight, scale, torch.float32)
    assert torch.equal(served.apply_weights(layer, x), expected)
    said = [message for message in caplog.messages if "XPU_FP4_ACTIVATIONS" in message]
    assert said == ["XPU_FP4_ACTIVATIONS=mxint8: every MXFP4 layer runs in w4a8 group 128, whatever the checkpoint says"]


def test_an_unknown_request_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_FP4_ACTIVATIONS", "int8")
    with pytest.raises(ValueError, match="XPU_FP4_ACTIVATIONS is 'int8', expected mxint8"):
        init_mxfp4_linear_kernel(None)


@pytest.mark.parametrize("activations", [None, "", "mxint8"])
def test_on_xpu_a_request_puts_ours_in_front(on_xpu: None, monkeypatch: pytest.MonkeyPatch, activations: str | None) -> None:
    if activations is not None:
        monkeypatch.setenv("XPU_FP4_ACTIVATIONS", activations)
    built_in: dict[PlatformEnum, list[type]] = {PlatformEnum.XPU: [XPUMxFp4LinearKernel]}
    monkeypatch.setattr(linear_kernels, "_POSSIBLE_MXFP4_KERNELS", built_in)
    registration.register_kernel_and_config()
    first, second = (XpuFp4LinearKernel, XPUMxFp4LinearKernel) if activations else (XPUMxFp4LinearKernel, XpuFp4LinearKernel)
    assert kernels_of(PlatformEnum.XPU) == [first, second]
    assert type(init_mxfp4_linear_kernel(kMxfp4Dynamic)) is first


# ---- transforms ----

TRANSFORMED = [Scheme("w4a4", hadamard=32), Scheme("w4a8", hadamard=32), Scheme("w4a8", group=32, hadamard=32)]
NAME = "model.layers.0.mlp.down_proj"


def config_of(
    scheme: Scheme, ignore: Sequence[str] = (), exceptions: dict[str, Scheme] | None = None
) -> ActivationsAwareConfig:
    config: ActivationsAwareConfig = ActivationsAwareConfig.from_config(write_config(scheme, ignore, exceptions or {}))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def bare(kind: type[nn.Module]) -> Any:
    """A layer as vLLM shows it to its configuration, which looks at the class."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


def with_content(layer: Any, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Creates the layer's parameters as vLLM does and fills them: codes, scales, bias and offset."""
    layer.prefix = NAME

    def load(parameter: Tensor, value: Tensor) -> None:
        parameter.data.copy_(value)

    ranks: dict[str, Any] = {"get_tensor_model_parallel_rank": lambda: 0, "get_tensor_model_parallel_world_size": lambda: 1}
    with mock.patch.multiple("vllm.model_executor.parameter", **ranks):
        layer.scheme.create_weights(
            layer=layer,
            output_partition_sizes=[N],
            input_size_per_partition=K,
            params_dtype=torch.float32,
            weight_loader=load,
        )
    layer.register_parameter("bias", None)
    names, (codes, scale) = names_of(scheme), reference.quantize(torch.randn(N, K))
    layer.get_parameter(names.packed).data.copy_(codes)
    layer.get_parameter(names.scale).data.copy_(scale)
    if not scheme.input_offset:
        return codes, scale, None, None
    bias, offset = torch.randn(N), torch.randn(K)
    layer.get_parameter(names.bias).data.copy_(bias)
    parameter = layer.get_parameter(names.input_offset)
    parameter.weight_loader(parameter, offset)
    return codes, scale, bias, offset


@pytest.mark.parametrize("has_offset", [False, True])
@pytest.mark.parametrize("scheme", TRANSFORMED, ids=str)
def test_a_transform_is_the_kernels_and_has_the_bits_of_the_definition(scheme: Scheme, has_offset: bool) -> None:
    scheme = replace(scheme, input_offset=has_offset)
    layer = bare(LinearBase)
    method = config_of(scheme).get_quant_method(layer, NAME)
    assert type(method) is CompressedTensorsLinearMethod, "nothing around the kernel"
    codes, scale, bias, offset = with_content(layer, scheme)
    method.process_weights_after_loading(layer)
    x = torch.randn(5, K)
    quantized = DEFINED[replace(scheme, hadamard=0, input_offset=False)](reference.transform(x, scheme.hadamard, offset))
    expected = reference.gemm(*quantized, codes, scale, torch.float32, bias)
    assert torch.equal(method.apply(layer, x, layer.bias), expected)


def test_on_xpu_a_transform_goes_to_ours(on_xpu: None) -> None:
    layer = bare(LinearBase)
    config_of(Scheme("w4a4", hadamard=32)).get_quant_method(layer, NAME)
    assert type(layer.scheme.kernel) is XpuFp4LinearKernel


def test_a_request_keeps_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPU_FP4_ACTIVATIONS", "mxint8")
    layer = bare(LinearBase)
    config_of(Scheme("w4a4", hadamard=32)).get_quant_method(layer, NAME)
    assert layer.scheme.kernel._scheme == Scheme("w4a8", hadamard=32)


def test_layers_that_differ_are_served_as_written() -> None:
    most, some = Scheme("w4a8", hadamard=32, input_offset=True), Scheme("w4a16", hadamard=64)
    parts = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    config = config_of(most, ["lm_head"], dict.fromkeys(parts, some))
    for name, expected in ((NAME, most), ("model.layers.0.self_attn.qkv_proj", some)):
        layer = bare(LinearBase)
        config.get_quant_method(layer, name)
        assert layer.scheme.scheme == expected
    mixed = config_of(most, ["lm_head"], {parts[0]: replace(most, hadamard=64)})
    with pytest.raises(ValueError, match=r"self_attn.qkv_proj: its parts have different transforms, expected one for all"):
        mixed.get_quant_method(bare(LinearBase), "model.layers.0.self_attn.qkv_proj")


def test_parts_of_a_fused_layer_have_one_offset() -> None:
    scheme = Scheme("w4a16", input_offset=True)
    layer = bare(LinearBase)
    config_of(scheme).get_quant_method(layer, NAME)
    _, _, _, offset = with_content(layer, scheme)
    assert offset is not None
    parameter = layer.input_offset
    parameter.weight_loader(parameter, offset)
    with pytest.raises(ValueError, match=rf"{NAME}: its parts have different input offsets, expected one for all"):
        parameter.weight_loader(parameter, offset + 1)


def test_a_transform_of_what_is_not_quantized_is_refused() -> None:
    config = config_of(Scheme("w4a16", hadamard=32))
    config.ignore = [NAME]
    with pytest.raises(CheckpointError, match=f"transforms the input of {NAME}, whose weight is not MXFP4"):
        config.get_quant_method(bare(LinearBase), NAME)
    with pytest.raises(CheckpointError, match="applies a Hadamard transform at the input of lm_head, which is not quantized"):
        config.get_quant_method(bare(ParallelLMHead), "lm_head")
    config_of(Scheme("w4a16", hadamard=32), ["lm_head"]).get_quant_method(bare(ParallelLMHead), "lm_head")


def test_a_shard_that_cuts_a_transform_is_refused_by_its_name() -> None:
    served = XpuFp4LinearKernel.of(Scheme("w4a4", hadamard=64))
    layer = layer_with(*reference.quantize(torch.randn(N, K)))
    with pytest.raises(
        ValueError, match=rf"{NAME}: .* has 160 elements, expected a multiple of 64, .* another tensor parallel"
    ):
        served.process_weights_after_loading(layer)


def test_matrices_of_transforms_are_not_loaded_and_names_are_vllms() -> None:
    config = config_of(Scheme("w4a16", hadamard=32), ["model.lm_head"], {"model.a.q_proj": Scheme("w4a16", hadamard=64)})
    mapper = config.get_checkpoint_weight_mapper()
    assert mapper.map_name("model.a.q_proj.hadamard_32_input.weight") is None
    assert mapper.map_name("model.a.q_proj.weight_packed") == "model.a.q_proj.weight_packed"
    assert mapper.map_name("model.a.q_proj.g_idx") is None, "vLLM's own rule"
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    layer = bare(LinearBase)
    config.get_quant_method(layer, "language_model.model.a.q_proj")
    assert layer.scheme.scheme.hadamard == 64


def test_a_slice_of_wider_activations_is_served() -> None:
    layer, weight, scale = random_layer()
    served = init_mxfp4_linear_kernel(kMxfp4Dynamic)
    served.process_weights_after_loading(layer)
    x = torch.randn(5, 2 * K)[:, K:]
    expected = reference.gemm(*reference.quantize(x), weight, scale, torch.float32)
    assert torch.equal(served.apply_weights(layer, x), expected)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_dynamo_traces_the_layer_without_a_break(key: object) -> None:
    layer, _, _ = random_layer()
    served = init_mxfp4_linear_kernel(key)
    served.process_weights_after_loading(layer)
    x = torch.randn(4, K)
    compiled = torch.compile(lambda t: served.apply_weights(layer, t), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), served.apply_weights(layer, x))


def test_a_shard_that_cuts_a_block_is_refused_by_its_name() -> None:
    # K = 96 over two workers: vLLM gives each 48 values and one scale of a row.
    layer = layer_with(torch.zeros(N, 24, dtype=torch.uint8), torch.zeros(N, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj: .* choose another tensor parallel size"):
        init_mxfp4_linear_kernel(kMxfp4Dynamic).process_weights_after_loading(layer)
