// SPDX-License-Identifier: Apache-2.0
// The peers of docs/GPU.md: a GEMM over operands that were widened beforehand, to bfloat16, or to int8 with XPU_FP4_INT8, whose
// sums are left as they are. As favourable to widening as can be: no tails, no bias, no decoding and no scales in the loop, so
// that its loop is loads and matrix instructions alone. A [m, k] by rows; B as dpas fragments [k/K][n/16][8 dwords][16 lanes],
// K = 16 or, of int8, 32; C [m, n]. A sub-group computes 32 rows x 64 columns.
#include "operands.hpp"

extern SYCL_EXTERNAL xpu_fp4_float8 intel_sub_group_bf16_bf16_matrix_mad_k16(xpu_fp4_row_fragment a, xpu_fp4_int8 b,
                                                                             xpu_fp4_float8 acc);
extern "C" SYCL_EXTERNAL xpu_fp4_ushort16 __builtin_IB_subgroup_block_read_flat_u16_m8k16v2(long surface, int width, int height,
                                                                                            int pitch, xpu_fp4_int2 at);

using namespace xpu_fp4;

constexpr int kRowUnits = 4, kColumnUnits = 4;
constexpr int kLineBytes = 64;  // of a row of A in a step

#ifdef XPU_FP4_INT8
constexpr int kSize = 1;
using Sums = int8;
XPU_FP4_INLINE xpu_fp4_ushort16 load_rows(long a, int m, int width, xpu_fp4_int2 at) {
  return __builtin_IB_subgroup_block_read_flat_u8_m8k32v2(a, width - 1, m - 1, width - 1, at);
}
XPU_FP4_INLINE Sums multiply_add(RowFragment a, int8 b, Sums acc) { return matrix_mad(a, b, acc); }
#define XPU_FP4_PEER int8_peer
#else
constexpr int kSize = 2;
using Sums = float8;
XPU_FP4_INLINE xpu_fp4_ushort16 load_rows(long a, int m, int width, xpu_fp4_int2 at) {
  return __builtin_IB_subgroup_block_read_flat_u16_m8k16v2(a, width - 1, m - 1, width - 1, at);
}
XPU_FP4_INLINE Sums multiply_add(RowFragment a, int8 b, Sums acc) {
  return intel_sub_group_bf16_bf16_matrix_mad_k16(a, b, acc);
}
#define XPU_FP4_PEER bf16_peer
#endif
constexpr int kStep = kLineBytes / kSize;

XPU_FP4_KERNEL(2) XPU_FP4_PEER(const uint8_t* a, const uint8_t* b, uint32_t* c, int m, int n, int k) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int first_row = uniform(static_cast<int>(item.get_global_id(0))) * (kRowUnit * kRowUnits);
  const int first_column = uniform(static_cast<int>(item.get_global_id(1)) / kLanes) * (kLanes * kColumnUnits);
  Sums acc[kRowUnits][kColumnUnits];
#pragma unroll
  for (auto& row : acc) {
#pragma unroll
    for (Sums& unit : row) unit = 0;
  }
#pragma nounroll
  for (int step = 0; step < k; step += kStep) {
    RowFragment rows[kRowUnits][2];
#pragma unroll
    for (int i = 0; i < kRowUnits; ++i) {
      const xpu_fp4_int2 at = {step, first_row + kRowUnit * i};
      const auto loaded = load_rows((long)a, m, kSize * k, at);
#pragma unroll
      for (int r = 0; r < 16; ++r) rows[i][r / 8][r % 8] = static_cast<short>(loaded[r]);
    }
#pragma unroll
    for (int j = 0; j < kColumnUnits; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t fragment = (step / (kStep / 2) + half) * (n / kLanes) + first_column / kLanes + j;
        const int8 columns =
            __builtin_bit_cast(int8, __spirv_SubgroupBlockReadINTEL<xpu_fp4_uint8>((GlobalWords)(b + fragment * 512)));
#pragma unroll
        for (int i = 0; i < kRowUnits; ++i) acc[i][j] = multiply_add(rows[i][half], columns, acc[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowUnits; ++i) {
#pragma unroll
    for (int r = 0; r < kRowUnit; ++r) {
#pragma unroll
      for (int j = 0; j < kColumnUnits; ++j) {
        c[(first_row + kRowUnit * i + r) * n + first_column + kLanes * j + lane_id()] =
            __builtin_bit_cast(uint32_t, acc[i][j][r]);
      }
    }
  }
}
