# SPDX-License-Identifier: Apache-2.0
"""GGUF files into model directories: gguf's writer and quantizer make the files, Transformers the models to compare with."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
import xpu_fp4
from checkpoint_files import EXPERTS, HIDDEN, IDS, INTERMEDIATE, LAYERS, VOCABULARY, llama_config, save_tokenizer, tensors_of
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Type
from helpers import assert_same_bits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, Qwen3Config
from xpu_fp4 import reference
from xpu_fp4.checkpoints import CheckpointError, open_checkpoint
from xpu_fp4.cli import main
from xpu_fp4.gguf import convert, convert_gguf, file
from xpu_fp4.gguf.architectures import describe
from xpu_fp4.gguf.convert import unpack_blocks

Tensors = dict[str, tuple[Tensor, Type]]
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}


def metadata_of(architecture: str, config: Any, **changes: Any) -> dict[str, Any]:
    """Returns what llama.cpp writes of a model; changes have _ in a dot's place as a key of the architecture, None: none."""
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if architecture == "gpt-oss":
        keys |= {
            "expert_count": config.num_local_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.intermediate_size,
            "attention.sliding_window": config.sliding_window,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": config.rope_parameters["factor"],
            "rope.scaling.original_context_length": config.rope_parameters["original_max_position_embeddings"],
        }
    named = {f"{architecture}.{key}": value for key, value in (keys | changes).items() if value is not None}
    return {"general.architecture": architecture, "general.name": "small", **named, "tokenizer.ggml.eos_token_id": 2}


def write_gguf(path: Path, metadata: dict[str, Any], tensors: Tensors) -> Path:
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, (tensor, kind) in tensors.items():
        data = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_stored(tensor: Tensor, kind: Type) -> Tensor:
    """Returns what is left of a tensor in that type, by gguf's own formulas."""
    data = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(data, kind)).to(torch.bfloat16)


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * (0.02 if parameter.dim() > 1 else 0.2))
    return model


DENSE = {
    "input_layernorm.weight": ("attn_norm.weight", Type.F32),
    "post_attention_layernorm.weight": ("ffn_norm.weight", Type.F32),
    "self_attn.q_proj.weight": ("attn_q.weight", Type.MXFP4),
    "self_attn.k_proj.weight": ("attn_k.weight", Type.Q8_0),
    "self_attn.v_proj.weight": ("attn_v.weight", Type.MXFP4),
    "self_attn.o_proj.weight": ("attn_output.weight", Type.MXFP4),
    "self_attn.q_norm.weight": ("attn_q_norm.weight", Type.F32),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", Type.F32),
    "mlp.gate_proj.weight": ("ffn_gate.weight", Type.MXFP4),
    "mlp.up_proj.weight": ("ffn_up.weight", Type.MXFP4),
    "mlp.down_proj.weight": ("ffn_down.weight", Type.BF16),
}
GPT_OSS = {
    "input_layernorm.weight": ("attn_norm.weight", Type.F32),
    "post_attention_layernorm.weight": ("post_attention_norm.weight", Type.F32),
    **{
        f"self_attn.{ours}_proj.{kind}": (f"attn_{theirs}.{kind}", Type.Q8_0 if kind == "weight" else Type.F32)
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "o": "output"}.items()
        for kind in ("weight", "bias")
    },
    "self_attn.sinks": ("attn_sinks.weight", Type.F32),
    "mlp.router.weight": ("ffn_gate_inp.weight", Type.F32),
    "mlp.router.bias": ("ffn_gate_inp.bias", Type.F32),
}
OUTER = {
    "model.embed_tokens.weight": ("token_embd.weight", Type.F16),
    "model.norm.weight": ("output_norm.weight", Type.F32),
    "lm_head.weight": ("output.weight", Type.Q8_0),
}


def rotated(weight: Tensor, heads: int) -> Tensor:
    """Orders rows as llama.cpp stores queries and keys of llama."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def stored(model: Any, table: dict[str, tuple[str, Type]], heads: dict[str, int]) -> Tensors:
    """The tensors of a model under llama.cpp's names; in the model, their values become those that are stored."""
    tensors: Tensors = {}
    for name, parameter in model.named_parameters():
        layer = name.removeprefix("model.layers.").partition(".")
        theirs, kind = OUTER[name] if name in OUTER else table.get(layer[2], ("", Type.F32))
        if not theirs:
            continue  # of experts
        parameter.copy_(as_stored(parameter, kind))
        count = heads.get(theirs, 0)
        block = "" if name in OUTER else f"blk.{layer[0]}."
        tensors[block + theirs] = (rotated(parameter, count) if count else parameter, kind)
    return tensors


def make_gpt_oss(path: Path, **changes: Any) -> Any:
    """Writes the file and returns the model that is in it."""
    config = GptOssConfig(**SMALL, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=8, pad_token_id=0)
    model = random_model(config)
    tensors = stored(model, GPT_OSS, {})
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        parts = {"gate": experts.gate_up_proj[..., ::2], "up": experts.gate_up_proj[..., 1::2], "down": experts.down_proj}
        biases = {"gate": experts.gate_up_proj_bias[:, ::2], "up": experts.gate_up_proj_bias[:, 1::2]}
        for part, weight in parts.items():
            weight.copy_(as_stored(weight.transpose(1, 2), Type.MXFP4).transpose(1, 2))  # Transformers has them transposed
            tensors[f"blk.{i}.ffn_{part}_exps.weight"] = (weight.transpose(1, 2), Type.MXFP4)
            tensors[f"blk.{i}.ffn_{part}_exps.bias"] = (biases.get(part, experts.down_proj_bias), Type.F32)
    write_gguf(path, metadata_of("gpt-oss", config, **changes), tensors)
    return model


def make_dense(path: Path, architecture: str, *, tied: bool = False, **changes: Any) -> Any:
    config = Qwen3Config(**SMALL, tie_word_embeddings=tied) if architecture == "qwen3" else llama_config(tied=tied)
    model = random_model(config)
    heads = {"attn_q.weight": config.num_attention_heads, "attn_k.weight": config.num_key_value_heads}
    tensors = stored(model, DENSE, heads if architecture == "llama" else {})
    write_gguf(path, metadata_of(architecture, config, **changes), tensors)
    return model


MAKE: dict[str, Callable[[Path], Any]] = {
    "gpt-oss": make_gpt_oss,
    "llama": lambda path: make_dense(path, "llama"),
    "qwen3": lambda path: make_dense(path, "qwen3"),
    "tied": lambda path: make_dense(path, "llama", tied=True),
}


# ---- what it converts ----


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


# ---- what it refuses ----


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


def test_convert_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(HOSTILE["a long name"][0])
    result = run("convert", tmp_path / "model.gguf", tmp_path / "out")
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "is damaged" in result.output
