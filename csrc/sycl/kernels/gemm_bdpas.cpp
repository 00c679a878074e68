// SPDX-License-Identifier: Apache-2.0
// W4A4 with Xe3P's own block-scaled FP4 instruction: Y [M, N] = A x W^T + bias from packed codes and scales, with nothing
// decoded. The hardware rounds inside, so this is NOT the definition of format/accumulate.h: it is held to W4A16's bound, and
// used only where it is asked for. Its operand layout follows Intel's compiler and was never run on hardware.
//
// A sub-group computes 8 * XPU_FP4_ROW_UNITS rows x kLanes * XPU_FP4_COLUMN_UNITS columns, one quad (128 of K) at a time. Needs
// K >= 128 and codes that begin on a cache line, for 2D loads. Macros: those, XPU_FP4_DTYPE (Y's), XPU_FP4_REGISTERS.
#include "output.hpp"

typedef unsigned char xpu_fp4_uchar2 __attribute__((ext_vector_type(2)));
#if XPU_FP4_MATRIX_UNIT
extern SYCL_EXTERNAL xpu_fp4_float8 intel_sub_group_e2m1_e2m1_scaled_matrix_mad_k64(xpu_fp4_row_fragment a, xpu_fp4_int8 b,
                                                                                    xpu_fp4_float8 acc, xpu_fp4_uchar2 a_scale,
                                                                                    xpu_fp4_uchar2 b_scale);
extern "C" SYCL_EXTERNAL xpu_fp4_uint8 __builtin_IB_subgroup_block_read_flat_transpose_u32_k8(long surface, int width,
                                                                                              int height, int pitch,
                                                                                              xpu_fp4_int2 at);
#endif

using namespace xpu_fp4;

constexpr int kRowUnits = XPU_FP4_ROW_UNITS, kColumnUnits = XPU_FP4_COLUMN_UNITS;
constexpr int kTileRows = kRowUnit * kRowUnits, kTileColumns = kLanes * kColumnUnits;
constexpr int kHalves = 2;  // instructions of K = 64 in a quad
constexpr int kHalfBytes = 32;

// ---- one 8 x kLanes x 64 product of scaled e2m1 ----
// lane l of a: for each of 8 rows the codes K = 4l .. 4l+3;  lane n of b: column n, dword j = K 8j .. 8j+7
// scales: of K 0 .. 31 and K 32 .. 63; lanes 0 .. 7 of a_scale are the rows, lane n of b_scale is column n
#if XPU_FP4_MATRIX_UNIT
XPU_FP4_INLINE float8 scaled_mad(RowFragment a, int8 b, float8 acc, xpu_fp4_uchar2 a_scale, xpu_fp4_uchar2 b_scale) {
  return intel_sub_group_e2m1_e2m1_scaled_matrix_mad_k64(a, b, acc, a_scale, b_scale);
}
#else
inline int dot8(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 32; i += 4) sum += e2m1::twice(a >> i & 15u) * e2m1::twice(b >> i & 15u);
  return sum;
}
inline float8 scaled_mad(RowFragment a, int8 b, float8 acc, xpu_fp4_uchar2 a_scale, xpu_fp4_uchar2 b_scale) {
  for (int r = 0; r < kRowUnit; ++r) {
    for (int half = 0; half < 2; ++half) {
      int sum = 0;
      for (int j = 4 * half; j < 4 * half + 4; ++j) sum += dot8(row_dword(a, r, j), b[j]);
      const uint8_t row = sycl::select_from_group(this_sub_group(), uint32_t{a_scale[half]}, r);
      acc[r] += block_product(static_cast<float>(sum), row_factor(Format::mxfp4, row), weight_factor(b_scale[half]));
    }
  }
  return acc;
}
#endif

/// Packed codes [height, k / 2]; what is beyond reads as zeros.
struct Codes {
  GlobalBytes codes;  // of the tile's first row
  int64_t row_bytes, height;

#if XPU_FP4_MATRIX_UNIT
  XPU_FP4_INLINE int width() const { return static_cast<int>(row_bytes) - 1; }
  XPU_FP4_INLINE int last_row() const { return static_cast<int>(sycl::min(height, int64_t{1} << 24)) - 1; }
  /// Eight rows, lanes along K.
  XPU_FP4_INLINE void load_rows(uint32_t row, uint32_t quad, RowFragment (&out)[kHalves]) const {
    const xpu_fp4_int2 at = {static_cast<int>(quad * (kHalves * kHalfBytes)), static_cast<int>(row)};
    const auto rows = __builtin_IB_subgroup_block_read_flat_u8_m8k32v2((long)codes, width(), last_row(), width(), at);
#pragma unroll
    for (int i = 0; i < 16; ++i) out[i / 8][i % 8] = static_cast<short>(rows[i]);
  }
  /// One row per lane.
  XPU_FP4_INLINE int8 load_columns(uint32_t row, uint32_t quad, int half) const {
    const xpu_fp4_int2 at = {static_cast<int>((quad * kHalves + half) * (kHalfBytes / 4)), static_cast<int>(row)};
    return __builtin_bit_cast(
        int8, __builtin_IB_subgroup_block_read_flat_transpose_u32_k8((long)codes, width(), last_row(), width(), at));
  }
#else
  uint32_t at(int64_t row, int64_t byte, int size) const {
    uint32_t value = 0;
    for (int i = 0; i < size && row < height && byte + i < row_bytes; ++i) value |= codes[row * row_bytes + byte + i] << 8 * i;
    return value;
  }
  void load_rows(uint32_t row, uint32_t quad, RowFragment (&out)[kHalves]) const {
    for (int i = 0; i < 16; ++i) out[i / 8][i % 8] = at(row + i % 8, (quad * kHalves + i / 8) * kHalfBytes + 2 * lane_id(), 2);
  }
  int8 load_columns(uint32_t row, uint32_t quad, int half) const {
    int8 out;
    for (int j = 0; j < 8; ++j) out[j] = at(row + lane_id(), (quad * kHalves + half) * kHalfBytes + 4 * j, 4);
    return out;
  }
#endif
};

/// The scale bytes of one row of an operand, a row to each lane.
struct Scales {
  GlobalBytes scale;
  int64_t block_stride;
  uint32_t blocks;

  /// A missing block, whose codes read as zeros, takes the last one's.
  XPU_FP4_INLINE void load(uint32_t quad, xpu_fp4_uchar2 (&out)[kHalves]) const {
#pragma unroll
    for (uint32_t b = 0; b < kQuad; ++b) out[b / 2][b % 2] = scale[sycl::min(quad * kQuad + b, blocks - 1) * block_stride];
  }
};

XPU_FP4_KERNEL(2)
gemm_bdpas(XPU_FP4_STORED_PARAMETERS(a), XPU_FP4_STORED_PARAMETERS(w), XPU_FP4_OUTPUT_PARAMETERS, int64_t k, int) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t first_row = uniform(static_cast<int64_t>(item.get_global_id(0))) * kTileRows;
  const int64_t first_column = uniform(static_cast<int64_t>(item.get_global_id(1)) / kLanes) * kTileColumns;
  if (first_row >= m || first_column >= n) return;
  const auto blocks = static_cast<uint32_t>(k / kBlock);
  const Codes rows = {(GlobalBytes)a_codes + first_row * (k / 2), k / 2, m - first_row};
  const Codes columns = {(GlobalBytes)w_codes + first_column * (k / 2), k / 2, n - first_column};
  Scales row_scales[kRowUnits], column_scales[kColumnUnits];
#pragma unroll
  for (int i = 0; i < kRowUnits; ++i) {
    const int64_t row = sycl::min(first_row + kRowUnit * i + lane_id() % kRowUnit, m - 1);
    row_scales[i] = {(GlobalBytes)a_scale + row * blocks, 1, blocks};
  }
#pragma unroll
  for (int j = 0; j < kColumnUnits; ++j) {
    const int64_t column = sycl::min(first_column + kLanes * j + lane_id(), n - 1);
    column_scales[j] = {(GlobalBytes)w_scale + column * w_scale_row_stride, w_scale_block_stride, blocks};
  }

  float8 acc[kRowUnits][kColumnUnits];
#pragma unroll
  for (int i = 0; i < kRowUnits; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnUnits; ++j) acc[i][j] = 0.0f;
  }
#pragma nounroll
  for (uint32_t quad = 0; quad * kQuad < blocks; ++quad) {
    RowFragment x[kRowUnits][kHalves];
    xpu_fp4_uchar2 x_scale[kRowUnits][kHalves];
#pragma unroll
    for (int i = 0; i < kRowUnits; ++i) {
      rows.load_rows(kRowUnit * i, quad, x[i]);
      row_scales[i].load(quad, x_scale[i]);
    }
#pragma unroll(kUnroll)
    for (int j = 0; j < kColumnUnits; ++j) {
      xpu_fp4_uchar2 scale[kHalves];
      column_scales[j].load(quad, scale);
#pragma unroll(kUnroll)
      for (int half = 0; half < kHalves; ++half) {
        const int8 b = columns.load_columns(kLanes * j, quad, half);
#pragma unroll(kUnroll)
        for (int i = 0; i < kRowUnits; ++i) acc[i][j] = scaled_mad(x[i][half], b, acc[i][j], x_scale[i][half], scale[half]);
      }
    }
  }
  Output{XPU_FP4_OUTPUT}.store_tile<kRowUnits, kColumnUnits>(acc, first_row, first_column);
}
