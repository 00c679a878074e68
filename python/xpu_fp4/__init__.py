# SPDX-License-Identifier: Apache-2.0
"""MXFP4 (OCP Microscaling Formats v1.0) for PyTorch on CPUs and Intel GPUs: quantize, linear layers in W4A4, W4A8 and W4A16.

The ops are `torch.ops.xpu_fp4.*`; importing this package registers them, and the names that vLLM calls (see `compat`).
"""

import importlib
from typing import TYPE_CHECKING

from . import _library as _library  # first: it loads the ops
from ._version import __version__
from .backends import Backend, backends, cpu_backend
from .compat import override_vllm_ops
from .convert import expand_, quantize_
from .functional import (
    Activation,
    Group,
    Hadamard,
    Mode,
    ScaleMode,
    dequantize,
    expand,
    linear,
    linear_prepacked,
    mxint8_dequantize,
    mxint8_quantize,
    prepack,
    quantize,
    unprepack,
)
from .functional_experts import experts, experts_prepacked, prepack_experts
from .modules import MXFP4Linear
from .moe import MXFP4Experts
from .warmup import warmup

if TYPE_CHECKING:
    from .calibration import calibrate_
    from .checkpoints import apply_checkpoint, load_model, transformers_config
else:

    def __getattr__(name: str) -> object:
        """Imports `checkpoints` and `calibration` where they are asked for: they need safetensors, the ops need torch alone."""
        if name in ("calibration", "checkpoints"):
            return importlib.import_module(f".{name}", __name__)
        if name in __all__:
            owner = ".calibration" if name == "calibrate_" else ".checkpoints"
            return getattr(importlib.import_module(owner, __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Activation",
    "Backend",
    "Group",
    "Hadamard",
    "MXFP4Experts",
    "MXFP4Linear",
    "Mode",
    "ScaleMode",
    "__version__",
    "apply_checkpoint",
    "backends",
    "calibrate_",
    "cpu_backend",
    "dequantize",
    "expand",
    "expand_",
    "experts",
    "experts_prepacked",
    "linear",
    "linear_prepacked",
    "load_model",
    "mxint8_dequantize",
    "mxint8_quantize",
    "override_vllm_ops",
    "prepack",
    "prepack_experts",
    "quantize",
    "quantize_",
    "transformers_config",
    "unprepack",
    "warmup",
]
