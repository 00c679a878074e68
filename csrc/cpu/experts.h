// SPDX-License-Identifier: Apache-2.0
// A layer of experts on the native kernels.
#pragma once
#include "../backend.h"

namespace xpu_fp4::cpu {

/// Expert by expert, through the backend's products.
void run_experts(const Backend& backend, const Experts& args);

}  // namespace xpu_fp4::cpu
