// SPDX-License-Identifier: Apache-2.0
// W4A16 on the matrix unit: Y [M, N] = X x W^T + bias, X and Y float16 or bfloat16, W as it is in the checkpoint.
//
// Four times an element is exact in either type: it is decoded in registers, two matrix-mads sum a block of 32 in float32, and
// the block's scale, a power of two, enters by one fma per output. So no scale is rounded, whatever its exponent.
//
// A sub-group computes 8 * XPU_FP4_ROW_UNITS rows x kLanes * XPU_FP4_COLUMN_UNITS columns. With XPU_FP4_SPLIT = 8, for few
// rows, the eight sub-groups of a work-group share K by quads and add their sums at the end, in a fixed order. Macros: those,
// XPU_FP4_DTYPE (X's, and Y's but for XPU_FP4_Y_DTYPE), XPU_FP4_BLOCK_2D, XPU_FP4_ALIGNMENT (of W), XPU_FP4_ALIGNED_ROWS (X
// begins on a cache line, as 2D loads need it), XPU_FP4_REGISTERS.
#include <sycl/ext/oneapi/work_group_static.hpp>

#include "output.hpp"

#if XPU_FP4_MATRIX_UNIT
extern SYCL_EXTERNAL xpu_fp4_float8 intel_sub_group_bf16_bf16_matrix_mad_k16(xpu_fp4_row_fragment a, xpu_fp4_int8 b,
                                                                             xpu_fp4_float8 acc);
extern SYCL_EXTERNAL xpu_fp4_float8 intel_sub_group_f16_f16_matrix_mad_k16(xpu_fp4_row_fragment a, xpu_fp4_int8 b,
                                                                           xpu_fp4_float8 acc);
#if XPU_FP4_BLOCK_2D
extern "C" SYCL_EXTERNAL xpu_fp4_ushort16 __builtin_IB_subgroup_block_read_flat_u16_m8k16v2(long surface, int width, int height,
                                                                                            int pitch, xpu_fp4_int2 at);
#endif
#endif

using namespace xpu_fp4;

constexpr int kRowUnits = XPU_FP4_ROW_UNITS, kColumnUnits = XPU_FP4_COLUMN_UNITS, kSplit = XPU_FP4_SPLIT;
constexpr int kTileRows = kRowUnit * kRowUnits, kTileColumns = kLanes * kColumnUnits;
constexpr int kHalves = 2;  // matrix-mads of 16 in a block
constexpr bool kBf16 = kDType == DType::bf16;

// ---- one 8 x kLanes x 16 product; the layouts of matrix_mad with 16-bit elements: a dword holds K 2j and 2j+1 ----
#if XPU_FP4_MATRIX_UNIT
XPU_FP4_INLINE float8 matrix_mad_16(RowFragment a, int8 b, float8 acc) {
  if constexpr (kBf16) return intel_sub_group_bf16_bf16_matrix_mad_k16(a, b, acc);
  return intel_sub_group_f16_f16_matrix_mad_k16(a, b, acc);
}
#else
inline float element(uint32_t pair, int i) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * i));
  return kBf16 ? float_from_bf16(bits) : load_converted<DType::f16>(&bits, 0);
}
inline float8 matrix_mad_16(RowFragment a, int8 b, float8 acc) {
  for (int r = 0; r < kRowUnit; ++r) {
    for (int j = 0; j < 8; ++j) {
      const uint32_t x = row_dword(a, r, j);
      for (int i = 0; i < 2; ++i) acc[r] += element(x, i) * element(b[j], i);
    }
  }
  return acc;
}
#endif

/// The tile's rows of X; those beyond M read as zeros, or as the last one.
struct Rows {
  GlobalBytes x;
  uint32_t height;
  int64_t row_bytes;

#if XPU_FP4_MATRIX_UNIT && XPU_FP4_BLOCK_2D && XPU_FP4_ALIGNED_ROWS
  XPU_FP4_INLINE void load(uint32_t unit, uint32_t block, RowFragment (&out)[kHalves]) const {
    const int width = static_cast<int>(row_bytes) - 1;
    const xpu_fp4_int2 at = {static_cast<int>(block * kBlock), static_cast<int>(unit * kRowUnit)};
    const auto rows = __builtin_IB_subgroup_block_read_flat_u16_m8k16v2((long)x, width, height - 1, width, at);
#pragma unroll
    for (int i = 0; i < 16; ++i) out[i / 8][i % 8] = static_cast<short>(rows[i]);
  }
#elif XPU_FP4_SUB_GROUP == 8 && XPU_FP4_ALIGNED_ROWS
  /// Both halves of a row through one address.
  XPU_FP4_INLINE void load(uint32_t unit, uint32_t block, RowFragment (&out)[kHalves]) const {
#pragma unroll(kUnroll)
    for (uint32_t r = 0; r < kRowUnit; ++r) {
      const uint32_t row = sycl::min(unit * kRowUnit + r, height - 1);
      const auto words =
          __spirv_SubgroupBlockReadINTEL<xpu_fp4_uint2>((GlobalWords)(x + row * row_bytes + block * (2 * kBlock)));
      out[0][r] = static_cast<int>(words[0]);
      out[1][r] = static_cast<int>(words[1]);
    }
  }
#else
  XPU_FP4_INLINE void load(uint32_t unit, uint32_t block, RowFragment (&out)[kHalves]) const {
#pragma unroll(kUnroll)
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll(kUnroll)
      for (uint32_t r = 0; r < kRowUnit; ++r) {
        const uint32_t row = sycl::min(unit * kRowUnit + r, height - 1);
        GlobalBytes from = x + row * row_bytes + block * (2 * kBlock) + h * kBlock;
#if XPU_FP4_SUB_GROUP == 16
        out[h][r] = ((GlobalShorts)from)[lane_id()];
#else
        // X may begin between dwords.
        const uint32_t low = ((GlobalShorts)from)[2 * lane_id()], high = ((GlobalShorts)from)[2 * lane_id() + 1];
        out[h][r] = low | high << 16;
#endif
      }
    }
  }
#endif
};

/// Eight codes -> four pairs of 4 * their values, in K order. With exponent e, mantissa m and n = not zero, the bits of such a
/// value are sign, n, zeros, e m: n stands for the leading bit of the exponent, 2^(1 + e) (1 + m / 2).
XPU_FP4_INLINE void decode_pairs(uint32_t x, int (&pairs)[4]) {
  constexpr int top = kBf16 ? 8 : 11;                       // where e m ends
  const uint32_t normal = (x >> 1 | x >> 2) & 0x11111111u;  // e is not 0; else the mantissa is part of n
  const uint32_t low_bits = x & (0x66666666u | normal);
  const uint32_t nonzero = (x & 0x77777777u) + 0x77777777u;  // bit 3
  const uint32_t high_bits = (x & 0x88888888u) | (nonzero >> 1 & 0x44444444u);
  const auto place = [](uint32_t from, int left) { return left >= 0 ? from << left : from >> -left; };
  constexpr uint32_t em = 0x00010001u * (7u << (top - 2)), sn = 0x00010001u * (3u << 14);
  // Codes 4 apart are 16 bits apart: they are put in place together, and then find their neighbours.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int even = 8 * i, odd = 8 * i + 4;  // where the codes begin
    const uint32_t evens = (place(low_bits, top - 2 - even) & em) | (place(high_bits, 12 - even) & sn);
    const uint32_t odds = (place(low_bits, top - 2 - odd) & em) | (place(high_bits, 12 - odd) & sn);
    pairs[i] = static_cast<int>((evens & 0xFFFFu) | odds << 16);
    pairs[i + 2] = static_cast<int>(evens >> 16 | (odds & 0xFFFF0000u));
  }
}

/// The lane's row of W.
struct Column {
  GlobalBytes codes, scale;
  int64_t scale_block_stride;

  XPU_FP4_INLINE void load(uint32_t block, int8 (&out)[kHalves]) const {
    struct alignas(XPU_FP4_ALIGNMENT) Packed {
      uint8_t byte[kBlockBytes];
    };
    const auto packed = *(XPU_FP4_GLOBAL const Packed*)(codes + uint64_t{block} * kBlockBytes);
    const auto dwords = __builtin_bit_cast(xpu_fp4_uint4, packed);
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      int pairs[4];
      decode_pairs(dwords[d], pairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[d / 2][d % 2 * 4 + i] = pairs[i];
    }
  }
  /// 2^(e - 127), NaN for 255, over the 4 by which the decoded values are too large: weight_factor() without a branch.
  XPU_FP4_INLINE float factor(uint32_t block) const {
    const uint32_t e = scale[block * scale_block_stride];
    return 0.25f * float_of(sycl::max(e << 23, 0x00400000u) | (e + 1) >> 8 << 22);
  }
};

using Sums = float8[kRowUnits][kColumnUnits];

inline void add_block(const Rows& rows, const Column (&columns)[kColumnUnits], uint32_t block, Sums& acc) {
  int8 w[kColumnUnits][kHalves];
  float factor[kColumnUnits];
#pragma unroll
  for (int j = 0; j < kColumnUnits; ++j) {
    columns[j].load(block, w[j]);
    factor[j] = columns[j].factor(block);
  }
#pragma unroll(kUnroll)
  for (int i = 0; i < kRowUnits; ++i) {
    RowFragment x[kHalves];
    rows.load(i, block, x);
#pragma unroll(kUnroll)
    for (int j = 0; j < kColumnUnits; ++j) {
      const float8 sum = matrix_mad_16(x[1], w[j][1], matrix_mad_16(x[0], w[j][0], float8(0.0f)));
#pragma unroll
      for (int r = 0; r < kRowUnit; ++r) acc[i][j][r] = sycl::fma(sum[r], factor[j], acc[i][j][r]);
    }
  }
}

/// Every sub-group's sums -> their total in sub-group 0: 1 is added to 0, then 2, and so on.
XPU_FP4_INLINE void add_splits(Sums& acc, uint32_t split) {
  static syclexp::work_group_static<float[kSplit][kTileRows][kTileColumns]> sums;
  const auto group = syclext::this_work_item::get_work_group<2>();
#pragma unroll(kUnroll)
  for (int i = 0; i < kRowUnits; ++i) {
#pragma unroll(kUnroll)
    for (int j = 0; j < kColumnUnits; ++j) {
#pragma unroll
      for (int r = 0; r < kRowUnit; ++r) sums[split][kRowUnit * i + r][kLanes * j + lane_id()] = acc[i][j][r];
    }
  }
  sycl::group_barrier(group);
  if (split != 0) return;
#pragma unroll(kUnroll)
  for (int i = 0; i < kRowUnits; ++i) {
#pragma unroll(kUnroll)
    for (int j = 0; j < kColumnUnits; ++j) {
#pragma unroll
      for (int r = 0; r < kRowUnit; ++r) {
        for (int s = 1; s < kSplit; ++s) acc[i][j][r] += sums[s][kRowUnit * i + r][kLanes * j + lane_id()];
      }
    }
  }
}

XPU_FP4_KERNEL(2)
gemm_w4a16_matrix(const void* x, XPU_FP4_STORED_PARAMETERS(w), XPU_FP4_OUTPUT_PARAMETERS, int64_t k) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  // One tile per sub-group, or per work-group of kSplit sub-groups.
  const auto tile_column = uniform(static_cast<int64_t>(item.get_global_id(1)) / (kLanes * kSplit));
  const uint32_t split = kSplit == 1 ? 0 : uniform(static_cast<uint32_t>(item.get_local_id(1)) / kLanes);
  const int64_t first_row = uniform(static_cast<int64_t>(item.get_global_id(0))) * kTileRows;
  const int64_t first_column = tile_column * kTileColumns;
  if (first_row >= m || first_column >= n) return;  // whole work-groups where they are split
  XPU_FP4_TO_EXPERT(item.get_global_id(0))
  const int64_t row_bytes = 2 * k;
  const auto height = static_cast<uint32_t>(sycl::min(m - first_row, int64_t{kTileRows}));
  const Rows rows = {(GlobalBytes)x + first_row * row_bytes, height, row_bytes};
  Column columns[kColumnUnits];
#pragma unroll
  for (int j = 0; j < kColumnUnits; ++j) {
    const int64_t column = sycl::min(first_column + kLanes * j + lane_id(), n - 1);
    columns[j] = {(GlobalBytes)w_codes + column * (k / 2), (GlobalBytes)w_scale + column * w_scale_row_stride,
                  w_scale_block_stride};
  }

  Sums acc;
#pragma unroll
  for (int i = 0; i < kRowUnits; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnUnits; ++j) acc[i][j] = 0.0f;
  }
  const auto blocks = static_cast<uint32_t>(k / kBlock);
#pragma nounroll
  for (uint32_t quad = split; quad * kQuad < blocks; quad += kSplit) {
    const uint32_t last = sycl::min(quad * kQuad + kQuad, blocks);
#pragma nounroll
    for (uint32_t block = quad * kQuad; block < last; ++block) add_block(rows, columns, block, acc);
  }
  if constexpr (kSplit > 1) {
    add_splits(acc, split);
    if (split != 0) return;
  }
  Output{XPU_FP4_OUTPUT}.store_tile<kRowUnits, kColumnUnits>(acc, first_row, first_column);
}
