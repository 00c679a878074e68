// SPDX-License-Identifier: Apache-2.0
// Device code: the sum of one quad, with the bits of format/accumulate.h, from the integers of the matrix unit. Beside the
// matrix-mads, an output and quad cost 2 float instructions where the quad's exponents are aligned, 4 where its pairs are or
// the rows' are near, 8 inside of the window, 16 in general (layout.hpp), and no integer instruction:
//  * A chain of matrix-mads starts from the bits of m = 1.25 * 2^23. |d| < 2^21, so the int32 result *is* the float m + d: four
//    blocks sum to at most 128 * 96 * 96 with MXFP4 activations, 128 * 128 * 96 = 1572864 with MXINT8, whose codes may be -128.
//  * u = fma(that, sa, -m * sa) = d * sa is exact; sa is the row's power of two, a scalar operand.
//  * The column's power of two goes into the fma that adds. Sums inside of a quad are kept in units of the first block's; the
//    others enter as ratios. Scaling by a power of two commutes with rounding inside of the window.
//  * Both operands are integers that are too large by a power of two: 2^2 together for MXFP4 activations, 2^7 for MXINT8. It
//    leaves with the column's first scale, which is normal inside of the window, and on the general level exact: 2^-134 at
//    least.
//  * The general level's first product, d * 2^min(ea, 100) with |d| < 2^19, is finite and no bit of it is below 2^-127. The
//  next
//    rounds; where the third factor is not 1, it is at least 2^-34 and so the third is exact.
//
// Near, with MXFP4 activations: a column's scales are within 2 powers of two of each other, a row's within 8. So a quad's four
// products are multiples of some unit, and their sum is at most 4608 * (3 * 2^10 + 1) < 2^24 of it: the definition rounds none
// of its three sums, and the order is free. With blocks f, g, and h and i in one chain,
//   x = fma(m + df, sf, -m (sf + sg + sh)) = df sf - m (sg + sh)
//   y = fma(m + dg, sg, x)                 = df sf + dg sg - m sh
//   z = fma(m + dh, sh, y)                 = the sum
// is exact if x and y are. Let F and G be the scales of f and g, which their shifts have reduced to sf and sg. All codes of a
// column are shifted by at least 1, so df sf is a multiple of 2F, and at most 8 * 4608 F; what not_near (alignment.hpp) demands
// of a row leaves 24 bits for both:
//   sg + sh <= 3F,       so |x| <= 1.25 * 2^23 * 3F + 8 * 4608 F              < 2^24 * 2F
//   sh <= 2F and <= 2G,  so |y| <= 1.25 * 2^23 * 2U + 8 * 4608 * (2^8 + 1) U  < 2^24 * 2U, U the lesser of F and G
#pragma once
#include "operands.hpp"

namespace xpu_fp4 {

// Inlining early shares address code among the levels, which costs tiles of 16 lanes their last registers.
#if XPU_FP4_SUB_GROUP == 8
#define XPU_FP4_STEP XPU_FP4_INLINE
#else
#define XPU_FP4_STEP inline
#endif

constexpr float kStart = float_of(kStartBits);

/// Both operands' integers are too large by 2^this.
constexpr int kTooLarge = -(integer_exponent(kFormat) + integer_exponent(Format::mxfp4));

/// Its bits, from a kernel's argument, and made to look different from lane to lane: a constant, or a uniform value,
/// would be written to eight registers before every chain.
XPU_FP4_INLINE int8 start_of_lane(uint32_t bits) { return static_cast<int>(bits + lane_id() * (bits & 1)); }

template <int level>
constexpr int kChains = level == kQuadLevel   ? 1
                        : level == kPairLevel ? 2
                                              : 4;  // of a quad

XPU_FP4_INLINE uint32_t exponent_of(uint32_t exponents, uint32_t block) { return exponents >> (8 * block) & 255u; }
XPU_FP4_INLINE float power(uint32_t biased) { return float_of(biased << 23); }  // 1 .. 254; 255 gives Inf

/// The sums of a quad's chains for 8 rows, as floats that are kStart too large.
template <int level>
struct ChainSums {
  static_assert(level != kNearLevel, "near_terms() has chains of its own");
  int8 sum[kChains<level>];

  ChainSums() = default;
  XPU_FP4_INLINE ChainSums(const RowFragment (&a)[kQuad], const int8 (&b)[kQuad], const int8& start) {
    constexpr int blocks = kQuad / kChains<level>;
#pragma unroll(kUnroll)
    for (int c = 0; c < kChains<level>; ++c) {
      sum[c] = start;
#pragma unroll(kUnroll)
      for (int i = c * blocks; i < (c + 1) * blocks; ++i) sum[c] = matrix_mad(a[i], b[i], sum[c]);
    }
  }
};

/// Holds, of kLanes rows, lane = row, sa and what takes the start off.
template <int level>
struct RowScales {
  float scale[kChains<level>], offset[kChains<level>], rest[kChains<level>];

  RowScales() = default;
  XPU_FP4_INLINE explicit RowScales(uint32_t exponents) {
#pragma unroll
    for (int c = 0; c < kChains<level>; ++c) {
      const uint32_t e = exponent_of(exponents, c * (kQuad / kChains<level>));
      if constexpr (level == kGeneralLevel) {
        // scale * rest, scale <= 2^100 so that d * scale cannot overflow (RowFactor in format/accumulate.h).
        const uint32_t kept = e == 255u ? 255u : sycl::min(e, 227u);
        scale[c] = float_of(sycl::max(kept << 23, 0x00400000u));
        rest[c] = power(127u + e - kept);
      } else {
        scale[c] = power(e);  // a NaN scale is Inf here, and Inf - Inf below: rows of NaN stay on the fast levels
      }
      offset[c] = scale[c] * -kStart;
    }
  }
};

template <>
struct RowScales<kNearLevel> {
  float scale[3], offset;

  XPU_FP4_INLINE RowScales(uint32_t exponents, const NearOrder& order) {
#pragma unroll
    for (int c = 0; c < 3; ++c) scale[c] = power(exponent_of(exponents, order.block[c]));
    offset = (scale[0] + scale[1] + scale[2]) * -kStart;
  }
};

/// Holds, of kLanes columns, lane = column, the first scale, over 2^kTooLarge, and ratios.
template <int level>
struct ColumnScales {
  float scale[kChains<level>];

  ColumnScales() = default;
  XPU_FP4_INLINE explicit ColumnScales(uint32_t exponents) {
    uint32_t e[kQuad];
#pragma unroll
    for (int b = 0; b < kQuad; ++b) e[b] = exponent_of(exponents, b);
    if constexpr (level == kGeneralLevel) {
#pragma unroll
      for (int b = 0; b < kQuad; ++b) {
        // e8m0::value() in three instructions: 2^-127 has the bits 0x00400000, and e + 1 reaches 256 for NaN only.
        const float value = float_of(sycl::max(e[b] << 23, 0x00400000u) | (e[b] + 1) >> 8 << 22);
        scale[b] = value * pow2(-kTooLarge);
      }
    } else {
      scale[0] = power(e[0] - kTooLarge);
      if constexpr (level == kPairLevel) scale[1] = power(e[2] - e[0] + 127);
      if constexpr (level == kBlockLevel) {
        scale[1] = power(e[1] - e[0] + 127);
        scale[2] = power(e[2] - e[0] + 127);
        scale[3] = power(e[3] - e[2] + 127);
      }
    }
  }
};

/// A column's blocks share their exponent on the near level.
template <>
struct ColumnScales<kNearLevel> : ColumnScales<kQuadLevel> {
  using ColumnScales<kQuadLevel>::ColumnScales;
};

/// The near level's sums for 8 rows, from operands in its order. A chain ends before the next begins, so that one takes
/// registers.
XPU_FP4_INLINE float8 near_terms(const RowFragment (&a)[kQuad], const int8 (&b)[kQuad], const int8& start,
                                 const RowScales<kNearLevel>& rows, int first_row) {
  float8 sum;
#pragma unroll(kUnroll)
  for (int r = 0; r < kRowUnit; ++r) sum[r] = of_lane(rows.offset, first_row + r);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    int8 chain = matrix_mad(a[c], b[c], start);
    if (c == 2) chain = matrix_mad(a[3], b[3], chain);
#pragma unroll(kUnroll)
    for (int r = 0; r < kRowUnit; ++r) {
      sum[r] = sycl::fma(float_of(chain[r]), of_lane(rows.scale[c], first_row + r), sum[r]);
    }
  }
  return sum;
}

/// The quad's sum for row r of 8, the lane's column: in units of columns.scale[0], but on the general level.
template <int level>
XPU_FP4_INLINE float quad_term(const ChainSums<level>& sums, int r, const RowScales<level>& rows, int row,
                               const ColumnScales<level>& columns) {
  const float (&s)[kChains<level>] = columns.scale;
  float u[kChains<level>];
#pragma unroll
  for (int c = 0; c < kChains<level>; ++c) {
    u[c] = sycl::fma(float_of(sums.sum[c][r]), of_lane(rows.scale[c], row), of_lane(rows.offset[c], row));
  }
  if constexpr (level == kQuadLevel) return u[0];
  if constexpr (level == kPairLevel) return sycl::fma(u[1], s[1], u[0]);
  if constexpr (level == kBlockLevel) {
    return sycl::fma(sycl::fma(u[3], s[3], u[2]), s[2], sycl::fma(u[1], s[1], u[0]));
  }
  if constexpr (level == kGeneralLevel) {
    float p[kQuad];
#pragma unroll
    for (int b = 0; b < kQuad; ++b) p[b] = u[b] * s[b] * of_lane(rows.rest[b], row);
    return (p[0] + p[1]) + (p[2] + p[3]);
  }
}

}  // namespace xpu_fp4
