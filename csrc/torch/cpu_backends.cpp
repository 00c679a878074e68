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
  const char* variable = std::getenv("XPU_FP4_CPU_BACKEND");
  return variable == nullptr || *variable == '\0' ? CpuBackend::native : parse(variable, "XPU_FP4_CPU_BACKEND");
}

std::string name_of(CpuBackend backend) { return backend == CpuBackend::native ? "native" : "sycl"; }

// torch's threads, so that torch.set_num_threads holds and no second pool competes for the cores.
void torch_parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  at::parallel_for(0, n, grain, body);
}

const Backend& native_backend() {
  static const auto backend = cpu::make_backend(cpu::best_kernels(), torch_parallel_for);
  return *backend;
}

}  // namespace

const Backend& cpu_backend() { return choice() == CpuBackend::native ? native_backend() : syclrt::load_plugin().cpu(); }

std::string cpu_backend_name() { return name_of(choice()); }

void set_cpu_backend(std::string_view name) {
  thread_choice = name.empty() ? std::nullopt : std::optional(parse(name, "the CPU backend"));
}

std::string cpu_backend_override() { return thread_choice ? name_of(*thread_choice) : ""; }

}  // namespace xpu_fp4
