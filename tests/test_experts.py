# SPDX-License-Identifier: Apache-2.0
"""A layer of experts: the bits of its definition, equal to the single products, whatever tokens come together."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import xpu_fp4
from helpers import DTYPES, assert_same_bits, normal, random_codes, random_scales, seeded
from torch import Tensor
from xpu_fp4 import Activation, Mode, functional_experts, reference
from xpu_fp4.weight import Gate, PackedExperts

BIT_DEFINED: tuple[Mode, ...] = ("w4a4", "w4a8")
ALL_MODES: tuple[Mode, ...] = (*BIT_DEFINED, "w4a16")


@dataclass(frozen=True)
class Layer:
    """The operands of a layer: E experts, H columns of x, I columns between the products."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    w13_bias: Tensor | None
    w2_bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.w13.shape[0], self.x.shape[1], self.w13.shape[1] // 2

    def run(self, **options: object) -> Tensor:
        return xpu_fp4.experts(
            self.x, self.ids, self.weights, self.w13, self.w13_scale, self.w2, self.w2_scale, self.w13_bias, self.w2_bias,
            **options,  # type: ignore[arg-type]
        )  # fmt: skip

    def run_prepacked(self, **options: object) -> Tensor:
        w13 = xpu_fp4.prepack_experts(self.w13, self.w13_scale)
        w2 = xpu_fp4.prepack_experts(self.w2, self.w2_scale)
        return xpu_fp4.experts_prepacked(
            self.x,
            self.ids,
            self.weights,
            w13,
            w2,
            self.shape[2],
            self.w13_bias,
            self.w2_bias,
            **options,  # type: ignore[arg-type]
        )


def layer(
    tokens: int = 9,
    top_k: int = 3,
    experts: int = 5,
    hidden: int = 160,
    inner: int = 96,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = True,
    seed: int = 7,
) -> Layer:
    generator = seeded(seed)

    def weight(n: int, k: int) -> tuple[Tensor, Tensor]:
        codes = random_codes(experts * n, k, generator).view(experts, n, k // 2)
        return codes, random_scales(experts * n, k, generator, 117, 122).view(experts, n, k // 32)

    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator)
    biases = [torch.randn(experts, n, generator=generator).to(dtype) if bias else None for n in (2 * inner, hidden)]
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return Layer(x, ids.int(), weights, *weight(2 * inner, hidden), *weight(hidden, inner), *biases)


def definition(
    given: Layer,
    mode: Mode,
    *,
    activation: Activation = "silu_mul",
    interleaved: bool = False,
    router_on_input: bool = False,
    hadamard: xpu_fp4.Hadamard = 0,
    w13_offset: Tensor | None = None,
    w2_offset: Tensor | None = None,
    **_: object,
) -> Tensor:
    """The definition of modes whose products are defined to the bit."""
    dtype = given.x.dtype

    def quantize(x: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        x = reference.transform(x, hadamard, offset) if hadamard or offset is not None else x
        return reference.quantize(x) if mode == "w4a4" else reference.mxint8_quantize(x)

    def product(x: Tensor, offset: Tensor | None, w: Tensor, scale: Tensor, bias: Tensor | None, out: torch.dtype) -> Tensor:
        return reference.gemm(*quantize(x, offset), w, scale, out, bias)

    def bias_of(bias: Tensor | None, expert: int) -> Tensor | None:
        return None if bias is None else bias[expert]

    def up(e: int, x: Tensor) -> Tensor:
        u = product(x, w13_offset, given.w13[e], given.w13_scale[e], bias_of(given.w13_bias, e), dtype)
        return reference.gate(u, activation, interleaved=interleaved)

    def down(e: int, h: Tensor) -> Tensor:
        return product(h, w2_offset, given.w2[e], given.w2_scale[e], bias_of(given.w2_bias, e), torch.float32)

    return reference.experts(given.x, given.ids, given.weights, up, down, router_on_input=router_on_input)


CASES: dict[str, dict[str, Any]] = {
    "silu_mul": {},
    "swiglu_oai": {"activation": "swiglu_oai", "interleaved": True},
    "swiglu_oai by halves": {"activation": "swiglu_oai"},
    "silu_mul interleaved": {"interleaved": True},
    "router on the input": {"router_on_input": True},
    "hadamard": {"hadamard": 32},
    "offsets": {"w13_offset": normal(160, seed=1), "w2_offset": normal(96, seed=2)},
    "offset of h": {"w2_offset": normal(96, seed=2), "hadamard": 32, "interleaved": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", BIT_DEFINED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_defined_modes_have_the_bits_of_the_definition(backend: str, case: str, mode: Mode, dtype: torch.dtype) -> None:
    given = layer(dtype=dtype, bias=case != "hadamard")
    expected = definition(given, mode, **CASES[case])
    assert_same_bits(given.run(mode=mode, **CASES[case]), expected)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("case", CASES)
def test_prepacked_experts_have_the_same_bits(case: str, mode: Mode) -> None:
    given = layer(dtype=torch.bfloat16)
    assert_same_bits(given.run_prepacked(mode=mode, **CASES[case]), given.run(mode=mode, **CASES[case]))


@pytest.mark.parametrize("mode", ALL_MODES)
def test_packed_experts_have_the_same_bits_in_every_form(mode: Mode) -> None:
    given = layer()
    gate = Gate("swiglu_oai", interleaved=True, alpha=1.5, limit=2.0)
    places = torch.tensor([4, -1, 1, 0, 2], dtype=torch.int32)
    options: dict[str, Any] = {"mode": mode, "group": 32, "hadamard": 32, "expert_map": places, "router_on_input": True}
    expected = given.run(activation="swiglu_oai", interleaved=True, alpha=1.5, limit=2.0, **options)
    stored = PackedExperts.stored(given.w13, given.w13_scale, given.w2, given.w2_scale)
    assert (stored.experts, stored.hidden, stored.intermediate) == given.shape
    assert stored.best().form == "prepacked"
    for packed in (stored, stored.prepacked()):
        y = packed.layer(given.x, given.ids, given.weights, given.w13_bias, given.w2_bias, gate=gate, **options)
        assert_same_bits(y, expected)
        for got, want in zip(packed.stored_tensors(), stored.tensors, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 32, 32), (1, 4, 8, 288, 160), (40, 2, 4, 128, 128), (70, 1, 3, 64, 32)])
def test_a_layer_equals_its_single_products(backend: str, mode: Mode, shape: tuple[int, ...]) -> None:
    """This holds in w4a16 too, whose products each backend defines for itself: a layer is composed of them."""
    given = layer(*shape)

    def linear(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return xpu_fp4.linear(x, w, scale, bias, mode=mode)

    def up(e: int, x: Tensor) -> Tensor:
        return reference.gate(linear(x, given.w13[e], given.w13_scale[e], given.w13_bias[e]), "silu_mul")  # type: ignore[index]

    def down(e: int, h: Tensor) -> Tensor:
        if mode == "w4a16":  # float32 activations are what gives float32 results
            return linear(h.float(), given.w2[e], given.w2_scale[e], given.w2_bias[e])  # type: ignore[index]
        codes, scale = xpu_fp4.quantize(h) if mode == "w4a4" else xpu_fp4.mxint8_quantize(h)
        w, w_scale = given.w2[e].view(torch.float4_e2m1fn_x2).t(), given.w2_scale[e].view(torch.float8_e8m0fnu).t()
        out: Tensor = torch.ops.xpu_fp4.mxfp4_gemm(codes, w, scale, w_scale.contiguous(), torch.float32, given.w2_bias[e])  # type: ignore[index]
        return out

    assert_same_bits(given.run(mode=mode), reference.experts(given.x, given.ids, given.weights, up, down))


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_token_has_the_same_bits_alone(backend: str, mode: Mode) -> None:
    given = layer(40, 4, 8)
    together = given.run(mode=mode)
    for token in (0, 17, 39):
        one = slice(token, token + 1)
        alone = Layer(given.x[one], given.ids[one], given.weights[one], *list(given.__dict__.values())[3:])
        assert_same_bits(alone.run(mode=mode), together[one])


def test_slots_of_no_expert_add_nothing(backend: str) -> None:
    given = layer()
    ids = given.ids.clone()
    ids[0] = -1
    ids[1, 1] = given.shape[0]
    ids[2, 0] = torch.iinfo(torch.int32).max
    changed = Layer(given.x, ids, *list(given.__dict__.values())[2:])
    known = torch.where(ids < given.shape[0], ids, -1)
    y = changed.run(mode="w4a8")
    assert_same_bits(y, definition(Layer(given.x, known, *list(given.__dict__.values())[2:]), "w4a8"))
    assert_same_bits(y[0], torch.zeros_like(y[0]))


def test_an_expert_map_says_where_an_expert_is(backend: str) -> None:
    given = layer()
    places = torch.tensor([2, -1, 0, 5, 1, -7, 4, 3], dtype=torch.int32)  # one beyond the experts that are here
    ids = torch.randint(-1, 8, given.ids.shape, generator=seeded(3))
    here = torch.where((ids >= 0), places[ids.clamp(min=0)].long(), -1)
    here = torch.where((here >= 0) & (here < given.shape[0]), here, -1)
    mapped = Layer(given.x, ids, *list(given.__dict__.values())[2:]).run(mode="w4a4", expert_map=places)
    assert_same_bits(mapped, definition(Layer(given.x, here, *list(given.__dict__.values())[2:]), "w4a4"))


def test_special_values_stay_in_their_token(backend: str) -> None:
    given = layer()
    x = given.x.clone()
    x[2, 5], x[4, 0] = torch.nan, torch.inf
    y = Layer(x, *list(given.__dict__.values())[1:]).run(mode="w4a8")
    assert_same_bits(y, definition(Layer(x, *list(given.__dict__.values())[1:]), "w4a8"))
    assert y[2].isnan().all()
    assert not y[[0, 1, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 64, 32), (3, 0, 3, 64, 32), (3, 2, 3, 0, 32), (3, 2, 3, 64, 0)])
def test_empty_layers(backend: str, shape: tuple[int, ...]) -> None:
    given = layer(*shape)
    y = given.run(mode="w4a8")
    assert y.shape == given.x.shape
    assert_same_bits(y, definition(given, "w4a8"))


def test_sigmoid_is_near_the_exact_one() -> None:
    z = torch.cat([torch.linspace(-100, 100, 100_001), normal(10_000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    exact = torch.sigmoid(z.double())
    error = (reference.sigmoid(z).double() - exact).abs()
    ulp = (torch.nextafter(exact.float(), torch.tensor(2.0)) - exact.float()).double()
    assert (error <= 2.6 * ulp + 2.0**-125).all()


BAD: dict[str, tuple[Callable[[Layer], dict[str, Any]], str]] = {
    "ids": (lambda g: {"ids": g.ids.float()}, "topk_ids must be int32 or int64"),
    "ids' rows": (lambda g: {"ids": g.ids[1:]}, r"topk_ids has shape \[8, 3\], expected \[T, top_k\] with T = 9"),
    "weights": (lambda g: {"weights": g.weights[:, :2]}, r"topk_weights has shape \[9, 2\], expected \[9, 3\]"),
    "w13": (lambda g: {"w13": g.w13[:, 1:]}, "w13 has shape"),
    "w13_scale": (lambda g: {"w13_scale": g.w13_scale[..., 1:]}, "w13_scale has shape"),
    "w2": (lambda g: {"w2": g.w2[1:]}, "w13 has shape"),
    "w2 strided": (lambda g: {"w2": g.w2.transpose(0, 1).contiguous().transpose(0, 1)}, "w2 must be contiguous"),
    "w2_bias": (lambda g: {"w2_bias": g.w2_bias[:, 1:]}, "w2_bias has shape"),  # type: ignore[index]
    "x": (lambda g: {"x": g.x[0]}, r"x must be \[T, H\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    change, message = BAD[case]
    given = layer()
    with pytest.raises(RuntimeError, match=f"mxfp4_experts: {message}"):
        Layer(**{**given.__dict__, **change(given)}).run()


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "w8a8"}, 'mode is "w8a8", expected'),
    "activation": ({"activation": "gelu"}, 'activation is "gelu", expected'),
    "limit": ({"activation": "swiglu_oai", "limit": -1.0}, "limit is -1"),
    "NaN limit": ({"activation": "swiglu_oai", "limit": float("nan")}, "limit is nan"),
    "group": ({"group": 64}, "group is 64"),
    "scale_mode": ({"scale_mode": "up"}, 'scale_mode is "up"'),
    "FP-Quant's scale_mode": ({"scale_mode": "quest"}, 'scale_mode is "quest", one of FP-Quant\'s'),
    "hadamard": ({"hadamard": 16}, "hadamard is 16"),
    "hadamard of h": ({"hadamard": 64}, "expected a multiple of hadamard"),
    "map": ({"expert_map": torch.zeros(3)}, "expert_map must be int32"),
    "offset of x": ({"w13_offset": torch.zeros(127)}, r"w13_offset has shape \[127\], expected \[128\]"),
    "offset of h": ({"w2_offset": torch.zeros(96).bfloat16()}, "w2_offset must be float32, got BFloat16"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options_are_named(case: str) -> None:
    options, message = BAD_OPTIONS[case]
    with pytest.raises(RuntimeError, match=message):
        layer(hidden=128).run(**options)


def test_prepacked_experts_have_the_keywords_and_defaults_of_experts() -> None:
    parameters = inspect.signature(xpu_fp4.experts).parameters.values()
    keywords = {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}
    schema = torch.ops.xpu_fp4.mxfp4_experts_prepacked.default._schema
    assert {one.name: one.default_value for one in schema.arguments if one.name in keywords} == keywords
    assert set(functional_experts.ExpertsOptions.__annotations__) == set(keywords)
