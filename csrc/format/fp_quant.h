// SPDX-License-Identifier: Apache-2.0
// FP-Quant's two rules for the scale of a block, as its kernels (QuTLASS) have them, so that its checkpoints can be read:
//   abs_max  the exponent of amax + 1e-8. Elements are multiplied by 3 before they are encoded: at most 3 * 2 = 6 in units of
//            the scale. So codes and scales stand for 3 times the elements.
//   quest    the exponent of c * sigma + 1e-8, sigma^2 = mean(x^2) - mean(x)^2, c = 2.92247856 / 6; what lies beyond 6 in units
//            of the scale saturates. Here 1e-8 is a lower bound, not an addend, and no root is taken: the exponent of a root is
//            half the exponent of the square.
// Both bound the scale below by 2^-27, the exponent of 1e-8. Every + and * is one float32 rounding. Host and device.
#pragma once
#include <cstdint>

#include "e8m0.h"

namespace xpu_fp4::fp_quant {

constexpr bool is_rule(ScaleMode mode) { return mode == ScaleMode::abs_max || mode == ScaleMode::quest; }

/// Codes and scales stand for so many times the elements.
constexpr float global_scale(ScaleMode mode) { return mode == ScaleMode::abs_max ? 3.0f : 1.0f; }

constexpr float kLeastScale = 1e-8f;
constexpr uint32_t kLeastByte = bits_of(kLeastScale) >> 23;
static_assert(kLeastByte == 100);

/// Returns the scale byte by the rule abs_max, from the bits of the block's largest magnitude.
constexpr uint8_t abs_max_scale(uint32_t amax_bits) {
  return amax_bits >= kInfBits ? e8m0::kNan : static_cast<uint8_t>(bits_of(float_of(amax_bits) + kLeastScale) >> 23);
}

/// The nearest float32 to (2.92247856 / 6)^2.
constexpr float kSquareFactor = 0x1.e5e198p-3f;

/// Returns the scale byte by the rule quest, from the sum of a block's elements and that of their squares (tree_sum).
constexpr uint8_t quest_scale(uint32_t amax_bits, float sum, float sum_of_squares) {
  const float mean = sum * (1.0f / 32), variance = sum_of_squares * (1.0f / 32) - mean * mean;
  if (amax_bits >= kInfBits || magnitude_bits(variance) >= kInfBits) return e8m0::kNan;  // squares may overflow
  if (variance < 0) return static_cast<uint8_t>(e8m0::kBias);  // rounding alone can do that; QuTLASS takes the scale 1 then
  const uint32_t byte = ((bits_of(variance * kSquareFactor) >> 23) + e8m0::kBias) >> 1;
  return static_cast<uint8_t>(byte > kLeastByte ? byte : kLeastByte);
}

struct Itself {
  constexpr float operator()(float x) const { return x; }
};
struct Square {
  constexpr float operator()(float x) const { return x * x; }
};

/// Sums `count` neighbours: element i takes i + s, for s = 1, 2, 4 ... count / 2. There is no loop, since elements are in
/// registers on a GPU.
template <int count, class Term = Itself>
constexpr float tree_sum(const float* x) {
  if constexpr (count == 1) {
    return Term()(x[0]);
  } else {
    return tree_sum<count / 2, Term>(x) + tree_sum<count / 2, Term>(x + count / 2);
  }
}

}  // namespace xpu_fp4::fp_quant
