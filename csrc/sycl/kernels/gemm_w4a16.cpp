// SPDX-License-Identifier: Apache-2.0
// W4A16: Y [M, N] = X [M, K] x W [N, K]^T + bias in float32, in the order of format/accumulate.h. XPU_FP4_DTYPE is X's,
// and Y's but for XPU_FP4_Y_DTYPE. Grouped, a tile is a row.
// One lane per output, neighbouring lanes on neighbouring columns; every lane reads its own packed row of W.
#include "common.hpp"

using namespace xpu_fp4;

inline float run_sum(const void* x, int64_t first, const uint8_t* packed) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kRun; i += 2) {
    sum += load<kDType>(x, first + i) * static_cast<float>(e2m1::twice(e2m1::low(packed[i / 2])));
    sum += load<kDType>(x, first + i + 1) * static_cast<float>(e2m1::twice(e2m1::high(packed[i / 2])));
  }
  return sum;
}

inline float block_sum(const void* x, int64_t first, const Bytes16& packed) {
  float sum[kBlock / kRun];
#pragma unroll
  for (int r = 0; r < kBlock / kRun; ++r) sum[r] = run_sum(x, first + r * kRun, packed.byte + r * (kRun / 2));
  return add_runs(sum[0], sum[1], sum[2], sum[3]);
}

XPU_FP4_KERNEL(2) gemm_w4a16(const void* x, XPU_FP4_STORED_PARAMETERS(w), XPU_FP4_OUTPUT_PARAMETERS, int64_t k) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t row = item.get_global_id(0), lane_column = item.get_global_id(1);
  XPU_FP4_TO_EXPERT(row)
  // A lane beyond N repeats the last column: it must not leave before the sum is complete. For the lanes that remain, Intel's
  // CPU compiler would make a loop of its own that adds the quads in another order.
  const int64_t column = sycl::min(lane_column, n - 1);
  const int64_t row_blocks = k / kBlock;
  float acc = 0.0f;
  for (int64_t quad = 0; quad < row_blocks; quad += kQuad) {
    float p[kQuad] = {};  // a missing block counts as +0
#pragma unroll
    for (int b = 0; b < kQuad; ++b) {
      const int64_t block = quad + b;
      if (block < row_blocks) {
        const float sum = block_sum(x, row * k + block * kBlock, load16(w_codes + column * (k / 2) + block * kBlockBytes));
        p[b] = block_share(sum, weight_factor(w_scale[column * w_scale_row_stride + block * w_scale_block_stride]));
      }
    }
    acc = add_quad(acc, p[0], p[1], p[2], p[3]);
  }
  if (lane_column >= n) return;
  const OutputArguments output = XPU_FP4_OUTPUT;
  acc *= output.factor;
  if (bias != nullptr) acc += bias[row * bias_row_stride + column * bias_column_stride];
  store<kYDType>(y, row * n + column, acc);
}
