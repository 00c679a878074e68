# SPDX-License-Identifier: Apache-2.0
"""Who owns the names that vLLM calls when another library defines them first, later, never. Each case is its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

# A library as vllm-xpu-kernels is one: it defines the op when it is loaded, and returns all sevens.
STAND_IN = """
#include <ATen/ATen.h>
#include <torch/library.h>
using at::Tensor;
Tensor sevens(const Tensor& a, const Tensor& b, const Tensor&, const Tensor&, std::optional<at::ScalarType>,
              const std::optional<Tensor>&) {
  return at::full({a.size(0), b.size(1)}, 7.0, at::kFloat);
}
TORCH_LIBRARY(_xpu_C, m) {
  m.def("fp4_gemm(Tensor A, Tensor B, Tensor A_scale, Tensor B_scale, ScalarType? out_dtype, Tensor? bias_) -> Tensor");
  m.impl("fp4_gemm", at::kCPU, &sevens);
  m.def("cutlass_grouped_gemm_interface(Tensor ptr_A, Tensor? ptr_A_scale, Tensor ptr_B, Tensor? ptr_B_scale, "
        "Tensor? ptr_bias, Tensor ptr_D, Tensor rows_per_expert, int N, int K, int num_experts) -> Tensor");
}
TORCH_LIBRARY(_C, m) {
  m.def("per_token_group_quant_mxfp4(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps) -> ()");
  m.def("swigluoai_and_mul(Tensor! out, Tensor input, float alpha=1.702, float limit=7.0) -> ()");
}
TORCH_LIBRARY(_moe_C, m) {
  m.def("moe_gather(Tensor! output, Tensor moe_output, Tensor topk_weights, Tensor unpermuted_row_to_permuted_row, "
        "int num_experts) -> ()");
  m.def("init_expert_map(Tensor expert_map,int num_experts, int ep_rank, int ep_size) -> ()");
  m.def("remap_hidden_states(Tensor hidden_states, Tensor? hidden_states_scales, Tensor remapped_hidden_states,"
        "Tensor? remapped_hidden_states_scales,Tensor? expert_map, Tensor rows_per_expert,"
        "Tensor unpermuted_row_to_permuted_row, Tensor topk_ids,int total_experts_num, int local_experts_num) -> ()");
}
"""

ALL = [
    *("_xpu_C::fp4_gemm", "_C::per_token_group_quant_mxfp4", "_xpu_C::cutlass_grouped_gemm_interface"),
    *("_moe_C::remap_hidden_states", "_moe_C::moe_gather", "_moe_C::init_expert_map", "_C::swigluoai_and_mul"),
]

PRELUDE = """
import torch
def call():
    u8 = dict(dtype=torch.uint8)
    a, b = torch.zeros(2, 16, **u8), torch.zeros(3, 16, **u8).t()
    return torch.ops._xpu_C.fp4_gemm(a, b, torch.zeros(2, 1, **u8), torch.zeros(1, 3, **u8), None, None).max().item()
def load_theirs():
    torch.ops.load_library({library!r})
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_in")
    source, library = folder / "stand_in.cpp", folder / "stand_in.so"
    source.write_text(STAND_IN)
    include = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    link = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", "-std=c++20", "-fPIC", "-shared", *include, source, "-o", library, *link], check=True)
    package = folder / "vllm_xpu_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    return library


def run(code: str, library: Path, *, package_installed: bool = False, **environment: str) -> str:
    """The output of a process that must end well; an abort of the dispatcher shows as a signal."""
    path = os.environ.get("PYTHONPATH", "") + (os.pathsep + str(library.parent) if package_installed else "")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE.format(library=str(library)) + code],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_ours_is_defined_where_nobody_else_does(stand_in: Path) -> None:
    assert run("import xpu_fp4; print(torch.ops._xpu_C.fp4_gemm, call())", stand_in) == "_xpu_C.fp4_gemm 0.0"


def test_theirs_loaded_first_stays_until_it_is_overridden(stand_in: Path) -> None:
    code = "load_theirs(); import xpu_fp4; print(call()); print(xpu_fp4.override_vllm_ops(), call())"
    assert run(code, stand_in) == f"7.0\n{ALL} 0.0"


def test_theirs_loaded_later_works_if_their_package_is_installed(stand_in: Path) -> None:
    code = "import xpu_fp4; load_theirs(); print(call()); print(xpu_fp4.override_vllm_ops(), call())"
    assert run(code, stand_in, package_installed=True) == f"7.0\n{ALL} 0.0"


def test_an_override_before_theirs_is_loaded_is_refused(stand_in: Path) -> None:
    code = """
import xpu_fp4
try: xpu_fp4.override_vllm_ops()
except RuntimeError as error: print("Import vllm_xpu_kernels._C" in str(error))
load_theirs(); print(call())
"""
    assert run(code, stand_in, package_installed=True) == "True\n7.0"


def test_a_stand_in_module_counts_as_their_package(stand_in: Path) -> None:
    code = """
import sys, types; sys.modules["vllm_xpu_kernels"] = types.ModuleType("vllm_xpu_kernels")
import xpu_fp4; load_theirs(); print(call())
"""
    assert run(code, stand_in) == "7.0"


def test_the_override_gives_their_op_our_fake(stand_in: Path) -> None:
    code = """
load_theirs(); import xpu_fp4; xpu_fp4.override_vllm_ops()
u8 = dict(dtype=torch.uint8, device="meta")
a, b, a_scale, b_scale = (torch.zeros(shape, **u8) for shape in ((2, 16), (3, 16), (2, 1), (1, 3)))
print(torch.ops._xpu_C.fp4_gemm(a, b.t(), a_scale, b_scale, None, None).dtype)
"""
    assert run(code, stand_in) == "torch.float16"


def test_the_names_are_left_alone_on_request(stand_in: Path) -> None:
    code = "import xpu_fp4; print(hasattr(torch.ops._xpu_C, 'fp4_gemm')); load_theirs(); print(call())"
    assert run(code, stand_in, XPU_FP4_COMPAT_OPS="0") == "False\n7.0"


def test_overriding_twice_or_with_nothing_to_override_is_harmless(stand_in: Path) -> None:
    assert (
        run("import xpu_fp4; print(xpu_fp4.override_vllm_ops(), xpu_fp4.override_vllm_ops(), call())", stand_in) == "[] [] 0.0"
    )


def test_another_schema_under_the_name_is_an_error(stand_in: Path) -> None:
    code = """
library = torch.library.Library("_xpu_C", "DEF"); library.define("fp4_gemm(Tensor x) -> Tensor")
import xpu_fp4
try: xpu_fp4.override_vllm_ops()
except RuntimeError as error: print("fp4_gemm exists with the schema" in str(error))
"""
    assert run(code, stand_in) == "True"
