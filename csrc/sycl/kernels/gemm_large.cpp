// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8 for many rows: Y [M, N] = A x W^T + bias over expanded operands (layout.hpp), the bits of format/accumulate.h.
//
// A sub-group computes 8 * XPU_FP4_ROW_UNITS rows x kLanes * XPU_FP4_COLUMN_UNITS columns: the columns of a quad stay in
// registers, the rows pass 8 at a time. Its level (layout.hpp) decides how each quad is summed (quad_sum.hpp); on the near
// level its blocks are loaded in that order. Macros: XPU_FP4_FORMAT (of A), XPU_FP4_ROW_UNITS, XPU_FP4_COLUMN_UNITS,
// XPU_FP4_DTYPE (Y's), XPU_FP4_BLOCK_2D, XPU_FP4_REGISTERS.
#include "operands.hpp"
#include "output.hpp"
#include "quad_sum.hpp"

using namespace xpu_fp4;

constexpr int kRowUnits = XPU_FP4_ROW_UNITS, kColumnUnits = XPU_FP4_COLUMN_UNITS;
constexpr int kTileRows = kRowUnit * kRowUnits;
constexpr bool kHasNear = kBlock2D && kFormat == Format::mxfp4;
constexpr int kUnitsPerGroup = kLanes / kRowUnit;  // row units that share a word of exponents per lane

struct Tile {
  ManyRowCodes rows;
  GlobalWords row_exponents;  // of the tile's first group
  ColumnCodes<kColumnUnits> columns;
  GlobalWords column_exponents;
  uint32_t quads;
  int8 start;
};

/// acc += the quad's share of 8 rows x kLanes columns.
template <int level>
XPU_FP4_STEP void add_unit(const Tile& tile, const RowFragment (&a)[kQuad], const int8 (&b)[kQuad],
                           const RowScales<level>& rows, const ColumnScales<level>& columns, int first_row, float8& acc) {
  if constexpr (level == kNearLevel) {
    const float8 terms = near_terms(a, b, tile.start, rows, first_row);
#pragma unroll(kUnroll)
    for (int r = 0; r < kRowUnit; ++r) acc[r] = sycl::fma(terms[r], columns.scale[0], acc[r]);
  } else {
    const ChainSums<level> sums(a, b, tile.start);
#pragma unroll(kUnroll)
    for (int r = 0; r < kRowUnit; ++r) {
      const float term = quad_term(sums, r, rows, first_row + r, columns);
      acc[r] = level == kGeneralLevel ? acc[r] + term : sycl::fma(term, columns.scale[0], acc[r]);
    }
  }
}

/// acc += one quad of the tile. The block and general levels hold one column unit at a time and read the rows again for the
/// next: their chains and scales take the registers. `order` is the near level's.
template <int level, class... Order>
XPU_FP4_STEP void add_quad_of_tile(const Tile& tile, uint32_t quad, float8 (&acc)[kRowUnits][kColumnUnits],
                                   const Order&... order) {
  constexpr int held = level >= kBlockLevel ? 1 : 2;
#pragma unroll(kUnroll)
  for (int first = 0; first < kColumnUnits; first += held) {
    int8 b[held][kQuad];
#pragma unroll
    for (int j = 0; j < held; ++j) tile.columns.load(first + j, quad, b[j], order...);
    const auto scales_of = [&](int j) {
      return ColumnScales<level>(load_lanes(tile.column_exponents + ((first + j) * tile.quads + quad) * kLanes));
    };
    const ColumnScales<level> columns[2] = {scales_of(0), scales_of(held - 1)};
#pragma unroll(kUnroll)
    for (int group = 0; group < kRowUnits / kUnitsPerGroup; ++group) {
      const RowScales<level> rows(load_lanes(tile.row_exponents + (group * tile.quads + quad) * kLanes), order...);
#pragma unroll(kUnroll)
      for (int i = 0; i < kUnitsPerGroup; ++i) {
        const int unit = group * kUnitsPerGroup + i;
        RowFragment a[kQuad];
        tile.rows.load(unit, quad, a, order...);
#pragma unroll(kUnroll)
        for (int j = 0; j < held; ++j) {
          add_unit<level>(tile, a, b[j], rows, columns[j], unit * kRowUnit, acc[unit][first + j]);
        }
      }
    }
  }
}

struct Levels {
  GlobalWords rows, columns;  // of the tile's first groups
  uint32_t pitch;

  /// Lane i gets the level of the tile in quad `first + i`.
  XPU_FP4_INLINE uint32_t load(uint32_t first) const {
    uint32_t ruled_out = 0;
#pragma unroll
    for (int g = 0; g < kTileRows / kLanes; ++g) ruled_out |= load_lanes(rows + g * pitch + first);
#pragma unroll
    for (int g = 0; g < kColumnUnits; ++g) ruled_out |= load_lanes(columns + g * pitch + first);
    return sycl::ctz(~ruled_out);
  }
};

XPU_FP4_KERNEL(2)
gemm_large(XPU_FP4_EXPANDED_PARAMETERS(a), XPU_FP4_EXPANDED_PARAMETERS(b), XPU_FP4_OUTPUT_PARAMETERS, uint32_t quads,
           uint32_t start_bits) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t first_row = uniform(static_cast<int64_t>(item.get_global_id(0))) * kTileRows;
  const int64_t first_column = uniform(static_cast<int64_t>(item.get_global_id(1)) / kLanes) * (kColumnUnits * kLanes);
  if (first_row >= m || first_column >= n) return;
  XPU_FP4_FIND_EXPERT(item.get_global_id(0))
  const uint32_t pitch = round_up(quads, uint32_t{kLanes});
#ifdef XPU_FP4_GROUPED
  const uint64_t row_group = first_row / kLanes, column_group = (expert * n + first_column) / kLanes;
#else
  const uint64_t row_group = first_row / kLanes, column_group = first_column / kLanes;
#endif

  Tile tile;
  tile.quads = quads;
  const auto rows = static_cast<uint32_t>(sycl::min(m - first_row, int64_t{kTileRows}));
  tile.rows = ManyRowCodes({(GlobalBytes)a_codes + uint64_t(first_row) * quads * kQuadElements, quads, rows});
  tile.row_exponents = (GlobalWords)a_exponents + row_group * quads * kLanes;
  tile.column_exponents = (GlobalWords)b_exponents + column_group * quads * kLanes;
  tile.columns = {(GlobalBytes)b_codes + column_group * quads * (kQuad * kColumnFragmentBytes), quads};
  tile.start = start_of_lane(start_bits);
  const Levels levels = {(GlobalWords)a_levels + row_group * pitch, (GlobalWords)b_levels + column_group * pitch, pitch};

  // The sub-groups of a work-group share the rows, or the columns, of their tiles; each prefetches a part.
  const uint32_t prefetched_unit = uniform(static_cast<uint32_t>(item.get_local_id(1))) / kLanes % kRowUnits;
  const uint32_t prefetched_group = uniform(static_cast<uint32_t>(item.get_local_id(0))) % kColumnUnits;

  float8 acc[kRowUnits][kColumnUnits];
#pragma unroll
  for (int i = 0; i < kRowUnits; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnUnits; ++j) acc[i][j] = 0.0f;
  }
#pragma nounroll
  for (uint32_t first = 0; first < quads; first += kLanes) {
    const uint32_t lane_level = levels.load(first), last = sycl::min(first + kLanes, quads);
#pragma nounroll
    for (uint32_t quad = first; quad < last; ++quad) {
      tile.rows.prefetch(prefetched_unit, quad + 1);
      tile.columns.prefetch(prefetched_group, quad + 1);
      const uint32_t level = sycl::group_broadcast(this_sub_group(), lane_level, quad - first);
      if (level == kQuadLevel) {
        add_quad_of_tile<kQuadLevel>(tile, quad, acc);
      } else if (level == kPairLevel) {
        add_quad_of_tile<kPairLevel>(tile, quad, acc);
      } else if (kHasNear && level < kBlockLevel) {
        add_quad_of_tile<kNearLevel>(tile, quad, acc, NearOrder(level));
      } else if (level == kBlockLevel) {
        add_quad_of_tile<kBlockLevel>(tile, quad, acc);
      } else {
        add_quad_of_tile<kGeneralLevel>(tile, quad, acc);
      }
    }
  }
  Output{XPU_FP4_OUTPUT}.store_tile<kRowUnits, kColumnUnits>(acc, first_row, first_column);
}
