# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plug-in decodes what Transformers decodes with compressed-tensors' emulation of MXFP4."""

from pathlib import Path

import pytest

from .engine import EngineFailed, Engines, Run, generate
from .fixtures import MIXED, W4A4, W4A16, Models, Reference
from .reference import NEW_TOKENS, PROMPTS

CALLS = 2 * 4 * NEW_TOKENS  # layers x (qkv, o, gate_up, down), in every step
W4A4_OPS = {"xpu_fp4::mxfp4_linear_prepacked": CALLS}
W4A16_OPS = {"xpu_fp4::mxfp4_linear_w4a16_prepacked": CALLS}


def assert_tokens(run: Run, expected: list[list[int]]) -> None:
    certain = sum(map(len, expected))
    assert certain >= 0.6 * len(PROMPTS) * NEW_TOKENS, "the reference is certain of too little to compare with"
    assert [tokens[: len(want)] for tokens, want in zip(run.tokens, expected, strict=True)] == expected


def test_formats_are_told_apart_by_their_tokens(reference: Reference) -> None:
    answers = [reference(W4A4), reference(W4A16), reference(MIXED), reference(W4A16, xpu_activations=True)]
    firsts = [[tokens[:4] for tokens in answer if len(tokens) >= 4] for answer in answers]
    assert all(a != b for i, a in enumerate(firsts) for b in firsts[:i])


def test_w4a4_of_compressed_tensors(engines: Engines, reference: Reference) -> None:
    run = engines["w4a4"]
    assert_tokens(run, reference(W4A4))
    assert run.ops == W4A4_OPS


def test_weight_only_of_compressed_tensors_keeps_activations(engines: Engines, reference: Reference) -> None:
    run = engines["w4a16"]
    assert_tokens(run, reference(W4A16))
    assert run.ops == W4A16_OPS


def test_weight_only_is_recognised_layer_by_layer(engines: Engines, reference: Reference) -> None:
    run = engines["mixed"]
    assert_tokens(run, reference(MIXED))
    assert run.ops == {name: count // 2 for name, count in (W4A4_OPS | W4A16_OPS).items()}


def test_w4a4_of_quark(engines: Engines, reference: Reference) -> None:
    run = engines["quark_w4a4"]
    assert_tokens(run, reference(W4A4))
    assert run.ops == W4A4_OPS


@pytest.mark.parametrize(("scheme", "ops"), [("w4a4", W4A4_OPS), ("w4a16", W4A16_OPS)])
def test_quark_as_vllm_allows_it_equals_compressed_tensors(engines: Engines, scheme: str, ops: dict[str, int]) -> None:
    quark, compressed = engines[f"quark_{scheme}_bf16"], engines[f"{scheme}_bf16"]
    assert quark.tokens == compressed.tokens
    assert quark.ops == compressed.ops == ops


def test_torch_compile(engines: Engines, reference: Reference) -> None:
    run = engines["compiled"]
    assert_tokens(run, reference(W4A4))
    assert run.ops == W4A4_OPS


def test_engine_in_a_process_of_its_own(models: Models, reference: Reference, vllm_folder: Path) -> None:
    run = generate(models.w4a4, vllm_folder, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert_tokens(run, reference(W4A4))
    assert run.ops == {}, "the engine ran in the process that asked it"
    assert "Using XpuFp4LinearKernel" in run.log


def test_tensor_parallel_workers_share_qkv_and_gate_up(models: Models, reference: Reference, vllm_folder: Path) -> None:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # a core for each worker
    run = generate(models.w4a4, vllm_folder, env=env, tensor_parallel_size=2)
    assert_tokens(run, reference(W4A4))
    assert run.ops == {}, "an engine with one worker ran in the process that asked it"


def test_vllm_alone_refuses(models: Models, vllm_folder: Path) -> None:
    with pytest.raises(EngineFailed, match="Failed to find a kernel that can implement the MXFP4 linear layer"):
        generate(models.w4a4, vllm_folder, env={"VLLM_PLUGINS": ""})


def test_vllms_own_xpu_kernel_runs_on_our_ops(models: Models, reference: Reference, vllm_folder: Path) -> None:
    run = generate(models.w4a4, vllm_folder, prepare="drop_in", env={"VLLM_DISABLED_KERNELS": "XpuFp4LinearKernel"})
    assert_tokens(run, reference(W4A16, xpu_activations=True))
    assert run.ops == dict.fromkeys(("_xpu_C::fp4_gemm", "_C::per_token_group_quant_mxfp4"), CALLS)
