// SPDX-License-Identifier: Apache-2.0
// A layer of experts on the native kernels.
#pragma once
#include "backend.h"

namespace xpu_fp4::cpu {

/// Slots are sorted by expert, and each product takes all experts at once. Besides inputs and output, memory holds the slots of
/// so many at a time, of whole tokens (one token may have more). Of each slot that is u, 2 w2.k elements of x's dtype, and v,
/// w2.n floats, in the same place; and the expanded activations of one product, for each 1024 of K 1.7 KiB in W4A4 and W4A8, 4
/// KiB in W4A16. With gpt-oss' sizes and 16-bit x, 12 KiB and 5 (W4A16: 12): 190 MiB at most. The calling thread keeps it
/// (scratch.h).
constexpr int64_t kMostSlots = 8192;

void run_experts(const KernelTable& kernels, const ParallelFor& parallel_for, const Experts& args);

}  // namespace xpu_fp4::cpu
