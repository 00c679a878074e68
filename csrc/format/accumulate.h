// SPDX-License-Identifier: Apache-2.0
// The order in which products become outputs. It is fixed: no dependence on the shape, the tile, the thread count, the device
// or the other rows of the batch. Every + and * below is one float32 rounding; contraction must be off. Host and device.
#pragma once
#include <cstdint>

#include "block.h"

namespace xpu_fp4 {

/// Blocks that are summed pairwise before they join the accumulator.
constexpr int kQuad = 4;

/// Integer dot product of two blocks, sum of (2a)(2w): exact, |d| <= 32 * 12 * 12 = 4608.
constexpr int block_dot(const uint8_t* a, const uint8_t* w) {
  int d = 0;
  for (int i = 0; i < kBlockBytes; ++i) {
    d += e2m1::twice(e2m1::low(a[i])) * e2m1::twice(e2m1::low(w[i]));
    d += e2m1::twice(e2m1::high(a[i])) * e2m1::twice(e2m1::high(w[i]));
  }
  return d;
}

/// x * 2^e with a single rounding, for float(integer below 2^13) or any x whose scaling by 2^(e/2) is exact or overflows.
constexpr float scale_by_pow2(float x, int e) {
  // Two factors near the square root, so that the first product is exact and only the second rounds, underflows or
  // overflows. Below 2^-200 every product is a zero anyway, and both factors stay normal floats.
  const int clamped = e < -200 ? -200 : e, half = clamped >> 1;
  return x * pow2(half) * pow2(clamped - half);
}

/// W4A4: d * 2^(ea + ew - 2) rounded once to float32; NaN if either scale is NaN.
constexpr float block_product(int d, uint8_t a_scale, uint8_t w_scale) {
  const float p = scale_by_pow2(static_cast<float>(d), int{a_scale} + int{w_scale} - (2 * e8m0::kBias + 2));
  return a_scale == e8m0::kNan || w_scale == e8m0::kNan ? float_of(kNanBits) : p;
}

/// Adds four consecutive blocks (K = 128) to the accumulator; missing blocks of the last quad are +0.
constexpr float add_quad(float acc, float p0, float p1, float p2, float p3) { return acc + ((p0 + p1) + (p2 + p3)); }

/// W4A16: the products x * (2w) of a block are summed as four runs of eight, the runs pairwise. That keeps the error under
/// 2^-22 sqrt(K) sum |x w| for every K up to 2^18 and lets both CPU backends give the same bits.
constexpr int kRun = 8;
constexpr float add_runs(float s0, float s1, float s2, float s3) { return (s0 + s1) + (s2 + s3); }

/// W4A16: sum of a block in units of its scale / 2 -> its share of the output; NaN if the scale is NaN.
constexpr float block_share(float sum, uint8_t w_scale) {
  // pow2(e - 1) would be subnormal for the smallest scales: two normal factors.
  const int e = e8m0::exponent(w_scale) - 1, half = e / 2;
  return w_scale == e8m0::kNan ? float_of(kNanBits) : sum * pow2(half) * pow2(e - half);
}

}  // namespace xpu_fp4
