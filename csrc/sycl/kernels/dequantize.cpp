// SPDX-License-Identifier: Apache-2.0
// Codes and scales -> values, each rounded once. A lane does eight elements: four bytes of MXFP4, eight of MXINT8.
#include "common.hpp"

using namespace xpu_fp4;

constexpr int kLaneBytes = 4;

XPU_FP4_KERNEL(1) dequantize(const uint8_t* q, const uint8_t* scales, void* out, int64_t lanes) {
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

XPU_FP4_KERNEL(1) dequantize_mxint8(const uint8_t* q, const uint8_t* scales, void* out, int64_t lanes) {
  const int64_t id = syclext::this_work_item::get_nd_item<1>().get_global_linear_id();
  if (id >= lanes) return;
  const uint8_t scale = scales[id / (kBlock / 8)];
#pragma unroll
  for (int64_t i = 8 * id; i < 8 * id + 8; ++i) {
    store<kDType>(out, i, mxint8::dequantize_element(static_cast<int8_t>(q[i]), scale));
  }
}
