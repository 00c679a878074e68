// SPDX-License-Identifier: Apache-2.0
// Device code: what the sub-groups of a work-group of gemm_small.cpp tell each other in a round, the sums of a quad each,
// through local memory. XPU_FP4_ROWS: rows of the work-group.
#pragma once
#include "operands.hpp"

namespace xpu_fp4 {

constexpr int kRows = XPU_FP4_ROWS;
constexpr int kSplit = small_split(kRows);
constexpr int kOwnRows = ceil_div(kRows, kSplit);  // that a sub-group adds up
constexpr int kUnitRows = kRows < kRowUnit ? kRows : kRowUnit;

// A round's terms: of few rows a row's quads lie together, [row][quad][lane], so that whoever adds them up loads eight at a
// time; else a quad's rows do, [quad][row][lane], so that whoever computes them stores eight.
constexpr bool kQuadsTogether = kRows < kRowUnit;
constexpr int kTermsStride = kQuadsTogether ? kLanes : kRows * kLanes;  // of a quad
using RoundTerms = uint32_t[kSplit][kRows][kLanes];

#define XPU_FP4_LOCAL __attribute__((opencl_local))
using LocalWords = XPU_FP4_LOCAL uint32_t*;

template <int count>
struct Words {
  typedef uint32_t type __attribute__((ext_vector_type(count)));
};
template <>
struct Words<1> {
  using type = uint32_t;
};

/// Rows of kLanes floats, through one address.
template <int count>
XPU_FP4_INLINE void store_rows(LocalWords out, const float* rows) {
  typename Words<count>::type words;
  if constexpr (count == 1) {
    words = __builtin_bit_cast(uint32_t, rows[0]);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) words[i] = __builtin_bit_cast(uint32_t, rows[i]);
  }
  __spirv_SubgroupBlockWriteINTEL(out, words);
}
template <int count>
XPU_FP4_INLINE void load_rows(LocalWords from, float (&rows)[count]) {
  const auto words = __spirv_SubgroupBlockReadINTEL<typename Words<count>::type>((XPU_FP4_LOCAL const uint32_t*)from);
  if constexpr (count == 1) {
    rows[0] = float_of(words);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) rows[i] = float_of(words[i]);
  }
}

/// Terms of a row unit of the sub-group's quad.
XPU_FP4_INLINE void store_unit(LocalWords out, int unit, const float (&term)[kUnitRows]) {
  if constexpr (kQuadsTogether) {
#pragma unroll
    for (int r = 0; r < kUnitRows; ++r) store_rows<1>(out + r * kSplit * kLanes, term + r);
  } else {
    store_rows<kUnitRows>(out + unit * kRowUnit * kLanes, term);
  }
}

/// A round's terms of the sub-group's own row, where quads lie together. What else there is to load, the kernels do themselves:
/// from a function it takes an instruction more.
XPU_FP4_INLINE void load_quads(LocalWords all, uint32_t own_row, float (&own)[kSplit][kOwnRows]) {
#pragma unroll
  for (int q = 0; q < kSplit; q += 8) {
    float eight[8];
    load_rows(all + (own_row * kSplit + q) * kLanes, eight);
#pragma unroll
    for (int i = 0; i < 8; ++i) own[q + i][0] = eight[i];
  }
}

/// Of local memory alone: group_barrier waits for global memory too.
XPU_FP4_INLINE void barrier() {
  constexpr uint32_t work_group = 2, acquire_release = 8, local = 256;
  __spirv_ControlBarrier(work_group, work_group, acquire_release | local);
}

}  // namespace xpu_fp4
