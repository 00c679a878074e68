# SPDX-License-Identifier: Apache-2.0
"""The offset and the Hadamard before a quantizer: the bits of their definition in every op, mode and form of a weight."""

import copy
import io
import pickle
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import xpu_fp4
from helpers import (
    ALL_PATTERNS,
    DTYPES,
    ENVIRONMENTS,
    HALF_DTYPES,
    Environment,
    assert_same_bits,
    environment_is,
    float_environment,
    from_bits,
    normal,
    off_by,
    random_codes,
    random_scales,
    seeded,
)
from torch import Tensor, nn
from xpu_fp4 import Group, Hadamard, Mode, MXFP4Linear, reference

SIZES: tuple[Hadamard, ...] = (32, 64, 128)
SHAPES: tuple[tuple[Hadamard, int], ...] = ((0, 96), (32, 160), (64, 192), (128, 384))
LONGER: tuple[tuple[Hadamard, int], ...] = ((32, 32), (64, 64), (128, 128), (32, 2080), (128, 2176))
MODES: tuple[Mode, ...] = ("w4a4", "w4a8", "w4a16")


def offset_of(k: int) -> Tensor:
    return normal(k, seed=61) / 3


def spread(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows with a few elements that are far larger than the others: what the transform is for."""
    x = normal(*shape)
    return torch.where(torch.arange(shape[-1]) % 37 == 5, 40 * x, x).to(dtype)


def definition(x: Tensor, size: int, offset: Tensor | None) -> Tensor:
    """The transform in numpy, a pair at a time: shares nothing with the reference but the formula."""
    rows = x.float().numpy().reshape(-1, x.shape[-1]).copy()
    if offset is not None:
        rows = rows - offset.numpy()
    if size:
        distance = 1
        while distance < size:
            low = np.array([i for i in range(rows.shape[1]) if i % (2 * distance) < distance], dtype=np.int64)
            u, v = rows[:, low], rows[:, low + distance]
            rows[:, low], rows[:, low + distance] = u + v, u - v
            distance *= 2
        rows *= np.float32(1 / np.sqrt(np.float64(size)))
    return torch.from_numpy(rows).view(x.shape)


def cases(dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[tuple[Tensor, Hadamard, Tensor | None]]:
    """Inputs, sizes and offsets: every size in rows of whole and broken quads, short and long."""
    for dtype in dtypes:
        for size, k in (*SHAPES, *LONGER):
            x = spread(3, k, dtype=dtype)
            yield x, size, offset_of(k)
            if size:
                yield x, size, None


def test_the_reference_is_the_definition() -> None:
    for x, size, offset in cases():
        assert_same_bits(reference.transform(x, size, offset), definition(x, size, offset))


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_orthonormal_and_sylvesters(size: Hadamard) -> None:
    matrix = reference.transform(torch.eye(size), size)
    sylvester = torch.ones(1, 1)
    while len(sylvester) < size:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    assert_same_bits(matrix.sign(), sylvester)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size))
    x = spread(4, 2 * size)
    torch.testing.assert_close(reference.transform(reference.transform(x, size), size), x)


def test_quantizers_take_the_transformed_row(backend: str) -> None:
    for x, size, offset in cases():
        y = reference.transform(x, size, offset)
        q, scale = xpu_fp4.quantize(x, hadamard=size, input_offset=offset)
        want_q, want_scale = reference.quantize(y)
        assert_same_bits(scale, want_scale)
        assert_same_bits(q, want_q)
        for group in (32, 128):
            q, scale = xpu_fp4.mxint8_quantize(x, group, hadamard=size, input_offset=offset)
            want_q, want_scale = reference.mxint8_quantize(y, group)
            assert_same_bits(scale, want_scale)
            assert_same_bits(q, want_q)


@pytest.mark.parametrize("scale_mode", ["floor", "ceil", "even", "rceil"])
def test_scale_rules_see_the_transformed_row(scale_mode: xpu_fp4.ScaleMode) -> None:
    x = spread(64, 256)
    q, scale = xpu_fp4.quantize(x, scale_mode, hadamard=64)
    want_q, want_scale = reference.quantize(reference.transform(x, 64), scale_mode)
    assert_same_bits(scale, want_scale)
    assert_same_bits(q, want_q)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_every_element_that_a_dtype_has(backend: str, dtype: torch.dtype, size: Hadamard) -> None:
    # NaN, Inf, subnormals and sums that overflow are among them; neighbours differ in size by little, then by much.
    for x in (from_bits(ALL_PATTERNS, dtype).view(-1, 1024), from_bits(ALL_PATTERNS, dtype).view(1024, -1).t()):
        y = reference.transform(x, size)
        q, scale = xpu_fp4.quantize(x, hadamard=size)
        want_q, want_scale = reference.quantize(y)
        assert_same_bits(scale, want_scale)
        assert_same_bits(q, want_q)
        q, scale = xpu_fp4.mxint8_quantize(x, hadamard=size)
        want_q, want_scale = reference.mxint8_quantize(y)
        assert_same_bits(scale, want_scale)
        assert_same_bits(q, want_q)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_spoils_its_block_of_h_alone(backend: str, bad: float) -> None:
    x = torch.ones(2, 256)
    x[0, 70:72] = bad  # two of 3e38 overflow only when they meet
    _, scale = xpu_fp4.quantize(x, hadamard=64)
    assert scale.view(torch.uint8).eq(255).tolist() == [[i in (2, 3) for i in range(8)], [False] * 8]
    _, scale = xpu_fp4.mxint8_quantize(x, hadamard=64)
    assert scale.view(torch.uint8).eq(255).tolist() == [[i < 4 for i in range(8)], [False] * 8]


def test_ties_are_those_of_the_transformed_row(backend: str) -> None:
    # Rows whose transforms are exact halves of integers: turned twice, small integers times powers of two stay exact.
    wanted = torch.arange(-24, 40).repeat(4, 1).float().roll(5, 1) / 4
    x = reference.transform(wanted, 64)
    assert_same_bits(reference.transform(x, 64), wanted)
    for scale_mode in ("floor", "even"):
        q, scale = xpu_fp4.quantize(x, scale_mode, hadamard=64)
        want_q, want_scale = reference.quantize(wanted, scale_mode)
        assert_same_bits(q, want_q)
        assert_same_bits(scale, want_scale)


def as_given(x: Tensor, size: Hadamard, offset: Tensor | None, mode: Mode) -> Tensor:
    """Returns what a linear without a transform must be given: float32 or, where nothing is quantized, values of x's dtype."""
    y = reference.transform(x, size, offset)
    return y if mode != "w4a16" else y.to(x.dtype).float()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [1, 3, 17])
def test_linears_take_the_transformed_row(backend: str, m: int, mode: Mode) -> None:
    for dtype in DTYPES:
        for size, k in SHAPES:
            x, offset, bias = spread(m, k, dtype=dtype), offset_of(k), normal(37)
            w, w_scale = random_codes(37, k, seeded(1)), random_scales(37, k, seeded(2), 117, 137)
            wanted = xpu_fp4.linear(as_given(x, size, offset, mode), w, w_scale, bias, mode=mode).to(dtype)
            assert_same_bits(xpu_fp4.linear(x, w, w_scale, bias, mode=mode, hadamard=size, input_offset=offset), wanted)


@pytest.mark.parametrize("group", [32, 128])
def test_groups_of_the_transformed_row(backend: str, group: Group) -> None:
    x, w, w_scale = spread(5, 320), random_codes(21, 320, seeded(1)), random_scales(21, 320, seeded(2), 117, 137)
    wanted = xpu_fp4.linear(reference.transform(x, 64), w, w_scale, mode="w4a8", group=group)
    assert_same_bits(xpu_fp4.linear(x, w, w_scale, mode="w4a8", group=group, hadamard=64), wanted)


@pytest.mark.parametrize("mode", MODES)
def test_forms_of_the_weight_and_neighbours_change_nothing(mode: Mode) -> None:
    x, w, w_scale = spread(70, 256), random_codes(50, 256, seeded(1)), random_scales(50, 256, seeded(2), 117, 137)
    offset = offset_of(256)
    y = xpu_fp4.linear(x, w, w_scale, mode=mode, hadamard=128, input_offset=offset)
    strips = xpu_fp4.prepack(w, w_scale)
    assert_same_bits(xpu_fp4.linear_prepacked(x, strips, 50, mode=mode, hadamard=128, input_offset=offset), y)
    for rows in (slice(0, 1), slice(1, 8), slice(30, 70)):
        alone = xpu_fp4.linear(x[rows], w, w_scale, mode=mode, hadamard=128, input_offset=offset)
        assert_same_bits(alone, y[rows])


def test_memory_of_any_layout(backend: str) -> None:
    x, offset = spread(6, 128), offset_of(256)[::2]
    want = xpu_fp4.quantize(x, hadamard=32, input_offset=offset.contiguous())
    for given in (x.t().contiguous().t(), off_by(x), x.repeat_interleave(2, 1)[:, ::2]):
        for q, wanted in zip(xpu_fp4.quantize(given, hadamard=32, input_offset=offset), want, strict=True):
            assert_same_bits(q, wanted)


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_float_environment_of_the_caller_does_not_matter(backend: str, environment: Environment) -> None:
    x, offset = spread(64, 256) * 1e-38, offset_of(256) * 1e-38
    want = [*xpu_fp4.quantize(x, hadamard=128, input_offset=offset), *xpu_fp4.mxint8_quantize(x, hadamard=32)]
    with float_environment(environment):
        got = [*xpu_fp4.quantize(x, hadamard=128, input_offset=offset), *xpu_fp4.mxint8_quantize(x, hadamard=32)]
        assert environment_is(environment)
    for g, w in zip(got, want, strict=True):
        assert_same_bits(g, w)


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0)])
def test_empty_inputs(backend: str, shape: tuple[int, int]) -> None:
    x, k = torch.empty(shape), shape[1]
    q, scale = xpu_fp4.quantize(x, hadamard=64, input_offset=torch.zeros(k))
    assert (q.shape, scale.shape) == ((shape[0], k // 2), (shape[0], k // 32))
    w, w_scale = random_codes(5, k, seeded(1)), random_scales(5, k, seeded(2))
    y = xpu_fp4.linear(x, w, w_scale, torch.ones(5), mode="w4a8", hadamard=64, input_offset=torch.zeros(k))
    assert_same_bits(y, torch.ones(shape[0], 5))


# ---- the module ----


def turned_linear(hadamard: Hadamard, mode: Mode = "w4a8") -> tuple[nn.Linear, MXFP4Linear]:
    source = nn.Linear(256, 48)
    source.weight.data = spread(48, 256)
    return source, MXFP4Linear.from_linear(source, mode=mode, hadamard=hadamard)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hadamard", SIZES)
def test_a_turned_layer_computes_what_the_layer_computed(hadamard: Hadamard, mode: Mode) -> None:
    source, layer = turned_linear(hadamard, mode)
    codes, scale = reference.quantize(reference.transform(source.weight, hadamard))
    assert_same_bits(layer.weight_packed, codes)
    assert_same_bits(layer.weight_scale, scale)
    x = spread(9, 256)
    want = source(x)
    # It is the rounding of weights (and inputs) to four bits that is left of the difference.
    assert (layer(x) - want).norm() < 0.25 * want.norm()
    torch.testing.assert_close(
        layer.weight @ torch.eye(256), reference.transform(reference.values(codes, scale).float(), hadamard)
    )


def test_a_turned_layer_of_outliers_is_nearer_to_the_layer() -> None:
    x = spread(64, 256)

    def error(hadamard: Hadamard) -> float:
        source, layer = turned_linear(hadamard, "w4a4")
        return torch.dist(layer(x), source(x)).item()

    assert error(32) < 0.9 * error(0)


def layer_with_offset() -> MXFP4Linear:
    layer = MXFP4Linear(128, 32, mode="w4a8", hadamard=64, input_offset=True, dtype=torch.bfloat16)
    layer.weight_packed = nn.Parameter(random_codes(32, 128, seeded(1)).view(torch.uint8), requires_grad=False)
    layer.weight_scale = nn.Parameter(random_scales(32, 128, seeded(2), 117, 137).view(torch.uint8), requires_grad=False)
    layer.input_offset = nn.Parameter(offset_of(128), requires_grad=False)
    return layer


def test_state_copies_and_casts_keep_the_offset_as_it_is() -> None:
    layer = layer_with_offset()
    x = spread(3, 128, dtype=torch.bfloat16)
    y = layer(x)
    assert {name: t.dtype for name, t in layer.state_dict().items()} == {
        "weight_packed": torch.uint8,
        "weight_scale": torch.uint8,
        "bias": torch.bfloat16,
        "input_offset": torch.float32,
    }
    fresh = MXFP4Linear(128, 32, mode="w4a8", hadamard=64, input_offset=True, dtype=torch.bfloat16)
    fresh.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    others = (
        fresh,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
        copy.deepcopy(layer).bfloat16(),
        copy.deepcopy(layer).half().bfloat16(),
    )
    for other in others:
        assert other.input_offset is not None
        assert_same_bits(other.input_offset, offset_of(128))
        assert_same_bits(other(x), y)
    assert (
        repr(layer)
        == "MXFP4Linear(in_features=128, out_features=32, bias=True, mode=w4a8, group=128, hadamard=64, input_offset=True)"
    )


def test_quantize_turns_every_layer() -> None:
    model = xpu_fp4.quantize_(nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)), mode="w4a8", hadamard=64)
    assert [layer.hadamard for layer in model if isinstance(layer, MXFP4Linear)] == [64, 64]
    with pytest.raises(ValueError, match="0 has in_features 96, expected a multiple of 64"):
        xpu_fp4.quantize_(nn.Sequential(nn.Linear(96, 64)), hadamard=64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hadamard": 16}, r"hadamard is 16, expected 0 \(none\), 32, 64 or 128"),
        ({"hadamard": 128}, "in_features is 192, expected a multiple of hadamard, 128"),
    ],
)
def test_a_module_refuses_what_its_ops_would(arguments: dict[str, Hadamard], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MXFP4Linear(192, 32, **arguments)  # type: ignore[arg-type]
