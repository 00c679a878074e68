// SPDX-License-Identifier: Apache-2.0
// The MXFP4 element, e2m1 (OCP Microscaling Formats v1.0, section 5.3.3): code = sign << 3 | m, and m = 0..7 stands for
// 0, 0.5, 1, 1.5, 2, 3, 4, 6. No Inf, no NaN; 0x8 is -0. Host and device.
#pragma once
#include <cstdint>

#include "float_bits.h"

namespace xpu_fp4::e2m1 {

/// Decides halfway between two values: for the even code (MXFP4), or for the smaller magnitude (the numbers of
/// vllm-xpu-kernels' quantizer).
enum class Ties { to_even, toward_zero };

/// Twice the magnitude of a code, an integer: 0, 1, 2, 3, 4, 6, 8, 12. The sign bit is ignored.
constexpr int twice_magnitude(unsigned code) {
  const int exponent = static_cast<int>(code >> 1) & 3, mantissa = static_cast<int>(code & 1u);
  return exponent == 0 ? mantissa : (2 | mantissa) << (exponent - 1);
}

/// Twice the value of a code, an integer in [-12, 12]; both zeros give 0.
constexpr int twice(unsigned code) { return (code & 8u) != 0 ? -twice_magnitude(code) : twice_magnitude(code); }

/// Value of a code, -0 included.
constexpr float value(unsigned code) {
  const float magnitude = 0.5f * static_cast<float>(twice_magnitude(code));
  return (code & 8u) != 0 ? -magnitude : magnitude;
}

/// Nearest code to |y|, 0..7, saturated to 6.0. y must not be NaN.
template <Ties ties = Ties::to_even>
constexpr unsigned encode_magnitude(float y) {
  const uint32_t b = magnitude_bits(y);
  // An e2m1 value has one mantissa bit from 1 upwards: round float32's 23 bits to one, and the exponent follows by carry.
  const uint32_t just_below_half = 0x1FFFFFu, last_kept_bit = (b >> 22) & 1u;
  const uint32_t rounded = b + just_below_half + (ties == Ties::to_even ? last_kept_bit : 0u);
  const uint32_t code = (rounded >> 22) - ((bits_of(1.0f) >> 22) - 2u);
  // Below 1 the values are multiples of 0.5.
  const uint32_t to_half = b > bits_of(0.25f);
  const uint32_t to_one = ties == Ties::to_even ? b >= bits_of(0.75f) : b > bits_of(0.75f);
  return b < bits_of(1.0f) ? to_half + to_one : code < 7u ? code : 7u;
}

/// The two codes of a packed byte: even elements are in the low nibble.
constexpr unsigned low(uint8_t packed) { return packed & 15u; }
constexpr unsigned high(uint8_t packed) { return packed >> 4; }
constexpr uint8_t pack(unsigned even, unsigned odd) { return static_cast<uint8_t>(even | (odd << 4)); }

}  // namespace xpu_fp4::e2m1
