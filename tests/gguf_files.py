# SPDX-License-Identifier: Apache-2.0
"""GGUF files of small models, by gguf's own writer and quantizer, and the Transformers models that they hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from checkpoint_files import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, llama_config
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3Config

Tensors = dict[str, tuple[Tensor, Type]]
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}


def metadata_of(architecture: str, config: Any, **changes: Any) -> dict[str, Any]:
    """Returns what llama.cpp writes of a model; changes have _ in a dot's place as a key of the architecture, None: none."""
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if architecture == "gpt-oss":
        keys |= {
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.intermediate_size,
            "attention.sliding_window": config.sliding_window,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.rope_parameters["factor"],
            "rope.scaling.original_context_length": config.rope_parameters["original_max_position_embeddings"],
        }
    named = {f"{architecture}.{key}": value for key, value in (keys | changes).items() if value is not None}
    return {"general.architecture": architecture, "general.name": "small", **named, "tokenizer.ggml.eos_token_id": 2}


def write_gguf(path: Path, metadata: dict[str, Any], tensors: Tensors) -> Path:
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (tensor, kind) in tensors.items():
        data = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_stored(tensor: Tensor, kind: Type) -> Tensor:
    """Returns what is left of a tensor in that type, by gguf's own formulas."""
    data = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(data, kind)).to(torch.bfloat16)


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * (0.02 if parameter.dim() > 1 else 0.2))
    return model


DENSE = {
    "input_layernorm.weight": ("attn_norm.weight", Type.F32),
    "post_attention_layernorm.weight": ("ffn_norm.weight", Type.F32),
    "self_attn.q_proj.weight": ("attn_q.weight", Type.MXFP4),
    "self_attn.k_proj.weight": ("attn_k.weight", Type.Q8_0),
    "self_attn.v_proj.weight": ("attn_v.weight", Type.MXFP4),
    "self_attn.o_proj.weight": ("attn_output.weight", Type.MXFP4),
    "self_attn.q_norm.weight": ("attn_q_norm.weight", Type.F32),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", Type.F32),
    "mlp.gate_proj.weight": ("ffn_gate.weight", Type.MXFP4),
    "mlp.up_proj.weight": ("ffn_up.weight", Type.MXFP4),
    "mlp.down_proj.weight": ("ffn_down.weight", Type.BF16),
}
GPT_OSS = {
    "input_layernorm.weight": ("attn_norm.weight", Type.F32),
    "post_attention_layernorm.weight": ("post_attention_norm.weight", Type.F32),
    **{
        f"self_attn.{ours}_proj.{kind}": (f"attn_{theirs}.{kind}", Type.Q8_0 if kind == "weight" else Type.F32)
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "o": "output"}.items()
        for kind in ("weight", "bias")
    },
    "self_attn.sinks": ("attn_sinks.weight", Type.F32),
    "mlp.router.weight": ("ffn_gate_inp.weight", Type.F32),
    "mlp.router.bias": ("ffn_gate_inp.bias", Type.F32),
}
OUTER = {
    "model.embed_tokens.weight": ("token_embd.weight", Type.F16),
    "model.norm.weight": ("output_norm.weight", Type.F32),
    "lm_head.weight": ("output.weight", Type.Q8_0),
}


def rotated(weight: Tensor, heads: int) -> Tensor:
    """Orders rows as llama.cpp stores queries and keys of llama."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def stored(model: Any, table: dict[str, tuple[str, Type]], heads: dict[str, int]) -> Tensors:
    """The tensors of a model under llama.cpp's names; in the model, their values become those that are stored."""
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        layer = name.removeprefix("model.layers.").partition(".")
        theirs, kind = OUTER[name] if name in OUTER else table.get(layer[2], ("", Type.F32))
        if not theirs:
            continue  # of experts
        parameter.copy_(as_stored(parameter, kind))
        count = heads.get(theirs, 0)
        block = "" if name in OUTER else f"blk.{layer[0]}."
        tensors[block + theirs] = (rotated(parameter, count) if count else parameter, kind)
    return tensors


def make_gpt_oss(path: Path, **changes: Any) -> Any:
    """Writes the file and returns the model that is in it."""
    config = GptOssConfig(**SMALL, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=8, pad_token_id=0)
    model = random_model(config)
    tensors = stored(model, GPT_OSS, {})
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        parts = {"gate": experts.gate_up_proj[..., ::2], "up": experts.gate_up_proj[..., 1::2], "down": experts.down_proj}
        biases = {"gate": experts.gate_up_proj_bias[:, ::2], "up": experts.gate_up_proj_bias[:, 1::2]}
        for part, weight in parts.items():
            weight.copy_(as_stored(weight.transpose(1, 2), Type.MXFP4).transpose(1, 2))  # Transformers has them transposed
            tensors[f"blk.{i}.ffn_{part}_exps.weight"] = (weight.transpose(1, 2), Type.MXFP4)
            tensors[f"blk.{i}.ffn_{part}_exps.bias"] = (biases.get(part, experts.down_proj_bias), Type.F32)
    write_gguf(path, metadata_of("gpt-oss", config, **changes), tensors)
    return model


def make_dense(path: Path, architecture: str, *, tied: bool = False, **changes: Any) -> Any:
    config = Qwen3Config(**SMALL, tie_word_embeddings=tied) if architecture == "qwen3" else llama_config(tied=tied)
    model = random_model(config)
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    tensors = stored(model, DENSE, heads if architecture == "llama" else {})
    write_gguf(path, metadata_of(architecture, config, **changes), tensors)
    return model


MAKE: dict[str, Callable[[Path], Any]] = {
    "gpt-oss": make_gpt_oss,
    "llama": lambda path: make_dense(path, "llama"),
    "qwen3": lambda path: make_dense(path, "qwen3"),
    "tied": lambda path: make_dense(path, "llama", tied=True),
}
