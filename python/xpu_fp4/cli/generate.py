# SPDX-License-Identifier: Apache-2.0
"""`xpu-fp4 generate`: let an MXFP4 language model answer a prompt."""

from pathlib import Path
from typing import Any

import click
import torch

from ..checkpoints import load_model
from ..checkpoints.errors import printable
from ..checkpoints.models import load_tokenizer, require_transformers
from ..functional import Mode
from .common import DIRECTORY, errors_as_messages, run_in_scheme


@click.command("generate")
@click.argument("folder", metavar="DIR", type=DIRECTORY)
@click.option("--prompt", required=True, help="Taken as a chat message where the model has a chat template.")
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the chat template.")
@run_in_scheme
@errors_as_messages
@torch.inference_mode()
def command(folder: Path, prompt: str, max_new_tokens: int, raw: bool, mode: Mode | None) -> None:
    """Answer a prompt with the MXFP4 language model in DIR, greedily, so that the answer is always the same."""
    transformers = require_transformers()
    transformers.logging.disable_progress_bar()
    model = load_model(folder, mode=mode)
    if not model.can_generate():
        raise ValueError(f"{folder} is a {type(model).__name__}, which generates no text")
    tokenizer = load_tokenizer(folder)
    streamer = _streamer(transformers)(tokenizer, skip_prompt=not raw, skip_special_tokens=True)
    model.generate(**_tokens(tokenizer, prompt, raw), max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


def _streamer(transformers: Any) -> Any:
    class Streamer(transformers.TextStreamer):  # type: ignore[misc]  # transformers has no types
        """Prints an answer as it grows: a model may be made to answer with what controls a terminal."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text("\n".join(map(printable, text.split("\n"))), stream_end)

    return Streamer


def _tokens(tokenizer: Any, prompt: str, raw: bool) -> Any:
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
