# SPDX-License-Identifier: Apache-2.0
"""Questions whose right answers are known: does a chat model still answer like its original?"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

MOST_BYTES = 16 << 20
"""A file of questions has no more."""
_TOGETHER = 32


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question, and the words of which one is in every right answer."""

    question: str
    expected: list[str]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file that has one as a JSON object in each line.

    Raises ValueError, with the line's number, where a line is something else.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes, expected questions of at most {MOST_BYTES >> 20} MiB")
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            question = msgspec.json.decode(line, type=Question)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}; expected {{'question': '...', 'expected': ['...']}}") from error
        if not question.question.strip() or not any(word.strip() for word in question.expected):
            raise ValueError(f"{path}, line {number}: expected a question, and a word that answers it")
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} has no questions")
    return questions


def is_right(answer: str, expected: Sequence[str]) -> bool:
    """Whether one of the expected words is in the answer, as a word of its own and in any case."""
    words = "|".join(re.escape(word.strip()) for word in expected if word.strip())
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", answer, re.IGNORECASE) is not None


def answer_all(model: Any, tokenizer: Any, questions: Sequence[str], tokens: int = 32) -> list[str]:
    """The greedy answers of a language model, each of so many tokens at most; as chat messages where it has a template."""
    texts = [_prompt(tokenizer, question) for question in questions]
    answers: list[str] = []
    padding = {"padding": True, "padding_side": "left"} if tokenizer.pad_token or tokenizer.eos_token else {}
    if padding and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    together = _TOGETHER if padding else 1
    for first in range(0, len(texts), together):
        batch = tokenizer(texts[first : first + together], return_tensors="pt", add_special_tokens=False, **padding)
        output = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def _prompt(tokenizer: Any, question: str) -> str:
    if not tokenizer.chat_template:
        return f"{tokenizer.bos_token or ''}{question}"
    message = [{"role": "user", "content": question}]
    prompt: str = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return prompt
