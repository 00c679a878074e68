// SPDX-License-Identifier: Apache-2.0
// The MXFP4 scale, e8m0: byte b stands for 2^(b - 127), 0xFF for NaN, and the ways to choose it from a block's largest
// magnitude. Decided on bits, never with log2 or exp2 in floating point. Host and device.
#pragma once
#include <cstdint>

#include "float_bits.h"

namespace xpu_fp4 {

/// How the scale of a block follows from amax = f * 2^E, 1 <= f < 2:
///   floor  2^(E-2)                        OCP specification, section 6.3; microscaling; ggml
///   ceil   twice that if f > 1            torchao CEIL
///   even   twice that if f >= 1.75        compressed-tensors, AMD Quark, vLLM's Triton quantizer; our default
///   rceil  twice that if f > 1.5          the least power of two with amax <= 6 * scale: FlashInfer, torchao RCEIL
/// abs_max and quest are FP-Quant's rules: format/fp_quant.h.
enum class ScaleMode : int { floor = 0, ceil = 1, even = 2, rceil = 3, abs_max = 4, quest = 5 };

namespace e8m0 {

constexpr int kBias = 127;
constexpr uint8_t kNan = 0xFF;
/// The largest element of a block is of the order of 2^2, e2m1's largest power of two.
constexpr unsigned kMaxExponent = 2;

/// Gives what carries into the exponent exactly where the first four rules double the scale, if added to the bits of amax. The
/// low sixteen bits are all set or all clear, so that bfloat16 can do with the others.
constexpr uint32_t rounding(ScaleMode mode) {
  return mode == ScaleMode::floor ? 0u : mode == ScaleMode::ceil ? 0x7FFFFFu : mode == ScaleMode::even ? 0x200000u : 0x3FFFFFu;
}

/// Scale byte of a block by one of the first four rules, from the bits of its largest magnitude (magnitude_bits). Inf and NaN
/// give kNan; the exponent is clamped to [-127, 127]; a zero or subnormal amax gives byte 0.
constexpr uint8_t from_amax(uint32_t amax_bits, ScaleMode mode) {
  if (amax_bits >= kInfBits) return kNan;
  const uint32_t exponent = (amax_bits + rounding(mode)) >> 23;
  return static_cast<uint8_t>(exponent > kMaxExponent ? exponent - kMaxExponent : 0u);
}

/// Unbiased exponent of a scale byte that is not NaN.
constexpr int exponent(uint8_t byte) { return static_cast<int>(byte) - kBias; }

/// Returns what a scale byte stands for.
constexpr float value(uint8_t byte) { return byte == kNan ? float_of(kNanBits) : pow2(exponent(byte)); }

/// 2^-exponent: what an element is multiplied by before it is encoded.
constexpr float reciprocal(uint8_t byte) { return pow2(-exponent(byte)); }

}  // namespace e8m0
}  // namespace xpu_fp4
