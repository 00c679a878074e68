// SPDX-License-Identifier: Apache-2.0
// Device code: factor, bias, conversion and the store of a tile.
#pragma once
#include "convert.hpp"
#include "operands.hpp"

namespace xpu_fp4 {

struct Output : OutputArguments {
  XPU_FP4_INLINE float bias_of(int64_t row, int64_t column) const {
    return ((XPU_FP4_GLOBAL const float*)bias)[row * bias_row_stride + column * bias_column_stride];
  }

  XPU_FP4_INLINE void store_row(float acc, int64_t row, int64_t column) const {
    if (column >= n) return;
    const float scaled = acc * factor;
    store_converted<kYDType>(y, row * n + column, bias == nullptr ? scaled : scaled + bias_of(row, column));
  }

  /// acc[i][j], element r of it, is row first_row + 8 i + r, column first_column + kLanes j + lane.
  template <int row_units, int column_units>
  XPU_FP4_INLINE void store_tile(const float8 (&acc)[row_units][column_units], int64_t first_row, int64_t first_column) const {
    const auto columns = static_cast<int>(sycl::min(n - first_column, int64_t{kLanes * column_units}));
    const auto rows = static_cast<int>(sycl::min(m - first_row, int64_t{kRowUnit * row_units}));
    const auto lane = static_cast<int>(lane_id());
    bool real[column_units];
    float added[column_units];
    auto from = (XPU_FP4_GLOBAL const float*)bias + (first_row * bias_row_stride + (first_column + lane) * bias_column_stride);
#pragma unroll
    for (int j = 0; j < column_units; ++j) {
      real[j] = kLanes * j + lane < columns;
      // It is -0 without a bias, which changes nothing.
      added[j] = bias != nullptr && real[j] ? from[j * kLanes * bias_column_stride] : -0.0f;
    }
    int64_t at = first_row * n + first_column + lane;
#pragma unroll(kUnroll)
    for (int i = 0; i < row_units; ++i) {
#pragma unroll(kUnroll)
      for (int r = 0; r < kRowUnit; ++r) {
        if (kRowUnit * i + r >= rows) return;
        if (bias_row_stride != 0 && i + r != 0) {
          from += bias_row_stride;
#pragma unroll
          for (int j = 0; j < column_units; ++j) {
            if (real[j]) added[j] = from[j * kLanes * bias_column_stride];
          }
        }
#pragma unroll
        for (int j = 0; j < column_units; ++j) {
          if (real[j]) store_converted<kYDType>(y, at + kLanes * j, acc[i][j][r] * factor + added[j]);
        }
        at += n;
      }
    }
  }
};

}  // namespace xpu_fp4
