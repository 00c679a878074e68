// SPDX-License-Identifier: Apache-2.0
// Device code: format/float_bits.h's load() and store() with the device's own float16 conversions, which round alike and take
// one instruction.
#pragma once
#include "common.hpp"

namespace xpu_fp4 {

template <DType T>
inline float load_converted(const void* data, int64_t i) {
  if constexpr (T == DType::f16) {
    return static_cast<float>(__builtin_bit_cast(_Float16, static_cast<const uint16_t*>(data)[i]));
  } else {
    return load<T>(data, i);
  }
}

template <DType T>
inline void store_converted(void* data, int64_t i, float x) {
  if constexpr (T == DType::f16) {
    const auto half = __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
    static_cast<uint16_t*>(data)[i] = is_nan(x) ? uint16_t{0x7E00} : half;
  } else if constexpr (T == DType::bf16) {
    // bf16_from_float() without a branch.
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), rounded = bits + 0x7FFFu + (bits >> 16 & 1);
    static_cast<uint16_t*>(data)[i] = sycl::select(rounded, 0x7FC00000u, is_nan(x)) >> 16;
  } else {
    store<T>(data, i, x);
  }
}

/// x, rounded to type T and read again.
template <DType T>
inline float rounded(float x) {
  alignas(4) uint8_t bytes[4];
  store_converted<T>(bytes, 0, x);
  return load_converted<T>(bytes, 0);
}

}  // namespace xpu_fp4
