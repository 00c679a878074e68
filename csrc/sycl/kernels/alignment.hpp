// SPDX-License-Identifier: Apache-2.0
// The rules of the expanded form (layout.hpp): which exponents a row's quad gets, and which levels it rules out. Host and
// device: the pre-pass decides by them, and tools/level_mix.py asks how often.
#pragma once
#include "format/e8m0.h"
#include "layout.hpp"

namespace xpu_fp4 {

/// Says what an operand is to a product.
struct AlignmentRule {
  bool columns;    // W, else A
  bool has_near;   // the product's kernel has the near level
  uint32_t shift;  // by which codes may grow: 12 << 3 = 96 fits an int8, MXINT8's codes fill it
  Window window;
};
/// With the near level's addresses gemm_large would not fit in the registers of devices without 2D loads (`row_fragments`),
/// whose block level is fast enough; MXINT8's sums are too large for it.
constexpr AlignmentRule alignment_rule(Arrangement arrangement, Format format) {
  const bool columns = arrangement == Arrangement::column_fragments, mxfp4 = format == Format::mxfp4;
  return {columns, arrangement != Arrangement::row_fragments && mxfp4, mxfp4 ? 3u : 0u,
          columns ? kWeightWindow : activations_window(format)};
}

/// How a quad is expanded: every block shifted left by scale - exponent.
struct Alignment {
  uint32_t exponent[kQuad];
  uint32_t levels;  // that it rules out
};

struct ScaleRange {
  uint32_t low = 255, high = 0;
  constexpr void add(uint32_t scale) {
    low = low < scale ? low : scale;
    high = high > scale ? high : scale;
  }
  constexpr bool empty() const { return low > high; }
  constexpr bool within(uint32_t distance) const { return high - low <= distance; }  // not if empty
};

/// The near levels that a row of A rules out (quad_sum.hpp says why): `scale`, within 8 from `least` + 3 on, is what blocks'
/// sums are multiples of; `exponent`, at least `least`, is the unit of their chains.
constexpr uint32_t not_near(const uint32_t (&scale)[kQuad], const uint32_t (&exponent)[kQuad], uint32_t least) {
  uint32_t most[kQuad] = {}, unit[kQuad] = {}, applies = 0;
#pragma unroll
  for (int b = 0; b < kQuad; ++b) {
    most[b] = 3u << (scale[b] - least);
    unit[b] = 1u << (exponent[b] - least);
  }
#pragma unroll
  for (uint32_t level = kNearLevel; level < kBlockLevel; ++level) {
    const auto [first, second, third, fourth] = NearOrder(level).block;
    if (first == second) continue;
    const bool exact = unit[second] + unit[third] <= most[first] && unit[third] <= most[second];
    if (exact && exponent[third] == exponent[fourth]) applies |= 1u << level;
  }
  return kNoNearLevel & ~applies;
}

/// Aligns a quad, from its scale bytes and where blocks are zeros: those take any exponent, since their products are +0 anyhow.
/// All other blocks take the smallest exponent that fits, so that their integer sums share the largest power of two; the near
/// level relies on it.
constexpr Alignment align(const AlignmentRule& rule, const uint32_t (&scales)[kQuad], const bool (&zero)[kQuad]) {
  ScaleRange all;
  bool nan = false;
#pragma unroll
  for (int b = 0; b < kQuad; ++b) {
    nan |= scales[b] == e8m0::kNan;
    if (!zero[b]) all.add(scales[b]);
  }
  if (all.empty()) all.add(e8m0::kBias);
  Alignment result = {};
  uint32_t scale[kQuad] = {}, (&exponent)[kQuad] = result.exponent;
  const bool outside = all.low < rule.window.low || all.high > rule.window.high;
#pragma unroll
  for (int b = 0; b < kQuad; ++b) exponent[b] = scale[b] = nan ? uint32_t{e8m0::kNan} : zero[b] ? all.low : scales[b];
  if (nan || outside) {
    // A row of A that is NaN becomes so on every level (quad_sum.hpp); a column does on the general one.
    result.levels = nan && !rule.columns ? 0 : kOnlyGeneral;
    return result;
  }
  // The blocks of a column's pair may share an exponent where not all four can. A row of A has low blocks, and high ones with
  // outliers in the same channels as other rows.
  ScaleRange part[2];
  bool second[kQuad] = {};
#pragma unroll
  for (int b = 0; b < kQuad; ++b) {
    second[b] = rule.columns ? !all.within(rule.shift) && b >= 2 : scale[b] - all.low > rule.shift;
    if (!zero[b] && !second[b]) part[0].add(scale[b]);
    if (!zero[b] && second[b]) part[1].add(scale[b]);
  }
#pragma unroll
  for (int b = 0; b < kQuad; ++b) {
    const ScaleRange own = second[b] ? part[1] : part[0];
    exponent[b] = (own.within(rule.shift) ? own.high : scale[b]) - rule.shift;
  }
  const uint32_t spread = all.high - all.low;
  if (!all.within(rule.shift)) {
    result.levels = 1u << kQuadLevel;
    if (exponent[0] != exponent[1] || exponent[2] != exponent[3]) result.levels |= 1u << kPairLevel;
  }
  if (!rule.has_near || spread > (rule.columns ? 2u : 8u)) {
    result.levels |= kNoNearLevel;
  } else if (!rule.columns && !all.within(rule.shift)) {
    result.levels |= not_near(scale, exponent, all.low - rule.shift);
  }
  return result;
}

}  // namespace xpu_fp4
