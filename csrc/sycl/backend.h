// SPDX-License-Identifier: Apache-2.0
// The SYCL kernels as a Backend.
#pragma once
#include <memory>

#include "queue.h"

namespace xpu_fp4::syclrt {

std::unique_ptr<Backend> make_backend(std::unique_ptr<Queue> queue);

}  // namespace xpu_fp4::syclrt
