// SPDX-License-Identifier: Apache-2.0
// Device code of the products over expanded operands (layout.hpp): loads, prefetches, scalars of a lane. A macro of its own:
//   XPU_FP4_BLOCK_2D   1 for devices that have 2D block loads: all with 16 lanes. Decides the arrangement of A
#pragma once
#include "common.hpp"
#include "layout.hpp"

typedef unsigned xpu_fp4_uint2 __attribute__((ext_vector_type(2)));
typedef unsigned xpu_fp4_uint4 __attribute__((ext_vector_type(4)));
typedef unsigned xpu_fp4_uint8 __attribute__((ext_vector_type(8)));
typedef unsigned xpu_fp4_uint32 __attribute__((ext_vector_type(32)));
typedef uint16_t xpu_fp4_ushort8 __attribute__((ext_vector_type(8)));
typedef uint16_t xpu_fp4_ushort16 __attribute__((ext_vector_type(16)));
typedef int xpu_fp4_int2 __attribute__((ext_vector_type(2)));
typedef float xpu_fp4_float8 __attribute__((ext_vector_type(8)));

#if XPU_FP4_MATRIX_UNIT && XPU_FP4_BLOCK_2D
// Known to Intel's compiler by name. A surface is its address, width in bytes, height and pitch, each less one.
extern "C" {
SYCL_EXTERNAL xpu_fp4_ushort16 __builtin_IB_subgroup_block_read_flat_u8_m8k32v2(long surface, int width, int height, int pitch,
                                                                                xpu_fp4_int2 at);
SYCL_EXTERNAL xpu_fp4_uint32 __builtin_IB_subgroup_block_read_flat_u32_m32k16v1(long surface, int width, int height, int pitch,
                                                                                xpu_fp4_int2 at);
SYCL_EXTERNAL void __builtin_IB_subgroup_block_read_prefetch_u8_m8k32v2(long surface, int width, int height, int pitch,
                                                                        xpu_fp4_int2 at, int cache);
SYCL_EXTERNAL void __builtin_IB_subgroup_block_read_prefetch_u8_m32k32v2(long surface, int width, int height, int pitch,
                                                                         xpu_fp4_int2 at, int cache);
}
#endif

namespace xpu_fp4 {

using float8 = xpu_fp4_float8;

// What stays out of line takes generic pointers, whose address arithmetic is 64 bits wide on Alchemist.
#define XPU_FP4_INLINE inline __attribute__((always_inline))

/// Registers want constant indices on a GPU; on the CPU device copies of the long stand-in only slow its compilation.
constexpr int kUnroll = XPU_FP4_MATRIX_UNIT ? 64 : 1;

constexpr int kLanes = kSubGroup;
constexpr int kRowUnit = 8;                           // rows of a matrix-mad
constexpr int kRowFragmentBytes = kRowUnit * kBlock;  // a block of 8 rows
constexpr int kColumnFragmentBytes = kLanes * kBlock;
constexpr bool kBlock2D = XPU_FP4_BLOCK_2D;
constexpr int kCacheInL1AndL3 = 4;  // of prefetches, as Intel's compiler numbers it

#define XPU_FP4_GLOBAL __attribute__((opencl_global))
using GlobalBytes = XPU_FP4_GLOBAL const uint8_t*;
using GlobalShorts = XPU_FP4_GLOBAL const uint16_t*;
using GlobalWords = XPU_FP4_GLOBAL const uint32_t*;

XPU_FP4_INLINE uint32_t lane_id() { return this_sub_group().get_local_linear_id(); }
/// x of lane `index % kLanes`: with a constant index an operand, not an instruction.
XPU_FP4_INLINE float of_lane(float x, int index) { return sycl::group_broadcast(this_sub_group(), x, index % kLanes); }
/// Tells the compiler that x is the same in all lanes.
template <class T>
XPU_FP4_INLINE T uniform(T x) {
  return sycl::group_broadcast(this_sub_group(), x, 0);
}

/// Lane i gets word, or byte, i: loaded through one address instead of one per lane.
XPU_FP4_INLINE uint32_t load_lanes(GlobalWords words) { return __spirv_SubgroupBlockReadINTEL<uint32_t>(words); }
XPU_FP4_INLINE uint32_t load_lanes(GlobalBytes bytes) { return __spirv_SubgroupBlockReadINTEL<uint8_t>(bytes); }

/// One tile's rows of expanded A. `height` rows are real, the others read as zeros.
struct RowCodes {
  GlobalBytes codes;  // of the tile's first row
  uint32_t quads, height;

  /// Four blocks of 8 rows, from row 8 * unit of the tile.
  XPU_FP4_INLINE void load(uint32_t unit, uint32_t quad, RowFragment (&out)[kQuad]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowFragment pair[2];
      load_pair(unit, quad, half, pair);
#pragma unroll
      for (int b = 0; b < 2; ++b) out[2 * half + b] = pair[b];
    }
  }
  /// Two of them.
  XPU_FP4_INLINE void load_pair(uint32_t unit, uint32_t quad, int half, RowFragment (&out)[2]) const {
    if constexpr (!kBlock2D) {
      load_fragments(codes + (unit * quads + quad) * (kQuad * kRowFragmentBytes) + half * (2 * kRowFragmentBytes), out);
    } else {
      load_surface(unit, quad, half, out);
    }
  }

#if XPU_FP4_MATRIX_UNIT && XPU_FP4_BLOCK_2D
  XPU_FP4_INLINE void load_surface(uint32_t unit, uint32_t quad, int half, RowFragment (&out)[2]) const {
    const int width = static_cast<int>(quads * kQuadElements) - 1;
    const xpu_fp4_int2 at = {static_cast<int>(quad * kQuadElements) + 2 * kBlock * half, static_cast<int>(unit * kRowUnit)};
    const auto rows = __builtin_IB_subgroup_block_read_flat_u8_m8k32v2((long)codes, width, height - 1, width, at);
#pragma unroll
    for (int i = 0; i < 16; ++i) out[i / 8][i % 8] = static_cast<short>(rows[i]);
  }
  /// Eight rows of a quad.
  XPU_FP4_INLINE void prefetch(uint32_t unit, uint32_t quad) const {
    const int width = static_cast<int>(quads * kQuadElements) - 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const xpu_fp4_int2 at = {static_cast<int>(quad * kQuadElements) + 2 * kBlock * half, static_cast<int>(unit * kRowUnit)};
      __builtin_IB_subgroup_block_read_prefetch_u8_m8k32v2((long)codes, width, height - 1, width, at, kCacheInL1AndL3);
    }
  }
#else
  XPU_FP4_INLINE void load_surface(uint32_t unit, uint32_t quad, int half, RowFragment (&out)[2]) const {
    for (int b = 0; b < 2; ++b) {
      for (uint32_t r = 0; r < kRowUnit; ++r) {
        const uint32_t row = unit * kRowUnit + r;
        const uint64_t at = uint64_t{row} * quads * kQuadElements + quad * kQuadElements + (2 * half + b) * kBlock;
        out[b][r] = row < height ? ((GlobalShorts)(codes + at))[lane_id()] : 0;
      }
    }
  }
  XPU_FP4_INLINE void prefetch(uint32_t, uint32_t) const {}
#endif

 private:
  static XPU_FP4_INLINE void load_fragments(GlobalBytes from, RowFragment (&out)[2]) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#if XPU_FP4_SUB_GROUP == 16
      out[b] = __builtin_bit_cast(
          RowFragment, __spirv_SubgroupBlockReadINTEL<xpu_fp4_ushort8>((GlobalShorts)(from + b * kRowFragmentBytes)));
#else
      out[b] = __builtin_bit_cast(RowFragment,
                                  __spirv_SubgroupBlockReadINTEL<xpu_fp4_uint8>((GlobalWords)(from + b * kRowFragmentBytes)));
#endif
    }
  }
};

/// Neighbouring groups of kLanes columns of expanded B.
template <int groups>
struct ColumnCodes {
  GlobalBytes codes;  // of the first group
  uint32_t quads;

#if XPU_FP4_MATRIX_UNIT && XPU_FP4_BLOCK_2D
  // One surface with rows of 64 bytes: a quad's fragments are 32 of them.
  XPU_FP4_INLINE int last_row() const { return static_cast<int>(groups * quads * 32) - 1; }
  XPU_FP4_INLINE xpu_fp4_int2 place(uint32_t group, uint32_t quad) const {
    return {0, static_cast<int>((group * quads + quad) * 32)};
  }
  XPU_FP4_INLINE void load(uint32_t group, uint32_t quad, int8 (&out)[kQuad]) const {
    const auto words = __builtin_IB_subgroup_block_read_flat_u32_m32k16v1((long)codes, 63, last_row(), 63, place(group, quad));
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i / 8][i % 8] = static_cast<int>(words[i]);
  }
  XPU_FP4_INLINE void prefetch(uint32_t group, uint32_t quad) const {
    __builtin_IB_subgroup_block_read_prefetch_u8_m32k32v2((long)codes, 63, last_row(), 63, place(group, quad), kCacheInL1AndL3);
  }
#else
  XPU_FP4_INLINE void load(uint32_t group, uint32_t quad, int8 (&out)[kQuad]) const {
#pragma unroll
    for (int b = 0; b < kQuad; ++b) {
      const uint32_t at = ((group * quads + quad) * kQuad + b) * kColumnFragmentBytes;
      out[b] = __builtin_bit_cast(int8, __spirv_SubgroupBlockReadINTEL<xpu_fp4_uint8>((GlobalWords)(codes + at)));
    }
  }
  XPU_FP4_INLINE void prefetch(uint32_t, uint32_t) const {}
#endif
};

}  // namespace xpu_fp4
