# SPDX-License-Identifier: Apache-2.0
"""The op names that vLLM calls: `_xpu_C::fp4_gemm`, `_C::per_token_group_quant_mxfp4`, and for CPU tensors those of experts.

vllm-xpu-kernels defines the same names, and two C++ definitions of one op abort the process. So the rules are:

- At import they are defined if the package `vllm_xpu_kernels` is not installed and nobody has defined them yet.
  `XPU_FP4_COMPAT_OPS=0` leaves them alone.
- Where that package is installed, theirs stay, until `override_vllm_ops()` puts ours in their place, after theirs has loaded.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._library import fake_gemm, ops


def _fake_that_writes(*args: object, **kwargs: object) -> None:
    return None


def _fake_grouped_gemm(
    ptr_A: Tensor,
    ptr_A_scale: Tensor | None,
    ptr_B: Tensor,
    ptr_B_scale: Tensor | None,
    ptr_bias: Tensor | None,
    ptr_D: Tensor,
    rows_per_expert: Tensor,
    N: int,
    K: int,
    num_experts: int,
) -> Tensor:
    return ptr_D  # what the op writes, too


_FAKES: dict[str, Callable[..., Any]] = {
    "_xpu_C::fp4_gemm": fake_gemm,
    "_C::per_token_group_quant_mxfp4": _fake_that_writes,
    "_xpu_C::cutlass_grouped_gemm_interface": _fake_grouped_gemm,
    "_moe_C::remap_hidden_states": _fake_that_writes,
    "_moe_C::moe_gather": _fake_that_writes,
    "_moe_C::init_expert_map": _fake_that_writes,
    "_C::swigluoai_and_mul": _fake_that_writes,
}


def _register_fakes(names: list[str]) -> None:
    for name in names:
        torch.library.register_fake(name, _FAKES[name], allow_override=True)


def define_vllm_ops() -> list[str]:
    """Defines the names that do not exist yet, and returns them. To load vllm_xpu_kernels afterwards aborts the process."""
    names: list[str] = ops._define_compat_ops()
    _register_fakes(names)
    return names


def override_vllm_ops() -> list[str]:
    """Puts our implementations in place of existing ones, and defines the missing ones. Those for experts are for CPU tensors.

    Returns the names whose implementation was replaced; torch warns once for each. Raises RuntimeError if an existing op has
    another schema than vllm-xpu-kernels', or if that package is installed and has not defined its ops yet: if we did, loading
    it later would abort the process.
    """
    missing = [name for name in _FAKES if not _is_defined(name)]
    if missing and _is_installed("vllm_xpu_kernels"):
        raise RuntimeError(f"{', '.join(missing)}: not defined yet. Import vllm_xpu_kernels._C, ._moe_C and ._xpu_C first")
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
