// SPDX-License-Identifier: Apache-2.0
// Registers the ops, and the functions that the Python package asks about the library itself (names with an underscore: not an
// interface).
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "../sycl/loader.h"
#include "compat.h"
#include "cpu_backends.h"
#include "table.h"

namespace xpu_fp4 {
namespace {

struct GetCpuBackend {
  const Backend* operator()() const { return &cpu_backend(); }
};
struct GetNativeBackend {
  const Backend* operator()() const { return &native_backend(); }
};

struct GetNoBackend {
  const Backend* operator()() const {
    TORCH_CHECK(false, "xpu_fp4: this op has no kernels for tensors of this kind and device");
  }
};

template <class GetBackend, class GetNative>
std::vector<OpRow> all_ops() {
  std::vector<OpRow> rows = op_table<GetBackend>();
  for (OpRow& row : prepacked_op_table<GetBackend, GetNative>()) rows.push_back(std::move(row));
  return rows;
}

std::vector<OpRow> cpu_ops() { return all_ops<GetCpuBackend, GetNativeBackend>(); }
std::vector<OpRow> ops_without_backend() { return all_ops<GetNoBackend, GetNoBackend>(); }

const bool cpu_compat_binding = [] {
  add_compat_binding({c10::DispatchKey::CPU, [] {
    std::vector<CompatRow> rows = compat_table<GetCpuBackend>();
    for (CompatRow& row : compat_experts_table<GetCpuBackend>()) rows.push_back(std::move(row));
    return rows;
  }});
  return true;
}();

// Gives one line per device: name; driver; sub-group; whose kernels it runs.
std::vector<std::string> describe_sycl_devices() {
  std::vector<std::string> lines;
  for (const auto& device : syclrt::load_plugin().devices()) {
    lines.push_back(device.name + "; " + device.driver + "; sub-group " + std::to_string(device.sub_group) +
                    (device.architecture.empty() ? "; portable kernels" : "; kernels of " + device.architecture));
  }
  return lines;
}

}  // namespace

TORCH_LIBRARY(xpu_fp4, library) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag, stride_tag()};
  for (const OpRow& row : cpu_ops()) library.def(row.schema, tags);
  library.def("_cpu_backend() -> str", cpu_backend_name);
  library.def("_cpu_backend_override() -> str?", cpu_backend_override);
  library.def("_set_cpu_backend(str? name) -> ()", set_cpu_backend);
  library.def("_native_isa() -> str", native_isa);
  library.def("_sycl_devices() -> str[]", describe_sycl_devices);
  library.def("_sycl_embedded_programs() -> int", [] { return syclrt::load_plugin().embedded_programs(); });
  library.def("_sycl_runtime() -> str", syclrt::runtime_path);
  library.def("_sycl_backend_file() -> str", syclrt::backend_path);
  library.def("_sycl_cache_dir() -> str", syclrt::cache_dir);
  library.def("_define_compat_ops() -> str[]", define_compat_ops);
  library.def("_override_compat_ops() -> str[]", override_compat_ops);
}

// The ops have no derivative: backward through one raises instead of giving no gradient.
TORCH_LIBRARY_IMPL(xpu_fp4, Autograd, library) {
  for (const OpRow& row : cpu_ops()) library.impl(row.name().c_str(), torch::autograd::autogradNotImplementedFallback());
}

// All other tensors: sparse, nested, None. The checks that come before a backend name the argument, as torch's own error does
// not.
TORCH_LIBRARY_IMPL(xpu_fp4, CompositeExplicitAutograd, library) { implement(library, ops_without_backend()); }
TORCH_LIBRARY_IMPL(xpu_fp4, NestedTensorCPU, library) { implement(library, ops_without_backend()); }

TORCH_LIBRARY_IMPL(xpu_fp4, CPU, library) { implement(library, cpu_ops()); }

}  // namespace xpu_fp4
