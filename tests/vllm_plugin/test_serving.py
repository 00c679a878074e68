# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plug-in decodes what Transformers decodes with compressed-tensors' emulation of MXFP4."""

from pathlib import Path

import pytest

from .engine import EngineFailed, Run, generate
from .fixtures import MIXED, W4A4, W4A16, Models, Reference
from .reference import NEW_TOKENS, PROMPTS

FUSED_LINEARS = 2 * 4  # layers x (qkv, o, gate_up, down)


def assert_tokens(run: Run, expected: list[list[int]]) -> None:
    certain = sum(map(len, expected))
    assert certain >= 0.6 * len(PROMPTS) * NEW_TOKENS, "the reference is certain of too little to compare with"
    assert [tokens[: len(want)] for tokens, want in zip(run.tokens, expected, strict=True)] == expected


def test_formats_are_told_apart_by_their_tokens(reference: Reference) -> None:
    answers = [reference(W4A4), reference(W4A16), reference(MIXED), reference(W4A16, xpu_activations=True)]
    firsts = [[tokens[:4] for tokens in answer if len(tokens) >= 4] for answer in answers]
    assert all(a != b for i, a in enumerate(firsts) for b in firsts[:i])


def test_w4a4_of_compressed_tensors(models: Models, reference: Reference, tmp_path: Path) -> None:
    run = generate(models.w4a4, tmp_path)
    assert_tokens(run, reference(W4A4))
    assert run.ops == {"xpu_fp4::mxfp4_linear_prepacked": FUSED_LINEARS * NEW_TOKENS}


def test_weight_only_of_compressed_tensors_keeps_activations(models: Models, reference: Reference, tmp_path: Path) -> None:
    run = generate(models.w4a16, tmp_path)
    assert_tokens(run, reference(W4A16))
    assert run.ops == {"xpu_fp4::mxfp4_linear_w4a16_prepacked": FUSED_LINEARS * NEW_TOKENS}


def test_weight_only_is_recognised_layer_by_layer(models: Models, reference: Reference, tmp_path: Path) -> None:
    run = generate(models.mixed, tmp_path)
    assert_tokens(run, reference(MIXED))
    half = FUSED_LINEARS * NEW_TOKENS // 2
    assert run.ops == {"xpu_fp4::mxfp4_linear_prepacked": half, "xpu_fp4::mxfp4_linear_w4a16_prepacked": half}


def test_w4a4_of_quark(models: Models, reference: Reference, tmp_path: Path) -> None:
    run = generate(models.quark_w4a4, tmp_path, prepare=("quark_float32",))
    assert_tokens(run, reference(W4A4))


def test_weight_only_of_quark_equals_that_of_compressed_tensors(models: Models, tmp_path: Path) -> None:
    quark = generate(models.quark_w4a16, tmp_path, dtype="bfloat16")
    compressed = generate(models.w4a16, tmp_path, dtype="bfloat16")
    assert quark.tokens == compressed.tokens
    assert quark.ops == compressed.ops == {"xpu_fp4::mxfp4_linear_w4a16_prepacked": FUSED_LINEARS * NEW_TOKENS}


def test_torch_compile(models: Models, reference: Reference, tmp_path: Path) -> None:
    run = generate(models.w4a4, tmp_path, enforce_eager=False)
    assert_tokens(run, reference(W4A4))
    assert run.ops == {"xpu_fp4::mxfp4_linear_prepacked": FUSED_LINEARS * NEW_TOKENS}


def test_engine_in_a_process_of_its_own(models: Models, reference: Reference, tmp_path: Path) -> None:
    run = generate(models.w4a4, tmp_path, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert_tokens(run, reference(W4A4))
    assert "Using XpuFp4LinearKernel" in run.log


def test_tensor_parallel_workers_share_qkv_and_gate_up(models: Models, reference: Reference, tmp_path: Path) -> None:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # a core for each worker
    run = generate(models.w4a4, tmp_path, env=env, tensor_parallel_size=2)
    assert_tokens(run, reference(W4A4))


def test_vllm_alone_refuses(models: Models, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="Failed to find a kernel that can implement the MXFP4 linear layer"):
        generate(models.w4a4, tmp_path, env={"VLLM_PLUGINS": ""})


def test_vllms_own_xpu_kernel_runs_on_our_ops(models: Models, reference: Reference, tmp_path: Path) -> None:
    run = generate(models.w4a4, tmp_path, prepare=("drop_in",), env={"VLLM_DISABLED_KERNELS": "XpuFp4LinearKernel"})
    assert_tokens(run, reference(W4A16, xpu_activations=True))
    assert run.ops == {name: FUSED_LINEARS * NEW_TOKENS for name in ("_xpu_C::fp4_gemm", "_C::per_token_group_quant_mxfp4")}
