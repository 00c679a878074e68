// SPDX-License-Identifier: Apache-2.0
// W4A4 for few rows: Y [M, N] = A x W^T + bias, A expanded (layout.hpp), W as it is in the checkpoint; the bits of
// format/accumulate.h. Bound by the bandwidth of W's packed codes, which are read once for every XPU_FP4_ROWS rows.
//
// A work-group computes XPU_FP4_ROWS rows x kLanes columns. Its kSplit sub-groups share K: in a round each decodes its own quad
// of weights in registers and leaves the quad's sums in local memory; then each adds up, for its share of the rows, the round's
// quads in ascending order. So the order is that of the definition. Macros: XPU_FP4_ROWS, XPU_FP4_DTYPE (Y's),
// XPU_FP4_BLOCK_2D.
#include <sycl/ext/oneapi/work_group_static.hpp>

#include "decode.hpp"
#include "output.hpp"
#include "quad_sum.hpp"

using namespace xpu_fp4;

constexpr int kRows = XPU_FP4_ROWS;
constexpr int kRowUnits = (kRows + kRowUnit - 1) / kRowUnit;
constexpr int kGroups = (kRows + kLanes - 1) / kLanes;  // of rows, that share a word of exponents per lane
constexpr int kSplit = 8;
constexpr int kOwnRows = (kRows + kSplit - 1) / kSplit;

using RoundTerms = float[kSplit][kRows][kLanes];

struct Rows {
  RowCodes codes;
  GlobalWords exponents;
  GlobalWords levels;
  uint32_t quads, level_pitch;
};

/// Sums of one quad for all rows, to local memory.
template <int level>
XPU_FP4_STEP void store_terms(const Rows& rows, const DecodedQuad& w, uint32_t quad, const int8& magic,
                              float (&out)[kRows][kLanes]) {
  const ColumnScales<level, 2 + kDecodeShift> columns(w.exponents);
#pragma unroll(kUnroll)
  for (int group = 0; group < kGroups; ++group) {
    const RowScales<level> scales(load_lanes(rows.exponents + (group * rows.quads + quad) * kLanes));
#pragma unroll(kUnroll)
    for (int unit = group * (kLanes / kRowUnit); unit < sycl::min((group + 1) * (kLanes / kRowUnit), kRowUnits); ++unit) {
      RowFragment a[kQuad];
      rows.codes.load(unit, quad, a);
      const ChainSums<level> sums(a, w.codes, magic);
#pragma unroll(kUnroll)
      for (int r = 0; r < sycl::min(kRowUnit, kRows - unit * kRowUnit); ++r) {
        const float term = quad_term(sums, r, scales, unit * kRowUnit + r, columns);
        // Exact inside of the window.
        out[unit * kRowUnit + r][lane_id()] = level == kGeneralLevel ? term : term * columns.scale[0];
      }
    }
  }
}

XPU_FP4_INLINE bool any_outside_of_window(const Rows& rows, uint32_t quad, uint32_t column_exponents) {
  bool outside = false;
#pragma unroll
  for (int b = 0; b < kQuad; ++b) outside |= exponent_of(column_exponents, b) - kWindowLow > kWindowHigh - kWindowLow;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) outside |= rows.levels[g * rows.level_pitch + quad] == kOnlyGeneral;
  return sycl::any_of_group(this_sub_group(), outside);
}

XPU_FP4_KERNEL(2)
gemm_small(const uint8_t* a, const uint32_t* a_exponents, const uint32_t* a_levels, const uint8_t* w, const uint8_t* w_scale,
           int64_t w_scale_row_stride, int64_t w_scale_block_stride, const float* bias, int64_t bias_row_stride,
           int64_t bias_column_stride, void* y, int64_t m, int64_t n, int64_t k, uint32_t magic_bits) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  static syclexp::work_group_static<RoundTerms[2]> terms;
  const uint32_t split = this_sub_group().get_group_linear_id();
  const int64_t first_row = static_cast<int64_t>(item.get_global_id(0)) * kRows;
  const int64_t first_column = static_cast<int64_t>(item.get_global_id(1)) / (kLanes * kSplit) * kLanes;
  const auto quads = static_cast<uint32_t>((k + kQuadElements - 1) / kQuadElements);
  const uint32_t pitch = (quads + kLanes - 1) / kLanes * kLanes;

  // Rows are padded to groups: a tile may start inside of one only where it is smaller, and then it is the first.
  const uint64_t row_group = first_row / kLanes;
  const auto height = static_cast<uint32_t>(sycl::min(m - first_row, int64_t{kRows}));
  const Rows rows = {{(GlobalBytes)a + uint64_t(first_row) * quads * kQuadElements, quads, height},
                     (GlobalWords)a_exponents + row_group * quads * kLanes,
                     (GlobalWords)a_levels + row_group * pitch,
                     quads,
                     pitch};
  const WeightColumn column(w, w_scale, w_scale_row_stride, w_scale_block_stride, k,
                            sycl::min(first_column + lane_id(), n - 1));
  const int8 magic = magic_of_lane(magic_bits);

  float acc[kOwnRows] = {};
  uint32_t buffer = 0;
  int64_t scale_at = split * kQuad * w_scale_block_stride;
#pragma nounroll
  for (uint32_t first = 0; first < quads; first += kSplit) {
    const uint32_t quad = first + split;
    if (quad < quads) {
      const DecodedQuad decoded(column, quad, scale_at);
      if (any_outside_of_window(rows, quad, decoded.exponents)) {
        store_terms<kGeneralLevel>(rows, decoded, quad, magic, terms[buffer][split]);
      } else {
        store_terms<kBlockLevel>(rows, decoded, quad, magic, terms[buffer][split]);
      }
    }
    sycl::group_barrier(item.get_group());
    const uint32_t count = sycl::min(uint32_t{kSplit}, quads - first);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const uint32_t row = split + i * kSplit;
      if (row >= kRows) break;
      for (uint32_t q = 0; q < count; ++q) acc[i] += terms[buffer][q][row][lane_id()];
    }
    scale_at += kSplit * kQuad * w_scale_block_stride;
    buffer ^= 1;  // the next round writes what the one before has read: one barrier is enough
  }
  const Output output = {bias, bias_row_stride, bias_column_stride, y, m, n};
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    const uint32_t row = split + i * kSplit;
    if (row < height) output.store_row(acc[i], first_row + row, first_column + lane_id());
  }
}
