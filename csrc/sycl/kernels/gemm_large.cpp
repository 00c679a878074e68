// SPDX-License-Identifier: Apache-2.0
// W4A4 for many rows: Y [M, N] = A x W^T + bias over expanded operands (layout.hpp), the bits of format/accumulate.h.
//
// A sub-group computes 8 * XPU_FP4_ROW_UNITS rows x 2 * kLanes columns: the columns of a quad stay in registers, the rows pass
// 8 at a time. Cost per output and quad, beside 4 matrix-mads per 8 rows: 2 float instructions where the quad's exponents are
// aligned, 4 where its pairs are, 8 inside of the window, 16 in general, and no integer instruction:
//  * The chain of matrix-mads starts from the bits of 1.5 * 2^23. |d| < 2^22, so the int32 result *is* the float 1.5 * 2^23 + d.
//  * u = fma(that, sa, -1.5 * 2^23 * sa) = d * sa is exact, sa the row's power of two: a scalar operand.
//  * The column's power of two goes into the fma that adds. Sums inside of a quad are kept in units of the first block's; the
//    others enter as ratios. Scaling by a power of two commutes with rounding inside of the window (layout.hpp).
// Macros: XPU_FP4_ROW_UNITS, XPU_FP4_DTYPE (Y's), XPU_FP4_BLOCK_2D, XPU_FP4_REGISTERS.
#include "operands.hpp"
#include "output.hpp"

using namespace xpu_fp4;

constexpr int kRowUnits = XPU_FP4_ROW_UNITS, kColumnUnits = XPU_FP4_COLUMN_UNITS;
constexpr int kTileRows = kRowUnit * kRowUnits;
constexpr int kUnitsPerGroup = kLanes / kRowUnit;  // row units that share a word of exponents per lane
constexpr float kMagic = 12582912.0f;              // 1.5 * 2^23

// Inlining early shares address code among the levels, which costs the tile of 16 lanes its last registers.
#if XPU_FP4_SUB_GROUP == 8
#define XPU_FP4_STEP XPU_FP4_INLINE
#else
#define XPU_FP4_STEP inline
#endif

struct Tile {
  RowCodes rows;
  GlobalWords row_exponents;  // of the tile's first group
  ColumnCodes<kColumnUnits> columns;
  GlobalWords column_exponents;
  uint32_t quads;
  int8 magic;
};

template <int level>
struct Chains {
  static constexpr int count = level == kQuadLevel ? 1 : level == kPairLevel ? 2 : 4;  // per quad
  static constexpr int blocks = kQuad / count;                                         // of a chain
};

XPU_FP4_INLINE uint32_t exponent_of(uint32_t exponents, int block) { return exponents >> (8 * block) & 255u; }
XPU_FP4_INLINE float power(uint32_t biased) { return float_of(biased << 23); }  // 1 .. 254; 255 gives Inf

/// kLanes rows, lane = row: sa, and what takes the magic off.
template <int level>
struct RowScales {
  static constexpr int kChains = Chains<level>::count;
  float scale[kChains], offset[kChains], rest[kChains];

  XPU_FP4_INLINE RowScales(const Tile& tile, uint32_t group, uint32_t quad) {
    const uint32_t exponents = load_lanes(tile.row_exponents + (group * tile.quads + quad) * kLanes);
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      const uint32_t e = exponent_of(exponents, c * Chains<level>::blocks);
      if constexpr (level == kGeneralLevel) {
        // scale * rest, scale <= 2^100 so that d * scale cannot overflow (format/accumulate.h, RowFactor). Selects on bits: as
        // `?:` of floats they became branches.
        const uint32_t kept = e == 255u ? 255u : sycl::min(e, 227u);
        scale[c] = float_of(sycl::max(kept << 23, 0x00400000u));
        rest[c] = power(127u + e - kept);
      } else {
        scale[c] = power(e);  // a NaN scale is Inf here, and Inf - Inf below: rows of NaN stay on the fast levels
      }
      offset[c] = scale[c] * -kMagic;
    }
  }
};

/// kLanes columns, lane = column: a quarter (the operands hold twice the values) of the first scale, and ratios.
template <int level>
struct ColumnScales {
  float scale[Chains<level>::count];

  XPU_FP4_INLINE ColumnScales(const Tile& tile, uint32_t group, uint32_t quad) {
    const uint32_t exponents = load_lanes(tile.column_exponents + (group * tile.quads + quad) * kLanes);
    uint32_t e[kQuad];
#pragma unroll
    for (int b = 0; b < kQuad; ++b) e[b] = exponent_of(exponents, b);
    if constexpr (level == kGeneralLevel) {
#pragma unroll
      // weight_factor(), NaN included, in three integer instructions and one float one.
      for (int b = 0; b < kQuad; ++b) scale[b] = 0.25f * float_of(sycl::max(e[b] << 23, 0x00400000u) | (e[b] + 1) >> 8 << 22);
    } else {
      scale[0] = power(e[0] - 2);
      if constexpr (level == kPairLevel) scale[1] = power(e[2] - e[0] + 127);
      if constexpr (level == kBlockLevel) {
        scale[1] = power(e[1] - e[0] + 127);
        scale[2] = power(e[2] - e[0] + 127);
        scale[3] = power(e[3] - e[2] + 127);
      }
    }
  }
};

/// acc += the quad's share of 8 rows x kLanes columns.
template <int level>
XPU_FP4_STEP void add_unit(const Tile& tile, const RowFragment (&a)[kQuad], const int8 (&b)[kQuad],
                           const RowScales<level>& rows, const ColumnScales<level>& columns, int first_row, float8& acc) {
  constexpr int chains = Chains<level>::count, blocks = Chains<level>::blocks;
  int8 sum[chains];
#pragma unroll(kUnroll)
  for (int c = 0; c < chains; ++c) {
    sum[c] = tile.magic;
#pragma unroll(kUnroll)
    for (int i = c * blocks; i < (c + 1) * blocks; ++i) sum[c] = matrix_mad(a[i], b[i], sum[c]);
  }
  const float(&s)[chains] = columns.scale;
#pragma unroll(kUnroll)
  for (int r = 0; r < kRowUnit; ++r) {
    float u[chains];
#pragma unroll
    for (int c = 0; c < chains; ++c) {
      u[c] = sycl::fma(float_of(sum[c][r]), of_lane(rows.scale[c], first_row + r), of_lane(rows.offset[c], first_row + r));
    }
    if constexpr (level == kQuadLevel) acc[r] = sycl::fma(u[0], s[0], acc[r]);
    if constexpr (level == kPairLevel) acc[r] = sycl::fma(sycl::fma(u[1], s[1], u[0]), s[0], acc[r]);
    if constexpr (level == kBlockLevel) {
      const float low = sycl::fma(u[1], s[1], u[0]), high = sycl::fma(u[3], s[3], u[2]);
      acc[r] = sycl::fma(sycl::fma(high, s[2], low), s[0], acc[r]);
    }
    if constexpr (level == kGeneralLevel) {
      float p[kQuad];
#pragma unroll
      for (int i = 0; i < kQuad; ++i) p[i] = u[i] * s[i] * of_lane(rows.rest[i], first_row + r);
      acc[r] = add_quad(acc[r], p[0], p[1], p[2], p[3]);
    }
  }
}

/// acc += one quad of the tile. The block and general levels hold one column unit at a time and read the rows again for the next:
/// their chains and scales take the registers.
template <int level>
XPU_FP4_STEP void add_quad_of_tile(const Tile& tile, uint32_t quad, float8 (&acc)[kRowUnits][kColumnUnits]) {
  constexpr int held = level >= kBlockLevel ? 1 : 2;
#pragma unroll(kUnroll)
  for (int first = 0; first < kColumnUnits; first += held) {
    int8 b[held][kQuad];
#pragma unroll
    for (int j = 0; j < held; ++j) tile.columns.load(first + j, quad, b[j]);
    const auto scales_of = [&](int j) { return ColumnScales<level>(tile, first + j, quad); };
    const ColumnScales<level> columns[2] = {scales_of(0), scales_of(held - 1)};
#pragma unroll(kUnroll)
    for (int group = 0; group < kRowUnits / kUnitsPerGroup; ++group) {
      const RowScales<level> rows(tile, group, quad);
#pragma unroll(kUnroll)
      for (int i = 0; i < kUnitsPerGroup; ++i) {
        const int unit = group * kUnitsPerGroup + i;
        RowFragment a[kQuad];
        tile.rows.load(unit, quad, a);
#pragma unroll(kUnroll)
        for (int j = 0; j < held; ++j) {
          add_unit<level>(tile, a, b[j], rows, columns[j], unit * kRowUnit, acc[unit][first + j]);
        }
      }
    }
  }
}

struct Levels {
  GlobalBytes rows, columns;  // of the tile's first groups
  uint32_t pitch;

  /// Lane i gets the level of the tile in quad `first + i`.
  XPU_FP4_INLINE uint32_t load(uint32_t first) const {
    uint32_t level = 0;
#pragma unroll
    for (int g = 0; g < kTileRows / kLanes; ++g) level = sycl::max(level, load_lanes(rows + g * pitch + first));
#pragma unroll
    for (int g = 0; g < kColumnUnits; ++g) level = sycl::max(level, load_lanes(columns + g * pitch + first));
    return level;
  }
};

// `magic` is 0x4B400000, an argument, and made to look different from lane to lane: a constant, or a uniform value, would be
// written to eight registers before every chain.
XPU_FP4_KERNEL(2)
gemm_large(const uint8_t* a, const uint32_t* a_exponents, const uint8_t* a_levels, const uint8_t* b,
           const uint32_t* b_exponents, const uint8_t* b_levels, const float* bias, int64_t bias_row_stride,
           int64_t bias_column_stride, void* y, int64_t m, int64_t n, uint32_t quads, uint32_t magic) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t first_row = uniform(static_cast<int64_t>(item.get_global_id(0))) * kTileRows;
  const int64_t first_column = uniform(static_cast<int64_t>(item.get_global_id(1)) / kLanes) * (kColumnUnits * kLanes);
  if (first_row >= m || first_column >= n) return;
  const uint32_t pitch = (quads + kLanes - 1) / kLanes * kLanes;
  const uint64_t row_group = first_row / kLanes, column_group = first_column / kLanes;

  Tile tile;
  tile.quads = quads;
  const auto rows = static_cast<uint32_t>(sycl::min(m - first_row, int64_t{kTileRows}));
  tile.rows = {(GlobalBytes)a + uint64_t(first_row) * quads * kQuadElements, quads, rows};
  tile.row_exponents = (GlobalWords)a_exponents + row_group * quads * kLanes;
  tile.column_exponents = (GlobalWords)b_exponents + column_group * quads * kLanes;
  tile.columns = {(GlobalBytes)b + column_group * quads * (kQuad * kColumnFragmentBytes), quads};
  tile.magic = static_cast<int>(magic + lane_id() * (magic & 1));
  const Levels levels = {(GlobalBytes)a_levels + row_group * pitch, (GlobalBytes)b_levels + column_group * pitch, pitch};

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
      } else if (level == kBlockLevel) {
        add_quad_of_tile<kBlockLevel>(tile, quad, acc);
      } else {
        add_quad_of_tile<kGeneralLevel>(tile, quad, acc);
      }
    }
  }
  Output{bias, bias_row_stride, bias_column_stride, y, m, n}.store_tile<kRowUnits, kColumnUnits>(acc, first_row, first_column);
}
