# SPDX-License-Identifier: Apache-2.0
"""The commands on model directories, from an unquantized model to its report."""

import copy
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
import xpu_fp4
from checkpoint_files import IDS, LINEARS, VOCABULARY, WORDS, llama, save_llama, save_tokenizer
from click.testing import CliRunner, Result
from rich.filesize import decimal
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel
from xpu_fp4 import Mode, MXFP4Linear
from xpu_fp4.checkpoints import open_checkpoint
from xpu_fp4.checkpoints.evaluation import language_scores, layer_noise, perplexity
from xpu_fp4.checkpoints.questions import is_right, read_questions
from xpu_fp4.checkpoints.statistics import scale_statistics
from xpu_fp4.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def fail(message: str, *arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split()), result.output
    assert isinstance(result.exception, SystemExit), "a traceback"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    save_llama(folder)
    save_tokenizer(folder)
    succeed("quantize", folder, folder.with_name("w4a4"), "--scheme", "w4a4")
    return folder.with_name("w4a4")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    BertModel(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.5)).save_pretrained(
        folder
    )
    save_tokenizer(folder)
    succeed("quantize", folder, folder.with_name("w4a16"), "--scheme", "w4a16")
    return folder.with_name("w4a16")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(WORDS[i : i + 10]) for i in range(0, 100, 10)))
    return path


# ---- quantize ----


def test_quantize_takes_its_options(language_model: Path, tmp_path: Path) -> None:
    source = language_model.with_name("llama")
    options = ("--scheme", "w4a16", "--scale-mode", "ceil", "--ignore", "lm_head", "--ignore", "re:.*down_proj")
    output = succeed("quantize", source, tmp_path / "out", *options)
    assert "12 linear layers are MXFP4; kept as they are: lm_head, model.layers.0.mlp.down_proj" in output
    layers = open_checkpoint(tmp_path / "out").layers
    assert layers.keys() == {name for name in LINEARS if "down_proj" not in name}
    assert {layer.scheme.mode for layer in layers.values()} == {"w4a16"}


def test_quantize_says_what_it_keeps_and_how_large_the_folder_is(language_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = succeed("quantize", language_model.with_name("llama"), out, "--include", "lm_head")
    assert "15 linear layers are MXFP4; kept as they are: none" in output
    assert decimal(sum(path.stat().st_size for path in out.rglob("*") if path.is_file())) in output
    assert "lm_head" in open_checkpoint(out).layers


@pytest.mark.parametrize("scheme", get_args(Mode))
def test_quantize_takes_every_scheme(language_model: Path, tmp_path: Path, scheme: Mode) -> None:
    succeed("quantize", language_model.with_name("llama"), tmp_path / "out", "--scheme", scheme)
    shown = {"w4a4": "w4a4 scale_mode even", "w4a8": "w4a8 group 128", "w4a16": "w4a16"}[scheme]
    assert {str(layer.scheme) for layer in open_checkpoint(tmp_path / "out").layers.values()} == {shown}
    assert succeed("inspect", tmp_path / "out").count(f" {shown} ") == len(LINEARS)
    layers = json.loads(succeed("inspect", tmp_path / "out", "--json"))["layers"].values()
    expected = {"w4a4": [scheme, "even", None], "w4a8": [scheme, None, 128], "w4a16": [scheme, None, None]}[scheme]
    assert all([layer.get(key) for key in ("mode", "scale_mode", "group")] == expected for layer in layers)


def test_quantize_says_what_is_wrong(language_model: Path, tmp_path: Path) -> None:
    source = language_model.with_name("llama")
    fail("is quantized already, by 'compressed-tensors'", "quantize", language_model, tmp_path / "out")
    fail("ignore has 'lm_haed', which matches no linear layer", "quantize", source, tmp_path / "out", "--ignore", "lm_haed")
    fail("exists already", "quantize", source, language_model)
    fail("does not exist", "quantize", tmp_path / "nowhere", tmp_path / "out")
    fail("config.json does not exist", "quantize", tmp_path, tmp_path / "out")
    fail("'int4' is not one of", "quantize", source, tmp_path / "out", "--scheme", "int4")


# ---- inspect ----


def test_inspect_shows_every_layer(language_model: Path) -> None:
    output = succeed("inspect", language_model)
    assert "compressed-tensors, 14 MXFP4 layers" in output
    lines = {line.split()[0]: line.split() for line in output.splitlines() if "_proj" in line}
    assert {name: line[1:3] for name, line in lines.items()} == {name: [f"{n}x{k}", "w4a4"] for name, (n, k) in LINEARS.items()}


def test_inspect_json_counts_every_block(language_model: Path) -> None:
    content = json.loads(succeed("inspect", language_model, "--json"))
    assert content["format"] == "compressed-tensors"
    for name, (n, k) in LINEARS.items():
        layer = content["layers"][name]
        assert layer["shape"] == [n, k]
        assert (layer["mode"], layer["scale_mode"]) == ("w4a4", "even")
        assert sum(layer["histogram"].values()) == n * k // 32


def test_alignment_is_that_of_the_definition() -> None:
    rows = torch.full((64, 5), 127, dtype=torch.uint8)
    rows[0, :2] = torch.tensor([127, 130])  # 3 apart: aligned
    rows[1, :2] = torch.tensor([127, 131])  # 4 apart: not
    rows[40, 1:3] = torch.tensor([120, 120])  # both pairs are not, nor is the quad
    rows[41, 4] = 255
    found = scale_statistics(rows)
    assert found.invalid == 1
    assert found.histogram == {0: 64 * 5 - 5, 3: 1, 4: 1, -7: 2}
    assert found.pairs == pytest.approx(1 - 3 / (64 * 3))
    assert found.quads == pytest.approx(1 - 2 / (64 * 2))
    assert found.tile_pairs == pytest.approx(1 - 3 / 6)
    assert found.tile_quads == pytest.approx(1 - 2 / 4)


# ---- eval ----


def test_eval_compares_language_models(language_model: Path, text: Path, tmp_path: Path) -> None:
    source = language_model.with_name("llama")
    arguments = ("eval", language_model, "--text", text, "--window", 32, "--windows", 2, "--original", source)
    output = succeed(*arguments, "--report", tmp_path / "report.html")
    assert "64 in windows of 32" in output
    assert "w4a4 scale_mode even" in output
    for line in ("perplexity", "divergence from the original", "same likeliest token", *LINEARS):
        assert line in output
    page = (tmp_path / "report.html").read_text()
    assert all(f"<td>{name}</td>" in page for name in LINEARS)
    assert "data:image/png;base64," in page
    succeed(*arguments, "--report", tmp_path / "report.png")
    content = (tmp_path / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">2I", content[16:24]) == (1200, 800)


def questions(folder: Path) -> Path:
    path = folder / "questions.jsonl"
    path.write_text('{"question": "w1 w2", "expected": ["w3", "w4 w5"]}\n\n{"question": "w6", "expected": ["<b>"]}\n')
    return path


def test_eval_puts_recipes_side_by_side(language_model: Path, text: Path, tmp_path: Path) -> None:
    source, other = language_model.with_name("llama"), tmp_path / "w4a16"
    succeed("quantize", source, other, "--scheme", "w4a16")
    arguments = ("--text", text, "--window", 32, "--original", source, "--questions", questions(tmp_path))
    output = succeed("eval", language_model, other, *arguments, "--report", tmp_path / "report.html")
    lines = [[cell.strip() for cell in line.split("│")[1:5]] for line in output.splitlines() if "│" in line]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["scheme"] == ["w4a4 scale_mode even", "w4a16", ""]
    perplexities = [float(cell) for cell in cells["perplexity"]]
    divergences = [float(cell) for cell in cells["divergence from the original, nats"][:2]]
    assert 0 < divergences[1] < divergences[0]
    assert abs(perplexities[1] - perplexities[2]) < abs(perplexities[0] - perplexities[2])
    assert [cell.endswith("of 2") for cell in cells["right answers"]] == [True] * 3
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Answers</h2>" in page
    assert "w1 w2" in page
    fail("expected different directories", "eval", other, other, *arguments)


def test_scores_are_those_of_their_definitions() -> None:
    model, original = (llama(torch.float32, tied=tied).requires_grad_(False) for tied in (False, True))
    ids = IDS.view(2, 12)
    with torch.inference_mode():
        ours, theirs = language_scores([model], ids, original)
        p, q = (m(ids).logits[:, :-1].double().softmax(-1) for m in (original, model))
    assert ours.divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert ours.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert (theirs.divergence, theirs.agreement) == (None, None)
    assert theirs.perplexity == perplexity(original, ids)
    with torch.inference_mode():
        itself = language_scores([original], ids, original)[0]
    assert (itself.divergence, itself.agreement) == (0, 1)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The capital is Paris.", True),
        ("PARIS", True),
        ("It is New  York", False),
        ("New York!", True),
        ("Parisian", False),
        ("comparis", False),
        ("H2O+", True),
        ("", False),
    ],
)
def test_an_answer_is_right_if_it_has_the_word(answer: str, right: bool) -> None:
    assert is_right(answer, ["paris", " New York ", "h2o+", ""]) is right


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 2: Expected `object`, got `array`"),
        ('{"question": "a"}', "line 2: Object missing required field `expected`"),
        ('{"question": "a", "expected": "b"}', "line 2: Expected `array`"),
        ('{"question": "a", "expected": ["b"], "c": 1}', "line 2: Object contains unknown field `c`"),
        ('{"question": " ", "expected": ["b"]}', "line 2: expected a question, and a word that answers it"),
        ('{"question": "a", "expected": [" "]}', "line 2: expected a question, and a word that answers it"),
        ("\udcff", "line 2"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b'{"question": "a", "expected": ["b"]}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_questions(path)


def test_no_questions_at_all_are_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no questions"):
        read_questions(path)


def test_eval_runs_the_same_weights_in_another_scheme(language_model: Path, text: Path) -> None:
    arguments = ("eval", language_model, "--text", text, "--window", 32)
    found = {scheme: succeed(*arguments, "--scheme", scheme) for scheme in get_args(Mode)}
    assert found["w4a4"] == succeed(*arguments)
    for scheme, output in found.items():
        assert f" {scheme}" in output
    figures = {scheme: re.findall(r"perplexity *│ *([0-9.]+)", output) for scheme, output in found.items()}
    w4a4, w4a8, w4a16 = (float(figures[scheme][0]) for scheme in ("w4a4", "w4a8", "w4a16"))
    assert abs(w4a8 - w4a16) < abs(w4a4 - w4a16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eval_runs_every_model_in_the_dtype_that_is_asked_for(language_model: Path, text: Path, dtype: str) -> None:
    source = language_model.with_name("llama")
    arguments = ("eval", language_model, "--text", text, "--window", 32, "--windows", 1, "--original", source)
    output = succeed(*arguments, "--dtype", dtype)
    found = {
        line[0]: line[1:] for line in ([c.strip() for c in row.split("│")[1:4]] for row in output.splitlines() if "│" in row)
    }
    assert found["dtype"] == [dtype, dtype]
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :32]
    with torch.inference_mode():
        models = (
            xpu_fp4.load_model(language_model, dtype=dtype),
            AutoModelForCausalLM.from_pretrained(source, dtype=dtype),
        )
        expected = [f"{perplexity(model, ids):.2f}" for model in models]
    assert found["perplexity"] == expected
    if dtype == "bfloat16":  # the models' own
        assert succeed(*arguments) == output


def test_eval_compares_sentence_embeddings(encoder: Path, language_model: Path, text: Path, tmp_path: Path) -> None:
    output = succeed("eval", encoder, "--text", text, "--original", encoder.with_name("bert"))
    figures = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in output.splitlines() if "│" in line}
    assert figures["sentences"] == "10"
    fail("--questions are for language models", "eval", encoder, "--text", text, "--questions", questions(tmp_path))
    fail("expected a BertModel like the first DIR", "eval", encoder, language_model, "--text", text)
    assert 0.5 < float(figures["cosine similarity, least"]) <= float(figures["cosine similarity, mean"]) < 1
    assert "encoder.layer.1.output.dense" in output


def test_eval_says_what_is_missing(language_model: Path, encoder: Path, text: Path, tmp_path: Path) -> None:
    fail("expected at least one window of 1024", "eval", language_model, "--text", text)
    fail("give --original to compare sentence embeddings", "eval", encoder, "--text", text)
    fail("--report needs a name that ends in", "eval", encoder, "--text", text, "--report", tmp_path / "x.pdf")
    fail("'int8' is not one of", "eval", language_model, "--text", text, "--dtype", "int8")
    fail("has no quantization_config", "eval", language_model.with_name("llama"), "--text", text)
    bert = encoder.with_name("bert")
    fail("--original is a BertModel, expected a LlamaForCausalLM", "eval", language_model, "--text", text, "--original", bert)


def test_perplexity_is_that_of_the_definition() -> None:
    model = llama(torch.float32)
    ids = IDS.view(2, 12)
    with torch.inference_mode():
        expected = [cross_entropy(model(row[None]).logits[0, :-1], row[1:]).item() for row in ids]
        assert perplexity(model, ids) == pytest.approx(math.exp(sum(expected) / 2))


def test_noise_is_of_each_layer_by_itself() -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 32)
    quantized = xpu_fp4.quantize_(nn.Sequential(copy.deepcopy(first), copy.deepcopy(second)), mode="w4a16")
    x = torch.randn(8, 64)
    with torch.no_grad():
        for linear, module in ((first, quantized[0]), (second, quantized[1])):
            assert isinstance(module, MXFP4Linear)
            linear.weight.copy_(module.dequantized_weight())
        first.weight[0, 0] += 1
        noise = layer_noise(nn.Sequential(first, second), quantized, lambda model: model(x))
        signal = float(first(x).double().square().sum()), float(first.weight.double().square().sum())
    assert [layer.name for layer in noise] == ["0", "1"]
    assert noise[0].output == pytest.approx(10 * math.log10(signal[0] / float(x[:, 0].double().square().sum())), rel=1e-3)
    assert noise[0].weight == pytest.approx(10 * math.log10(signal[1]), rel=1e-6)
    assert noise[1].weight == math.inf
    assert noise[1].output > 100, "the second layer is given the original's inputs, so the first one's noise is not in it"


# ---- generate ----


@pytest.mark.parametrize("scheme", [None, "w4a8"])
def test_generate_is_greedy(language_model: Path, scheme: Mode | None) -> None:
    options = ("--scheme", scheme) if scheme else ()
    arguments = ("generate", language_model, "--prompt", "w1 w2 w3", "--max-new-tokens", 5, *options)
    output = succeed(*arguments)
    assert succeed(*arguments) == output
    ids = torch.tensor([[4, 5, 6]])
    model = xpu_fp4.load_model(language_model, mode=scheme)
    with torch.inference_mode():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    words = ["<pad>", "<s>", "</s>", *WORDS]
    assert output.split() == [words[i] for i in ids[0, 3:]]


def test_generate_needs_a_language_model(encoder: Path) -> None:
    fail("is a BertModel, which generates no text", "generate", encoder, "--prompt", "w1")


def test_every_command_has_help() -> None:
    commands: dict[str, Callable[..., object]] = dict.fromkeys(("quantize", "convert", "inspect", "eval", "generate"), succeed)
    for name in commands:
        assert succeed(name, "--help").startswith(f"Usage: main {name}")
