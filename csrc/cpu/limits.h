// SPDX-License-Identifier: Apache-2.0
// What the processor can do at most, measured by the benchmark in the run that measures the kernels. Nothing else uses this.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace xpu_fp4::cpu {

/// Int8 or bfloat16 products added up in registers by one instruction, from operands that stay in registers.
struct ComputeLimit {
  const char* instruction;
  bool (*supported)();
  /// Runs on the calling thread; returns the operations done, two for a multiply-add.
  int64_t (*run)(int64_t iterations);
};

/// All that this build knows, the fastest first.
const std::vector<ComputeLimit>& compute_limits();

/// Reads n bytes once, in one pass; returns their exclusive or, so that nothing is left out.
uint64_t read_once(const std::byte* data, size_t n);

/// Reads so many bytes and writes so many, a copy as far as it goes, then a read or a fill.
uint64_t read_and_write(const std::byte* from, size_t read, std::byte* to, size_t written);

}  // namespace xpu_fp4::cpu
