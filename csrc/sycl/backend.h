// SPDX-License-Identifier: Apache-2.0
// The SYCL kernels as a Backend.
#pragma once
#include <memory>

#include "../explanation.h"
#include "queue.h"

namespace xpu_fp4::syclrt {

/// `explained`, where it is not null, is told of each product and layer of experts which kernel it took and why.
std::unique_ptr<Backend> make_backend(std::unique_ptr<Queue> queue, Explanation* explained = nullptr);

}  // namespace xpu_fp4::syclrt
