// SPDX-License-Identifier: Apache-2.0
// Device code: packed weights to operands of the matrix unit, in registers.
#pragma once
#include "operands.hpp"

namespace xpu_fp4 {

/// The decoded values are 2^3 times twice the element: that spares the shift back.
constexpr int kDecodeShift = 3;

/// Eight codes -> 8 * twice their values as int8: those of the four low nibbles, and of the four high ones.
XPU_FP4_INLINE void decode8(uint32_t x, int& low, int& high) {
  const uint32_t magnitude = x & 0x77777777u, four = x & 0x44444444u;
  const uint32_t sum = magnitude + (x & (four - (four >> 2)));            // 0, 1, 2, 3, 4, 6, 8, 10
  const uint32_t twice = sum + (sum & (sum >> 2) & 0x22222222u);          // 10 becomes 12
  const uint32_t negative = x & (magnitude + 0x77777777u) & 0x88888888u;  // and not zero
  const uint32_t one = negative >> 3;
  const uint32_t y = (twice ^ (negative | (negative - one))) + one;  // two's complement, its sign in `negative`
  constexpr uint32_t kept = 0x78787878u;
  high = static_cast<int>(sycl::bitselect(negative, y >> 1, kept));  // one instruction; of `and` and `or` three would remain
  low = static_cast<int>(sycl::bitselect(negative << 4, y << 3, kept));
}

/// The lane's row of W.
struct WeightColumn {
  GlobalBytes codes, scale;
  int64_t scale_block_stride;
  uint32_t blocks;

  XPU_FP4_INLINE WeightColumn(const uint8_t* w, const uint8_t* w_scale, int64_t scale_row_stride, int64_t scale_block_stride,
                              int64_t k, int64_t row)
      : codes((GlobalBytes)w + row * (k / 2)),
        scale((GlobalBytes)w_scale + row * scale_row_stride),
        scale_block_stride(scale_block_stride),
        blocks(static_cast<uint32_t>(k / kBlock)) {}
};

struct DecodedQuad {
  int8 codes[kQuad];   // the order of layout.hpp
  uint32_t exponents;  // the blocks' scale bytes

  /// scale_at: 4 * quad * scale_block_stride, which the caller's loop steps without a 64-bit product.
  XPU_FP4_INLINE DecodedQuad(const WeightColumn& column, uint32_t quad, int64_t scale_at) : exponents(0) {
    struct alignas(XPU_FP4_ALIGNMENT) Packed {
      uint8_t byte[kBlockBytes];
    };
    // For a missing block the last one is read again: A's codes are 0 there.
    const uint32_t first = quad * kQuad, last = column.blocks - 1;
    GlobalBytes scale = column.scale + scale_at;
#pragma unroll
    for (uint32_t b = 0; b < kQuad; ++b) {
      const auto packed = *(XPU_FP4_GLOBAL const Packed*)(column.codes + sycl::min(first + b, last) * kBlockBytes);
      const auto dwords = __builtin_bit_cast(xpu_fp4_uint4, packed);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int low, high;
        decode8(dwords[i], low, high);
        codes[b][2 * i] = low;
        codes[b][2 * i + 1] = high;
      }
      exponents |= uint32_t{*scale} << (8 * b);
      if (first + b < last) scale += column.scale_block_stride;
    }
  }
};

}  // namespace xpu_fp4
