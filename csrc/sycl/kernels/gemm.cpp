// SPDX-License-Identifier: Apache-2.0
// W4A4: Y [M, N] = A [M, K] x W [N, K]^T + bias, in the order of format/accumulate.h.
//
// A sub-group computes kSubGroup rows x kColumnUnits * kSubGroup columns. An MX block is one matrix-mad: both operands are
// unpacked in registers to int8 (twice the value), the int32 sums are exact, and each becomes a float32 product before the
// next block. Lane l holds the row factors of row l and the weight factors of its own columns.
// Cost per sub-group and block: kRowUnits * kColumnUnits matrix-mads of 8 x kSubGroup x 32, and about five float operations per
// output.
#include "common.hpp"

using namespace xpu_fp4;

constexpr int kRowUnits = kSubGroup / 8;
constexpr int kColumnUnits = 2;
constexpr int kTileRows = kSubGroup, kTileColumns = kColumnUnits * kSubGroup;

struct Shape {
  int64_t m, n, k;
  int64_t row_bytes() const { return k / 2; }
  int64_t row_blocks() const { return k / kBlock; }
};

struct WeightRows {
  const uint8_t* codes;
  const uint8_t* scale;
  int64_t scale_row_stride, scale_block_stride;
};

// Rows beyond M and columns beyond N repeat the last one: their results are not stored.
struct Tile {
  Shape shape;
  int64_t first_row, first_column;
  int lane;
  int64_t row(int i) const { return sycl::min(first_row + i, shape.m - 1); }
  int64_t column(int unit) const { return first_column + unit * kSubGroup + lane; }
  int64_t safe_column(int unit) const { return sycl::min(column(unit), shape.n - 1); }
};

inline RowFragment load_rows(const Tile& tile, const uint8_t* a, int unit, int64_t block) {
  RowFragment fragment;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const uint8_t* lane_bytes =
        a + tile.row(unit * 8 + r) * tile.shape.row_bytes() + block * kBlockBytes + tile.lane * kRowBytes;
    uint32_t values = unpack2(lane_bytes[0]);
    if constexpr (kRowBytes == 2) values |= unpack2(lane_bytes[1]) << 16;
    fragment[r] = values;
  }
  return fragment;
}

struct Accumulators {
  float value[kRowUnits][kColumnUnits][8];
};

// The products of one block: out[unit of rows][unit of columns][row], one column per lane.
inline void block_products(const Tile& tile, const uint8_t* a, const uint8_t* a_scale, const WeightRows& w, int64_t block,
                           Accumulators& out) {
  const auto sub_group = this_sub_group();
  const RowFactor lane_factor = row_factor(a_scale[tile.row(tile.lane) * tile.shape.row_blocks() + block]);
  RowFragment rows[kRowUnits];
#pragma unroll
  for (int i = 0; i < kRowUnits; ++i) rows[i] = load_rows(tile, a, i, block);
#pragma unroll
  for (int j = 0; j < kColumnUnits; ++j) {
    const int64_t column = tile.safe_column(j);
    const int8 weights = column_fragment(load16(w.codes + column * tile.shape.row_bytes() + block * kBlockBytes));
    const float factor = weight_factor(w.scale[column * w.scale_row_stride + block * w.scale_block_stride]);
#pragma unroll
    for (int i = 0; i < kRowUnits; ++i) {
      const int8 dot = matrix_mad(rows[i], weights, int8(0));
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const RowFactor row = {sycl::group_broadcast(sub_group, lane_factor.scale, i * 8 + r),
                               sycl::group_broadcast(sub_group, lane_factor.rest, i * 8 + r)};
        out.value[i][j][r] = block_product(static_cast<float>(dot[r]), row, factor);
      }
    }
  }
}

template <class Function>
inline void for_each_output(const Function& function) {
#pragma unroll
  for (int i = 0; i < kRowUnits; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnUnits; ++j) {
#pragma unroll
      for (int r = 0; r < 8; ++r) function(i, j, r);
    }
  }
}

XPU_FP4_KERNEL(2)
gemm(const uint8_t* a, const uint8_t* a_scale, const uint8_t* w, const uint8_t* w_scale, int64_t w_scale_row_stride,
     int64_t w_scale_block_stride, const float* bias, int64_t bias_row_stride, int64_t bias_column_stride, void* y, int y_dtype,
     int64_t m, int64_t n, int64_t k) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t column_tile = item.get_global_id(1) / kSubGroup;
  const Tile tile = {{m, n, k},
                     static_cast<int64_t>(item.get_group(0)) * kTileRows,
                     column_tile * kTileColumns,
                     static_cast<int>(this_sub_group().get_local_linear_id())};
  if (tile.first_column >= n) return;
  const WeightRows weights = {w, w_scale, w_scale_row_stride, w_scale_block_stride};

  Accumulators acc = {};
  for (int64_t quad = 0; quad < tile.shape.row_blocks(); quad += kQuad) {
    Accumulators p[kQuad] = {};  // a missing block counts as +0
    // Registers want constant indices on a GPU; the stand-in is long, and four copies of it only slow its compilation.
#pragma unroll(XPU_FP4_MATRIX_UNIT ? kQuad : 1)
    for (int b = 0; b < kQuad; ++b) {
      if (quad + b < tile.shape.row_blocks()) block_products(tile, a, a_scale, weights, quad + b, p[b]);
    }
    for_each_output([&](int i, int j, int r) {
      acc.value[i][j][r] =
          add_quad(acc.value[i][j][r], p[0].value[i][j][r], p[1].value[i][j][r], p[2].value[i][j][r], p[3].value[i][j][r]);
    });
  }

  for_each_output([&](int i, int j, int r) {
    const int64_t row = tile.first_row + i * 8 + r, column = tile.column(j);
    if (row >= m || column >= n) return;
    float value = acc.value[i][j][r];
    if (bias != nullptr) value += bias[row * bias_row_stride + column * bias_column_stride];
    store(static_cast<DType>(y_dtype), y, row * n + column, value);
  });
}
