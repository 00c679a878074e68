// SPDX-License-Identifier: Apache-2.0
// The SYCL backend on a queue that launches nothing: which kernels a GPU would run, as the launches themselves decide.
#pragma once
#include <functional>
#include <string>

#include "../backend.h"
#include "../explanation.h"

namespace xpu_fp4::syclrt {

/// A product of an architecture (architectures.h), as modelled times assume it.
struct PlannedDevice {
  std::string architecture;
  std::string card;
  int64_t engines;       // vector engines
  int lanes;             // columns of a matrix instruction
  double ghz;            // the highest clock
  double bandwidth;      // bytes a second
  double matrix_clocks;  // of an engine, for a matrix instruction: 8 rows by `lanes` by 32 int8 or 16 bfloat16
};

/// `engines`: those of the architecture's card where it is 0. Throws std::runtime_error where no architecture has that name.
PlannedDevice planned_device(const std::string& architecture, int64_t engines);

/// What `call` makes a backend on that device do. Its pointers are looked at for their alignment alone.
Explanation explain(const PlannedDevice& device, const std::function<void(const Backend&)>& call);

}  // namespace xpu_fp4::syclrt
