// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI but no VBMI: Cascade Lake, Cooper Lake.
#include "simd_includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c,prefer-vector-width=512")
#define XPU_FP4_FLOAT_LANES 16
#include "avx512_dequantize.h"
#include "avx512_gemm.h"
#include "avx512_quantize.h"
#include "avx512_w4a16.h"
#include "combine.h"

namespace xpu_fp4::cpu {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}

const ProductKernels& product(const Activations& a) {
  return a.to.format == Format::none ? product_kernels<Avx512Float, finish_row> : product_kernels<Vnni<false>, finish_row>;
}
}  // namespace

const KernelTable kAvx512Vnni = {"avx512_vnni", supported, transform_and_quantize<quantize>, group_quantize, dequantize,
                                 combine,       product};

}  // namespace xpu_fp4::cpu
#endif
