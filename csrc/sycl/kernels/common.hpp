// SPDX-License-Identifier: Apache-2.0
// Device code: types, unaligned loads and the matrix primitive. Kernels are compiled at first use by SYCL's runtime compiler,
// one program per variant; the host (sycl/variants.cpp) sets these macros:
//   XPU_FP4_SUB_GROUP    lanes of a sub-group: 16, or 8 on GPUs whose matrix unit is 8 wide (Alchemist)
//   XPU_FP4_MATRIX_UNIT  1 where the device has Intel's int8 matrix unit, 0 for the stand-in
//   XPU_FP4_ALIGNMENT    bytes to which the vector-accessed pointers are aligned: 16, or 1 if any of them is not
//   XPU_FP4_DTYPE        where a kernel depends on it: the DType of the tensor of floats, as its number
//   XPU_FP4_FORMAT       where a kernel depends on it: the Format of the activations, or of the operand that it expands
//   XPU_FP4_SCALE_MODE   FP-Quant's ScaleMode, as its number, where MXFP4 scales follow one of its rules
//   XPU_FP4_FACTOR       where a product's sums are multiplied by a factor
//   XPU_FP4_Y_DTYPE      where the output has another one
//   XPU_FP4_GROUPED      1 for a product of experts: each tile of rows has a weight of its own
//   XPU_FP4_REGISTERS    where a kernel wants 256 registers per thread on a GPU instead of 128
#pragma once
// All of <sycl/sycl.hpp> takes three times as long to read, which is most of what compiling a kernel takes.
#include <sycl/builtins.hpp>
#include <sycl/ext/oneapi/free_function_queries.hpp>
#include <sycl/ext/oneapi/kernel_properties/properties.hpp>
#include <sycl/group_algorithm.hpp>
#include <sycl/group_barrier.hpp>
#include <sycl/nd_item.hpp>
#include <sycl/sub_group.hpp>
#if XPU_FP4_MATRIX_UNIT && defined(XPU_FP4_REGISTERS)
#include <sycl/ext/intel/experimental/grf_size_properties.hpp>
#define XPU_FP4_GRF SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((sycl::ext::intel::experimental::grf_size<XPU_FP4_REGISTERS>))
#else
#define XPU_FP4_GRF  // not a property that the CPU device knows
#endif

#include "arguments.hpp"
#include "format/mxint8.h"
#include "layout.hpp"

namespace syclext = sycl::ext::oneapi;
namespace syclexp = sycl::ext::oneapi::experimental;

// Vectors as the matrix built-in takes them.
typedef short xpu_fp4_short8 __attribute__((ext_vector_type(8)));
typedef int xpu_fp4_int8 __attribute__((ext_vector_type(8)));
#if XPU_FP4_SUB_GROUP == 16
typedef xpu_fp4_short8 xpu_fp4_row_fragment;
#else
typedef xpu_fp4_int8 xpu_fp4_row_fragment;
#endif
#if XPU_FP4_MATRIX_UNIT
// Known to Intel's GPU compiler by its mangled name, hence outside of every namespace.
extern SYCL_EXTERNAL xpu_fp4_int8 intel_sub_group_i8_i8_matrix_mad_k32(xpu_fp4_row_fragment a, xpu_fp4_int8 b,
                                                                       xpu_fp4_int8 acc);
#endif

namespace xpu_fp4 {

constexpr int kSubGroup = XPU_FP4_SUB_GROUP;
/// Registers want constant indices on a GPU; on the CPU device copies of long loops only slow compilation.
constexpr int kUnroll = XPU_FP4_MATRIX_UNIT ? 128 : 1;
#ifdef XPU_FP4_DTYPE
constexpr DType kDType = static_cast<DType>(XPU_FP4_DTYPE);
#ifdef XPU_FP4_Y_DTYPE
constexpr DType kYDType = static_cast<DType>(XPU_FP4_Y_DTYPE);
#else
constexpr DType kYDType = kDType;
#endif
#endif
#ifdef XPU_FP4_FORMAT
constexpr Format kFormat = static_cast<Format>(XPU_FP4_FORMAT);
#endif

// SYCL offers kernel properties only through this macro. The sub-group's size is asked for by the attribute: the runtime
// compiler of SYCL 2025.3 drops the property `sub_group_size<N>` of such a function (its SPIR-V has no SubgroupSize), so that
// the device chooses, Intel's CPU device with AVX-512 sixteen lanes.
#define XPU_FP4_KERNEL(dimensions)                                                                 \
  extern "C" SYCL_EXT_ONEAPI_FUNCTION_PROPERTY((syclexp::nd_range_kernel<dimensions>)) XPU_FP4_GRF \
      [[sycl::reqd_sub_group_size(XPU_FP4_SUB_GROUP)]] void

using int8 = xpu_fp4_int8;
using RowFragment = xpu_fp4_row_fragment;

inline sycl::sub_group this_sub_group() { return syclext::this_work_item::get_sub_group(); }

/// Sixteen bytes, loaded at once where the variant's alignment allows it.
struct alignas(XPU_FP4_ALIGNMENT) Bytes16 {
  uint8_t byte[16];
};
inline Bytes16 load16(const void* address) { return *static_cast<const Bytes16*>(address); }

// ---- one 8 x kSubGroup x 32 product of int8 matrices, int32 sums ----
// lane l of a: for each of 8 rows the int8 values K = 2l, 2l+1 (8 lanes: K = 4l .. 4l+3)
// lane n of b: column n, dword j = K 4j .. 4j+3;   lane n of the result: column n, rows 0..7
#if XPU_FP4_MATRIX_UNIT
inline int8 matrix_mad(RowFragment a, int8 b, int8 acc) { return intel_sub_group_i8_i8_matrix_mad_k32(a, b, acc); }
#else
/// K = 4j .. 4j+3 of row r, from the lanes that hold them.
inline uint32_t row_dword(const RowFragment& a, int r, int j) {
  const auto sub_group = this_sub_group();
#if XPU_FP4_SUB_GROUP == 16
  const uint32_t pair = static_cast<uint16_t>(a[r]);
  return sycl::select_from_group(sub_group, pair, 2 * j) | sycl::select_from_group(sub_group, pair, 2 * j + 1) << 16;
#else
  return sycl::select_from_group(sub_group, static_cast<uint32_t>(a[r]), j);
#endif
}
inline int dot4(uint32_t a, uint32_t b, int acc) {
  for (int i = 0; i < 32; i += 8) acc += int{static_cast<int8_t>(a >> i)} * int{static_cast<int8_t>(b >> i)};
  return acc;
}
inline int8 matrix_mad(RowFragment a, int8 b, int8 acc) {
  for (int r = 0; r < kRowUnit; ++r) {
    for (int j = 0; j < 8; ++j) acc[r] = dot4(row_dword(a, r, j), static_cast<uint32_t>(b[j]), acc[r]);
  }
  return acc;
}
#endif

/// Leaves a grouped product's kernel where a tile is empty, else goes to its expert. All lanes of a work-group's
/// row of tiles do the same.
#ifdef XPU_FP4_GROUPED
#define XPU_FP4_FIND_EXPERT(index)                                                        \
  const int64_t expert = sycl::group_broadcast(this_sub_group(), tiles[index].expert, 0); \
  m = sycl::group_broadcast(this_sub_group(), tiles[index].end, 0);                       \
  if (expert < 0) return;                                                                 \
  if (bias != nullptr) bias += expert * n;
#define XPU_FP4_TO_EXPERT(index)   \
  XPU_FP4_FIND_EXPERT(index)       \
  w_codes += expert * n * (k / 2); \
  w_scale += expert * n * w_scale_row_stride;
#else
#define XPU_FP4_FIND_EXPERT(index)
#define XPU_FP4_TO_EXPERT(index)
#endif

/// Two packed codes -> two int8 of twice their value, in K order.
inline uint32_t unpack2(uint8_t packed) {
  return static_cast<uint8_t>(e2m1::twice(e2m1::low(packed))) |
         static_cast<uint32_t>(static_cast<uint8_t>(e2m1::twice(e2m1::high(packed)))) << 8;
}

/// A column's packed block -> its lane of the B operand.
inline int8 column_fragment(const Bytes16& packed) {
  int8 fragment;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    fragment[j] = static_cast<int>(unpack2(packed.byte[2 * j]) | unpack2(packed.byte[2 * j + 1]) << 16);
  }
  return fragment;
}

}  // namespace xpu_fp4
