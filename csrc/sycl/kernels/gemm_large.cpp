// SPDX-License-Identifier: Apache-2.0
// W4A4 and W4A8 for many rows: Y [M, N] = A x W^T + bias over expanded operands (layout.hpp), the bits of format/accumulate.h.
//
// A sub-group computes 8 * XPU_FP4_ROW_UNITS rows x kLanes * XPU_FP4_COLUMN_UNITS columns: the columns of a quad stay in
// registers, the rows pass 8 at a time. Its level (layout.hpp) decides how each quad is summed (quad_sum.hpp); on the near
// level its blocks are loaded in that order. Work-groups are walked down a few rows of them, then to the next columns, so that
// the last cache serves both operands (docs/GPU.md). Macros: XPU_FP4_FORMAT (of A), XPU_FP4_ROW_UNITS, XPU_FP4_COLUMN_UNITS,
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

/// acc += the terms of 8 rows x kLanes columns.
template <int level>
XPU_FP4_STEP void add_terms(const ChainSums<level>& sums, const RowScales<level>& rows, const ColumnScales<level>& columns,
                            int first_row, float8& acc) {
#pragma unroll(kUnroll)
  for (int r = 0; r < kRowUnit; ++r) {
    const float term = quad_term(sums, r, rows, first_row + r, columns);
    acc[r] = level == kGeneralLevel ? acc[r] + term : sycl::fma(term, columns.scale[0], acc[r]);
  }
}

/// acc += the quad's share of 8 rows x kLanes columns.
template <int level>
XPU_FP4_STEP void add_unit(const Tile& tile, const RowFragment (&a)[kQuad], const int8 (&b)[kQuad],
                           const RowScales<level>& rows, const ColumnScales<level>& columns, int first_row, float8& acc) {
  if constexpr (level == kNearLevel) {
    const float8 terms = near_terms(a, b, tile.start, rows, first_row);
#pragma unroll(kUnroll)
    for (int r = 0; r < kRowUnit; ++r) acc[r] = sycl::fma(terms[r], columns.scale[0], acc[r]);
  } else {
    add_terms<level>(ChainSums<level>(a, b, tile.start), rows, columns, first_row, acc);
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

/// acc += one aligned quad of the tile. The matrix unit gets a row unit's chains before the terms of the unit before are added,
/// and each half of the next unit's rows is loaded as soon as its registers are free, so that a thread seldom waits for either.
XPU_FP4_STEP void add_aligned_quad_of_tile(const Tile& tile, uint32_t quad, float8 (&acc)[kRowUnits][kColumnUnits]) {
  constexpr int level = kQuadLevel;
  int8 b[kColumnUnits][kQuad];
  ColumnScales<level> columns[kColumnUnits];
#pragma unroll
  for (int j = 0; j < kColumnUnits; ++j) {
    tile.columns.load(j, quad, b[j]);
    columns[j] = ColumnScales<level>(load_lanes(tile.column_exponents + (j * tile.quads + quad) * kLanes));
  }
  RowFragment a[kQuad];
  tile.rows.load(0, quad, a);
  RowScales<level> rows[2];                // of a unit's group, and of the next
  ChainSums<level> sums[2][kColumnUnits];  // of a unit, and of the next
#pragma unroll(kUnroll)
  for (int unit = 0; unit <= kRowUnits; ++unit) {
    const int group = unit / kUnitsPerGroup;
    if (unit < kRowUnits && unit % kUnitsPerGroup == 0) {
      rows[group % 2] = RowScales<level>(load_lanes(tile.row_exponents + (group * tile.quads + quad) * kLanes));
    }
    if (unit < kRowUnits) {
      auto& begun = sums[unit % 2];
#pragma unroll(kUnroll)
      for (int j = 0; j < kColumnUnits; ++j) begun[j].sum[0] = tile.start;
#pragma unroll(kUnroll)
      for (int half = 0; half < 2; ++half) {
#pragma unroll(kUnroll)
        for (int j = 0; j < kColumnUnits; ++j) {
#pragma unroll(kUnroll)
          for (int i = 2 * half; i < 2 * half + 2; ++i) begun[j].sum[0] = matrix_mad(a[i], b[j][i], begun[j].sum[0]);
        }
        if (unit + 1 < kRowUnits) tile.rows.load_half(unit + 1, quad, half, a + 2 * half);
      }
    }
    if (unit > 0) {
      const int before = unit - 1;
#pragma unroll
      for (int j = 0; j < kColumnUnits; ++j) {
        add_terms<level>(sums[before % 2][j], rows[before / kUnitsPerGroup % 2], columns[j], before * kRowUnit, acc[before][j]);
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

/// The sub-groups of a work-group share the rows, or the columns, of their tiles: of what `sharing` of them have in common,
/// number `own` prefetches every sharing-th unit.
struct Prefetched {
  uint32_t own, sharing;

  template <class Codes>
  XPU_FP4_INLINE void prefetch(const Codes& codes, uint32_t units, uint32_t quad) const {
#pragma nounroll
    for (uint32_t unit = own; unit < units; unit += sharing) codes.prefetch(unit, quad);
  }
};

/// Dimensions of the range: panels of rows of work-groups; columns of work-groups, rows of tiles inside; rows of work-groups of
/// a panel, which follow one another, columns of tiles and lanes inside.
XPU_FP4_KERNEL(3)
gemm_large(XPU_FP4_EXPANDED_PARAMETERS(a), XPU_FP4_EXPANDED_PARAMETERS(b), XPU_FP4_OUTPUT_PARAMETERS, uint32_t quads,
           uint32_t start_bits) {
  const auto item = syclext::this_work_item::get_nd_item<3>();
  const Prefetched rows_of_tile = {uniform(static_cast<uint32_t>(item.get_local_id(2)) / kLanes),
                                   static_cast<uint32_t>(item.get_local_range(2)) / kLanes};
  const Prefetched columns_of_tile = {uniform(static_cast<uint32_t>(item.get_local_id(1))),
                                      static_cast<uint32_t>(item.get_local_range(1))};
  const auto panel = static_cast<uint32_t>(item.get_global_id(0));
  const uint32_t row_in_panel = uniform(static_cast<uint32_t>(item.get_global_id(2))) / kLanes / rows_of_tile.sharing;
  const uint32_t group_row = panel * static_cast<uint32_t>(item.get_group_range(2)) + row_in_panel;
  const uint32_t group_column = static_cast<uint32_t>(item.get_global_id(1)) / columns_of_tile.sharing;
  const int64_t row_of_tiles = int64_t{group_row} * columns_of_tile.sharing + columns_of_tile.own;
  const int64_t column_of_tiles = int64_t{group_column} * rows_of_tile.sharing + rows_of_tile.own;
  const int64_t first_row = row_of_tiles * kTileRows, first_column = column_of_tiles * (kColumnUnits * kLanes);
  if (first_row >= m || first_column >= n) return;
  XPU_FP4_FIND_EXPERT(row_of_tiles)
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
      rows_of_tile.prefetch(tile.rows, kRowUnits, quad + 1);
      columns_of_tile.prefetch(tile.columns, kColumnUnits, quad + 1);
      const uint32_t level = sycl::group_broadcast(this_sub_group(), lane_level, quad - first);
      if (level == kQuadLevel) {
        if constexpr (kBlock2D) {
          add_aligned_quad_of_tile(tile, quad, acc);
        } else {
          add_quad_of_tile<kQuadLevel>(tile, quad, acc);  // no registers for more
        }
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
