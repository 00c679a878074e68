// SPDX-License-Identifier: Apache-2.0
// The XPU device: the SYCL kernels on the queue of the current stream. Built where torch is an XPU build; elsewhere the tests
// compile this file and cannot link it.
#include <c10/xpu/XPUStream.h>

#include "../sycl/loader.h"
#include "bind.h"
#include "compat.h"

namespace xpu_fp4 {
namespace {

struct GetXpuBackend {
  std::unique_ptr<Backend> operator()() const {
    return syclrt::load_plugin().on_queue(&c10::xpu::getCurrentXPUStream().queue());
  }
};

const bool xpu_binding = [] {
  syclrt::configure_cache();  // torch starts SYCL before our first op
  add_compat_binding({c10::DispatchKey::XPU, bind_fp4_gemm<GetXpuBackend>, bind_group_quant<GetXpuBackend>});
  return true;
}();

}  // namespace

TORCH_LIBRARY_IMPL(xpu_fp4, XPU, library) { bind_ops<GetXpuBackend>(library); }

}  // namespace xpu_fp4
