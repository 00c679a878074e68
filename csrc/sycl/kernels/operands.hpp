// SPDX-License-Identifier: Apache-2.0
// Device code of the products over expanded operands (layout.hpp): loads, prefetches, scalars of a lane. A macro of its own:
//   XPU_FP4_BLOCK_2D   1 for devices that have 2D block loads: all with 16 lanes. Decides the arrangement of A
#pragma once
#include "common.hpp"

typedef unsigned xpu_fp4_uint2 __attribute__((ext_vector_type(2)));
typedef unsigned xpu_fp4_uint4 __attribute__((ext_vector_type(4)));
typedef unsigned xpu_fp4_uint8 __attribute__((ext_vector_type(8)));
typedef unsigned xpu_fp4_uint32 __attribute__((ext_vector_type(32)));
typedef uint16_t xpu_fp4_ushort8 __attribute__((ext_vector_type(8)));
typedef uint16_t xpu_fp4_ushort16 __attribute__((ext_vector_type(16)));
typedef int xpu_fp4_int2 __attribute__((ext_vector_type(2)));
typedef float xpu_fp4_float8 __attribute__((ext_vector_type(8)));

#if XPU_FP4_MATRIX_UNIT && XPU_FP4_BLOCK_2D
// Known to Intel's compiler by name. A surface is its address, width in bytes, height and pitch, each less one. A payload is
// all that a load says, in one register. Left to itself, the compiler keeps one for each place in a surface.
extern "C" {
SYCL_EXTERNAL int* __builtin_IB_subgroup_createBlock2DAddressPayload(long surface, int width, int height, int pitch, int x,
                                                                     int y, int block_width, int block_height, int blocks);
SYCL_EXTERNAL void __builtin_IB_subgroup_setBlock2DAddressPayloadBlockX(int* payload, int x);
SYCL_EXTERNAL void __builtin_IB_subgroup_setBlock2DAddressPayloadBlockY(int* payload, int y);
SYCL_EXTERNAL xpu_fp4_ushort8 __builtin_IB_subgroup_block_read_ap_u8_m8k32v1(int* payload, int x, int y, int cache);
SYCL_EXTERNAL xpu_fp4_ushort16 __builtin_IB_subgroup_block_read_ap_u8_m8k32v2(int* payload, int x, int y, int cache);
SYCL_EXTERNAL xpu_fp4_ushort16 __builtin_IB_subgroup_block_read_flat_u8_m8k32v2(long surface, int width, int height, int pitch,
                                                                                xpu_fp4_int2 at);
SYCL_EXTERNAL xpu_fp4_uint8 __builtin_IB_subgroup_block_read_flat_u32_m8k16v1(long surface, int width, int height, int pitch,
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

// Functions out of line take generic pointers, whose address arithmetic is 64 bits wide on Alchemist.
#define XPU_FP4_INLINE inline __attribute__((always_inline))

constexpr int kLanes = kSubGroup;
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

/// Lane i gets word i: loaded through one address instead of one per lane.
XPU_FP4_INLINE uint32_t load_lanes(GlobalWords words) { return __spirv_SubgroupBlockReadINTEL<uint32_t>(words); }
/// Lane i gets words i, i + kLanes, ...
XPU_FP4_INLINE int8 load_lanes8(GlobalWords words) {
  return __builtin_bit_cast(int8, __spirv_SubgroupBlockReadINTEL<xpu_fp4_uint8>(words));
}

/// Loads one tile's rows of expanded A. `height` rows are real, the others read as zeros.
struct RowCodes {
  GlobalBytes codes;  // of the tile's first row
  uint32_t quads, height;

#if XPU_FP4_MATRIX_UNIT && XPU_FP4_BLOCK_2D
  /// Two blocks, the first or the last, of a quad of 8 rows, from row 8 * unit of the tile.
  XPU_FP4_INLINE void load_pair(uint32_t unit, uint32_t quad, int half, RowFragment (&out)[2]) const {
    const auto rows =
        __builtin_IB_subgroup_block_read_flat_u8_m8k32v2((long)codes, width(), height - 1, width(), place(unit, quad, half));
#pragma unroll
    for (int i = 0; i < 16; ++i) out[i / 8][i % 8] = static_cast<short>(rows[i]);
  }
  /// Eight rows of a quad.
  XPU_FP4_INLINE void prefetch(uint32_t unit, uint32_t quad) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __builtin_IB_subgroup_block_read_prefetch_u8_m8k32v2((long)codes, width(), height - 1, width(), place(unit, quad, half),
                                                           kCacheInL1AndL3);
    }
  }
  XPU_FP4_INLINE int width() const { return static_cast<int>(quads * kQuadElements) - 1; }

 private:
  static XPU_FP4_INLINE xpu_fp4_int2 place(uint32_t unit, uint32_t quad, int half) {
    return {static_cast<int>(quad * kQuadElements) + 2 * kBlock * half, static_cast<int>(unit * kRowUnit)};
  }
#else
  XPU_FP4_INLINE void load_pair(uint32_t unit, uint32_t quad, int half, RowFragment (&out)[2]) const {
#pragma unroll
    for (int b = 0; b < 2; ++b) out[b] = load_block(unit, quad, 2 * half + b);
  }
  XPU_FP4_INLINE RowFragment load_block(uint32_t unit, uint32_t quad, uint32_t block) const {
#if XPU_FP4_BLOCK_2D
    RowFragment out;
    for (uint32_t r = 0; r < kRowUnit; ++r) {
      const uint32_t row = unit * kRowUnit + r;
      const uint64_t at = uint64_t{row} * quads * kQuadElements + quad * kQuadElements + block * kBlock;
      out[r] = row < height ? ((GlobalShorts)(codes + at))[lane_id()] : 0;
    }
    return out;
#else
    return load_lanes8((GlobalWords)(codes + ((unit * quads + quad) * kQuad + block) * kRowFragmentBytes));
#endif
  }
  XPU_FP4_INLINE void prefetch(uint32_t, uint32_t) const {}
#endif
};

/// Four blocks of 8 rows at a time, also in the near level's order.
struct ManyRowCodes : RowCodes {
  ManyRowCodes() = default;

#if XPU_FP4_MATRIX_UNIT && XPU_FP4_BLOCK_2D
  XPU_FP4_INLINE explicit ManyRowCodes(const RowCodes& rows) : RowCodes(rows), one_block(payload(1)), two_blocks(payload(2)) {}

  XPU_FP4_INLINE void load_half(uint32_t unit, uint32_t quad, int half, RowFragment* out) const {
    set_row(two_blocks, unit);
    read_half(quad, half, out);
  }
  XPU_FP4_INLINE void load(uint32_t unit, uint32_t quad, RowFragment (&out)[kQuad]) const {
    set_row(two_blocks, unit);
#pragma unroll
    for (int half = 0; half < 2; ++half) read_half(quad, half, out + 2 * half);
  }
  XPU_FP4_INLINE void load(uint32_t unit, uint32_t quad, RowFragment (&out)[kQuad], const NearOrder& order) const {
    set_row(one_block, unit);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      set_block(one_block, quad, order.block[i]);
      out[i] = __builtin_bit_cast(RowFragment, __builtin_IB_subgroup_block_read_ap_u8_m8k32v1(one_block, 0, 0, 0));
    }
  }

 private:
  int *one_block, *two_blocks;  // payloads of loads of 8 rows

  XPU_FP4_INLINE void read_half(uint32_t quad, int half, RowFragment* out) const {
    set_block(two_blocks, quad, 2 * half);
    const auto rows = __builtin_IB_subgroup_block_read_ap_u8_m8k32v2(two_blocks, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < 16; ++i) out[i / 8][i % 8] = static_cast<short>(rows[i]);
  }
  XPU_FP4_INLINE int* payload(int blocks) const {
    return __builtin_IB_subgroup_createBlock2DAddressPayload((long)codes, width(), height - 1, width(), 0, 0, kBlock, kRowUnit,
                                                             blocks);
  }
  static XPU_FP4_INLINE void set_row(int* payload, uint32_t unit) {
    __builtin_IB_subgroup_setBlock2DAddressPayloadBlockY(payload, static_cast<int>(unit * kRowUnit));
  }
  static XPU_FP4_INLINE void set_block(int* payload, uint32_t quad, uint32_t block) {
    __builtin_IB_subgroup_setBlock2DAddressPayloadBlockX(payload, static_cast<int>(quad * kQuadElements + block * kBlock));
  }
#else
  XPU_FP4_INLINE explicit ManyRowCodes(const RowCodes& rows) : RowCodes(rows) {}

  XPU_FP4_INLINE void load_half(uint32_t unit, uint32_t quad, int half, RowFragment* out) const {
#pragma unroll
    for (int b = 0; b < 2; ++b) out[b] = load_block(unit, quad, 2 * half + b);
  }
  XPU_FP4_INLINE void load(uint32_t unit, uint32_t quad, RowFragment (&out)[kQuad]) const {
#pragma unroll
    for (int b = 0; b < kQuad; ++b) out[b] = load_block(unit, quad, b);
  }
  XPU_FP4_INLINE void load(uint32_t unit, uint32_t quad, RowFragment (&out)[kQuad], const NearOrder& order) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) out[i] = load_block(unit, quad, order.block[i]);
  }
#endif
};

/// Neighbouring groups of kLanes columns of expanded B.
template <int groups>
struct ColumnCodes {
  GlobalBytes codes;  // of the first group
  uint32_t quads;

  /// The near level's order.
  XPU_FP4_INLINE void load(uint32_t group, uint32_t quad, int8 (&out)[kQuad], const NearOrder& order) const {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) out[i] = load_block(group, quad, order.block[i]);
  }

#if XPU_FP4_MATRIX_UNIT && XPU_FP4_BLOCK_2D
  // All is one surface with rows of 64 bytes: a quad's fragments are 32 of them.
  XPU_FP4_INLINE int last_row() const { return static_cast<int>(groups * quads * 32) - 1; }
  XPU_FP4_INLINE xpu_fp4_int2 place(uint32_t group, uint32_t quad) const {
    return {0, static_cast<int>((group * quads + quad) * 32)};
  }
  XPU_FP4_INLINE void load(uint32_t group, uint32_t quad, int8 (&out)[kQuad]) const {
    const auto words = __builtin_IB_subgroup_block_read_flat_u32_m32k16v1((long)codes, 63, last_row(), 63, place(group, quad));
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i / 8][i % 8] = static_cast<int>(words[i]);
  }
  XPU_FP4_INLINE int8 load_block(uint32_t group, uint32_t quad, uint32_t block) const {
    const xpu_fp4_int2 at = {0, place(group, quad).y + static_cast<int>(8 * block)};
    return __builtin_bit_cast(int8, __builtin_IB_subgroup_block_read_flat_u32_m8k16v1((long)codes, 63, last_row(), 63, at));
  }
  XPU_FP4_INLINE void prefetch(uint32_t group, uint32_t quad) const {
    __builtin_IB_subgroup_block_read_prefetch_u8_m32k32v2((long)codes, 63, last_row(), 63, place(group, quad), kCacheInL1AndL3);
  }
#else
  XPU_FP4_INLINE void load(uint32_t group, uint32_t quad, int8 (&out)[kQuad]) const {
#pragma unroll
    for (int b = 0; b < kQuad; ++b) out[b] = load_block(group, quad, b);
  }
  XPU_FP4_INLINE int8 load_block(uint32_t group, uint32_t quad, uint32_t block) const {
    return load_lanes8((GlobalWords)(codes + ((group * quads + quad) * kQuad + block) * kColumnFragmentBytes));
  }
  XPU_FP4_INLINE void prefetch(uint32_t, uint32_t) const {}
#endif
};

}  // namespace xpu_fp4
