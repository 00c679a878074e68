// SPDX-License-Identifier: Apache-2.0
// Device code: packed weights to operands of the matrix unit, in registers.
//
// An int8 x int4 product takes eight codes from one dword, so that they are decoded where they are. Twice an element is no
// int4, but a sum of some: with m = code & 7 and the sign s = +-1,
//   2 |element| = m + y + 2 z,   y = m & 3 if m >= 4, else 0;   z = 1 if m = 7, else 0      0 1 2 3 4 6 8 12
// An int4 of m or y with all bits inverted is -1 - m or -1 - y; a bit of z inverted is 1 - z. So where s = -1 the sum of those,
// z twice, is -m - y - 2 z: the constants cancel.
//
// XPU_FP4_WEIGHT_OPERAND, WeightOperand of layout.hpp as its number, decides between that and an int8 of twice the element.
#pragma once
#include "operands.hpp"
#include "twice.hpp"

typedef int xpu_fp4_int4 __attribute__((ext_vector_type(4)));
#if XPU_FP4_MATRIX_UNIT
// Known to Intel's GPU compiler by their mangled names.
extern SYCL_EXTERNAL xpu_fp4_int8 intel_sub_group_i8_i4_matrix_mad_k32(xpu_fp4_row_fragment a, xpu_fp4_int4 b,
                                                                       xpu_fp4_int8 acc);
extern SYCL_EXTERNAL xpu_fp4_int8 intel_sub_group_i8_u4_matrix_mad_k32(xpu_fp4_row_fragment a, xpu_fp4_uint4 b,
                                                                       xpu_fp4_int8 acc);
extern "C" SYCL_EXTERNAL xpu_fp4_uint8 __builtin_IB_lsc_load_global_uint8(__attribute__((opencl_global))
                                                                          const xpu_fp4_uint8* base,
                                                                          int offset, int cache);
extern "C" SYCL_EXTERNAL void __builtin_IB_lsc_prefetch_global_uchar(__attribute__((opencl_global)) const uint8_t* base,
                                                                     int offset, int cache);
extern "C" SYCL_EXTERNAL unsigned __builtin_IB_lsc_load_global_uchar_to_uint(__attribute__((opencl_global)) const uint8_t* base,
                                                                             int offset, int cache);
#endif

namespace xpu_fp4 {

using int4 = xpu_fp4_int4;
using uint4 = xpu_fp4_uint4;

// ---- one 8 x kSubGroup x 32 product of int8 and int4, or uint4: matrix_mad with other columns ----
// lane n of b: column n, dword j = K 8j .. 8j+7, the first in the lowest bits
#if XPU_FP4_MATRIX_UNIT
XPU_FP4_INLINE int8 matrix_mad(RowFragment a, int4 b, int8 acc) { return intel_sub_group_i8_i4_matrix_mad_k32(a, b, acc); }
XPU_FP4_INLINE int8 matrix_mad(RowFragment a, uint4 b, int8 acc) { return intel_sub_group_i8_u4_matrix_mad_k32(a, b, acc); }
#else
/// Four nibbles -> four int8.
inline uint32_t widen4(uint32_t nibbles, bool is_signed) {
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = nibbles >> 4 * i & 15u;
    bytes |= (is_signed && nibble > 7 ? nibble | 0xF0u : nibble) << 8 * i;
  }
  return bytes;
}
inline int8 matrix_mad_4(RowFragment a, uint4 b, int8 acc, bool is_signed) {
  int8 wide;
  for (int j = 0; j < 8; ++j) wide[j] = static_cast<int>(widen4(b[j / 2] >> 16 * (j % 2), is_signed));
  return matrix_mad(a, wide, acc);
}
inline int8 matrix_mad(RowFragment a, int4 b, int8 acc) { return matrix_mad_4(a, __builtin_bit_cast(uint4, b), acc, true); }
inline int8 matrix_mad(RowFragment a, uint4 b, int8 acc) { return matrix_mad_4(a, b, acc, false); }
#endif

/// A column's block, K as packed: twice an element is m + y + 2 z. z_weight 1: z is as it is and takes two products; 2: it is
/// doubled, which is an instruction more for eight codes and a product less.
template <int z_weight>
struct DecodedBlock {
  int4 m, y;
  uint4 z;

  XPU_FP4_INLINE explicit DecodedBlock(uint4 packed) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t x = packed[i];
      const uint32_t negative = x & 0x88888888u, one = negative >> 3, seven = negative - one;
      const uint32_t four = x & 0x44444444u, three = four - (four >> 2);
      const uint32_t low = x & three;
      m[i] = static_cast<int>(x ^ seven);
      y[i] = static_cast<int>(low ^ (negative | seven));
      z[i] = z_weight == 1 ? (low & (low >> 1)) ^ one : (low & (low << 1)) ^ (negative >> 2);
    }
  }
};

template <int z_weight>
XPU_FP4_INLINE int8 matrix_mad(RowFragment a, const DecodedBlock<z_weight>& b, int8 acc) {
  const int8 with_z = matrix_mad(a, b.z, matrix_mad(a, b.y, matrix_mad(a, b.m, acc)));
  return z_weight == 1 ? matrix_mad(a, b.z, with_z) : with_z;
}

/// The same as int8: four times as many instructions, and one product.
struct Int8Block {
  int8 twice;

  XPU_FP4_INLINE explicit Int8Block(uint4 packed) {
#pragma unroll
    for (int i = 0; i < 8; ++i) twice[i] = static_cast<int>(twice4(spread4(packed[i / 2] >> 16 * (i % 2))));
  }
};

XPU_FP4_INLINE int8 matrix_mad(RowFragment a, const Int8Block& b, int8 acc) { return matrix_mad(a, b.twice, acc); }

/// Says what is known of W: Weights of layout.hpp.
constexpr auto kWeights = static_cast<Weights>(XPU_FP4_WEIGHTS);

#if XPU_FP4_MATRIX_UNIT
/// Asks for a lane's cache line.
XPU_FP4_INLINE void prefetch_line(GlobalBytes at) { __builtin_IB_lsc_prefetch_global_uchar(at, 0, kCacheInL1AndL3); }
/// Loads a byte as 32 bits, whose arithmetic the compiler does not narrow.
XPU_FP4_INLINE uint32_t load_byte(GlobalBytes at) { return __builtin_IB_lsc_load_global_uchar_to_uint(at, 0, 0); }
/// Loads eight dwords in one message; a plain load of these would be two.
XPU_FP4_INLINE xpu_fp4_uint8 load_dwords8(GlobalBytes at) {
  return __builtin_IB_lsc_load_global_uint8((XPU_FP4_GLOBAL const xpu_fp4_uint8*)at, 0, 0);
}
#else
XPU_FP4_INLINE void prefetch_line(GlobalBytes) {}
XPU_FP4_INLINE uint32_t load_byte(GlobalBytes at) { return *at; }
XPU_FP4_INLINE xpu_fp4_uint8 load_dwords8(GlobalBytes at) {
  struct alignas(16) Dwords {
    uint32_t dword[8];
  };
  return __builtin_bit_cast(xpu_fp4_uint8, *(XPU_FP4_GLOBAL const Dwords*)at);
}
#endif

/// The lane's row of W, from a sub-group's first quad on.
struct WeightColumn {
  GlobalBytes codes, scale;
  int64_t scale_block_stride;

  XPU_FP4_INLINE WeightColumn(const StoredOperand& w, int64_t k, int64_t row, uint32_t quad)
      : codes((GlobalBytes)w.codes + row * (k / 2) + quad * (kQuad * kBlockBytes)),
        scale_block_stride(kWeights == Weights::scales_together ? 1 : w.scale_block_stride) {
    scale = (GlobalBytes)w.scale + row * w.scale_row_stride + quad * kQuad * scale_block_stride;
  }

  /// The quad, to the first cache: a lane's codes are one line of it where rows begin on one. It must be there: a fetch from
  /// outside of memory is a fault.
  XPU_FP4_INLINE void prefetch() const {
    prefetch_line(codes);
    prefetch_line(scale);
  }

  XPU_FP4_INLINE void step(uint32_t quads) {
    codes += quads * (kQuad * kBlockBytes);
    scale += quads * kQuad * scale_block_stride;
  }
};

/// A quad of the lane's row of W.
struct WeightQuad {
  uint4 packed[kQuad];
  uint32_t exponents;  // the scale bytes

  /// `real` blocks exist. For the others the last one is read again: A's codes are 0 there.
  XPU_FP4_INLINE WeightQuad(const WeightColumn& column, uint32_t real) {
    const uint32_t last = kWeights == Weights::any ? sycl::min(real, uint32_t{kQuad}) - 1 : kQuad - 1;
    load_codes(column.codes, last);
    if constexpr (kWeights == Weights::scales_together) {
      exponents = *(GlobalWords)column.scale;
    } else {
      uint32_t e[kQuad];
#pragma unroll
      for (uint32_t b = 0; b < kQuad; ++b) e[b] = load_byte(column.scale + sycl::min(b, last) * column.scale_block_stride);
      exponents = e[0] | e[1] << 8 | (e[2] | e[3] << 8) << 16;
    }
  }

 private:
  static constexpr bool kTwoAtOnce = XPU_FP4_ALIGNMENT == 16 && kWeights != Weights::any;

  XPU_FP4_INLINE void load_codes(GlobalBytes codes, uint32_t last) {
    struct alignas(XPU_FP4_ALIGNMENT) Packed {
      uint8_t byte[kBlockBytes];
    };
#pragma unroll
    for (uint32_t b = 0; b < kQuad; ++b) {
      if constexpr (!kTwoAtOnce) {
        packed[b] = __builtin_bit_cast(uint4, *(XPU_FP4_GLOBAL const Packed*)(codes + sycl::min(b, last) * kBlockBytes));
      } else if (b % 2 == 0) {
        const auto both = load_dwords8(codes + b * kBlockBytes);
#pragma unroll
        for (int i = 0; i < 8; ++i) packed[b + i / 4][i % 4] = both[i];
      }
    }
  }
};

}  // namespace xpu_fp4
