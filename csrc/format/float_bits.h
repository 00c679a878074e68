// SPDX-License-Identifier: Apache-2.0
// IEEE-754 bit patterns: float32 <-> float16 and bfloat16, powers of two. Integer arithmetic, and exact operations on normal
// floats, so that no result depends on the rounding mode or on flush-to-zero. Host and device.
#pragma once
#include <cstdint>

namespace xpu_fp4 {

/// Element types of the tensors that are not MXFP4.
enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

/// Bytes of one element.
constexpr int size_of(DType t) { return t == DType::f32 ? 4 : 2; }

constexpr uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
constexpr float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfBits = 0x7F800000u;
/// The one NaN that this library returns, so that NaN results compare equal as bits too.
constexpr uint32_t kNanBits = 0x7FC00000u;

/// Bits of |x|: they order like |x| itself, with Inf and then NaN on top.
constexpr uint32_t magnitude_bits(float x) { return bits_of(x) & ~kSignBit; }
constexpr bool is_nan(float x) { return magnitude_bits(x) > kInfBits; }

/// 2^e for e in [-149, 127], subnormal results included.
constexpr float pow2(int e) { return float_of(e >= -126 ? static_cast<uint32_t>(e + 127) << 23 : uint32_t{1} << (e + 149)); }

/// bfloat16 -> float32, exact.
constexpr float float_from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

/// float16 -> float32, exact.
constexpr float float_from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 0x3FFu;
  const float subnormal = static_cast<float>(mantissa) * pow2(-24);
  const uint32_t normal = ((exponent + 112u) << 23) | (mantissa << 13);
  const uint32_t special = kInfBits | (mantissa << 13);
  const uint32_t magnitude = exponent == 0 ? bits_of(subnormal) : exponent == 31 ? special : normal;
  return float_of(sign | magnitude);
}

/// float32 -> bfloat16, round to nearest even; NaN becomes 0x7FC0.
constexpr uint16_t bf16_from_float(float x) {
  const uint32_t b = bits_of(x);
  return is_nan(x) ? uint16_t{0x7FC0} : static_cast<uint16_t>((b + 0x7FFFu + ((b >> 16) & 1u)) >> 16);
}

/// float32 -> float16, round to nearest even with gradual underflow, overflow to Inf; NaN becomes 0x7E00.
constexpr uint16_t f16_from_float(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u, b = magnitude_bits(x);
  if (b > kInfBits) return 0x7E00;
  if (b >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520, halfway past the largest, and above
  if (b >= 0x38800000u) {                                              // 2^-14 and above: drop 13 bits
    return static_cast<uint16_t>(sign | ((b + 0xFFFu + ((b >> 13) & 1u) - (112u << 23)) >> 13));
  }
  if (b < 0x33000000u) return static_cast<uint16_t>(sign);  // below 2^-25, half of the least subnormal
  const uint32_t shift = 126u - (b >> 23);                  // 14 .. 24: value = mantissa * 2^-24 / 2^shift
  const uint32_t mantissa = (b & 0x7FFFFFu) | 0x800000u;
  const uint32_t half = uint32_t{1} << (shift - 1), odd = (mantissa >> shift) & 1u;
  return static_cast<uint16_t>(sign | ((mantissa + half - 1u + odd) >> shift));
}

/// Element i of an array of type T as float32, exact.
template <DType T>
constexpr float load(const void* data, int64_t i) {
  if constexpr (T == DType::f32) return static_cast<const float*>(data)[i];
  if constexpr (T == DType::f16) return float_from_f16(static_cast<const uint16_t*>(data)[i]);
  if constexpr (T == DType::bf16) return float_from_bf16(static_cast<const uint16_t*>(data)[i]);
}

/// Rounds x once to type T and writes it as element i; NaN is written as the canonical one.
template <DType T>
constexpr void store(void* data, int64_t i, float x) {
  if constexpr (T == DType::f32) static_cast<float*>(data)[i] = is_nan(x) ? float_of(kNanBits) : x;
  if constexpr (T == DType::f16) static_cast<uint16_t*>(data)[i] = f16_from_float(x);
  if constexpr (T == DType::bf16) static_cast<uint16_t*>(data)[i] = bf16_from_float(x);
}

/// Stores x as a type that is known only at run time.
constexpr void store(DType type, void* data, int64_t i, float x) {
  if (type == DType::f32) store<DType::f32>(data, i, x);
  if (type == DType::f16) store<DType::f16>(data, i, x);
  if (type == DType::bf16) store<DType::bf16>(data, i, x);
}

}  // namespace xpu_fp4
