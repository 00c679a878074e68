# SPDX-License-Identifier: Apache-2.0
"""GGUF files that are refused: of another model, damaged, or hostile."""

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import EXPERTS, HIDDEN, INTERMEDIATE, llama_config
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Type
from gguf_files import (
    DENSE,
    GPT_OSS,
    Tensors,
    make_dense,
    make_gpt_oss,
    metadata_of,
    random_model,
    stored,
    write_gguf,
)
from torch import Tensor
from xpu_fp4.checkpoints import CheckpointError
from xpu_fp4.cli import main
from xpu_fp4.gguf import convert, convert_gguf, file
from xpu_fp4.gguf.architectures import describe


def refuse(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_gguf(path, path.parent / "out")
    for part in (str(path), *parts):
        assert part in str(caught.value), caught.value
    assert not (path.parent / "out").exists()


def altered(path: Path, change: Callable[[Tensors], object], **changes: Any) -> Path:
    """The small llama, its tensors changed before they are written."""
    config = llama_config()
    tensors = stored(random_model(config), DENSE, {"attn_q.weight": config.num_attention_heads, "attn_k.weight": 1})
    change(tensors)
    return write_gguf(path, metadata_of("llama", config, **changes), tensors)


def swap(name: str, tensor: Tensor, kind: Type) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, (tensor, kind))


def unquantized(tensors: Tensors) -> None:
    for name, (tensor, kind) in tensors.items():
        tensors[name] = (tensor, Type.Q8_0 if kind == Type.MXFP4 else kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("blk.1.ffn_up.weight"), "has no tensors blk.1.ffn_up.weight"),
        (lambda tensors: tensors.pop("token_embd.weight"), "has no tensor token_embd.weight"),
        (swap("rope_freqs.weight", torch.ones(16), Type.F32), "LlamaForCausalLM has no place for: rope_freqs.weight"),
        (swap("blk.0.ffn_gate_exps.weight", torch.ones(2, 8, 32), Type.F16), "no place for: blk.0.ffn_gate_exps.weight"),
        (swap("blk.0.attn_q.weight", torch.ones(65, 64), Type.MXFP4), "has 65 rows, expected 2 heads of even size"),
        (unquantized, "has no matrices in MXFP4 that layers multiply by; its types are BF16, F16, F32, Q8_0"),
    ],
)
def test_tensors_that_make_another_model_are_named(tmp_path: Path, change: Any, message: str) -> None:
    refuse(altered(tmp_path / "model.gguf", change), message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", None, "llama.block_count is None, expected an integer from 1"),
        ("block_count", "two", "llama.block_count is 'two', expected an integer from 1"),
        ("block_count", 2**32 - 1, "llama.block_count is 4294967295"),
        ("block_count", 10_000, "tensors, and the metadata 10000 blocks"),
        ("block_count", 1, "has no place for: blk.1."),
        ("attention.head_count", [2, 2], "llama.attention.head_count is [2, 2]"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "expected a number above 0"),
        ("attention.value_length", 16, "llama.attention.value_length is 16, expected 32"),
        ("rope.dimension_count", 16, "llama.rope.dimension_count is 16, expected 32"),
        ("rope.scaling.type", "linear", "llama.rope.scaling.type is 'linear', expected 'none'"),
        ("vocab_size", 5, "llama.vocab_size is 5, expected 128"),
    ],
)
def test_metadata_that_means_another_model_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    refuse(altered(tmp_path / "model.gguf", lambda tensors: None, **{key: value}), message)


def test_keys_that_are_not_read_are_named_in_a_warning(tmp_path: Path) -> None:
    path = altered(tmp_path / "model.gguf", lambda tensors: None, **{"attention.novelty": 1})
    with pytest.warns(UserWarning, match=r"left aside in the metadata: llama\.attention\.novelty"):
        convert_gguf(path, tmp_path / "out")


def test_a_row_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dense(tmp_path / "model.gguf", "llama")
    monkeypatch.setattr(convert, "_MOST_PIECE", 4000)
    refuse(tmp_path / "model.gguf", "token_embd.weight [128, 64] has 16384 bytes in a row or a head, expected at most 4000")


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    config = llama_config()
    write_gguf(tmp_path / "model.gguf", metadata_of("gemma3", config), {"token_embd.weight": (torch.ones(4, 32), Type.MXFP4)})
    refuse(tmp_path / "model.gguf", "has the architecture 'gemma3', expected one of gpt-oss, llama, qwen3")


def test_experts_of_another_type_are_refused(tmp_path: Path) -> None:
    model = make_gpt_oss(tmp_path / "good.gguf")
    tensors = stored(model, GPT_OSS, {})
    with file.GgufFile(tmp_path / "good.gguf") as good:
        for name in good:
            if "exps" in name:
                kind = Type.Q8_0 if name == "blk.1.ffn_down_exps.weight" else Type[good[name].type]
                tensors[name] = (torch.ones(good[name].shape), kind)
    write_gguf(tmp_path / "model.gguf", metadata_of("gpt-oss", model.config), tensors)
    refuse(tmp_path / "model.gguf", "blk.1.ffn_down_exps.weight is Q8_0", "other experts are not converted")


def test_gate_and_up_are_alike(tmp_path: Path) -> None:
    model = make_gpt_oss(tmp_path / "good.gguf")
    tensors = stored(model, GPT_OSS, {})
    with file.GgufFile(tmp_path / "good.gguf") as good:
        shapes = {name: good[name].shape for name in good if "exps" in name}
        kinds = {name: Type[good[name].type] for name in shapes}
    shapes["blk.0.ffn_up_exps.weight"] = (EXPERTS, INTERMEDIATE - 1, HIDDEN)
    tensors |= {name: (torch.ones(shape), kinds[name]) for name, shape in shapes.items()}
    write_gguf(tmp_path / "model.gguf", metadata_of("gpt-oss", model.config), tensors)
    refuse(tmp_path / "model.gguf", "blk.0.ffn_gate_exps.weight is MXFP4 [4, 96, 64], expected the same as blk.0.ffn_up_exps")


def test_the_scale_that_is_nan_here_is_refused(tmp_path: Path) -> None:
    make_dense(tmp_path / "model.gguf", "llama")
    with file.GgufFile(tmp_path / "model.gguf") as opened:
        begin = opened["blk.1.ffn_up.weight"].begin
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[begin + 17 * 5] = 255
    (tmp_path / "model.gguf").write_bytes(content)
    refuse(tmp_path / "model.gguf", "blk.1.ffn_up.weight has the scale 255")


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def header(keys: list[bytes] = [], tensors: list[bytes] = [], *, version: int = 3, counts: Any = None) -> bytes:  # noqa: B006
    return struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


def tensor(name: bytes = b"a", shape: tuple[int, ...] = (32,), kind: int = 0, begin: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, begin)


PAD = bytes(4096)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes, and a header that goes on to 4"),
    "no GGUF": (b"PK\3\4" + PAD, "is no GGUF file"),
    "version 1": (header(version=1), "has the GGUF version 0x1"),
    "big-endian": (struct.pack(">I", 0x47475546) + struct.pack(">IQQ", 3, 0, 0), "has the GGUF version 0x3000000"),
    "keys without end": (header(counts=(0, 2**63)) + PAD, "keys, expected at most 65536"),
    "tensors without end": (header(counts=(2**63, 0)) + PAD, "tensors and 0 keys, expected at most"),
    "more keys than bytes": (header([key(b"a", 0, b"1")], counts=(0, 9)), "is damaged"),
    "a long name": (header([string(b"a", 2**63)]) + PAD, "is damaged"),
    "a long string": (header([key(b"a", 8, string(b"", 2**40))]) + PAD, "is damaged"),
    "an array without end": (header([key(b"a", 9, array(0, 2**62))]) + PAD, "has arrays of more than"),
    "an array longer than the file": (header([key(b"a", 9, array(8, 1 << 20))]) + PAD, "is damaged"),
    "an array of arrays": (header([key(b"a", 9, array(9, 4))]) + PAD, "a is an array of arrays"),
    "an unknown type": (header([key(b"a", 77, b"")]) + PAD, "a has the type 77"),
    "a name that is no text": (header([key(b"\xff", 0, b"1")]) + PAD, "no UTF-8"),
    "a key twice": (header([key(b"a", 0, b"1")] * 2) + PAD, "has the key a twice"),
    "alignment 0": (header([key(b"general.alignment", 4, bytes(4))]) + PAD, "general.alignment is 0"),
    "alignment 24": (header([key(b"general.alignment", 4, bytes([24, 0, 0, 0]))]) + PAD, "general.alignment is 24"),
    "a part": (header([key(b"split.count", 2, bytes([3, 0]))]) + PAD, "is a part of several: join them first"),
    "dimensions": (header(tensors=[tensor(shape=(1,) * 9)]) + PAD, "has 9 dimensions"),
    "no elements": (header(tensors=[tensor(shape=(32, 0))]) + PAD, "of shape [0, 32]"),
    "a product beyond 64 bits": (header(tensors=[tensor(shape=(2**32, 2**32))]) + PAD, "tensor a has bytes"),
    "half a block": (
        header(tensors=[tensor(shape=(48,), kind=39)]) + PAD,
        "is MXFP4 of shape [48], expected rows of blocks of 32",
    ),
    "a type without name": (header(tensors=[tensor(kind=999)]) + PAD, "has the type 999"),
    "beyond the end": (header(tensors=[tensor(begin=1 << 20)]) + PAD, "tensor a has bytes"),
    "beyond 64 bits": (header(tensors=[tensor(begin=2**64 - 32)]) + PAD, "tensor a has bytes"),
    "not aligned": (header(tensors=[tensor(begin=4)]) + PAD, "aligned to 32"),
    "a tensor twice": (header(tensors=[tensor(), tensor()]) + PAD, "tensor a is there twice"),
    "the same bytes": (header(tensors=[tensor(bytes([97 + i]), (512,)) for i in range(9)]) + PAD, "they overlap"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_before_anything_is_read(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    (tmp_path / "model.gguf").write_bytes(content)
    refuse(tmp_path / "model.gguf", message)


def test_headers_and_their_entries_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dense(tmp_path / "model.gguf", "llama")
    monkeypatch.setattr(file, "MOST_HEADER", 1000)
    refuse(tmp_path / "model.gguf", "a header that goes on to")
    monkeypatch.undo()
    monkeypatch.setattr(file, "MOST_NAMES", 15)
    refuse(tmp_path / "model.gguf", "has 21 tensors and 14 keys, expected at most 15 of each")
    monkeypatch.undo()
    monkeypatch.setattr(file, "MOST_ENTRIES", 3)
    altered(tmp_path / "model.gguf", lambda tensors: None, **{"attention.head_count": [2, 2], "novelty": [1, 1]})
    refuse(tmp_path / "model.gguf", "has arrays of more than 3 entries together")


@pytest.mark.filterwarnings("ignore:.*left aside")
def test_a_truncated_or_damaged_header_is_a_checkpoint_error(tmp_path: Path) -> None:
    make_dense(tmp_path / "model.gguf", "llama")
    whole = (tmp_path / "model.gguf").read_bytes()
    with file.GgufFile(tmp_path / "model.gguf") as opened:
        data = min(tensor.begin for tensor in opened.values())
    damaged = tmp_path / "damaged.gguf"
    generator = random.Random(0)
    refused = 0
    for case in range(400):
        content = bytearray(whole)
        if case % 4 == 0:
            content = content[: generator.randrange(len(whole))]
        else:
            for _ in range(generator.randint(1, 3)):
                content[generator.randrange(data)] = generator.choice((0, 1, 127, 128, 255, generator.randrange(256)))
        damaged.write_bytes(content)
        try:
            with file.GgufFile(damaged) as opened:
                describe(opened)
        except CheckpointError:
            refused += 1
    assert refused > 300


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    refuse(tmp_path / "model.gguf", "is no regular file")


def test_convert_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(HOSTILE["a long name"][0])
    result = CliRunner().invoke(main, ["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "is damaged" in result.output
