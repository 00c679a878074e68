# SPDX-License-Identifier: Apache-2.0
"""vLLM with the plug-in decodes what Transformers decodes with compressed-tensors' emulation of MXFP4."""

import shutil
from pathlib import Path

import fp_quant_of_others
import pytest
import torch
import xpu_fp4
from safetensors.torch import load_file, save_file

from .checkpoints import HADAMARD
from .engine import EngineFailed, Engines, Run, generate
from .fixtures import DEPRECATED, MIXED, W4A4, W4A16, Models, Reference
from .reference import NEW_TOKENS, PROMPTS, ROUNDINGS, decode

CALLS = 2 * 4 * NEW_TOKENS  # layers x (qkv, o, gate_up, down), in every step
W4A4_OPS = {"xpu_fp4::mxfp4_linear_prepacked": CALLS}
W4A8_OPS = {"xpu_fp4::mxfp4_linear_w4a8_prepacked": CALLS}
W4A16_OPS = {"xpu_fp4::mxfp4_linear_w4a16_prepacked": CALLS}


def assert_tokens(run: Run, expected: list[list[int]]) -> None:
    certain = sum(map(len, expected))
    assert certain >= 0.6 * len(PROMPTS) * NEW_TOKENS, "the reference is certain of too little to compare with"
    assert [tokens[: len(want)] for tokens, want in zip(run.tokens, expected, strict=True)] == expected


def test_formats_are_told_apart_by_their_tokens(reference: Reference) -> None:
    others = ROUNDINGS.keys() - {"mxfp4"}  # which is W4A4's own
    answers = [reference(W4A4), reference(W4A16), reference(MIXED), *(reference(W4A16, activations=name) for name in others)]
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


@pytest.mark.parametrize("checkpoint", ["w4a8", "int8", "w4a8_compiled"])
def test_w4a8_by_our_hint_or_by_int8_activations(engines: Engines, reference: Reference, checkpoint: str) -> None:
    run = engines[checkpoint]
    assert_tokens(run, reference(W4A16, activations="mxint8"))
    assert run.ops == W4A8_OPS


@pytest.mark.parametrize("checkpoint", ["w4a4", "mixed", "quark_w4a4"])
def test_w4a8_on_request_whatever_the_checkpoint_says(
    engines_on_request: Engines, reference: Reference, checkpoint: str
) -> None:
    run = engines_on_request[checkpoint]
    assert_tokens(run, reference(W4A16, activations="mxint8"))
    assert run.ops == W4A8_OPS
    assert run.log.count("XPU_FP4_ACTIVATIONS=mxint8: every MXFP4 layer runs in w4a8 group 128") == 1


@pytest.mark.parametrize("checkpoint", ["w4a8", "int8"])
def test_load_model_decodes_the_same_tokens(models: Models, reference: Reference, checkpoint: str) -> None:
    model = xpu_fp4.load_model(getattr(models, checkpoint), dtype=torch.float32)
    with torch.inference_mode():
        tokens = [decode(model, prompt) for prompt in PROMPTS]
    expected = reference(W4A16, activations="mxint8")
    assert [found[: len(want)] for found, want in zip(tokens, expected, strict=True)] == expected


def test_an_unknown_request_is_named(models: Models, vllm_folder: Path) -> None:
    with pytest.raises(EngineFailed, match="XPU_FP4_ACTIVATIONS is 'int4', expected mxint8"):
        generate(models.w4a4, vllm_folder, env={"XPU_FP4_ACTIVATIONS": "int4"})


def test_weight_only_is_recognised_layer_by_layer(engines: Engines, reference: Reference) -> None:
    run = engines["mixed"]
    assert_tokens(run, reference(MIXED))
    assert run.ops == {name: count // 2 for name, count in (W4A4_OPS | W4A16_OPS).items()}


def test_rotated_inputs_of_compressed_tensors(engines: Engines, reference: Reference) -> None:
    run = engines["rotated_w4a4"]
    assert_tokens(run, reference(W4A4, rotated=True))
    assert run.ops == W4A4_OPS


def test_rotated_inputs_in_w4a8(engines: Engines, reference: Reference) -> None:
    run = engines["rotated_w4a8"]
    assert_tokens(run, reference(W4A16, activations="mxint8", rotated=True))
    assert run.ops == W4A8_OPS


@pytest.mark.parametrize("checkpoint", ["offset", "offset_compiled"])
def test_an_offset_and_its_share_in_the_bias_cancel(engines: Engines, reference: Reference, checkpoint: str) -> None:
    run = engines[checkpoint]
    assert_tokens(run, reference(W4A16, rotated=True))
    assert run.ops == W4A16_OPS


@pytest.mark.parametrize(("checkpoint", "method"), [("abs_max", "abs_max"), ("quest", "quest"), ("compiled", "abs_max")])
def test_fp_quants_checkpoints(engines: Engines, reference: Reference, checkpoint: str, method: str) -> None:
    run = engines[f"fp_quant_{checkpoint}"]
    assert_tokens(run, reference({}, fp_quant=method))
    assert run.ops == W4A4_OPS


def test_what_is_not_fp_quants_matrix_is_named(models: Models, vllm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models.fp_quant_abs_max, tmp_path / "gsr")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.forward_hadamard_matrix"))
    tensors[name] = fp_quant_of_others.sequency_ordered(HADAMARD)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(EngineFailed, match=r"forward_hadamard_matrix .* is not the matrix that its transform_init asks for"):
        generate(folder, vllm_folder, **DEPRECATED)


def test_layers_that_differ_by_our_hint(engines: Engines, models: Models) -> None:
    run = engines["exceptions"]
    assert run.ops == {name: count // 4 for name, count in W4A16_OPS.items()} | {n: 3 * c // 4 for n, c in W4A8_OPS.items()}
    model = xpu_fp4.load_model(models.exceptions, dtype=torch.float32)
    with torch.inference_mode():
        assert [tokens[0] for tokens in run.tokens] == [decode(model, prompt)[0] for prompt in PROMPTS]


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


def test_tensor_parallel_workers_cut_transforms_between_blocks(models: Models, reference: Reference, vllm_folder: Path) -> None:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    run = generate(models.offset, vllm_folder, env=env, tensor_parallel_size=2)
    assert_tokens(run, reference(W4A16, rotated=True))


def test_tensor_parallel_workers_share_fp_quants_scales(models: Models, reference: Reference, vllm_folder: Path) -> None:
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    run = generate(models.fp_quant_abs_max, vllm_folder, env=env, tensor_parallel_size=2, **DEPRECATED)
    assert_tokens(run, reference({}, fp_quant="abs_max"))


def test_vllm_alone_refuses(models: Models, vllm_folder: Path) -> None:
    with pytest.raises(EngineFailed, match="Failed to find a kernel that can implement the MXFP4 linear layer"):
        generate(models.w4a4, vllm_folder, env={"VLLM_PLUGINS": ""})


def test_vllms_own_xpu_kernel_runs_on_our_ops(models: Models, reference: Reference, vllm_folder: Path) -> None:
    run = generate(models.w4a4, vllm_folder, prepare="drop_in", env={"VLLM_DISABLED_KERNELS": "XpuFp4LinearKernel"})
    assert_tokens(run, reference(W4A16, activations="vllm-xpu-kernels"))
    assert run.ops == dict.fromkeys(("_xpu_C::fp4_gemm", "_C::per_token_group_quant_mxfp4"), CALLS)
