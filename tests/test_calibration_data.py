# SPDX-License-Identifier: Apache-2.0
"""What is calibrated on: texts, conversations, the command's files, the example's data."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xpu_fp4
from checkpoint_files import IDS, llama, save_llama
from click.testing import CliRunner
from helpers import assert_same_bits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
)
from xpu_fp4.calibration import Conversation, calibrate_, calibration_windows, read_chats
from xpu_fp4.checkpoints import CheckpointError
from xpu_fp4.checkpoints.questions import Question, read_questions
from xpu_fp4.cli import main

WORDS = [f"w{i}" for i in range(100)]
TEXT = " ".join(WORDS[i * 7 % 100] + "." * (i % 5 == 0) for i in range(4000))
CHATS = [
    [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1} w{i + 2}"}] for i in range(0, 90, 3)
]
TEMPLATE = "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "user", "assistant", ".", *WORDS]
    words_to_ids = {word: i for i, word in enumerate(words)}
    made = Tokenizer(WordLevel(words_to_ids, unk_token="<pad>"))
    made.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def chats_among(windows: Tensor) -> int:
    """Windows that begin as the template has it."""
    return int((windows[:, :2] == torch.tensor(tokenizer().convert_tokens_to_ids(["<s>", "user"]))).all(1).sum())


@pytest.mark.parametrize(
    ("texts", "chats", "template", "options", "expected"),
    [
        ([TEXT], [], None, {}, 0),
        ([TEXT], [], TEMPLATE, {}, 4),
        ([TEXT], [], TEMPLATE, {"template": False}, 0),
        ([TEXT], CHATS, TEMPLATE, {}, 4),
        ([TEXT], CHATS, TEMPLATE, {"template": False}, 4),
        ([], CHATS, TEMPLATE, {}, 8),
    ],
)
def test_half_of_the_windows_are_conversations_where_there_is_a_template(
    texts: list[str], chats: list[Conversation], template: str | None, options: dict[str, Any], expected: int
) -> None:
    windows = calibration_windows(tokenizer(template), texts, chats, samples=8, length=40, **options)
    assert windows.shape == (8, 40)
    assert chats_among(windows) == expected
    again, other = (
        calibration_windows(tokenizer(template), texts, chats, samples=8, length=40, seed=s, **options) for s in (0, 1)
    )
    assert torch.equal(windows, again)
    assert not torch.equal(windows, other)
    assert len(windows.unique(dim=0)) == 8


def test_what_is_no_data_to_calibrate_on_is_named() -> None:
    with pytest.raises(ValueError, match="nothing to calibrate on"):
        calibration_windows(tokenizer(), [])
    with pytest.raises(ValueError, match="no chat template"):
        calibration_windows(tokenizer(None), [TEXT], CHATS)
    with pytest.raises(ValueError, match="the texts have 11 characters, too few for windows of 40 tokens"):
        calibration_windows(tokenizer(None), ["w1 w2 w3 w4"], length=40)


def test_conversations_are_lines_or_an_array(tmp_path: Path) -> None:
    lines, array, bare = (tmp_path / name for name in ("lines.jsonl", "array.json", "bare.json"))
    entries = [{"messages": chat, "id": 5} for chat in CHATS]
    lines.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    array.write_text(json.dumps(entries))
    bare.write_text(json.dumps(CHATS, indent=1))
    assert read_chats(lines) == read_chats(array) == read_chats(bare) == CHATS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"chats has no conversations"),
        ("[]", r"chats has no conversations"),
        ('{"messages": [}', r"chats, line 1 is not readable JSON"),
        ('{"messages": []}\n', r"chats, line 1.messages is empty, expected messages"),
        ('{"text": "hi"}', r"chats, line 1 is \{'text': 'hi'\}, expected an object with messages"),
        (
            '[{"messages": [{"role": "user", "content": ["hi"]}]}]',
            r"chats\[0\].messages\[0\].content is \['hi'\], expected a string",
        ),
        ('[[{"role": "user"}]]', r"chats\[0\]\[0\] is \{'role': 'user'\}, expected an object with content"),
        ("[5]", r"chats\[0\] is 5, expected an array"),
        ("[" * 100_000, r"chats is not readable JSON: it is nested too deeply"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_place(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "chats").write_text(content)
    with pytest.raises((CheckpointError, ValueError), match=message):
        read_chats(tmp_path / "chats")


def test_the_command_calibrates(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "source")
    tokenizer().save_pretrained(folder)
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "chats").write_text(json.dumps(CHATS))
    data = [f"--calibrate={tmp_path / 'text'}", f"--chat={tmp_path / 'chats'}", "--samples=8", "--length=40", "--seed=3"]
    options = ["--scheme=w4a8", "--hadamard=32", "--offset", "--correct", "--keep-high=q_proj, k_proj,re:.*v_proj"]
    result = CliRunner().invoke(main, ["quantize", str(folder), str(tmp_path / "out"), *options, *data])
    assert result.exit_code == 0, result.output
    windows = calibration_windows(tokenizer(), [TEXT], CHATS, samples=8, length=40, seed=3)
    high = ["q_proj", "k_proj", "v_proj"]
    expected = calibrate_(llama(), [windows], mode="w4a8", hadamard=32, offset=True, keep_high=high, correct=True)
    assert_same_bits(xpu_fp4.load_model(tmp_path / "out")(IDS).logits, expected(IDS).logits)
    assert "14 linear layers are MXFP4" in result.output


def test_the_command_corrects_nothing_without_data(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source")
    result = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "out"), "--correct"])
    assert result.exit_code == 1
    assert "--correct is a way to calibrate: it takes --calibrate or --chat" in result.output


def test_the_command_names_what_is_no_text(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "source")
    tokenizer().save_pretrained(folder)
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    result = CliRunner().invoke(main, ["quantize", str(folder), str(tmp_path / "out"), f"--calibrate={tmp_path / 'text'}"])
    assert result.exit_code == 1
    assert "text is no UTF-8 text" in result.output


def test_the_command_says_how_to_get_llm_compressor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)  # as if it were not installed
    folder = save_llama(tmp_path / "source")
    tokenizer().save_pretrained(folder)
    (tmp_path / "text").write_text(TEXT)
    command = ["quantize", str(folder), str(tmp_path / "out"), "--with=llm-compressor"]
    data = [f"--calibrate={tmp_path / 'text'}", "--samples=8", "--length=40"]
    result = CliRunner().invoke(main, [*command, *data])
    assert result.exit_code == 1
    assert "llm-compressor is needed for this: pip install 'xpu_fp4[llm-compressor]'" in result.output
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "--with llm-compressor needs --calibrate or --chat" in " ".join(result.output.split())
    assert not list(tmp_path.glob("out*"))


EXAMPLES = Path(__file__).parent.parent / "examples"
ASIDE = """a an the is are was were do does did what which who how many much in on of to at we you i it and said have has call
called known there their its s for from by with that this one be can my me us your people need"""


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[\w+]+", text.lower()))


def is_about(question: Question, exchange: str) -> bool:
    """Whether an exchange has all that the question names, or half of it and its answer."""
    subject, words = words_of(question.question) - words_of(ASIDE), words_of(exchange)
    answers = any(words_of(answer) <= words for answer in question.expected if not answer.isdigit())
    return subject <= words or (answers and 2 * len(subject & words) >= len(subject))


def test_nothing_that_is_asked_is_calibrated_on() -> None:
    questions, chats = read_questions(EXAMPLES / "questions.jsonl"), read_chats(EXAMPLES / "chats.jsonl")
    france = questions[0]
    assert is_about(france, "France's capital? It is Lyon.")
    assert is_about(france, "Which city in France is the largest? Paris.")
    assert not is_about(france, "What is the capital of Norway? The capital of Norway is Oslo.")
    for messages in chats:
        for i in range(0, len(messages) - 1, 2):
            exchange = f"{messages[i]['content']} {messages[i + 1]['content']}"
            assert not [question.question for question in questions if is_about(question, exchange)], exchange
