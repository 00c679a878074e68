// SPDX-License-Identifier: Apache-2.0
// One MXFP4 block: 32 consecutive elements of a row, 16 packed bytes, one scale. Host and device.
#pragma once
#include <cstdint>

#include "e2m1.h"
#include "e8m0.h"

namespace xpu_fp4 {

/// Elements of a block, and bytes that they pack into.
constexpr int kBlock = 32;
constexpr int kBlockBytes = kBlock / 2;

/// Code of x under a scale that is not NaN: x / scale is exact, then one rounding to e2m1, the sign of zero kept.
constexpr unsigned quantize_element(float x, float reciprocal_scale) {
  return e2m1::encode_magnitude(x * reciprocal_scale) | (bits_of(x) >> 31 << 3);
}

/// Value of a code under a scale: exact in float32 but for overflow to Inf (4 and 6 at the scale 2^127); NaN if the scale is.
constexpr float dequantize_element(unsigned code, uint8_t scale) { return e2m1::value(code) * e8m0::value(scale); }

/// The compatibility quantizer (vllm-xpu-kernels' numbers): its scale is 2^ceil(log2(max(amax / 6, eps))), so the rceil rule
/// with a floor. Evaluated exactly; float32 log2 would round away an amax one ulp above 6 * 2^e.
namespace group_quant {

/// Scale byte of eps: 2^ceil(log2(eps)), within what e8m0 can hold. eps must be positive and finite.
constexpr uint8_t floor_from_eps(double eps) {
  const uint64_t b = __builtin_bit_cast(uint64_t, eps);
  const int exponent = static_cast<int>(b >> 52) - 1023 + ((b & 0xFFFFFFFFFFFFFu) != 0 ? 1 : 0);
  const int byte = exponent + e8m0::kBias;
  return static_cast<uint8_t>(byte < 0 ? 0 : byte < 254 ? byte : 254);
}

constexpr uint8_t scale_byte(uint32_t amax_bits, uint8_t floor_byte) {
  const uint8_t byte = e8m0::from_amax(amax_bits, ScaleMode::rceil);
  return byte > floor_byte ? byte : floor_byte;  // NaN, 0xFF, is above every floor
}

/// Ties go toward zero, and the sign bit is set only for x < 0 (not for -0).
constexpr unsigned quantize_element(float x, float reciprocal_scale) {
  const unsigned sign = bits_of(x) > kSignBit ? 8u : 0u;
  return e2m1::encode_magnitude<e2m1::Ties::toward_zero>(x * reciprocal_scale) | sign;
}

}  // namespace group_quant
}  // namespace xpu_fp4
