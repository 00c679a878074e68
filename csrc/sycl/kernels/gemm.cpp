// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8: Y [M, N] = A [M, K] x W [N, K]^T + bias, in the order of format/accumulate.h.
//
// A sub-group computes kSubGroup rows x kSubGroup columns. An MX block is one matrix-mad per 8 rows: MXFP4 operands are
// unpacked in registers to int8 (twice the value), the int32 sums are exact, and each is scaled to its float32 product. The
// weights of a quad stay in registers while its rows pass. Lane l holds the row factors of row l and the weight factors of
// column l. Cost per sub-group and block: kRowUnits matrix-mads of 8 x kSubGroup x 32, and about five float operations per
// output.
#include "common.hpp"

using namespace xpu_fp4;

constexpr int kRowUnits = kSubGroup / kRowUnit;
constexpr int kLaneBytes = code_bytes(kFormat, kBlock) / kSubGroup;  // of a row of A: two elements at 16 lanes, four at 8

struct Shape {
  int64_t m, n, k;
  int64_t row_blocks() const { return k / kBlock; }
};

// Rows beyond M and columns beyond N repeat the last one: their results are not stored.
struct Tile {
  Shape shape;
  int64_t first_row, first_column;
  int lane;
  int64_t row(int i) const { return sycl::min(first_row + i, shape.m - 1); }
  int64_t column() const { return sycl::min(first_column + lane, shape.n - 1); }
};

inline RowFragment load_rows(const Tile& tile, const uint8_t* a, int unit, int64_t block) {
  RowFragment fragment;
#pragma unroll
  for (int r = 0; r < kRowUnit; ++r) {
    const uint8_t* lane_bytes = a + tile.row(unit * kRowUnit + r) * code_bytes(kFormat, tile.shape.k) +
                                block * code_bytes(kFormat, kBlock) + tile.lane * kLaneBytes;
    uint32_t values = 0;
#pragma unroll
    for (int i = 0; i < kLaneBytes; ++i) {
      if constexpr (kFormat == Format::mxfp4) {
        values |= unpack2(lane_bytes[i]) << 16 * i;
      } else {
        values |= uint32_t{lane_bytes[i]} << 8 * i;
      }
    }
    fragment[r] = values;
  }
  return fragment;
}

// One quad of the tile: the lane's column of weights, and the factors of its column and row. Blocks beyond the last are not
// loaded and count as +0.
struct Quad {
  int64_t first_block;
  int blocks;
  int8 weights[kQuad];
  float weight_factors[kQuad];
  RowFactor row_factors[kQuad];
};

inline Quad load_quad(const Tile& tile, const uint8_t* a_scale, const StoredOperand& w, int64_t first_block) {
  Quad quad;
  quad.first_block = first_block;
  quad.blocks = static_cast<int>(sycl::min<int64_t>(kQuad, tile.shape.row_blocks() - first_block));
  const int64_t row = tile.row(tile.lane), column = tile.column();
#pragma unroll
  for (int b = 0; b < kQuad; ++b) {
    if (b >= quad.blocks) break;
    const int64_t block = first_block + b;
    quad.weights[b] = column_fragment(load16(w.codes + column * (tile.shape.k / 2) + block * kBlockBytes));
    quad.weight_factors[b] = weight_factor(w.scale[column * w.scale_row_stride + block * w.scale_block_stride]);
    quad.row_factors[b] = row_factor(kFormat, a_scale[row * tile.shape.row_blocks() + block]);
  }
  return quad;
}

// acc[r] += the quad's share of row 8 * unit + r, the lane's column.
inline void add_rows(const Tile& tile, const uint8_t* a, const Quad& quad, int unit, float (&acc)[kRowUnit]) {
  const auto sub_group = this_sub_group();
  float p[kQuad][kRowUnit] = {};
  // Registers want constant indices on a GPU; the stand-in is long, and four copies of it only slow its compilation.
#pragma unroll(XPU_FP4_MATRIX_UNIT ? kQuad : 1)
  for (int b = 0; b < kQuad; ++b) {
    if (b >= quad.blocks) break;
    const int8 dot = matrix_mad(load_rows(tile, a, unit, quad.first_block + b), quad.weights[b], int8(0));
#pragma unroll
    for (int r = 0; r < kRowUnit; ++r) {
      const RowFactor row = {sycl::group_broadcast(sub_group, quad.row_factors[b].scale, unit * kRowUnit + r),
                             sycl::group_broadcast(sub_group, quad.row_factors[b].rest, unit * kRowUnit + r)};
      p[b][r] = block_product(static_cast<float>(dot[r]), row, quad.weight_factors[b]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRowUnit; ++r) acc[r] = add_quad(acc[r], p[0][r], p[1][r], p[2][r], p[3][r]);
}

XPU_FP4_KERNEL(2)
gemm(XPU_FP4_STORED_PARAMETERS(a), XPU_FP4_STORED_PARAMETERS(w), XPU_FP4_OUTPUT_PARAMETERS, int64_t k, int y_dtype) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  XPU_FP4_TO_EXPERT(item.get_global_id(0))
  const OutputArguments output = XPU_FP4_OUTPUT;
  const StoredOperand w = XPU_FP4_STORED(w);
  const Tile tile = {{m, n, k},
                     static_cast<int64_t>(item.get_global_id(0)) * kSubGroup,
                     static_cast<int64_t>(item.get_global_id(1)) / kSubGroup * kSubGroup,
                     static_cast<int>(this_sub_group().get_local_linear_id())};
  if (tile.first_column >= n) return;

  float acc[kRowUnits][kRowUnit] = {};
  for (int64_t block = 0; block < tile.shape.row_blocks(); block += kQuad) {
    const Quad quad = load_quad(tile, a_scale, w, block);
#pragma unroll
    for (int unit = 0; unit < kRowUnits; ++unit) add_rows(tile, a_codes, quad, unit, acc[unit]);
  }

  const int64_t column = tile.first_column + tile.lane;
  if (column >= n) return;
#pragma unroll
  for (int i = 0; i < kSubGroup; ++i) {
    const int64_t row = tile.first_row + i;
    if (row >= m) break;
    float value = acc[i / kRowUnit][i % kRowUnit] * output.factor;
    if (bias != nullptr) value += bias[row * bias_row_stride + column * bias_column_stride];
    store(static_cast<DType>(y_dtype), y, row * n + column, value);
  }
}
