// SPDX-License-Identifier: Apache-2.0
// The XPU device: the SYCL kernels on the queue of the current stream. torch has XPU tensors only where it is an XPU build;
// what is asked of that build's own library is in xpu_queue.cpp.
#include <ATen/ops/empty.h>
#include <dlfcn.h>

#include <stdexcept>

#include "../sycl/loader.h"
#include "compat.h"
#include "table.h"

namespace xpu_fp4 {
namespace {

// Memory comes from torch's caching allocator: if let go after the submission, only the same stream gets it again, so that its
// kernels run in order.
std::shared_ptr<void> allocate_on_current_device(int64_t bytes) {
  const at::Tensor memory = at::empty({bytes}, at::TensorOptions(at::kXPU).dtype(at::kByte));
  return {memory.data_ptr(), [memory](void*) {}};
}

void* current_queue() {
  static const auto function =
      reinterpret_cast<void* (*)()>(syclrt::load_beside("_xpu_queue.abi3.so", "xpu_fp4_current_queue"));
  return function();
}

struct GetXpuBackend {
  std::unique_ptr<Backend> operator()() const {
    return syclrt::load_plugin().on_queue(current_queue(), allocate_on_current_device);
  }
};

const bool xpu_binding = [] {
  const bool torch_is_xpu = dlopen("libc10_xpu.so", RTLD_NOW | RTLD_NOLOAD) != nullptr;
  try {
    if (torch_is_xpu) syclrt::configure_cache();  // torch starts SYCL before our first op
  } catch (const std::runtime_error&) {
    // An import must not end here: there is no cache then, and our first op raises the same error.
  }
  add_compat_binding({c10::DispatchKey::XPU, compat_table<GetXpuBackend>});
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(xpu_fp4, XPU, library) { implement(library, op_table<GetXpuBackend>()); }

}  // namespace xpu_fp4
