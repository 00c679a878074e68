// SPDX-License-Identifier: Apache-2.0
// The benchmark's limits on torch's threads. Names with an underscore: not an interface.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <atomic>

#include "../cpu/limits.h"
#include "checks.h"

namespace xpu_fp4 {
namespace {

using at::Tensor;

std::vector<std::string> limit_instructions() {
  std::vector<std::string> names;
  for (const auto& limit : cpu::compute_limits()) {
    if (limit.supported()) names.emplace_back(limit.instruction);
  }
  return names;
}

// Operations done by all threads together.
int64_t limit_compute(std::string_view instruction, int64_t iterations) {
  for (const auto& limit : cpu::compute_limits()) {
    if (limit.instruction != instruction || !limit.supported()) continue;
    std::atomic<int64_t> ops = 0;
    at::parallel_for(0, at::get_num_threads(), 1,
                     [&](int64_t begin, int64_t end) { ops += limit.run((end - begin) * iterations); });
    return ops;
  }
  TORCH_CHECK(false, "xpu_fp4: instruction is \"", std::string(instruction), "\", expected one of ",
              c10::Join(", ", limit_instructions()));
}

void check_bytes(const Tensor& x, const char* name) {
  ops::check_memory({"_limit", name, x});
  TORCH_CHECK(x.is_cpu() && x.scalar_type() == at::kByte && x.dim() == 1 && x.is_contiguous(), "xpu_fp4: ", name, " is ",
              x.toString(), " ", x.sizes(), ", expected contiguous bytes in one dimension on the CPU");
}

// The parts that threads take: large, and whole pages.
constexpr int64_t kGrain = 256 * 1024;

int64_t limit_read(const Tensor& x) {
  check_bytes(x, "x");
  std::atomic<uint64_t> sum = 0;
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    sum ^= cpu::read_once(static_cast<const std::byte*>(x.const_data_ptr()) + begin, end - begin);
  });
  return static_cast<int64_t>(sum.load());
}

// Reads all of x and writes all of out.
int64_t limit_copy(const Tensor& x, const Tensor& out) {
  check_bytes(x, "x");
  check_bytes(out, "out");
  const auto* from = static_cast<const std::byte*>(x.const_data_ptr());
  auto* to = static_cast<std::byte*>(out.data_ptr());
  const int64_t read = x.numel(), written = out.numel(), parts = (read + written) / kGrain + 1;
  std::atomic<uint64_t> sum = 0;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t source = read * begin / parts, target = written * begin / parts;
    sum ^= cpu::read_and_write(from + source, read * end / parts - source, to + target, written * end / parts - target);
  });
  return static_cast<int64_t>(sum.load());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(xpu_fp4, library) {
  library.def("_limit_instructions() -> str[]", limit_instructions);
  library.def("_limit_compute(str instruction, int iterations) -> int", limit_compute);
  library.def("_limit_read(Tensor x) -> int");
  library.def("_limit_copy(Tensor x, Tensor(a!) out) -> int");
}

TORCH_LIBRARY_IMPL(xpu_fp4, CPU, library) {
  library.impl("_limit_read", limit_read);
  library.impl("_limit_copy", limit_copy);
}

}  // namespace xpu_fp4
