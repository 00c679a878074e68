// SPDX-License-Identifier: Apache-2.0
// The native CPU backend.
#pragma once
#include <functional>
#include <memory>

#include "../backend.h"
#include "../explanation.h"
#include "kernels.h"

namespace xpu_fp4::cpu {

/// Runs body(begin, end) over disjoint chunks that cover [0, n), possibly at once on several threads.
using ParallelFor = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

/// The native kernels of one table; parallel_for is how the host program wants its threads used.
std::unique_ptr<Backend> make_backend(const KernelTable& kernels, ParallelFor parallel_for);

/// How that backend would compute a product of rows and columns with a weight in strips. No pointer is followed.
Explanation explain(const KernelTable& kernels, const Product& product);

}  // namespace xpu_fp4::cpu
