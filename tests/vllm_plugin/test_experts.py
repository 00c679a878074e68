# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plug-in serves MXFP4 experts with the tokens of Transformers, whose experts are dense."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from xpu_fp4.checkpoints import Scheme

from . import moe_checkpoints
from .engine import EngineFailed, Engines, Run, generate
from .moe_checkpoints import LAYERS
from .reference import NEW_TOKENS, PROMPTS, certain_tokens_of_experts

STEPS = {"xpu_fp4::mxfp4_experts_prepacked": LAYERS * NEW_TOKENS}
TWO_WORKERS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # a core for each
IN_FLOAT32 = {"prepare": "in_float32"}


@dataclass(frozen=True)
class Models:
    """Folders of two tiny models, in bf16 with what MXFP4 has, and of their MXFP4 checkpoints."""

    gpt_oss_bf16: Path
    gpt_oss: Path
    qwen_bf16: Path
    qwen_w4a16: Path
    qwen_w4a8: Path
    qwen_w4a4: Path
    qwen_quark: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("moe")
    gpt_oss = moe_checkpoints.save_tiny_gpt_oss(folder / "gpt_oss_bf16")
    qwen = moe_checkpoints.save_tiny_qwen3_moe(folder / "qwen_bf16")
    return Models(
        gpt_oss,
        moe_checkpoints.save_as_gpt_oss(gpt_oss, folder / "gpt_oss"),
        qwen,
        moe_checkpoints.save_as_compressed(qwen, folder / "w4a16", Scheme("w4a16")),
        moe_checkpoints.save_as_compressed(qwen, folder / "w4a8", Scheme("w4a8")),
        moe_checkpoints.save_as_compressed(qwen, folder / "w4a4", Scheme("w4a4")),
        moe_checkpoints.save_as_quark(qwen, folder / "quark"),
    )


Reference = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def reference(uncompiled: None) -> Reference:
    """A bf16 folder, how the experts' activations are rounded -> the tokens that Transformers is certain of."""
    known: dict[tuple[Path, str | None], list[list[int]]] = {}

    def tokens(source: Path, activations: str | None = None) -> list[list[int]]:
        if (source, activations) not in known:
            known[source, activations] = certain_tokens_of_experts(source, activations=activations)
        return known[source, activations]

    return tokens


@pytest.fixture(scope="module")
def engines(models: Models, vllm_folder: Path) -> Engines:
    compiled, gpt_oss = {"enforce_eager": False}, {"model": str(models.gpt_oss)} | IN_FLOAT32
    return Engines(
        vllm_folder,
        {
            "gpt_oss": gpt_oss,
            "gpt_oss_compiled": gpt_oss | compiled,
            "gpt_oss_chunked": gpt_oss | {"max_num_batched_tokens": 24},
            "w4a16": {"model": str(models.qwen_w4a16)},
            "w4a16_compiled": {"model": str(models.qwen_w4a16)} | compiled,
            "w4a8": {"model": str(models.qwen_w4a8)},
            "w4a4": {"model": str(models.qwen_w4a4)},
            "quark": {"model": str(models.qwen_quark)} | IN_FLOAT32,
        },
    )


@pytest.fixture(scope="module")
def engines_on_request(models: Models, vllm_folder: Path) -> Engines:
    """Engines that are asked for MXINT8 activations, whatever their checkpoint says."""
    engines = {"gpt_oss": {"model": str(models.gpt_oss)} | IN_FLOAT32, "w4a4": {"model": str(models.qwen_w4a4)}}
    return Engines(vllm_folder, engines, env={"XPU_FP4_ACTIVATIONS": "mxint8"})


def assert_tokens(run: Run, expected: list[list[int]]) -> None:
    certain = sum(map(len, expected))
    assert certain >= 0.6 * len(PROMPTS) * NEW_TOKENS, "the reference is certain of too little to compare with"
    assert [tokens[: len(want)] for tokens, want in zip(run.tokens, expected, strict=True)] == expected


def test_modes_are_told_apart_by_their_tokens(models: Models, reference: Reference) -> None:
    for source in (models.gpt_oss_bf16, models.qwen_bf16):
        answers = [reference(source, activations) for activations in (None, "mxint8", "mxfp4")]
        assert answers[0] != answers[1] != answers[2] != answers[0]


@pytest.mark.parametrize("engine", ["gpt_oss", "gpt_oss_compiled"])
def test_gpt_oss(engines: Engines, models: Models, reference: Reference, engine: str) -> None:
    run = engines[engine]
    assert_tokens(run, reference(models.gpt_oss_bf16))
    assert run.ops == STEPS
    assert "Using XpuFp4Experts" in run.log


def test_gpt_oss_with_prompts_in_chunks(engines: Engines, models: Models, reference: Reference) -> None:
    run = engines["gpt_oss_chunked"]
    assert_tokens(run, reference(models.gpt_oss_bf16))
    (calls,) = run.ops.values()
    assert calls > LAYERS * NEW_TOKENS, "the prompts fit one step"


@pytest.mark.parametrize(
    ("engine", "activations"),
    [("w4a16", None), ("w4a16_compiled", None), ("w4a8", "mxint8"), ("w4a4", "mxfp4"), ("quark", "mxfp4")],
)
def test_qwen3_moe(engines: Engines, models: Models, reference: Reference, engine: str, activations: str | None) -> None:
    run = engines[engine]
    assert_tokens(run, reference(models.qwen_bf16, activations))
    assert run.ops == STEPS


def test_w4a8_on_request(engines_on_request: Engines, models: Models, reference: Reference) -> None:
    for engine, source in (("gpt_oss", models.gpt_oss_bf16), ("w4a4", models.qwen_bf16)):
        run = engines_on_request[engine]
        assert_tokens(run, reference(source, "mxint8"))
        assert run.ops == STEPS


def test_two_workers_share_gpt_oss_blocks_and_add_w2s_bias_once(
    models: Models, reference: Reference, vllm_folder: Path
) -> None:
    env = TWO_WORKERS | {"PREPARE_WORKERS": "in_float32"}
    run = generate(models.gpt_oss, vllm_folder, env=env, tensor_parallel_size=2, **IN_FLOAT32)
    assert_tokens(run, reference(models.gpt_oss_bf16))


def test_two_workers_have_half_of_the_experts_each(models: Models, reference: Reference, vllm_folder: Path) -> None:
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    run = generate(models.qwen_w4a8, vllm_folder, env=TWO_WORKERS, **parallel)
    assert_tokens(run, reference(models.qwen_bf16, "mxint8"))


def test_vllm_alone_has_no_experts(models: Models, vllm_folder: Path) -> None:
    with pytest.raises(EngineFailed, match="No MXFP4 MoE backend"):
        generate(models.gpt_oss, vllm_folder, env={"VLLM_DISABLED_KERNELS": "XpuFp4Experts"}, dtype="bfloat16")
