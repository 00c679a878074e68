# SPDX-License-Identifier: Apache-2.0
"""Small model directories in every format."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, random_codes, random_scales, seeded
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from xpu_fp4 import MXFP4Linear
from xpu_fp4.checkpoints import CheckpointError, open_checkpoint
from xpu_fp4.checkpoints.tensor_files import TensorFiles

Q0 = "model.layers.0.self_attn.q_proj"
HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 64, 96, 128, 2
LINEARS = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (32, HIDDEN),
        "self_attn.v_proj": (32, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }.items()
}
"""The linear layers of the small Llama that are quantized, with [N, K]."""

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]

IDS = torch.arange(1, 25)[None]


def llama_config(*, tied: bool = False, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )


def llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    torch.manual_seed(0)
    # .to(dtype) would round the rotary embedding's frequencies too.
    return AutoModelForCausalLM.from_config(llama_config(**changes), dtype=dtype).eval()


def save_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, *, tied: bool = False, shards: bool = True) -> Path:
    """An unquantized model directory, in several shards unless told otherwise."""
    llama(dtype, tied=tied).save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    return folder


def save_tokenizer(folder: Path) -> None:
    """A word of WORDS is a token."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Copies of all tensors in a directory."""
    files = TensorFiles(folder)
    return {name: files.tensor(name).clone() for name in files}


def layers(model: nn.Module) -> dict[str, MXFP4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MXFP4Linear)}


def assert_same_model(model: nn.Module, expected: nn.Module) -> None:
    state, want = model.state_dict(), expected.state_dict()
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert_same_bits(state[name], tensor)
    assert {name: str(module) for name, module in layers(model).items()} == {
        name: str(module) for name, module in layers(expected).items()
    }
    with torch.inference_mode():
        assert_same_bits(model(IDS).logits, expected(IDS).logits)


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A model directory of one safetensors file; config is all of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def packed_llama(packed_name: str, scale_name: str) -> dict[str, Tensor]:
    """The small Llama with random codes and scales in its linear layers; the other tensors are its own."""
    generator = seeded(3)
    linears = {f"{name}.weight" for name in LINEARS}
    tensors = {name: t.detach().clone() for name, t in llama().state_dict().items() if name not in linears}
    for name, (n, k) in LINEARS.items():
        tensors[f"{name}.{packed_name}"] = random_codes(n, k, generator)
        tensors[f"{name}.{scale_name}"] = random_scales(n, k, generator, 118, 124)
    return tensors


def llama_json(quantization_config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = llama_config(**changes).to_dict()
    return config | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "quantization_config": quantization_config}


MXFP4_ARGUMENTS = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False}


INT8_ARGUMENTS = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": True}


def compressed_tensors_config(*, mode: str = "w4a4", **changes: Any) -> dict[str, Any]:
    """Writes it as llm-compressor does, without scale_dtype, and W4A8 as we do; changes are of the top level."""
    group = {
        "targets": ["Linear"],
        "weights": MXFP4_ARGUMENTS,
        "input_activations": MXFP4_ARGUMENTS | {"dynamic": True} if mode == "w4a4" else None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    hint = {"xpu_fp4": {"activations": "mxint8", "group": 128}} if mode == "w4a8" else {}
    return config | hint | changes


QUARK_WEIGHT = {
    "dtype": "fp4",
    "qscheme": "per_group",
    "group_size": 32,
    "ch_axis": -1,
    "symmetric": None,
    "scale_format": "e8m0",
    "scale_calculation_mode": "even",
    "is_dynamic": False,
}


def quark_config(*, mode: str = "w4a4", **changes: Any) -> dict[str, Any]:
    inputs = QUARK_WEIGHT | {"is_dynamic": True} if mode == "w4a4" else None
    scheme = {"weight": QUARK_WEIGHT, "input_tensors": inputs, "output_tensors": None, "bias": None}
    config = {
        "quant_method": "quark",
        "global_quant_config": scheme,
        "exclude": ["lm_head"],
        "layer_quant_config": {},
        "layer_type_quant_config": {},
    }
    return config | changes


def auto_round_config(*, mode: str = "w4a4", **changes: Any) -> dict[str, Any]:
    """Writes it as AutoRound 0.16 does in its own format."""
    activations = {"act_bits": 4, "act_data_type": "mx_fp", "act_group_size": 32, "act_sym": True, "act_dynamic": True}
    config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
        "autoround_version": "0.16.1",
        "block_name_to_quantize": "model.layers",
        **{"bits": 4, "data_type": "mx_fp", "group_size": 32, "sym": True, "iters": 0},
    }
    return config | (activations if mode == "w4a4" else {}) | changes


EXPERTS = 4


def save_gpt_oss(folder: Path) -> Path:
    """A small gpt-oss with random codes and scales in its experts."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    generator = seeded(4)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, k, n = tensor.shape  # the model has them transposed
            tensors[f"{name}_blocks"] = random_codes(experts * n, k, generator).view(experts, n, k // 32, 16)
            tensors[f"{name}_scales"] = random_scales(experts * n, k, generator, 118, 122).view(experts, n, k // 32)
        else:
            tensors[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.1 + tensor.detach()
    described = config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    }
    return write_checkpoint(folder, tensors, described)


def compressed_tensors(folder: Path, config: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    content = packed_llama("weight_packed", "weight_scale") | tensors
    return write_checkpoint(folder, content, llama_json(config or compressed_tensors_config()))


def quark(folder: Path, config: dict[str, Any] | None = None) -> Path:
    return write_checkpoint(folder, packed_llama("weight", "weight_scale"), llama_json(config or quark_config()))


def group(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = compressed_tensors_config()["config_groups"]["group_0"]
    return found | changes


def split(folder: Path, parts: int) -> dict[str, str]:
    """Turns a directory of one file into one of shards; returns its index's map."""
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        mine = names[part::parts]
        save_file({name: tensors[name] for name in mine}, folder / file)
        weight_map |= dict.fromkeys(mine, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refuse(folder: Path, *parts: str) -> None:
    """A checkpoint that cannot be opened, with these parts of the message in this order."""
    with pytest.raises(CheckpointError, match=".*".join(map(re.escape, parts))):
        open_checkpoint(folder)
