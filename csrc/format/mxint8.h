// SPDX-License-Identifier: Apache-2.0
// The MXINT8 element and its scale (OCP Microscaling Formats v1.0, element INT8): a signed byte c stands for c * 2^-6, beside
// an e8m0 scale per block of 32. Quantizing uses -127 .. 127; a product takes -128 for what it says. A group of 32 or 128
// elements shares one scale. Decided on bits, like format/e8m0.h. Host and device.
#pragma once
#include <cstdint>

#include "block.h"

namespace xpu_fp4::mxint8 {

constexpr int kElementExponent = -6;
constexpr float kLargest = 127.0f;

/// Scale byte of a group from the bits of its largest magnitude f * 2^E: the exponent E, plus 1 if f >= 255/128, where 64 f
/// rounds to 128. Inf and NaN give e8m0::kNan; the exponent is clamped to [-127, 127].
constexpr uint8_t scale_byte(uint32_t amax_bits) {
  if (amax_bits >= kInfBits) return e8m0::kNan;
  // The sum carries into the exponent from 255/128 on. A subnormal of 2^-127 and more has one bit less behind its first.
  if (amax_bits < 0x00800000u) return amax_bits >= 0x007F8000u ? 1 : 0;
  const uint32_t exponent = (amax_bits + 0x10000u) >> 23;
  return static_cast<uint8_t>(exponent < 254u ? exponent : 254u);
}

/// 2^(6 - e), what an element is multiplied by before it is rounded, as two factors: it exceeds float32 for the least scales.
struct Reciprocal {
  float first, second;
};
constexpr Reciprocal reciprocal(uint8_t scale) {
  if (scale == e8m0::kNan) return {0.0f, 1.0f};
  const int e = -kElementExponent - e8m0::exponent(scale), kept = e < 100 ? e : 100;
  return {pow2(kept), pow2(e - kept)};
}

/// Code of a finite x under a scale that is not NaN: x / scale * 64 is exact, or so small that it rounds to 0; then one
/// rounding to an integer, ties to even, and saturation.
constexpr int8_t quantize_element(float x, const Reciprocal& reciprocal) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: floats there are integers apart
  const float scaled = x * reciprocal.first * reciprocal.second;
  const float clamped = scaled < -kLargest ? -kLargest : scaled > kLargest ? kLargest : scaled;
  return static_cast<int8_t>(bits_of(clamped + kRounder) - bits_of(kRounder));
}

/// Value of a code under a scale: exact in float32 but for overflow to -Inf (-128 at the scale 2^127); NaN if the scale is.
constexpr float dequantize_element(int8_t code, uint8_t scale) {
  if (scale == e8m0::kNan) return float_of(kNanBits);
  return static_cast<float>(code) * pow2(kElementExponent) * e8m0::value(scale);
}

}  // namespace xpu_fp4::mxint8
