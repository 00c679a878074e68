# SPDX-License-Identifier: Apache-2.0
"""Tiny models with MXFP4 experts: in bf16 for the reference, and in the layouts that vLLM loads."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from xpu_fp4 import dequantize, reference
from xpu_fp4.checkpoints import Scheme
from xpu_fp4.checkpoints.compressed_tensors import write_config

EXPERTS, HIDDEN, LAYERS = 8, 160, 2  # five blocks

_SHARED: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_DENSE = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]


def _save(model: PreTrainedModel, folder: Path) -> Path:
    """Random values in bf16, those of experts what MXFP4 has."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.2) + 1.0 * (
            "norm" in name
        )
        if parameter.ndim == 3:  # the experts' weights
            # gpt-oss has them as [E, K, N], the others as [E, N, K].
            axis = 1 if isinstance(model, GptOssForCausalLM) else 2
            rows = values.transpose(axis, 2)
            values = dequantize(*reference.quantize(rows.contiguous())).transpose(axis, 2)
        parameter.data.copy_(values)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_tiny_gpt_oss(folder: Path) -> Path:
    """I is 96: two workers get two blocks and one."""
    layers = ["sliding_attention", "full_attention"]
    sizes: dict[str, Any] = {"num_local_experts": EXPERTS, "intermediate_size": 96, "sliding_window": 64}
    return _save(GptOssForCausalLM(GptOssConfig(layer_types=layers, **sizes, **_SHARED)), folder)


def save_tiny_qwen3_moe(folder: Path) -> Path:
    sizes: dict[str, Any] = {"num_experts": EXPERTS, "intermediate_size": 256, "moe_intermediate_size": 128}
    return _save(Qwen3MoeForCausalLM(Qwen3MoeConfig(norm_topk_prob=True, **sizes, **_SHARED)), folder)


def _tensors(dense: Path, experts: Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    """Reads a bf16 checkpoint and replaces its experts' weights, one by one or in one tensor."""
    found: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        is_weight = ".experts." in name and not name.endswith("bias")
        found |= dict(experts(name, tensor)) if is_weight else {name: tensor}
    return found


def _write(dense: Path, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    shutil.copytree(dense, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    whole: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    return folder


def save_as_gpt_oss(dense: Path, folder: Path) -> Path:
    """Writes it as OpenAI publishes it: blocks and scales of all experts in one tensor each."""

    def packed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        codes, scale = reference.quantize(tensor.transpose(1, 2).float())
        yield f"{name}_blocks", codes.view(torch.uint8).unflatten(-1, (-1, 16))
        yield f"{name}_scales", scale.view(torch.uint8)

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    return _write(dense, folder, _tensors(dense, packed), config)


def _one_by_one(weight: str) -> Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]:
    """Each expert's projections by themselves, codes under that name."""

    def packed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        projection = name.removesuffix(".weight")
        codes, scale = reference.quantize(tensor.float())
        yield f"{projection}.{weight}", codes.view(torch.uint8)
        yield f"{projection}.weight_scale", scale.view(torch.uint8)

    return packed


def save_as_compressed(dense: Path, folder: Path, scheme: Scheme) -> Path:
    return _write(dense, folder, _tensors(dense, _one_by_one("weight_packed")), write_config(scheme, _DENSE, {}))


def save_as_quark(dense: Path, folder: Path) -> Path:
    """Experts in W4A4."""
    per_group = {
        "dtype": "fp4",
        "qscheme": "per_group",
        "group_size": 32,
        "ch_axis": -1,
        "scale_format": "e8m0",
        "scale_calculation_mode": "even",
        "symmetric": None,
        "round_method": "half_even",
    }
    attention = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(LAYERS) for name in "qkvo"]
    config = {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "weight": per_group | {"is_dynamic": False},
            "input_tensors": per_group | {"is_dynamic": True},
            "output_tensors": None,
            "bias": None,
        },
        "layer_type_quant_config": {},
        "layer_quant_config": {},
        "exclude": ["lm_head", *attention, *(f"model.layers.{layer}.mlp.gate" for layer in range(LAYERS))],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
    }
    return _write(dense, folder, _tensors(dense, _one_by_one("weight")), config)
