// SPDX-License-Identifier: Apache-2.0
// How a backend would compute something: what it says of a call without running a kernel.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace xpu_fp4 {

/// One kernel of a call, in the order of their launches.
struct ExplainedLaunch {
  std::string kernel, variant;
  int64_t work_groups, group_lanes;
};

struct Explanation {
  std::string kernel;       // that multiplies; of the native ones, the file in csrc/cpu that has its arithmetic
  std::string variant;      // what it is compiled for or, of the native ones, how it walks over the operands
  std::string passed_over;  // why other kernels do not run
  std::vector<ExplainedLaunch> launches{};
  int64_t weight_bytes = 0;        // of the weight in its form
  int64_t scratch_bytes = 0;       // that the call allocates at most at a time, beside its operands and its output
  std::optional<double> clocks{};  // of a vector engine: what the choice took this kernel to need
};

}  // namespace xpu_fp4
