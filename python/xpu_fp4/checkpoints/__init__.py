# SPDX-License-Identifier: Apache-2.0
"""MXFP4 model directories: read any of the ecosystem's formats, write compressed-tensors', load into models."""

from ..moe import MXFP4Experts
from .description import Checkpoint, Layer, Scheme
from .errors import CheckpointError
from .models import apply_checkpoint, load_model, transformers_config
from .quantizer import Plan, plan_quantization, quantize_checkpoint
from .reader import open_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Layer",
    "MXFP4Experts",
    "Plan",
    "Scheme",
    "apply_checkpoint",
    "load_model",
    "open_checkpoint",
    "plan_quantization",
    "quantize_checkpoint",
    "transformers_config",
]
