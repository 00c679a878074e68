# SPDX-License-Identifier: Apache-2.0
"""The benchmark of layers of experts: contenders compute the same, routers choose as they say, targets."""

from dataclasses import replace

import pytest
import torch
from bench_cases import CPU, LAYER
from torch import Tensor
from xpu_fp4 import Activation, reference
from xpu_fp4.bench import cases, experts, ggml, report, runner, targets
from xpu_fp4.bench.cases import Case
from xpu_fp4.bench.measure import Job, Timing


def layer_of(case: Case) -> experts.Layer:
    return experts.Layer(case, experts.LayerWeights(case, CPU, 1))


@pytest.mark.parametrize("activation", ["silu_mul", "swiglu_oai"])
def test_contenders_of_a_layer_compute_the_same(activation: Activation) -> None:
    assert LAYER.experts is not None
    layer = layer_of(replace(LAYER, experts=replace(LAYER.experts, activation=activation)))
    results: dict[str, Tensor] = {}
    for contender in experts.EXPERTS:
        if contender.name == "w4a8-dense" or contender.name.startswith("ggml"):
            continue  # these are not the whole layer
        made = contender.setup(layer)
        y = (made.run if isinstance(made, Job) else made)()
        assert isinstance(y, Tensor)
        results[contender.name] = y
    bound = {"w4a4": 0.5, "emul": 0.5, "w4a8": 0.05}  # what quantized activations do to few and random sums
    assert len(results) == 9
    for name, y in results.items():
        error = (y - results["torch-bf16-loop"]).float().norm() / results["torch-bf16-loop"].float().norm()
        assert error < bound.get(name[:4], 0.02), name


@pytest.mark.parametrize("repacked", [False, True])
def test_ggml_multiplies_the_chosen_experts(repacked: bool) -> None:
    try:
        library = ggml.instance()
    except ImportError as error:
        pytest.skip(str(error))
    layer = layer_of(LAYER)
    weights = layer.weights
    blocks = ggml.to_blocks(weights.codes.flatten(0, 1), weights.scale.flatten(0, 1)).view(6, 192, 5, 17)
    made = ggml.Weight(library, blocks, library.repacking if repacked else [library.plain])
    library.use_threads(1)
    ids = [ids for _, ids, _ in layer.inputs[:2]]
    x = torch.randn(5, 1, 160)
    products = ggml.Products(library, x, [made] * 2, 192, ids)
    for i, of_batch in enumerate(ids):
        products.run(i)
        w = reference.values(weights.codes.flatten(0, 1), weights.scale.flatten(0, 1)).view(6, 192, 160)[of_batch.long()]
        expected = torch.einsum("tk,tjnk->tjn", x[:, 0].double(), w)
        assert products.result(i).shape == (5, 2, 192)
        assert (products.result(i).double() - expected).norm() < 0.02 * expected.norm()
    library.rest()


def test_routers_choose_as_they_say() -> None:
    def counts(router: cases.Router) -> Tensor:
        ids = experts.routes(1000, 16, 4, router, torch.Generator().manual_seed(0))
        assert (ids.dtype, ids.shape) == (torch.int32, (1000, 4))
        return torch.bincount(ids.flatten(), minlength=16)

    assert counts("even").min() > 200
    skewed = counts("skewed")
    assert skewed[0] > 750
    assert skewed[-1] < 200
    assert 1900 < counts("half")[0] < 2100


def test_suites_of_experts_have_the_shapes_of_models() -> None:
    planned = cases.suite("gpt-oss-20b", 2)
    assert {(case.n, case.k) for case in planned} == {(2880, 2880)}
    assert {case.m for case in planned} == {1, 4, 16, 128, 1024}
    assert [case.only for case in planned if case.experts is not None and case.experts.router == "half"] == [cases.OUR_EXPERTS]
    assert {case.m for case in cases.suite("qwen3-30b-a3b", 1, ms=(3,))} == {3}
    assert str(LAYER) == "5 tokens, 2 of 6 experts 96 x 160, skewed router, 1 thread"
    assert LAYER.ops == 2 * 5 * 2 * 3 * 96 * 160
    with pytest.raises(ValueError, match="the suite gpt-oss-20b has gaussian data alone"):
        cases.suite("gpt-oss-20b", 1, "random-scales")


def test_bytes_of_a_layer_are_those_of_the_chosen_experts() -> None:
    layer = layer_of(LAYER)
    layer.inputs = [(torch.empty(0), torch.tensor([[0, 1], [1, 2]]), torch.empty(0))] * 2
    by_name = {contender.name: contender for contender in experts.EXPERTS}
    assert by_name["w4a8-experts"].bytes(layer) == 3 * 3 * 96 * 160 * 17 // 32
    assert by_name["torch-bf16-loop"].bytes(layer) == 3 * 3 * 96 * 160 * 2


def test_layers_of_experts_are_held_to_their_targets() -> None:
    record = runner.Record({}, {}, {})
    for case in cases.suite("gpt-oss-20b", 1):
        for name in case.only or (*cases.OUR_EXPERTS, "w4a8-loop", "torch-bf16-loop", "w4a8-dense", "limit-read"):
            time = {"limit-read": 1.0, "torch-bf16-loop": 9.0}.get(name, 2.0)
            record.results.append(
                runner.Result(
                    replace(case, only=()), name, "ours", Timing((time,) * 3, 1), case.ops, 16 if name == "limit-read" else 8
                )
            )
    found = {(line.work, line.measure): line for line in targets.verdicts(runner.Record.from_json(record.to_json()))}
    token = "gpt-oss-20b: w4a8-experts, 1 token"
    assert found[token, "of read bandwidth"].measured == pytest.approx(0.25)
    assert found[token, "times torch-bf16-loop"].reached is True
    assert found[token, "times w4a8-loop"].reached is False
    big = "gpt-oss-20b: w4a8-experts, 1024 tokens"
    assert found[big, "times w4a8-dense"].reached is True
    assert found[f"{big}, half of the rows one expert's", "time over the even case"].measured == pytest.approx(1)
    assert found[f"AMX: {big}", "times torch-bf16-loop"].note == "no limit-tdpbusd with 1024 tokens"
    assert report.has_targets(record)
