# SPDX-License-Identifier: Apache-2.0
"""GGUF files into model directories: gguf's writer and quantizer make the files, Transformers the models to compare with."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
import xpu_fp4
from checkpoint_files import IDS, LAYERS, VOCABULARY, save_tokenizer, tensors_of
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Type
from gguf_files import (
    DENSE,
    MAKE,
    make_dense,
    make_gpt_oss,
    metadata_of,
    write_gguf,
)
from helpers import assert_same_bits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from xpu_fp4 import reference
from xpu_fp4.checkpoints import open_checkpoint
from xpu_fp4.cli import main
from xpu_fp4.gguf import convert, convert_gguf, file
from xpu_fp4.gguf.convert import unpack_blocks


def test_blocks_have_the_values_of_gguf() -> None:
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (255, 8, 17), dtype=np.uint8)
    blocks[:, 0, 1:] = np.arange(16) * 17  # every code in both nibbles
    blocks[..., 0] = np.arange(255)[:, None]  # every scale but that of NaN
    codes, scale = unpack_blocks(torch.from_numpy(blocks))
    found = reference.values(codes.flatten(1), scale)
    with np.errstate(over="ignore"):
        expected = gguf.quants.dequantize(blocks.reshape(255, -1), Type.MXFP4).astype(np.float64)
    finite = np.isfinite(expected)  # gguf multiplies in float32, where 6 * 2^127 is none
    assert finite[:253].all()
    np.testing.assert_array_equal(found.numpy()[finite], expected[finite])


@pytest.mark.parametrize("case", MAKE)
def test_a_converted_file_computes_what_is_in_it(tmp_path: Path, case: str) -> None:
    expected = MAKE[case](tmp_path / "model.gguf").float()
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    model = xpu_fp4.load_model(folder, dtype="float32")
    assert type(model) is type(expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert {layer.scheme.mode for layer in open_checkpoint(folder).layers.values()} == {"w4a16"}
    assert model.config.eos_token_id == 2


def test_types_other_than_mxfp4_become_bfloat16_and_are_ignored(tmp_path: Path) -> None:
    make_dense(tmp_path / "model.gguf", "qwen3")
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    checkpoint = open_checkpoint(folder)
    packed = {ours.removesuffix(".weight") for ours, (_, kind) in DENSE.items() if kind == Type.MXFP4}
    assert checkpoint.layers.keys() == {f"model.layers.{i}.{name}" for i in range(LAYERS) for name in packed}
    assert {checkpoint.files[name].dtype for name in checkpoint.other_tensors()} == {"BF16"}
    kept = json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(kept) == {
        "lm_head",
        *(f"model.layers.{i}.{n}" for i in range(LAYERS) for n in ("self_attn.k_proj", "mlp.down_proj")),
    }


def test_transformers_reads_the_dense_ones_by_itself(tmp_path: Path) -> None:
    expected = make_dense(tmp_path / "model.gguf", "llama")
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=0, atol=0.05)


@pytest.mark.parametrize("case", ["gpt-oss", "llama"])
def test_pieces_are_small_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    MAKE[case](tmp_path / "model.gguf")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "whole")
    sizes = []
    read = file.GgufFile.rows

    def rows(self: file.GgufFile, name: str, begin: int, end: int) -> Tensor:
        data = read(self, name, begin, end)
        sizes.append(data.numel())
        return data

    monkeypatch.setattr(file.GgufFile, "rows", rows)
    monkeypatch.setattr(convert, "_PIECE", 4096)
    convert_gguf(tmp_path / "model.gguf", tmp_path / "pieces")
    assert max(sizes) <= 4096
    assert (tmp_path / "pieces/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_an_interrupted_conversion_goes_on_after_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_gpt_oss(tmp_path / "model.gguf")
    expected = tensors_of(convert_gguf(tmp_path / "model.gguf", tmp_path / "whole"))
    monkeypatch.setattr(convert, "_SHARD", 20_000)
    partial = tmp_path / "out.partial"

    def stop(done: int, total: int) -> None:
        if len(list(partial.glob("*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert not (partial / "config.json").exists()
    kept = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert len(kept) == 2
    steps: list[tuple[int, int]] = []
    folder = convert_gguf(tmp_path / "model.gguf", tmp_path / "out", progress=lambda *step: steps.append(step))
    assert {name: (folder / name).stat().st_ino for name in kept} == kept
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    assert len(list(folder.glob("*.safetensors"))) > 3
    found = tensors_of(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor)
    xpu_fp4.load_model(folder)


# ---- the command ----


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def tokenizer_metadata() -> dict[str, Any]:
    """A byte-level BPE, as gpt-oss has one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, "ab", "cd", "abcd", *(f"w{i}" for i in range(VOCABULARY - 31)), "<s>", "</s>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (VOCABULARY - 2) + [3, 3],
        "tokenizer.ggml.merges": ["a b", "c d", "ab cd"],
        "tokenizer.ggml.bos_token_id": VOCABULARY - 2,
        "tokenizer.ggml.eos_token_id": VOCABULARY - 1,
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt-oss"])
def test_convert_takes_the_tokenizer_along_where_transformers_reads_it(tmp_path: Path, architecture: str) -> None:
    if architecture == "gpt-oss" and not transformers.__version__.startswith("5.24."):
        pytest.skip("this version of Transformers does not read gpt-oss' tokenizer out of a GGUF file")
    model = MAKE[architecture](tmp_path / "plain.gguf")
    with file.GgufFile(tmp_path / "plain.gguf") as plain:
        tensors = {name: (torch.ones(plain[name].shape), Type[plain[name].type]) for name in plain}
    write_gguf(tmp_path / "model.gguf", metadata_of(architecture, model.config) | tokenizer_metadata(), tensors)
    result = run("convert", tmp_path / "model.gguf", tmp_path / "out")
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abcdab").input_ids[-2:] == [28, 26]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    xpu_fp4.load_model(tmp_path / "out")


def test_convert_says_where_a_tokenizer_may_come_from(tmp_path: Path) -> None:
    make_gpt_oss(tmp_path / "model.gguf")
    result = run("convert", tmp_path / "model.gguf", tmp_path / "out")
    assert result.exit_code == 1
    assert "transformers cannot read its tokenizer" in result.output
    assert "give --tokenizer DIR" in result.output
    assert not (tmp_path / "out").exists()
    save_tokenizer(tmp_path / "tokenizer")
    result = run("convert", tmp_path / "model.gguf", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer")
    assert result.exit_code == 0, result.output
    assert run("generate", tmp_path / "out", "--prompt", "w1 w2", "--max-new-tokens", 3).exit_code == 0
