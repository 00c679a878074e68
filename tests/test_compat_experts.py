# SPDX-License-Identifier: Apache-2.0
"""The ops that vllm-xpu-kernels' class for experts calls: sorting, the product of each expert, the gate, the sum."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import xpu_fp4
from helpers import DTYPES, assert_same_bits, expected_gemm, normal, random_codes, random_int8, random_scales, seeded
from torch import Tensor
from xpu_fp4 import reference

FP4 = torch.float4_e2m1fn_x2
EXPERTS, N, K, INNER = 5, 48, 96, 64
COUNTS = [3, 0, 1, 7, 2]
ROWS = 15  # two more than the experts have

moe, xpu = torch.ops._moe_C, torch.ops._xpu_C


def random_ids(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> Tensor:
    ids = torch.rand(tokens, experts, generator=seeded(tokens)).argsort(-1)[:, :top_k].to(dtype).contiguous()
    ids[0, 0] = -1
    return ids


def remapped(
    x: Tensor, ids: Tensor, local: int, expert_map: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Sorted rows, their scales, rows of each expert, places. What the op leaves alone has the bytes 0x55."""
    top_k = ids.shape[1]

    def untouched(rows: Tensor) -> Tensor:
        size = rows.shape[1] * rows.element_size()
        return torch.full((len(rows) * top_k, size), 0x55, dtype=torch.uint8).view(rows.dtype)

    out, out_scales = untouched(x), None if scales is None else untouched(scales)
    counts, places = torch.full((local,), 7, dtype=torch.int32), torch.full(ids.shape, 7, dtype=torch.int32)
    total = local if expert_map is None else len(expert_map)
    moe.remap_hidden_states(x, scales, out, out_scales, expert_map, counts, places, ids, total, local)
    return out, out_scales, counts, places


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, FP4], ids=str)
@pytest.mark.parametrize("has_map", [False, True])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_rows_are_sorted_by_expert_and_stay_in_order(dtype: torch.dtype, has_map: bool, ids_dtype: torch.dtype) -> None:
    tokens, top_k, total = 17, 3, 2 * EXPERTS
    raw = torch.randint(0, 256, (tokens, 24 * dtype.itemsize), generator=seeded(1), dtype=torch.uint8)
    scales = torch.randint(0, 256, (tokens, 5), generator=seeded(2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    ids = random_ids(tokens, top_k, total, ids_dtype)
    expert_map = None
    if has_map:
        expert_map = torch.full((total,), -1, dtype=torch.int32)
        expert_map[torch.randperm(total, generator=seeded(3))[:EXPERTS]] = torch.arange(EXPERTS, dtype=torch.int32)
    local = EXPERTS if has_map else total
    out, out_scales, counts, places = remapped(raw.view(dtype), ids, local, expert_map, scales)

    of = [-1 if i < 0 else i if expert_map is None else int(expert_map[i]) for i in ids.flatten().tolist()]
    order = sorted((slot for slot, expert in enumerate(of) if expert >= 0), key=lambda slot: of[slot])
    assert counts.tolist() == [of.count(expert) for expert in range(local)]
    assert [places.flatten()[slot] for slot in order] == list(range(len(order)))
    assert (places.flatten()[torch.tensor(of) < 0] == -1).all()
    tokens_of = torch.tensor(order) // top_k
    assert torch.equal(out.view(torch.uint8)[: len(order)], raw[tokens_of])
    assert (out.view(torch.uint8)[len(order) :] == 0x55).all()
    assert out_scales is not None
    assert torch.equal(out_scales.view(torch.uint8)[: len(order)], scales.view(torch.uint8)[tokens_of])


def test_ids_of_no_expert_are_nobodys() -> None:
    ids = torch.tensor([[0, 99], [-5, 2**40]])
    _, _, counts, places = remapped(torch.ones(2, 8), ids, 3)
    assert counts.tolist() == [1, 0, 0]
    assert places.tolist() == [[0, -1], [-1, -1]]
    expert_map = torch.tensor([5, 1], dtype=torch.int32)  # expert 5 is none of three
    _, _, counts, places = remapped(torch.ones(2, 8), torch.tensor([[0, 1], [1, 2]]), 3, expert_map)
    assert counts.tolist() == [0, 2, 0]
    assert places.tolist() == [[-1, 0], [1, -1]]


def test_an_expert_map_of_a_rank() -> None:
    expert_map = torch.full((12,), 7, dtype=torch.int32)
    moe.init_expert_map(expert_map, 4, 1, 3)
    assert expert_map.tolist() == [-1] * 4 + [0, 1, 2, 3] + [-1] * 4


def grouped_gemm(a: Tensor, a_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    w, w_scale = weights()
    d = torch.full((ROWS, N), 7.0, dtype=dtype)
    rows = torch.tensor(COUNTS, dtype=torch.int32)
    y: Tensor = xpu.cutlass_grouped_gemm_interface(a, a_scale, w.view(FP4), w_scale, bias, d, rows, N, K, EXPERTS)
    assert y.data_ptr() == d.data_ptr()
    assert (y[sum(COUNTS) :] == 7).all(), "rows of no expert"
    return y[: sum(COUNTS)]


def weights() -> tuple[Tensor, Tensor]:
    w = random_codes(EXPERTS * N, K, seeded(4)).view(EXPERTS, N, K // 2)
    return w, random_scales(EXPERTS * N, K, seeded(5)).view(EXPERTS, N, K // 32)


def by_expert(product: Callable[[int, slice], Tensor]) -> Tensor:
    ends = torch.tensor(COUNTS).cumsum(0).tolist()
    return torch.cat([product(e, slice(end - count, end)) for e, (end, count) in enumerate(zip(ends, COUNTS, strict=True))])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("codes", ["mxfp4", "mxint8"])
def test_a_grouped_product_of_codes_is_each_experts_gemm(backend: str, dtype: torch.dtype, has_bias: bool, codes: str) -> None:
    a = random_codes(ROWS, K, seeded(6)) if codes == "mxfp4" else random_int8(ROWS, K, seeded(6))
    a_scale, (w, w_scale) = random_scales(ROWS, K, seeded(7)), weights()
    bias = normal(EXPERTS, N, dtype=dtype) if has_bias else None
    y = grouped_gemm(a.view(FP4) if codes == "mxfp4" else a, a_scale, bias, dtype)
    expected = by_expert(
        lambda e, rows: expected_gemm(a[rows], a_scale[rows], w[e], w_scale[e], dtype, None if bias is None else bias[e])
    )
    assert_same_bits(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_grouped_product_of_floats_is_each_experts_linear(backend: str, dtype: torch.dtype) -> None:
    x, bias, (w, w_scale) = normal(ROWS, K, dtype=dtype), normal(EXPERTS, N, dtype=dtype, seed=8), weights()
    y = grouped_gemm(x, None, bias, dtype)
    assert_same_bits(y, by_expert(lambda e, rows: xpu_fp4.linear(x[rows], w[e], w_scale[e], bias[e], mode="w4a16")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_has_the_bits_of_a_layer_of_experts(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 7.0, -7.0, 7.5, -7.5, 90.0, -90.0, torch.inf, -torch.inf, torch.nan, 1e-30])
    x = torch.cat([3 * normal(300, 2 * INNER), torch.cartesian_prod(special, special).view(-1, 2).repeat(1, INNER)]).to(dtype)
    for alpha, limit in ((1.702, 7.0), (1.0, 2.5)):
        out = torch.full((len(x), INNER), 7.0, dtype=dtype)
        torch.ops._C.swigluoai_and_mul(out, x, alpha, limit)
        assert_same_bits(
            reference.canonical_nan(out), reference.gate(x, "swiglu_oai", interleaved=True, alpha=alpha, limit=limit)
        )
    out = torch.empty(2, 3, INNER, dtype=dtype)
    torch.ops._C.swigluoai_and_mul(out, x[:6].view(2, 3, -1))
    assert_same_bits(out.view(6, -1), reference.gate(x[:6], "swiglu_oai", interleaved=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_are_added_in_order_an_fma_each(dtype: torch.dtype) -> None:
    tokens, top_k, hidden = 9, 4, 40
    v, r = normal(tokens * top_k, hidden, dtype=dtype), normal(tokens, top_k, seed=9)
    places = torch.randperm(tokens * top_k, generator=seeded(10)).int().view(tokens, top_k)
    places[places % 5 == 0] = -1
    out = torch.full((tokens, hidden), 7.0, dtype=dtype)
    moe.moe_gather(out, v, r, places, EXPERTS)
    acc = torch.zeros(tokens, hidden)
    for j in range(top_k):
        added = reference.fma(r[:, j, None].expand_as(acc), v[places[:, j].clamp(min=0)].float(), acc)
        acc = torch.where(places[:, j, None] >= 0, added, acc)
    assert_same_bits(out, acc.to(dtype))
    again = torch.empty_like(out)
    moe.moe_gather(again, v, r, places.flatten(), EXPERTS)
    assert_same_bits(again, out)


def test_together_they_are_a_layer_of_experts() -> None:
    tokens, top_k, hidden = 11, 2, 96
    x, r = normal(tokens, hidden), torch.rand(tokens, top_k, generator=seeded(11))
    ids = random_ids(tokens, top_k, EXPERTS, torch.int32)
    shapes = {"w13": (2 * INNER, hidden), "w2": (hidden, INNER)}
    w = {name: random_codes(EXPERTS * n, k, seeded(n)).view(EXPERTS, n, k // 2) for name, (n, k) in shapes.items()}
    scale = {name: random_scales(EXPERTS * n, k, seeded(k), 120, 124).view(EXPERTS, n, -1) for name, (n, k) in shapes.items()}
    bias = {name: normal(EXPERTS, n, seed=n) for name, (n, _) in shapes.items()}

    sorted_x, _, counts, places = remapped(x, ids, EXPERTS)

    def product(name: str, a: Tensor) -> Tensor:
        n, k = shapes[name]
        d = torch.empty(len(a), n)
        given = (a, None, w[name].view(FP4), scale[name], bias[name], d, counts, n, k, EXPERTS)
        y: Tensor = xpu.cutlass_grouped_gemm_interface(*given)
        return y

    h = torch.empty(len(sorted_x), INNER)
    torch.ops._C.swigluoai_and_mul(h, product("w13", sorted_x))
    out = torch.empty_like(x)
    moe.moe_gather(out, product("w2", h), r, places, EXPERTS)
    layer = xpu_fp4.experts(
        x,
        ids,
        r,
        w["w13"],
        scale["w13"],
        w["w2"],
        scale["w2"],
        bias["w13"],
        bias["w2"],
        activation="swiglu_oai",
        interleaved=True,
    )
    assert_same_bits(out, layer)


# ---- errors, fakes ----

Arguments = dict[str, Any]


def remap_arguments() -> Arguments:
    ids = torch.zeros(4, 2, dtype=torch.int32)
    return {
        "hidden_states": torch.ones(4, 8),
        "hidden_states_scales": None,
        "remapped_hidden_states": torch.zeros(8, 8),
        "remapped_hidden_states_scales": None,
        "expert_map": torch.zeros(6, dtype=torch.int32),
        "rows_per_expert": torch.zeros(EXPERTS, dtype=torch.int32),
        "unpermuted_row_to_permuted_row": torch.zeros_like(ids),
        "topk_ids": ids,
        "total_experts_num": 6,
        "local_experts_num": EXPERTS,
    }


def gemm_arguments() -> Arguments:
    w, w_scale = weights()
    return {
        "ptr_A": normal(ROWS, K),
        "ptr_A_scale": None,
        "ptr_B": w.view(FP4),
        "ptr_B_scale": w_scale,
        "ptr_bias": normal(EXPERTS, N),
        "ptr_D": torch.zeros(ROWS, N),
        "rows_per_expert": torch.tensor(COUNTS, dtype=torch.int32),
        "N": N,
        "K": K,
        "num_experts": EXPERTS,
    }


def gather_arguments() -> Arguments:
    return {
        "output": torch.zeros(4, 8),
        "moe_output": normal(8, 8),
        "topk_weights": normal(4, 2),
        "unpermuted_row_to_permuted_row": torch.arange(8, dtype=torch.int32).view(4, 2),
        "num_experts": EXPERTS,
    }


def gate_arguments() -> Arguments:
    return {"out": torch.zeros(4, 8), "input": normal(4, 16), "alpha": 1.702, "limit": 7.0}


def map_arguments() -> Arguments:
    return {"expert_map": torch.zeros(12, dtype=torch.int32), "num_experts": 4, "ep_rank": 1, "ep_size": 3}


ALL: list[tuple[Any, Callable[[], Arguments]]] = [
    (moe.remap_hidden_states, remap_arguments),
    (moe.moe_gather, gather_arguments),
    (moe.init_expert_map, map_arguments),
    (xpu.cutlass_grouped_gemm_interface, gemm_arguments),
    (torch.ops._C.swigluoai_and_mul, gate_arguments),
]
HALF, LONG = torch.zeros(8, 8, dtype=torch.float16), torch.zeros(EXPERTS, dtype=torch.int64)
WRONG: list[tuple[int, Arguments, str]] = [
    (0, {"hidden_states": torch.ones(8)}, "hidden_states must be [T, H], got shape [8]"),
    (0, {"remapped_hidden_states": HALF}, "remapped_hidden_states must be Float, got Half"),
    (0, {"remapped_hidden_states": torch.zeros(4, 8)}, "remapped_hidden_states has shape [4, 8], expected [8, 8]"),
    (0, {"remapped_hidden_states_scales": HALF}, "must both be given or neither"),
    (0, {"topk_ids": torch.zeros(4, 2)}, "topk_ids must be int32 or int64, got Float"),
    (0, {"topk_ids": torch.zeros(3, 2, dtype=torch.int32)}, "topk_ids has shape [3, 2], expected [4, 2]"),
    (0, {"expert_map": LONG}, "expert_map must be Int, got Long"),
    (0, {"total_experts_num": 7}, "expert_map has shape [6], expected [7]"),
    (0, {"rows_per_expert": LONG}, "rows_per_expert must be Int, got Long"),
    (0, {"local_experts_num": -1}, "local_experts_num is -1, expected 0 or more"),
    (0, {"unpermuted_row_to_permuted_row": LONG.int()}, "unpermuted_row_to_permuted_row has shape [5], expected [4, 2]"),
    (1, {"output": HALF[:4]}, "output must be Float, got Half"),
    (1, {"output": torch.zeros(4, 16)[:, ::2]}, "output must be contiguous"),
    (1, {"topk_weights": normal(4, 2).half()}, "topk_weights must be Float, got Half"),
    (1, {"unpermuted_row_to_permuted_row": torch.full((8,), 8, dtype=torch.int32)}, "holds 8, expected -1 or a row of"),
    (1, {"unpermuted_row_to_permuted_row": torch.zeros(7, dtype=torch.int32)}, "has shape [7], expected an entry for each of"),
    (2, {"ep_rank": 3}, "ep_rank is 3, expected one of ep_size, 3"),
    (2, {"num_experts": 5}, "expert_map has shape [12], expected [15]"),
    (3, {"K": 48}, "K is 48, expected a multiple of 32"),
    (3, {"ptr_A": normal(ROWS, 64)}, "ptr_A has shape [15, 64], expected [15, 96]"),
    (3, {"ptr_A_scale": random_scales(ROWS, K, seeded(1))}, "ptr_A must be float4_e2m1fn_x2 or uint8 (MXFP4) or int8"),
    (3, {"ptr_B": weights()[0]}, "ptr_B must be float4_e2m1fn_x2, the only format here, got Byte"),
    (3, {"ptr_B_scale": None}, "ptr_B_scale is None, expected [num_experts, N, K/32]"),
    (3, {"ptr_B_scale": weights()[1].transpose(1, 2)}, "ptr_B_scale must be contiguous"),
    (3, {"ptr_bias": normal(N)}, "ptr_bias has shape [48], expected [5, 48]"),
    (3, {"ptr_D": torch.zeros(ROWS, N, dtype=torch.int32)}, "ptr_D must be float32, float16 or bfloat16, got Int"),
    (3, {"rows_per_expert": torch.tensor([3, 0, 1, 7, 5]).int()}, "rows_per_expert adds up to 16, expected at most the rows"),
    (3, {"rows_per_expert": torch.tensor([3, -1, 1, 7, 2]).int()}, "rows_per_expert has -1 for expert 1, expected 0 or more"),
    (4, {"input": normal(4, 15)}, "input must be [..., 2 d], got shape [4, 15]"),
    (4, {"out": torch.zeros(4, 16)}, "out has shape [4, 16], expected [4, 8]"),
    (4, {"limit": -1.0}, "limit is -1, expected 0 or more"),
]


@pytest.mark.parametrize(("op", "change", "message"), WRONG, ids=[f"{next(iter(c))}-{i}" for i, (_, c, _) in enumerate(WRONG)])
def test_a_wrong_argument_is_named(op: int, change: Arguments, message: str) -> None:
    function, arguments = ALL[op]
    with pytest.raises(RuntimeError, match=re.escape(message)) as error:
        function(**arguments() | change)
    assert str(error.value).startswith(function._qualified_op_name.partition("::")[2] + ": ")


@pytest.mark.parametrize(("op", "arguments"), ALL, ids=lambda value: str(value) if not callable(value) else None)
def test_a_lazily_negated_tensor_is_refused_where_it_would_be_written(op: Any, arguments: Callable[[], Arguments]) -> None:  # noqa: ANN401
    written = {"remapped_hidden_states", "output", "ptr_D", "out"}
    for name in written & arguments().keys():
        with pytest.raises(RuntimeError, match=f"{name} is a lazily negated view"):
            op(**arguments() | {name: torch._neg_view(arguments()[name])})


@pytest.mark.parametrize(("op", "arguments"), ALL, ids=lambda value: str(value) if not callable(value) else None)
def test_fakes_agree_with_the_ops(op: Any, arguments: Callable[[], Arguments]) -> None:  # noqa: ANN401
    # The peer's schemas of the others do not say what they write.
    says_what_it_writes = op in (moe.moe_gather, torch.ops._C.swigluoai_and_mul)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(op.default, (), arguments(), test_utils=tests if says_what_it_writes else ["test_faketensor"])
