// SPDX-License-Identifier: Apache-2.0
// Which backend serves CPU tensors: "native" (the default) or "sycl" (the SYCL kernels on Intel's CPU device). Chosen by the
// environment variable XPU_FP4_CPU_BACKEND for the process, and by set_cpu_backend for a thread. Never by what happens to work:
// where the chosen backend cannot run, an op raises its reason.
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "../backend.h"

namespace xpu_fp4 {

/// The backend of the current thread. Raises c10::Error if the environment variable names none, and std::runtime_error with the
/// reason if the backend cannot run.
const Backend& cpu_backend();

/// The native kernels, whatever is chosen.
const Backend& native_backend();

/// The name of the current thread's.
std::string cpu_backend_name();

/// The instruction set of the native kernels in use.
std::string native_isa();

/// Chooses for the current thread; none returns it to the process's choice. Raises c10::Error for other names.
void set_cpu_backend(std::optional<std::string_view> name);

/// The current thread's own choice.
std::optional<std::string> cpu_backend_override();

}  // namespace xpu_fp4
