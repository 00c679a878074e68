# SPDX-License-Identifier: Apache-2.0
"""Our quantizer in Transformers' registry, as `xpu_fp4`. Imported only when a model is loaded: it imports transformers.

A checkpoint names the quantizer that wrote it, and Transformers registers each name once. So a model comes to us by its
configuration: `from_pretrained(folder, config=xpu_fp4.transformers_config(folder))`.
"""

import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._text import shorten
from ..functional import Mode
from ..moe import MXFP4Experts
from .compressed_tensors import PACKED, SCALE
from .errors import CheckpointError, printable
from .names import without_conversion
from .placement import STACKS, find_tensors, replace_layers
from .reader import read_checkpoint

METHOD = "xpu_fp4"


@register_quantization_config(METHOD)
class XpuFp4Config(QuantizationConfigMixin):  # type: ignore[misc]  # transformers has no types
    """Says that xpu_fp4 loads the checkpoint. How it is quantized is read from the checkpoint itself, but for another mode."""

    def __init__(self, mode: Mode | None = None, **kwargs: Any) -> None:
        self.quant_method = METHOD
        self.mode = mode


@register_quantizer(METHOD)
class XpuFp4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the quantized layers of a model on the meta device; Transformers then loads the tensors into them."""

    requires_calibration = True  # a checkpoint is quantized already

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files")
        if not files:
            raise CheckpointError("an MXFP4 model is loaded from a directory, expected one in from_pretrained")
        self.checkpoint = read_checkpoint(Path(files[0]).parent).in_mode(self.quantization_config.mode)
        places = replace_layers(model, self.checkpoint)
        if left_out := self.checkpoint.layers.keys() - places.keys():
            warnings.warn(printable(f"{self.checkpoint.folder}: the model has no place for {shorten(left_out)}"), stacklevel=2)
        self.stacked = {name for name, place in places.items() if place.expert is not None}
        others = without_conversion(model, self.checkpoint.other_tensors())
        find_tensors(model, self.checkpoint.files, others)  # for its errors
        constants = [re.escape(name) for layer in self.checkpoint.layers.values() for name in layer.constants]
        known = cast(Any, model)._keys_to_ignore_on_load_unexpected
        known = [] if known is None else known  # a list or a set, by Transformers' version
        cast(Any, model)._keys_to_ignore_on_load_unexpected = type(known)([*known, *constants])
        for name in {places[name].module for name in self.stacked}:
            cast(MXFP4Experts, model.get_submodule(name)).flatten_blocks()

    def get_weight_conversions(self) -> list[Any]:
        """Renames the tensors of layers that are called otherwise in the files than in MXFP4Linear."""
        layers: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for layer in self.checkpoint.layers.values():
            for tensor, ours in ((layer.packed, PACKED), (layer.scale, SCALE), (layer.bias, "bias")):
                if len(layer.shape) == 2 and tensor is not None and tensor != f"{layer.name}.{ours}":
                    layers[tensor.removeprefix(f"{layer.name}."), ours].append(re.escape(layer.name))
        return [WeightRenaming(rf"^({'|'.join(names)})\.{kind}$", rf"\1.{ours}") for (kind, ours), names in layers.items()]

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Codes, scales and biases of single experts are stacked.

        Transformers 5.21 and later pass the model too, which this does without. Ours come first in the list: they are for the
        names in the files, which theirs change, and the first stack whose pattern is found in a name counts.
        """
        used = {name.rpartition(".")[2] for name in self.stacked}
        stacked = [
            WeightConverter(
                [f".experts.*.{name}.{part}$" for name in names],
                f".experts.{projection}_{ours}",
                [MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(names) > 1 else [])],
            )
            for projection, names in STACKS
            if used.intersection(names)
            for part, ours in ((PACKED, "blocks"), (SCALE, "scales"), ("bias", "bias"))
        ]
        return [*self.get_weight_conversions(), *stacked, *weight_conversions]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        del self.checkpoint, self.stacked  # its open files; the model keeps this quantizer, and may be copied or pickled
        for module in model.modules():
            if isinstance(module, MXFP4Experts):
                module.fold_blocks()

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return False
