# SPDX-License-Identifier: Apache-2.0
"""Calibration of a model directory, for `quantize_checkpoint`: one block at a time is kept in memory, finished ones on disk."""

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ..checkpoints.description import Scheme
from ..checkpoints.errors import printable
from ..checkpoints.fused import split
from ..checkpoints.models import map_original
from ..checkpoints.output import write_tensors
from ..checkpoints.placement import EXPERT, PARTS
from ..checkpoints.quantized import QuantizedLinear
from ..checkpoints.quantizer import Plan
from ..moe import DOWN, is_known
from .experts import unfuse
from .model import FinishedBlock, Progress, calibrate_blocks, not_calibrated

_BATCH_TOKENS = 2048
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class CheckpointCalibration:
    """GPTQ on token ids [samples, length], as `calibrate_` does it.

    Memory: what the model's blocks give on all tokens, the calls of one block, its layers, one Hessian, as `calibrate_` says;
    weights are mapped from their files, but for those that Transformers stacks or transposes. Each finished block goes to disk.
    The same model, windows and number of threads give the same bytes, interrupted or not.
    """

    windows: Tensor
    progress: Progress = lambda done, total: None
    correct: bool = False

    def check(self, schemes: Mapping[str, Scheme]) -> None:
        """There is no scheme that it cannot do."""

    def job(self) -> dict[str, Any]:
        return {**digest(self.windows), "correct": self.correct}

    def run(self, plan: Plan, schemes: Mapping[str, Scheme], folder: Path) -> Mapping[str, QuantizedLinear]:
        model = map_original(plan.source)
        layers, experts = _layers(model, plan, schemes)
        unfuse(model, experts)
        of_experts = {of.in_model: of.name for of in plan.experts}
        in_model = {}
        for name, in_files in layers.items():
            fused = next((e for e in experts if name.startswith(f"{e}.")), None)
            scheme = schemes[of_experts.get(fused or "", in_files[0])]
            in_model[name] = scheme if fused is None else replace(scheme, input_offset=False)
        store = FinishedLayers(folder, in_model)
        batches = batches_of(model, self.windows)
        rounded = calibrate_blocks(model, batches, in_model, self.progress, store, correct=self.correct)
        results: dict[str, QuantizedLinear] = {}
        for name, layer in store.layers().items():
            names = layers[name]
            results |= zip(names, split(layer, len(names)) if len(names) > 1 else (layer,), strict=True)
        warn_of_rest(plan, rounded, set(plan.quantized) - results.keys())
        return results


def digest(windows: Tensor) -> dict[str, Any]:
    """What tells windows from others, as JSON."""
    content = windows.contiguous().numpy().tobytes()
    return {"windows": list(windows.shape), "sha256": hashlib.sha256(content).hexdigest()}


def _layers(model: nn.Module, plan: Plan, schemes: Mapping[str, Scheme]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """What can be calibrated, by its name in the model once experts are unfused: the names in the files that make up its rows.

    Also the experts modules to unfuse. Of fused experts, a name in the files is FusedExperts.layer's.
    """
    modules = dict(model.named_modules())
    layers: dict[str, tuple[str, ...]] = {}
    single: defaultdict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in plan.quantized:
        in_model = plan.in_model[name]
        if type(modules.get(in_model)) is nn.Linear:
            layers[in_model] = (name,)
        elif (match := EXPERT.fullmatch(in_model)) and match[3] in PARTS and match[1] in modules:
            projection, part = PARTS[match[3]]
            single[match[1]][f"{in_model.rpartition('.')[0]}.{projection}"][part] = name
    experts = [of.in_model for of in plan.experts]
    for of in plan.experts:
        count = len(modules[of.in_model].get_parameter(DOWN))
        names = [of.layer(projection, expert) for expert in range(count) for projection in of.tensors]
        layers |= {name: (name,) for name in names}
    for module, found in single.items():
        parts = {name: tuple(names[part] for part in sorted(names)) for name, names in found.items()}
        is_whole = len(parts) == 2 * len(modules[module].get_parameter(DOWN)) and is_known(modules[module])
        if is_whole and len({schemes[name] for names in parts.values() for name in names}) == 1:
            layers |= parts
            experts.append(module)
    return layers, experts


def batches_of(model: Any, windows: Tensor) -> list[dict[str, Tensor]]:
    """What a Transformers model is called with, for all windows."""
    # A decoder behind an encoder goes on with the same text.
    inputs = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
    rows = max(1, _BATCH_TOKENS // windows.shape[1])
    return [dict.fromkeys(inputs, ids) for ids in windows.split(rows)]


def warn_of_rest(plan: Plan, rounded: Collection[str], outside: Collection[str]) -> None:
    if rounded or outside:
        warnings.warn(printable(f"{plan.source}: {not_calibrated(rounded, outside)}"), stacklevel=4)


class FinishedLayers:
    """A folder with a file for each finished block."""

    def __init__(self, folder: Path, schemes: Mapping[str, Scheme]) -> None:
        self._folder = folder
        self._schemes = schemes

    def load(self, block: str) -> FinishedBlock | None:
        path = self._path(block)
        if not path.exists():
            return None
        parts: dict[str, dict[str, Tensor]] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, it is no dict
                layer, _, part = name.rpartition(".")
                parts.setdefault(layer, {})[part] = file.get_tensor(name)
            rounded = json.loads(file.metadata()["rounded"])
        layers = {}
        for layer, tensors in parts.items():
            scheme = replace(self._schemes[layer], input_offset="input_offset" in tensors)
            layers[layer] = QuantizedLinear(scheme, **tensors)
        return FinishedBlock(layers, rounded)

    def save(self, block: str, finished: FinishedBlock) -> None:
        tensors = {
            f"{name}.{part}": tensor
            for name, layer in finished.layers.items()
            for part in ("codes", "scale", "bias", "input_offset")
            if (tensor := getattr(layer, part)) is not None
        }
        write_tensors(tensors, self._path(block), {"rounded": json.dumps(finished.rounded)})

    def layers(self) -> dict[str, QuantizedLinear]:
        """Of all blocks, mapped from the files."""
        blocks = [self.load(path.name.removesuffix(_SUFFIX)) for path in sorted(self._folder.glob(f"*{_SUFFIX}"))]
        return {name: layer for block in blocks if block is not None for name, layer in block.layers.items()}

    def _path(self, block: str) -> Path:
        return self._folder / f"{block}{_SUFFIX}"
