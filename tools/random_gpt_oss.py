# SPDX-License-Identifier: Apache-2.0
"""Writes a random model of gpt-oss' shape twice: FOLDER/mxfp4, and FOLDER/bf16, the same weights dequantized.

python tools/random_gpt_oss.py build/gpt-oss --parameters 1e9

For tools/vllm_throughput.py, which needs a tokenizer too: its words are numbers.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import GptOssConfig, PreTrainedTokenizerFast
from xpu_fp4 import dequantize

EXPERTS, TOP_K, HEAD, KV_HEADS, VOCABULARY = 32, 4, 64, 4, 32768
SCALE_BYTES = (118, 121)  # weights of 0.01 to 0.1, as trained ones have


def config_of(parameters: float, layers: int) -> GptOssConfig:
    """Gives the experts so many parameters; H and I are equal, as gpt-oss has them, and multiples of 32."""
    size = 32 * max(2, round(math.sqrt(parameters / (3 * EXPERTS * layers)) / 32))
    return GptOssConfig(
        num_hidden_layers=layers,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        vocab_size=VOCABULARY,
        hidden_size=size,
        intermediate_size=size,
        head_dim=HEAD,
        num_attention_heads=KV_HEADS * max(1, round(size / (HEAD * KV_HEADS))),
        num_key_value_heads=KV_HEADS,
        layer_types=["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)],
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        architectures=["GptOssForCausalLM"],
        dtype="bfloat16",
    )


def tensors_of(config: GptOssConfig) -> Iterator[tuple[str, Tensor | tuple[Tensor, Tensor]]]:
    """Every tensor by its name: bf16, or codes and scales of experts."""
    h, i, heads, kv = config.hidden_size, config.intermediate_size, config.num_attention_heads * HEAD, KV_HEADS * HEAD
    generator = torch.Generator().manual_seed(0)

    def dense(*shape: int) -> Tensor:
        return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

    def packed(n: int, k: int) -> tuple[Tensor, Tensor]:
        low, high = SCALE_BYTES
        codes = torch.randint(0, 256, (EXPERTS, n, k // 2), generator=generator, dtype=torch.uint8)
        return codes, torch.randint(low, high, (EXPERTS, n, k // 32), generator=generator, dtype=torch.uint8)

    yield "model.embed_tokens.weight", dense(VOCABULARY, h)
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{start}.{norm}.weight", torch.ones(h, dtype=torch.bfloat16)
        for name, (n, k) in {"q": (heads, h), "k": (kv, h), "v": (kv, h), "o": (h, heads)}.items():
            yield f"{start}.self_attn.{name}_proj.weight", dense(n, k)
            yield f"{start}.self_attn.{name}_proj.bias", dense(n)
        yield f"{start}.self_attn.sinks", dense(config.num_attention_heads)
        yield f"{start}.mlp.router.weight", dense(EXPERTS, h)
        yield f"{start}.mlp.router.bias", dense(EXPERTS)
        for name, (n, k) in {"gate_up_proj": (2 * i, h), "down_proj": (h, i)}.items():
            yield f"{start}.mlp.experts.{name}", packed(n, k)
            yield f"{start}.mlp.experts.{name}_bias", dense(EXPERTS, n)
    yield "model.norm.weight", torch.ones(h, dtype=torch.bfloat16)
    yield "lm_head.weight", dense(VOCABULARY, h)


def save(folder: Path, config: GptOssConfig, tensors: dict[str, Tensor], quantization: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    whole: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        whole["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(whole, indent=1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="0", pad_token="0").save_pretrained(folder)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--parameters", default=1e9, show_default=True, type=float, help="In the experts.")
@click.option("--layers", default=8, show_default=True, type=click.IntRange(1))
def main(folder: Path, parameters: float, layers: int) -> None:
    config = config_of(parameters, layers)
    stored: dict[str, Tensor] = {}
    dequantized: dict[str, Tensor] = {}
    for name, found in tensors_of(config):
        if isinstance(found, Tensor):
            stored[name] = dequantized[name] = found
            continue
        codes, scale = found
        stored |= {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scale}
        dequantized[name] = dequantize(codes, scale, torch.bfloat16).transpose(1, 2).contiguous()  # [E, K, N]
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    save(folder / "mxfp4", config, stored, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})
    save(folder / "bf16", config, dequantized)
    click.echo(f"{config.num_hidden_layers} layers, {EXPERTS} experts, H = I = {config.hidden_size}: {folder}/mxfp4 and /bf16")


if __name__ == "__main__":
    main()
