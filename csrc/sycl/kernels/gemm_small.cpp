// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8 for few rows: Y [M, N] = A x W^T + bias, A expanded (layout.hpp), W as it is in the checkpoint; the bits of
// format/accumulate.h. Bound by the bandwidth of W's packed codes, which are read once for every XPU_FP4_ROWS rows.
//
// A work-group computes XPU_FP4_ROWS rows x kLanes columns. Its kSplit sub-groups share K: in a round each decodes its own quad
// of weights in registers and leaves the quad's sums in local memory; then each adds up, for its share of the rows, the round's
// quads in ascending order. So the order is that of the definition. Where few rows leave clocks for it, a round first asks for
// the next one's weights, which come into the first cache while it computes and waits for others. Macros: XPU_FP4_FORMAT (of
// A), XPU_FP4_ROWS, XPU_FP4_DTYPE (Y's), XPU_FP4_BLOCK_2D, XPU_FP4_WEIGHTS (Weights of layout.hpp), XPU_FP4_WEIGHT_OPERAND.
// XPU_FP4_COMBINED, of experts: a work-group does the slots of a token, each a tile of one row, and adds them up.
#include <sycl/ext/oneapi/work_group_static.hpp>

#include "decode.hpp"
#include "output.hpp"
#include "quad_sum.hpp"
#include "round_terms.hpp"

using namespace xpu_fp4;

constexpr int kRowUnits = ceil_div(kRows, kRowUnit);
constexpr int kGroups = ceil_div(kRows, kLanes);  // of rows, that share a word of exponents per lane
constexpr bool kFetchesAhead = kRows <= kMostRowsFetchedAhead;
// For many rows with fewer products, so that the matrix unit keeps up with memory.
using Decoded = std::conditional_t<static_cast<WeightOperand>(XPU_FP4_WEIGHT_OPERAND) == WeightOperand::int8, Int8Block,
                                   DecodedBlock<(kRows > 16 ? 2 : 1)>>;

// Exponents come in groups of lanes: a tile that is not the first begins one.
#ifdef XPU_FP4_GROUPED
constexpr int kTileStride = round_up(kRows, kLanes);
#else
constexpr int kTileStride = kRows;
#endif

struct Rows {
  RowCodes codes;
  GlobalWords exponents;
  uint32_t quads;

  /// Of a quad, lane = row.
  XPU_FP4_INLINE void load_exponents(uint32_t quad, uint32_t (&out)[kGroups]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) out[group] = load_lanes(exponents + (group * quads + quad) * kLanes);
  }
};

/// The pair's sum for row r of 8, the lane's column: in units of the pair's first scale, but on the general level.
template <int level>
XPU_FP4_INLINE float pair_term(const int8 (&sums)[2], int r, const RowScales<level>& rows, int row,
                               const ColumnScales<level>& columns, int half) {
  float u[2];
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const int block = 2 * half + b;
    u[b] = sycl::fma(float_of(sums[b][r]), of_lane(rows.scale[block], row), of_lane(rows.offset[block], row));
    if constexpr (level == kGeneralLevel) u[b] = u[b] * columns.scale[block] * of_lane(rows.rest[block], row);
  }
  return level == kGeneralLevel ? u[0] + u[1] : sycl::fma(u[1], columns.scale[2 * half + 1], u[0]);
}

/// Sums of one quad for all rows, to local memory. One pair of blocks after the other, to hold few of them.
template <int level>
XPU_FP4_STEP void store_terms(const Rows& rows, const uint32_t (&exponents)[kGroups], const WeightQuad& w, uint32_t quad,
                              const int8& start, LocalWords out) {
  const ColumnScales<level> columns(w.exponents);
  const Decoded blocks[kQuad] = {Decoded(w.packed[0]), Decoded(w.packed[1]), Decoded(w.packed[2]), Decoded(w.packed[3])};
#pragma unroll(kUnroll)
  for (int unit = 0; unit < kRowUnits; ++unit) {
    const RowScales<level> scales(exponents[unit * kRowUnit / kLanes]);
    float term[kUnitRows];
#pragma unroll(kUnroll)
    for (int half = 0; half < 2; ++half) {
      RowFragment a[2];
      rows.codes.load_pair(unit, quad, half, a);
      const int8 sums[2] = {matrix_mad(a[0], blocks[2 * half], start), matrix_mad(a[1], blocks[2 * half + 1], start)};
#pragma unroll(kUnroll)
      for (int r = 0; r < kUnitRows; ++r) {
        const float pair = pair_term(sums, r, scales, unit * kRowUnit + r, columns, half);
        if (half == 0) {
          term[r] = pair;
        } else if constexpr (level == kGeneralLevel) {
          term[r] += pair;
        } else {
          term[r] = sycl::fma(pair, columns.scale[2], term[r]) * columns.scale[0];  // exact inside of the window
        }
      }
    }
    store_unit(out, unit, term);
  }
}

/// The highest bit of each byte that is an exponent outside of the window; of the other bits nothing is known.
XPU_FP4_INLINE uint32_t outside_of_window(uint32_t exponents, Window window) {
  constexpr uint32_t each = 0x01010101u;
  const uint32_t rest = exponents & 0x7F * each;
  const uint32_t low = rest + (128 - window.low) * each;    // without the bit: below the window, if the exponent is below 128
  const uint32_t high = rest + (255 - window.high) * each;  // with it: above, if not
  return (exponents & high) | ~(exponents | low);
}

XPU_FP4_INLINE bool any_outside_of_window(const uint32_t (&rows)[kGroups], uint32_t columns) {
  uint32_t outside = outside_of_window(columns, kWeightWindow);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    outside |= outside_of_window(rows[group], activations_window(kFormat));
  }
  return sycl::any_of_group(this_sub_group(), (outside & 0x80808080u) != 0);
}

/// The tile's rows from first_row on, of `m` that are real.
XPU_FP4_INLINE Rows rows_from(const ExpandedOperand& a, int64_t first_row, int64_t m, uint32_t quads) {
  // Rows are padded to groups: a tile may start inside of one only where it is smaller, and then it is the first.
  const uint64_t row_group = first_row / kLanes;
  const auto height = static_cast<uint32_t>(sycl::min(m - first_row, int64_t{kRows}));
  return {{(GlobalBytes)a.codes + uint64_t(first_row) * quads * kQuadElements, quads, height},
          (GlobalWords)a.exponents + row_group * quads * kLanes,
          quads};
}

/// acc += the tile's sums, of the sub-group's own rows.
XPU_FP4_INLINE void add_tile(const Rows& rows, WeightColumn column, uint32_t blocks, uint32_t split, const int8& start,
                             uint32_t& buffer, float (&acc)[kOwnRows]) {
  static syclexp::work_group_static<RoundTerms[2]> terms;
  const uint32_t quads = rows.quads, first_own = split * kOwnRows;
#pragma nounroll
  for (uint32_t first = 0; first < quads; first += kSplit) {
    const uint32_t quad = first + split;
    const auto all_terms = (LocalWords)&terms[buffer][0][0][0];
    const LocalWords own_terms = all_terms + split * kTermsStride;
    if (quad < quads) {
      const WeightQuad weights(column, blocks - quad * kQuad);
      if constexpr (kFetchesAhead) {
        column.step(kSplit);
        if (quad + kSplit < quads) column.prefetch();
      }
      uint32_t exponents[kGroups];
      rows.load_exponents(quad, exponents);
      if (any_outside_of_window(exponents, weights.exponents)) {
        store_terms<kGeneralLevel>(rows, exponents, weights, quad, start, own_terms);
      } else {
        store_terms<kBlockLevel>(rows, exponents, weights, quad, start, own_terms);
      }
    } else {
      const float zeros[kUnitRows] = {};  // which change no sum: none is -0
#pragma unroll
      for (int unit = 0; unit < kRowUnits; ++unit) store_unit(own_terms, unit, zeros);
    }
    barrier();
    if (first_own < kRows) {
      float own[kSplit][kOwnRows];
      if constexpr (kQuadsTogether) {
        load_quads(all_terms, first_own, own);
      } else {
#pragma unroll
        for (int q = 0; q < kSplit; ++q) load_rows(all_terms + (q * kRows + first_own) * kLanes, own[q]);
      }
#pragma unroll
      for (int q = 0; q < kSplit; ++q) {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) acc[i] += own[q][i];
      }
    }
    if constexpr (!kFetchesAhead) column.step(kSplit);
    buffer ^= 1;  // the next round writes what the one before has read: one barrier is enough
  }
}

#ifdef XPU_FP4_COMBINED
XPU_FP4_KERNEL(2)
gemm_small(XPU_FP4_EXPANDED_PARAMETERS(a), XPU_FP4_STORED_PARAMETERS(w), XPU_FP4_OUTPUT_PARAMETERS, int64_t k,
           uint32_t start_bits, XPU_FP4_SLOT_WEIGHTS_PARAMETERS) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const uint32_t split = uniform(this_sub_group().get_group_linear_id());
  const int64_t token = uniform(static_cast<int64_t>(item.get_global_id(0)));
  const int64_t first_column = static_cast<int64_t>(item.get_global_id(1)) / (kLanes * kSplit) * kLanes;
  const int64_t column = sycl::min(first_column + lane_id(), n - 1);
  const auto quads = static_cast<uint32_t>(ceil_div(k, kQuadElements));
  const int8 start = start_of_lane(start_bits);

  float sum = 0.0f;
  uint32_t buffer = 0;
#pragma nounroll
  for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
    const int64_t expert = uniform(tiles[slot].expert);
    if (expert < 0) continue;  // the whole work-group
    const int64_t first_row = slot * kTileStride;
    const StoredOperand own = {w_codes + expert * n * (k / 2), w_scale + expert * n * w_scale_row_stride, w_scale_row_stride,
                               w_scale_block_stride};
    float acc[kOwnRows] = {};
    add_tile(rows_from(XPU_FP4_EXPANDED(a), first_row, first_row + 1, quads), WeightColumn(own, k, column, split),
             static_cast<uint32_t>(k / kBlock), split, start, buffer, acc);
    if (bias != nullptr) acc[0] += bias[expert * n + column];
    sum = sycl::fma(weights == nullptr ? 1.0f : weights[slot], acc[0], sum);
  }
  if (split == 0 && first_column + lane_id() < n) store_converted<kDType>(y, token * n + column, sum);
}
#else
XPU_FP4_KERNEL(2)
gemm_small(XPU_FP4_EXPANDED_PARAMETERS(a), XPU_FP4_STORED_PARAMETERS(w), XPU_FP4_OUTPUT_PARAMETERS, int64_t k,
           uint32_t start_bits) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  XPU_FP4_TO_EXPERT(item.get_global_id(0))
  const uint32_t split = uniform(this_sub_group().get_group_linear_id());
  const int64_t first_row = uniform(static_cast<int64_t>(item.get_global_id(0))) * kTileStride;
  const int64_t first_column = static_cast<int64_t>(item.get_global_id(1)) / (kLanes * kSplit) * kLanes;
  const auto quads = static_cast<uint32_t>(ceil_div(k, kQuadElements));
  const Rows rows = rows_from(XPU_FP4_EXPANDED(a), first_row, m, quads);
  WeightColumn column(XPU_FP4_STORED(w), k, sycl::min(first_column + lane_id(), n - 1), split);
  const int8 start = start_of_lane(start_bits);

  float acc[kOwnRows] = {};
  uint32_t buffer = 0;
#ifdef XPU_FP4_GROUPED
  add_tile(rows, column, static_cast<uint32_t>(k / kBlock), split, start, buffer, acc);
#else
  // The loop is add_tile's, written out: called, it takes one instruction more a round on pvc, which is more than memory's
  // clocks. Experts call it: written out, their largest tile spills on dg2.
  static syclexp::work_group_static<RoundTerms[2]> terms;
  const auto blocks = static_cast<uint32_t>(k / kBlock);
  const uint32_t first_own = split * kOwnRows;
#pragma nounroll
  for (uint32_t first = 0; first < quads; first += kSplit) {
    const uint32_t quad = first + split;
    const auto all_terms = (LocalWords)&terms[buffer][0][0][0];
    const LocalWords own_terms = all_terms + split * kTermsStride;
    if (quad < quads) {
      const WeightQuad weights(column, blocks - quad * kQuad);
      if constexpr (kFetchesAhead) {
        column.step(kSplit);
        if (quad + kSplit < quads) column.prefetch();
      }
      uint32_t exponents[kGroups];
      rows.load_exponents(quad, exponents);
      if (any_outside_of_window(exponents, weights.exponents)) {
        store_terms<kGeneralLevel>(rows, exponents, weights, quad, start, own_terms);
      } else {
        store_terms<kBlockLevel>(rows, exponents, weights, quad, start, own_terms);
      }
    } else {
      const float zeros[kUnitRows] = {};  // which change no sum: none is -0
#pragma unroll
      for (int unit = 0; unit < kRowUnits; ++unit) store_unit(own_terms, unit, zeros);
    }
    barrier();
    if (first_own < kRows) {
      float own[kSplit][kOwnRows];
      if constexpr (kQuadsTogether) {
        load_quads(all_terms, first_own, own);
      } else {
#pragma unroll
        for (int q = 0; q < kSplit; ++q) load_rows(all_terms + (q * kRows + first_own) * kLanes, own[q]);
      }
#pragma unroll
      for (int q = 0; q < kSplit; ++q) {
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) acc[i] += own[q][i];
      }
    }
    if constexpr (!kFetchesAhead) column.step(kSplit);
    buffer ^= 1;  // the next round writes what the one before has read: one barrier is enough
  }
#endif
  const Output output{XPU_FP4_OUTPUT};
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    const uint32_t row = split * kOwnRows + i;
    if (row < rows.codes.height) output.store_row(acc[i], first_row + row, first_column + lane_id());
  }
}
#endif
