# SPDX-License-Identifier: Apache-2.0
"""Converts a GGUF file whose matrices are MXFP4 into a model directory, a piece of a tensor at a time.

llama.cpp's block is 17 bytes: the scale's byte b, then 16 bytes whose low nibbles are elements 0 to 15 and whose high nibbles
16 to 31. An element there is twice ours and its scale (ggml_e8m0_to_fp32_half) half of ours, 2^(b - 128), from b = 0 on: so the
codes are the same under the same byte. Only b = 255 differs, 2^128 there and NaN here: it is refused.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._library import BLOCK
from ..checkpoints import compressed_tensors, gpt_oss
from ..checkpoints.description import Scheme
from ..checkpoints.errors import CheckpointError
from ..checkpoints.output import StreamedTensor, new_directory, write_index, write_streamed, write_text
from ..checkpoints.reader import CONFIG
from ..checkpoints.tensor_files import SINGLE
from ..reference import pack
from .architectures import Model, Parameter, describe
from .file import GgufFile, GgufTensor, require_gguf

MXFP4 = "MXFP4"
_PIECE = 4 << 20  # bytes of a tensor that are read at a time, or those of a row or a head that are more
_MOST_PIECE = 64 << 20
_SHARD = 4 << 30
_NAN_SCALE = 255

Progress = Callable[[int, int], None]
"""Called with the bytes that are written, and all of them."""


def convert_gguf(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    tokenizer: Any = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """Converts the GGUF file `source` into the new model directory `out`, which load_model reads, and returns its path.

    The codes and scales of tensors in MXFP4 are kept, in gpt-oss' own format for gpt-oss, in compressed-tensors' for llama and
    qwen3, as W4A16; tensors of any other type that the package gguf dequantizes, and an embedding in MXFP4, become bfloat16.
    Memory: what becomes of a piece of 4 MiB, whatever the size of the file. Interrupted, call it again to go on after the last
    shard that was finished.

    Args:
        tokenizer: of Transformers; it is saved with the model.
        progress: called with the bytes that are written, and all of them.

    Raises:
        CheckpointError: no GGUF file or a damaged one, another architecture, no matrix in MXFP4, a tensor of another shape or
            type than the model has, the scale 255.
        FileExistsError, BlockingIOError: as quantize_checkpoint does.
        ImportError: the package gguf is missing.
    """
    source, out = Path(source), Path(out)
    with GgufFile(source) as file:
        model = describe(file)
        tensors = [tensor for parameter in model.parameters for tensor in _tensors_of(file, parameter, model)]
        config = model.config | {"quantization_config": _quantization_config(file, model)}
        shards = _shards(tensors)
        stat = source.stat()
        job = {"source": str(source.resolve()), "file": [stat.st_size, stat.st_mtime_ns]}
        total = sum(tensor.nbytes for tensor in tensors)
        done = 0
        with new_directory(out, job, set(shards)) as partial:
            for name, of_shard in shards.items():
                if not (partial / name).exists():
                    write_streamed(of_shard, partial / name, _after(done, total, progress))
                done += sum(tensor.nbytes for tensor in of_shard)
                progress(done, total)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            write_index(partial, [partial / name for name in shards])
            write_text(partial / CONFIG, json.dumps(config, indent=2))
    return out


def _after(done: int, total: int, progress: Progress) -> Callable[[int], None]:
    return lambda written: progress(done + written, total)


def unpack_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """llama.cpp's blocks uint8 [..., 17] -> codes uint8 [..., 16], even elements in the low nibble, and scales uint8 [...]."""
    scale, nibbles = blocks[..., 0], blocks[..., 1:]
    return pack(torch.cat([nibbles & 15, nibbles >> 4], -1)), scale


def _shards(tensors: Iterable[StreamedTensor]) -> dict[str, list[StreamedTensor]]:
    shards: list[list[StreamedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _quantization_config(file: GgufFile, model: Model) -> dict[str, Any]:
    packed = {parameter.name for parameter in model.parameters if _is_packed(file, parameter, model)}
    if not packed:
        types = sorted({tensor.type for tensor in file.values()})
        raise CheckpointError(f"{file.path} has no matrices in MXFP4 that layers multiply by; its types are {', '.join(types)}")
    if model.stacks_experts:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        return {"quant_method": gpt_oss.METHOD, "modules_to_not_convert": kept}
    matrices = {parameter.name for parameter in model.parameters if _is_matrix(file, parameter)}
    return compressed_tensors.write_config(Scheme("w4a16"), {name.removesuffix(".weight") for name in matrices - packed})


def _is_matrix(file: GgufFile, parameter: Parameter) -> bool:
    """Whether a linear layer multiplies by it: not an embedding."""
    return len(file[parameter.sources[0]].shape) == 2 and parameter.name.endswith(".weight") and "embed" not in parameter.name


def _is_packed(file: GgufFile, parameter: Parameter, model: Model) -> bool:
    tensor = file[parameter.sources[0]]
    return tensor.type == MXFP4 and (len(tensor.shape) == 3 if model.stacks_experts else _is_matrix(file, parameter))


def _tensors_of(file: GgufFile, parameter: Parameter, model: Model) -> list[StreamedTensor]:
    """Returns what is written of a parameter: codes and scales, or bfloat16."""
    first, *others = (file[name] for name in parameter.sources)
    where = f"{file.path}: tensor {first.name}"
    for other in others:
        if (other.type, other.shape) != (first.type, first.shape):
            there = f"{other.name}, {other.type} {list(other.shape)}"
            raise CheckpointError(f"{where} is {first.type} {list(first.shape)}, expected the same as {there}")
    step = _step(first, parameter, where)
    if _is_packed(file, parameter, model):
        return _packed(file, parameter, model, step)
    if len(first.shape) > 2:
        raise CheckpointError(f"{where} is {first.type} {list(first.shape)}, expected {MXFP4}: other experts are not converted")
    _check_dequantizes(first, where)
    *rows, last = first.shape
    size = (*rows, last * len(parameter.sources))
    return [StreamedTensor(parameter.name, torch.bfloat16, size, lambda: _dequantized(file, parameter, step))]


def _packed(file: GgufFile, parameter: Parameter, model: Model, step: int) -> list[StreamedTensor]:
    *leading, n, k = file[parameter.sources[0]].shape
    rows = (*leading, n * len(parameter.sources))
    if model.stacks_experts:
        codes, scales = f"{parameter.name}{gpt_oss.PACKED}", f"{parameter.name}{gpt_oss.SCALE}"
        codes_shape = (*rows, k // BLOCK, BLOCK // 2)
    else:
        module = parameter.name.removesuffix("weight")
        codes, scales = f"{module}{compressed_tensors.PACKED}", f"{module}{compressed_tensors.SCALE}"
        codes_shape = (*rows, k // 2)

    def part(index: int) -> Callable[[], Iterator[Tensor]]:
        return lambda: (parts[index] for parts in _unpacked(file, parameter, step))

    return [
        StreamedTensor(codes, torch.uint8, codes_shape, part(0)),
        StreamedTensor(scales, torch.uint8, (*rows, k // BLOCK), part(1)),
    ]


def _step(tensor: GgufTensor, parameter: Parameter, where: str) -> int:
    """The rows of a source that are read at a time: those of a head where they are reordered."""
    step = min(tensor.rows, max(1, _PIECE // tensor.row_bytes))
    if heads := parameter.rotated_heads:
        if tensor.rows % (2 * heads) != 0:
            raise CheckpointError(f"{where} has {tensor.rows} rows, expected {heads} heads of even size")
        step = tensor.rows // heads
    if (size := step * tensor.row_bytes) > _MOST_PIECE:
        raise CheckpointError(
            f"{where} {list(tensor.shape)} has {size} bytes in a row or a head, expected at most {_MOST_PIECE}"
        )
    return step


def _pieces(file: GgufFile, parameter: Parameter, step: int) -> Iterator[list[Tensor]]:
    """Rows of each source, uint8 [rows, row_bytes], in the order of Transformers."""
    rows = file[parameter.sources[0]].rows
    for begin in range(0, rows, step):
        piece = [file.rows(name, begin, min(begin + step, rows)) for name in parameter.sources]
        # llama.cpp rotates neighbouring rows of a head, Transformers row i and row i + half.
        yield [data.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) if parameter.rotated_heads else data for data in piece]


def _unpacked(file: GgufFile, parameter: Parameter, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    for piece in _pieces(file, parameter, step):
        codes, scale = unpack_blocks(_alternating(piece, 1).unflatten(1, (-1, 1 + BLOCK // 2)))
        if (scale == _NAN_SCALE).any():
            names = " and ".join(parameter.sources)
            raise CheckpointError(f"{file.path}: {names} has the scale {_NAN_SCALE}, 2^128 for llama.cpp, NaN for all others")
        yield codes, scale


def _dequantized(file: GgufFile, parameter: Parameter, step: int) -> Iterator[Tensor]:
    for piece in _pieces(file, parameter, step):
        values = [_dequantize(data, file[name].type) for data, name in zip(piece, parameter.sources, strict=True)]
        yield _alternating(values, 2)


def _alternating(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors [R, C] into one whose rows (dim 1), or the elements of whose rows (dim 2), are one of each in turn."""
    return torch.stack(list(tensors), dim).flatten(dim - 1, dim)


def _dequantize(data: Tensor, type_name: str) -> Tensor:
    """Rows uint8 [rows, row_bytes] -> bfloat16 [rows, K]."""
    gguf = require_gguf()
    values = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[type_name])
    return torch.from_numpy(values).to(torch.bfloat16)


def _check_dequantizes(tensor: GgufTensor, where: str) -> None:
    try:
        _dequantize(torch.zeros(1, tensor.row_bytes, dtype=torch.uint8), tensor.type)
    except NotImplementedError:
        raise CheckpointError(f"{where} is {tensor.type}, which the package gguf does not dequantize") from None
