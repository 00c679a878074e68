// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA: Haswell, Zen and later.
#include "simd_includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define XPU_FP4_FLOAT_LANES 8
#include "avx2_gemm.h"
#include "avx2_w4a16.h"
#include "combine.h"

namespace xpu_fp4::cpu {
namespace {
bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

const ProductKernels& product(const Activations& a) {
  return a.to.format == Format::none ? product_kernels<Avx2Float, finish_row_scalars>
                                     : product_kernels<Avx2<Int16Sums>, finish_row_scalars>;
}
}  // namespace

const KernelTable kAvx2 = {"avx2",  supported, transform_and_quantize<quantize>, group_quantize, dequantize_scalars,
                           combine, product};

}  // namespace xpu_fp4::cpu
#endif
