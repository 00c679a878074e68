# SPDX-License-Identifier: Apache-2.0
"""Calibration of a model directory by llm-compressor, for `quantize_checkpoint`: it decides on codes and scales, we write.

Nothing of it is imported before it is asked for: it may be missing.
"""

import importlib
import importlib.metadata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..checkpoints.compressed_tensors import FORMAT, PACKED, SCALE
from ..checkpoints.description import Scheme
from ..checkpoints.models import load_original
from ..checkpoints.quantized import QuantizedLinear
from ..checkpoints.quantizer import Plan
from ..functional import Hadamard, Mode
from .checkpoint import FinishedLayers, batches_of, digest, warn_of_rest
from .model import FinishedBlock

_PRESETS: dict[Mode, str] = {"w4a4": "MXFP4", "w4a16": "MXFP4A16"}
_MODEL = "model"


@dataclass(frozen=True)
class LlmCompressorCalibration:
    """llm-compressor's GPTQ on token ids [samples, length], with a Hadamard at the inputs by its QuIP where the scheme has one.

    Raises ImportError, with the remedy, if llm-compressor is missing. Memory: the whole model, and what llm-compressor adds.
    """

    windows: Tensor

    def __post_init__(self) -> None:
        try:
            importlib.import_module("llmcompressor")
        except ImportError as error:
            raise ImportError(f"llm-compressor is needed for this: pip install 'xpu_fp4[llm-compressor]' ({error})") from error

    def check(self, schemes: Mapping[str, Scheme]) -> None:
        for scheme in schemes.values():
            if scheme.mode not in _PRESETS:
                raise ValueError(
                    f"llm-compressor knows no {scheme.mode}, expected {' or '.join(_PRESETS)}: MXINT8 is ours alone"
                )
            if scheme.input_offset:
                raise ValueError("llm-compressor knows no offset of inputs: it is ours alone")
            if scheme.scale_mode != "even":
                raise ValueError(f"llm-compressor knows no scale mode {scheme.scale_mode}, expected even")

    def job(self) -> dict[str, Any]:
        return {"llm-compressor": importlib.metadata.version("llmcompressor"), **digest(self.windows)}

    def run(self, plan: Plan, schemes: Mapping[str, Scheme], folder: Path) -> Mapping[str, QuantizedLinear]:
        in_files = {plan.in_model[name]: name for name in schemes}
        of_model = {name: schemes[in_files[name]] for name in in_files}
        finished = FinishedLayers(folder, of_model)
        if finished.load(_MODEL) is None:
            model = load_original(plan.source)
            of_model = {name: scheme for name, scheme in of_model.items() if _is_linear(model, name)}
            finished.save(_MODEL, FinishedBlock(_calibrate(model, batches_of(model, self.windows), of_model), []))
        layers = finished.layers()
        warn_of_rest(plan, [], schemes.keys() - {in_files[name] for name in layers})
        return {in_files[name]: layer for name, layer in layers.items()}


def _is_linear(model: torch.nn.Module, name: str) -> bool:
    return type(dict(model.named_modules()).get(name)) is torch.nn.Linear


def _calibrate(model: Any, batches: list[dict[str, Tensor]], schemes: Mapping[str, Scheme]) -> dict[str, QuantizedLinear]:
    """What llm-compressor makes of the linears of these names, in place."""
    from compressed_tensors.compressors import ModelCompressor
    from llmcompressor import oneshot

    # A processor would tokenize: it is asked for whatever the data is.
    data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    oneshot(model=model, dataset=data, processor=object(), recipe=[*_transforms(schemes), _rounding(schemes)])
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    modules = {name: model.get_submodule(name) for name in schemes}
    return {
        name: QuantizedLinear(schemes[name], getattr(module, PACKED).detach(), getattr(module, SCALE).detach())
        for name, module in modules.items()
    }


def _transforms(schemes: Mapping[str, Scheme]) -> list[Any]:
    from llmcompressor.modifiers.transform import QuIPModifier

    targets: defaultdict[Hadamard, list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        if scheme.hadamard:
            targets[scheme.hadamard].append(name)
    return [
        QuIPModifier(rotations=["v"], transform_type="hadamard", transform_block_size=size, targets=names, ignore=[])
        for size, names in targets.items()
    ]


def _rounding(schemes: Mapping[str, Scheme]) -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor.modifiers.gptq import GPTQModifier

    groups = {}
    for mode, preset in _PRESETS.items():
        if names := [name for name, scheme in schemes.items() if scheme.mode == mode]:
            groups[mode] = preset_name_to_scheme(preset, names)
            groups[mode].format = FORMAT
    return GPTQModifier(config_groups=groups)
