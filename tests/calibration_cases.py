# SPDX-License-Identifier: Apache-2.0
"""Models and token ids that calibration is tested with."""

from collections.abc import Callable
from typing import Any

import torch
from checkpoint_files import VOCABULARY, llama
from helpers import seeded
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

LENGTH = 24
WINDOWS = torch.randint(3, VOCABULARY, (12, LENGTH), generator=seeded(1))
BATCHES = list(WINDOWS.split(4))
OTHERS = torch.randint(3, VOCABULARY, (8, LENGTH), generator=seeded(2))
MANY = torch.randint(3, VOCABULARY, (64, LENGTH), generator=seeded(3))


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=32,
        d_ff=96,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).eval()


def gemma() -> Any:
    """Its blocks get different masks and positions."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


def bert(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def linears_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]


MODELS: dict[str, Callable[[], Any]] = {"llama": lambda: llama(torch.float32), "bert": bert, "gemma": gemma, "t5": t5}


def batches_for(model: Any, windows: Tensor = WINDOWS) -> list[dict[str, Tensor]]:
    names = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    return [dict.fromkeys(names, ids) for ids in windows.split(4)]


@torch.no_grad()
def last_of(model: Any, windows: Tensor) -> Tensor:
    output = torch.cat([model(**batch)[0] for batch in batches_for(model, windows)])
    return output.flatten(0, -2)
