# SPDX-License-Identifier: Apache-2.0
"""Texts and conversations into windows of tokens to calibrate a model on.

A chat model must see its template's tokens among what it is calibrated on, or it loses the thread once it is quantized. So with
a tokenizer that has a template half of the windows are conversations: given ones or, if there are none, made of the text, whose
sentences become the turns.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import schemas
from ..checkpoints.untrusted import check_type, parse_json

Conversation = list[dict[str, str]]
"""Messages: `role` and `content`."""

_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def read_chats(path: Path) -> list[Conversation]:
    """The conversations of a file: a JSON object {"messages": [{"role": ..., "content": ...}, ...]} in each line, or an array.

    An array's entries are such objects, or their messages alone. Raises CheckpointError, with the file and the place in it, for
    anything else.
    """
    content = path.read_bytes()
    if content.lstrip().startswith(b"["):
        entries = {f"{path}[{i}]": entry for i, entry in enumerate(parse_json(content, str(path)))}
    else:
        lines = {f"{path}, line {i}": line for i, line in enumerate(content.splitlines(), 1) if line.strip()}
        entries = {where: parse_json(line, where) for where, line in lines.items()}
    if not entries:
        raise ValueError(f"{path} has no conversations")
    return [_messages(entry, where) for where, entry in entries.items()]


def _messages(entry: Any, where: str) -> Conversation:
    if isinstance(entry, dict):
        check_type(entry, schemas.Conversation, where)
        entry, where = entry["messages"], f"{where}.messages"
    check_type(entry, list[schemas.Message], where)
    if not entry:
        raise ValueError(f"{where} is empty, expected messages")
    return [{"role": message["role"], "content": message["content"]} for message in entry]


def calibration_windows(
    tokenizer: Any,
    texts: Sequence[str],
    chats: Sequence[Conversation] = (),
    *,
    samples: int = 32,
    length: int = 256,
    seed: int = 0,
    template: bool = True,
) -> Tensor:
    """Token ids [samples, length] out of texts and conversations.

    Where there are both, half of the windows are of each. Where there are texts alone, and the tokenizer has a chat template,
    half of the windows are conversations made of them; `template` False leaves all of them plain. Texts have the tokenizer's
    special tokens around each window, conversations those of the template. A conversation's window begins with it, and goes on
    with others; few conversations are gone through several times, each time in another order.

    Raises:
        ValueError: no texts and no conversations, texts that are too short, conversations without a template.
    """
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template, which conversations need")
    generator = torch.Generator().manual_seed(seed)
    in_template = bool(getattr(tokenizer, "chat_template", None)) and template
    as_chats = samples if not texts else samples // 2 if chats or in_template else 0
    windows: list[list[int]] = []
    if samples > as_chats:
        windows += _of_texts(texts, samples - as_chats, length, generator, _plain(tokenizer, length))
    if chats:
        windows += _of_chats(tokenizer, chats, as_chats, length, generator)
    elif as_chats and texts:
        windows += _of_texts(texts, as_chats, length, generator, lambda text: _tokens(tokenizer, _as_conversation(text)))
    if not windows:
        raise ValueError("there is nothing to calibrate on: give texts or conversations")
    return torch.tensor(windows)


def _plain(tokenizer: Any, length: int) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, truncation=True, max_length=length).input_ids
        return ids

    return encode


def _of_texts(
    texts: Sequence[str], count: int, length: int, generator: torch.Generator, encode: Callable[[str], list[int]]
) -> Iterator[list[int]]:
    """Windows from all over the texts: of as many equal stretches, each from a random place on."""
    text = "\n".join(texts)
    stretch = len(text) / count
    characters = 8 * length  # of most tokenizers' windows, a half of that
    for i in range(count):
        begin = int((i + torch.rand(1, generator=generator).item()) * stretch)
        begin = max(0, min(begin, len(text) - characters))
        begin = text.find(" ", begin) + 1 if begin else 0
        ids = encode(text[begin : begin + 2 * characters])
        if len(ids) < length:
            raise ValueError(f"the texts have {len(text)} characters, too few for windows of {length} tokens")
        yield ids[:length]


def _of_chats(
    tokenizer: Any,
    chats: Sequence[Conversation],
    count: int,
    length: int,
    generator: torch.Generator,
) -> Iterator[list[int]]:
    def shuffled() -> Iterator[Conversation]:
        while True:
            yield from (chats[i] for i in torch.randperm(len(chats), generator=generator).tolist())

    following = shuffled()
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < length:
            ids += _tokens(tokenizer, next(following))
        yield ids[:length]


def _tokens(tokenizer: Any, conversation: Conversation) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(conversation, return_dict=True).input_ids
    if not ids:
        raise ValueError(f"the tokenizer's chat template makes nothing of a conversation of {len(conversation)} messages")
    return ids


def _as_conversation(text: str) -> Conversation:
    sentences = [sentence for sentence in _SENTENCE.split(text) if sentence.strip()]
    return [{"role": ("user", "assistant")[i % 2], "content": sentence} for i, sentence in enumerate(sentences)]
