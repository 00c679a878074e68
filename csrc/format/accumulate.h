// SPDX-License-Identifier: Apache-2.0
// The order in which products become outputs. It is fixed: no dependence on the shape, the tile, the thread count, the device
// or the other rows of the batch. Every + and * below is one float32 rounding; contraction must be off. Host and device.
#pragma once
#include <cstdint>

#include "block.h"
#include "formats.h"

namespace xpu_fp4 {

/// Blocks that are summed pairwise before they join the accumulator: a quad, K = 128.
constexpr int kQuad = 4;
constexpr int kQuadElements = kQuad * kBlock;
constexpr int kQuadBytes = kQuadElements / 2;  // of packed codes

/// Integer dot product of two blocks, sum of (2a)(2w): exact, |d| <= 32 * 12 * 12 = 4608.
constexpr int block_dot(const uint8_t* a, const uint8_t* w) {
  int d = 0;
  for (int i = 0; i < kBlockBytes; ++i) {
    d += e2m1::twice(e2m1::low(a[i])) * e2m1::twice(e2m1::low(w[i]));
    d += e2m1::twice(e2m1::high(a[i])) * e2m1::twice(e2m1::high(w[i]));
  }
  return d;
}

/// Integer dot product of a block of MXINT8 activations, sum of c (2w): |d| <= 32 * 128 * 12 = 49152.
constexpr int block_dot(const int8_t* a, const uint8_t* w) {
  int d = 0;
  for (int i = 0; i < kBlockBytes; ++i) {
    d += a[2 * i] * e2m1::twice(e2m1::low(w[i]));
    d += a[2 * i + 1] * e2m1::twice(e2m1::high(w[i]));
  }
  return d;
}

/// A row of A brings this to a block's product: scale * rest = 2^ea for MXFP4 and 2^(ea - 5) for MXINT8, whose integers are
/// that much finer. It is split so that an integer below 2^16 times scale is exact in float32: no overflow (scale <= 2^100),
/// and no bit below 2^-149 (scale >= 2^-132).
struct RowFactor {
  float scale;
  float rest;  // 1 up to 2^100
};
constexpr RowFactor row_factor(Format format, uint8_t a_scale) {
  if (a_scale == e8m0::kNan) return {float_of(kNanBits), 1.0f};
  const int e = e8m0::exponent(a_scale) + integer_exponent(format) - integer_exponent(Format::mxfp4);
  const int kept = e < 100 ? e : 100;
  return {pow2(kept), pow2(e - kept)};
}

/// A row of W brings this: 2^(ew - 2), possibly subnormal; the -2 undoes the two factors of two in an MXFP4 integer product.
constexpr float weight_factor(uint8_t w_scale) {
  return w_scale == e8m0::kNan ? float_of(kNanBits) : pow2(e8m0::exponent(w_scale) - 2);
}

/// W4A4: d * 2^(ea + ew - 2), W4A8: d * 2^(ea + ew - 7), rounded once to float32; NaN if either scale is NaN. The second
/// multiplication is the one that rounds, underflows or overflows; where rest is not 1 the product before it is at least 2^-29,
/// so the third is exact.
constexpr float block_product(float d, RowFactor a, float w) { return d * a.scale * w * a.rest; }

/// Adds four consecutive blocks (K = 128) to the accumulator; missing blocks of the last quad are +0.
constexpr float add_quad(float acc, float p0, float p1, float p2, float p3) { return acc + ((p0 + p1) + (p2 + p3)); }

/// W4A16 in plain C++ and in the portable SYCL kernel: the products x * (2w) of a block are summed as four runs of eight, the
/// runs pairwise. That keeps the error under 2^-22 sqrt(K) sum |x w| for every K up to 2^18, as long as 12 K |x| does not
/// overflow float32 (the scale comes after the sum). Kernels for wider machines have orders of their own within that bound.
constexpr int kRun = 8;
constexpr float add_runs(float s0, float s1, float s2, float s3) { return (s0 + s1) + (s2 + s3); }

/// W4A16: sum of a block of x * (2w) -> its share of the output, in which weight_factor's 2^(ew - 2) lacks one factor of two.
constexpr float block_share(float sum, float w) { return sum * 2.0f * w; }

}  // namespace xpu_fp4
