// SPDX-License-Identifier: Apache-2.0
// MXFP4 codes and scales -> values, each rounded once. A lane unpacks four bytes.
#include "common.hpp"

using namespace xpu_fp4;

constexpr int kLaneBytes = 4;

XPU_FP4_KERNEL(1) dequantize(DequantizeArguments args) {
  const auto& [q, scales, out, lanes] = args;
  const int64_t id = syclext::this_work_item::get_nd_item<1>().get_global_linear_id();
  if (id >= lanes) return;
  const uint8_t scale = scales[id / (kBlockBytes / kLaneBytes)];
#pragma unroll
  for (int i = 0; i < kLaneBytes; ++i) {
    const int64_t byte = id * kLaneBytes + i;
    store<kDType>(out, 2 * byte, dequantize_element(e2m1::low(q[byte]), scale));
    store<kDType>(out, 2 * byte + 1, dequantize_element(e2m1::high(q[byte]), scale));
  }
}
