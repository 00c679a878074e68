// SPDX-License-Identifier: Apache-2.0
#include "cpu_backends.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <cstdlib>

#include "../cpu/backend.h"
#include "../sycl/loader.h"

namespace xpu_fp4 {
namespace {

enum class CpuBackend { native, sycl };

CpuBackend parse(std::string_view name, const char* where) {
  if (name == "native") return CpuBackend::native;
  if (name == "sycl") return CpuBackend::sycl;
  TORCH_CHECK(false, "xpu_fp4: ", where, " is \"", std::string(name), "\", expected \"native\" or \"sycl\"");
}

thread_local std::optional<CpuBackend> thread_choice;

CpuBackend choice() {
  if (thread_choice) return *thread_choice;
  static const CpuBackend of_process = [] {
    const char* variable = std::getenv("XPU_FP4_CPU_BACKEND");
    return variable == nullptr || *variable == '\0' ? CpuBackend::native : parse(variable, "XPU_FP4_CPU_BACKEND");
  }();
  return of_process;
}

std::string name_of(CpuBackend backend) { return backend == CpuBackend::native ? "native" : "sycl"; }

// torch's threads, so that torch.set_num_threads holds and no second pool competes for the cores.
void torch_parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, n, grain, body);
}

const cpu::KernelTable& native_kernels() {
  static const cpu::KernelTable& kernels = cpu::best_kernels();
  return kernels;
}

}  // namespace

const Backend& native_backend() {
  static const auto backend = cpu::make_backend(native_kernels(), torch_parallel_for);
  return *backend;
}

const Backend& cpu_backend() { return choice() == CpuBackend::native ? native_backend() : syclrt::load_plugin().cpu(); }

std::string cpu_backend_name() { return name_of(choice()); }

std::string native_isa() { return native_kernels().isa; }

void set_cpu_backend(std::optional<std::string_view> name) {
  thread_choice = name ? std::optional(parse(*name, "the CPU backend")) : std::nullopt;
}

std::optional<std::string> cpu_backend_override() {
  return thread_choice ? std::optional(name_of(*thread_choice)) : std::nullopt;
}

}  // namespace xpu_fp4
