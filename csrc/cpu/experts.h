// SPDX-License-Identifier: Apache-2.0
// A layer of experts on the native kernels.
#pragma once
#include "backend.h"

namespace xpu_fp4::cpu {

/// Slots are sorted by expert, and each product takes all experts at once. Besides inputs and output, memory holds so many
/// slots at a time, of whole tokens (a single token has any number): of each, both products' results (its u of 2 w2.k elements
/// of x's dtype and its v of w2.n floats lie in the same place), and the expanded activations of one of them, for each 1024 of
/// K 1.7 KiB in W4A4 and W4A8, 4 KiB in W4A16. Of gpt-oss that is 23 KiB and 5 KiB or 12: 270 MiB at most.
constexpr int64_t kMostSlots = 8192;

void run_experts(const KernelTable& kernels, const ParallelFor& parallel_for, const Experts& args);

}  // namespace xpu_fp4::cpu
