# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding by Transformers, every linear emulated by compressed-tensors: nothing of xpu_fp4 or vLLM takes part."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .checkpoints import Groups, quantize

# Far above float32's rounding errors in these models.
NOISE = 1e-6
NOISY_RUNS = 4

# Of several lengths; none is a multiple of another's.
PROMPTS = [[1, *range(10 + i, 10 + i + length)] for i, length in enumerate([3, 40, 7, 4, 11, 90])]
NEW_TOKENS = 8


def _decode(model: nn.Module, prompt: list[int]) -> list[int]:
    tokens, ids, cache = [], torch.tensor([prompt]), None
    for _ in range(NEW_TOKENS):
        output = model(ids, past_key_values=cache, use_cache=True)
        ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        tokens.append(int(ids))
    return tokens


def _add_noise(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = args
    return (x + NOISE * x.square().mean().sqrt() * torch.randn_like(x),)


@torch.no_grad()
def certain_tokens(source: Path, groups: Groups) -> list[list[int]]:
    """The tokens that follow each of PROMPTS, as far as they are certain.

    A rounding error may turn the code of an activation, and so a token and all after it. Tokens count as certain as far as
    float64, float32, and float32 with noise in the input of every linear give the same.
    """
    torch.manual_seed(0)
    runs = []
    for dtype in (torch.float64, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        quantize(model, groups)
        runs.append([_decode(model, prompt) for prompt in PROMPTS])
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_add_noise)
    runs += [[_decode(model, prompt) for prompt in PROMPTS] for _ in range(NOISY_RUNS)]
    return [_common_prefix(list(tokens)) for tokens in zip(*runs, strict=True)]


def _common_prefix(runs: list[list[int]]) -> list[int]:
    length = next((i for i, tokens in enumerate(zip(*runs, strict=True)) if len(set(tokens)) > 1), NEW_TOKENS)
    return runs[0][:length]
