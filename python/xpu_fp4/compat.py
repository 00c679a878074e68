# SPDX-License-Identifier: Apache-2.0
"""The op names that vLLM calls: `_xpu_C::fp4_gemm` and `_C::per_token_group_quant_mxfp4`.

vllm-xpu-kernels defines the same names, and two C++ definitions of one op abort the process. So the rules are:

- At import they are defined if the package `vllm_xpu_kernels` is not installed and nobody has defined them yet.
  `XPU_FP4_COMPAT_OPS=0` leaves them alone.
- Where that package is installed, theirs stay, until `override_vllm_ops()` puts ours in their place, after theirs has loaded.
"""

import importlib.util
import os
import sys

import torch
from torch import Tensor

from ._library import fake_gemm, ops


def _fake_group_quant(input: Tensor, output_q: Tensor, output_s: Tensor, group_size: int, eps: float) -> None:
    return None


_FAKES = {"_xpu_C::fp4_gemm": fake_gemm, "_C::per_token_group_quant_mxfp4": _fake_group_quant}


def _register_fakes(names: list[str]) -> None:
    for name in names:
        torch.library.register_fake(name, _FAKES[name], allow_override=True)


def define_vllm_ops() -> list[str]:
    """Defines the names that do not exist yet, and returns them. To load vllm_xpu_kernels afterwards aborts the process."""
    names: list[str] = ops._define_compat_ops()
    _register_fakes(names)
    return names


def override_vllm_ops() -> list[str]:
    """Puts our implementations in place of existing ones, and defines the missing ones.

    Returns the names whose implementation was replaced; torch warns once for each. Raises RuntimeError if an existing op has
    another schema than vllm-xpu-kernels', or if that package is installed and has not defined its ops yet: if we did, loading
    it later would abort the process.
    """
    missing = [name for name in _FAKES if not _is_defined(name)]
    if missing and _is_installed("vllm_xpu_kernels"):
        raise RuntimeError(
            f"{', '.join(missing)}: not defined yet. Import vllm_xpu_kernels._C and vllm_xpu_kernels._xpu_C first"
        )
    replaced: list[str] = ops._override_compat_ops()
    _register_fakes(list(_FAKES))
    return replaced


def _is_installed(package: str) -> bool:
    # A stand-in among the modules has no specification, and find_spec raises over it.
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _is_defined(name: str) -> bool:
    namespace, _, op = name.partition("::")
    return hasattr(getattr(torch.ops, namespace), op)


def _define_at_import() -> None:
    wanted = os.environ.get("XPU_FP4_COMPAT_OPS", "1") != "0"
    if wanted and not _is_installed("vllm_xpu_kernels"):
        define_vllm_ops()


_define_at_import()
