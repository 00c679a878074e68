# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and reference tokens, made once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from xpu_fp4.checkpoints import Scheme

from . import checkpoints
from .checkpoints import HADAMARD, Groups
from .engine import Engines
from .reference import certain_tokens

W4A4: Groups = {"MXFP4": ["Linear"]}
W4A16: Groups = {"MXFP4A16": ["Linear"]}
MIXED: Groups = {"MXFP4A16": ["re:.*(q|k|v|o)_proj"], "MXFP4": ["re:.*(gate|up|down)_proj"]}


DEPRECATED: dict[str, Any] = {"allow_deprecated_quantization": True}
"""What vLLM asks for before it reads FP-Quant's checkpoints."""


@dataclass(frozen=True)
class Models:
    """Folders of the tiny Llama in bf16 and of its MXFP4 checkpoints."""

    bf16: Path
    w4a4: Path
    w4a16: Path
    w4a8: Path
    int8: Path
    mixed: Path
    quark_w4a4: Path
    quark_w4a16: Path
    rotated_w4a4: Path
    rotated_w4a8: Path
    offset: Path
    exceptions: Path
    fp_quant_abs_max: Path
    fp_quant_quest: Path


@pytest.fixture(scope="session")
def vllm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the folder where vLLM's processes share their caches."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def uncompiled() -> Iterator[None]:
    """compressed-tensors compiles its rounding for every shape, which takes minutes."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, uncompiled: None) -> Models:
    folder = tmp_path_factory.mktemp("models")
    bf16 = checkpoints.save_tiny_llama(folder / "bf16")
    w4a4 = checkpoints.save_compressed(bf16, folder / "w4a4", W4A4)
    w4a16 = checkpoints.save_compressed(bf16, folder / "w4a16", W4A16)
    rotated_w4a16 = checkpoints.save_compressed(bf16, folder / "rotated_w4a16", W4A16, rotated=True)
    attention = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qkv"]
    return Models(
        bf16,
        w4a4,
        w4a16,
        checkpoints.save_as_w4a8(w4a16, folder / "w4a8", xpu_fp4={"activations": "mxint8", "group": 128}),
        checkpoints.save_as_w4a8(w4a16, folder / "int8", input_activations=checkpoints.INT8),
        checkpoints.save_compressed(bf16, folder / "mixed", MIXED),
        checkpoints.save_as_quark(w4a4, folder / "quark_w4a4", "MXFP4"),
        checkpoints.save_as_quark(w4a16, folder / "quark_w4a16", "MXFP4A16"),
        checkpoints.save_compressed(bf16, folder / "rotated_w4a4", W4A4, rotated=True),
        checkpoints.save_with_scheme(rotated_w4a16, folder / "rotated_w4a8", Scheme("w4a8", hadamard=HADAMARD)),
        checkpoints.save_with_scheme(rotated_w4a16, folder / "offset", Scheme("w4a16", hadamard=HADAMARD, input_offset=True)),
        checkpoints.save_with_scheme(
            rotated_w4a16,
            folder / "exceptions",
            Scheme("w4a8", hadamard=HADAMARD),
            dict.fromkeys(attention, Scheme("w4a16", hadamard=HADAMARD)),
        ),
        checkpoints.save_as_fp_quant(bf16, folder / "fp_quant_abs_max", "abs_max"),
        checkpoints.save_as_fp_quant(bf16, folder / "fp_quant_quest", "quest"),
    )


Reference = Callable[..., list[list[int]]]


@pytest.fixture(scope="session")
def reference(models: Models) -> Reference:
    """Groups, and the other arguments of certain_tokens -> the tokens that Transformers is certain of."""
    known: dict[str, list[list[int]]] = {}

    def tokens(groups: Groups, **how: Any) -> list[list[int]]:
        key = f"{groups} {how}"
        if key not in known:
            known[key] = certain_tokens(models.bf16, groups, **how)
        return known[key]

    return tokens


@pytest.fixture(scope="session")
def engines(models: Models, vllm_folder: Path) -> Engines:
    """An engine for each checkpoint, all in one process: each start of vLLM takes longer than all that they decode."""
    w4a4, w4a16 = {"model": str(models.w4a4)}, {"model": str(models.w4a16)}
    quark_w4a4, quark_w4a16 = {"model": str(models.quark_w4a4)}, {"model": str(models.quark_w4a16)}
    half = {"dtype": "bfloat16"}
    return Engines(
        vllm_folder,
        {
            "w4a4": w4a4,
            "w4a16": w4a16,
            "w4a8": {"model": str(models.w4a8)},
            "int8": {"model": str(models.int8)},
            "mixed": {"model": str(models.mixed)},
            "rotated_w4a4": {"model": str(models.rotated_w4a4)},
            "rotated_w4a8": {"model": str(models.rotated_w4a8)},
            "offset": {"model": str(models.offset)},
            "exceptions": {"model": str(models.exceptions)},
            "fp_quant_abs_max": {"model": str(models.fp_quant_abs_max)} | DEPRECATED,
            "fp_quant_quest": {"model": str(models.fp_quant_quest)} | DEPRECATED,
            "fp_quant_compiled": {"model": str(models.fp_quant_abs_max), "enforce_eager": False} | DEPRECATED,
            "offset_compiled": {"model": str(models.offset), "enforce_eager": False},
            "quark_w4a4": quark_w4a4 | {"prepare": "in_float32"},
            "w4a4_bf16": w4a4 | half,
            "w4a16_bf16": w4a16 | half,
            "quark_w4a4_bf16": quark_w4a4 | half,
            "quark_w4a16_bf16": quark_w4a16 | half,
            "compiled": w4a4 | {"enforce_eager": False},
            "w4a8_compiled": {"model": str(models.w4a8), "enforce_eager": False},
        },
    )


@pytest.fixture(scope="session")
def engines_on_request(models: Models, vllm_folder: Path) -> Engines:
    """Engines that are asked for MXINT8 activations, whatever their checkpoint says."""
    return Engines(
        vllm_folder,
        {
            "w4a4": {"model": str(models.w4a4)},
            "mixed": {"model": str(models.mixed)},
            "quark_w4a4": {"model": str(models.quark_w4a4), "prepare": "in_float32"},
        },
        env={"XPU_FP4_ACTIVATIONS": "mxint8"},
    )
