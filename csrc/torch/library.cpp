// SPDX-License-Identifier: Apache-2.0
// Registers the ops, and the functions that the Python package asks about the library itself (names with an underscore: not an
// interface).
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "../sycl/loader.h"
#include "bind.h"
#include "compat.h"
#include "cpu_backends.h"
#include "schemas.h"

namespace xpu_fp4 {
namespace {

struct GetCpuBackend {
  const Backend* operator()() const { return &cpu_backend(); }
};

const bool cpu_compat_binding = [] {
  add_compat_binding({c10::DispatchKey::CPU, bind_fp4_gemm<GetCpuBackend>, bind_group_quant<GetCpuBackend>});
  return true;
}();

// One line per device: name; driver; sub-group; whether it has the matrix unit.
std::vector<std::string> describe_sycl_devices() {
  std::vector<std::string> lines;
  for (const auto& device : syclrt::load_plugin().devices()) {
    lines.push_back(device.name + "; " + device.driver + "; sub-group " + std::to_string(device.sub_group) +
                    (device.has_matrix_unit ? "; int8 matrix unit" : "; stand-in for the matrix unit"));
  }
  return lines;
}

}  // namespace

TORCH_LIBRARY(xpu_fp4, library) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  for (const char* definition : {schema::kQuantize, schema::kDequantize, schema::kGemm, schema::kLinear, schema::kLinearW4A16,
                                 schema::kExpand, schema::kLinearExpanded, schema::kPrepack, schema::kUnprepack,
                                 schema::kGemmPrepacked, schema::kLinearPrepacked, schema::kLinearW4A16Prepacked}) {
    library.def(definition, tags);
  }
  library.def("_cpu_backend() -> str", cpu_backend_name);
  library.def("_cpu_backend_override() -> str?", cpu_backend_override);
  library.def("_set_cpu_backend(str? name) -> ()", set_cpu_backend);
  library.def("_native_isa() -> str", native_isa);
  library.def("_sycl_devices() -> str[]", describe_sycl_devices);
  library.def("_sycl_runtime() -> str", syclrt::runtime_path);
  library.def("_sycl_cache_dir() -> str", syclrt::cache_dir);
  library.def("_define_compat_ops() -> str[]", define_compat_ops);
  library.def("_override_compat_ops() -> str[]", override_compat_ops);
}

// The ops have no derivative: backward through one raises instead of giving no gradient.
TORCH_LIBRARY_IMPL(xpu_fp4, Autograd, library) {
  for (const char* op : {"mxfp4_quantize", "mxfp4_dequantize", "mxfp4_gemm", "mxfp4_linear", "mxfp4_linear_w4a16",
                         "mxfp4_expand", "mxfp4_linear_expanded", "mxfp4_prepack", "mxfp4_unprepack", "mxfp4_gemm_prepacked",
                         "mxfp4_linear_prepacked", "mxfp4_linear_w4a16_prepacked"}) {
    library.impl(op, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(xpu_fp4, CPU, library) {
  bind_ops<GetCpuBackend>(library);
  bind_prepacked_ops<GetCpuBackend>(library);
}

}  // namespace xpu_fp4
