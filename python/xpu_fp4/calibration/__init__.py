# SPDX-License-Identifier: Apache-2.0
"""Calibrated quantization: GPTQ on the inputs that each layer multiplies, block by block."""

from .checkpoint import CheckpointCalibration
from .data import Conversation, calibration_windows, read_chats
from .llm_compressor import LlmCompressorCalibration
from .model import calibrate_

__all__ = [
    "CheckpointCalibration",
    "Conversation",
    "LlmCompressorCalibration",
    "calibrate_",
    "calibration_windows",
    "read_chats",
]
