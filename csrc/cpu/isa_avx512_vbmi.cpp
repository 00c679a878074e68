// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI and VBMI: Ice Lake, Sapphire Rapids, Zen 4 and later.
#include "simd_includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,fma,f16c,prefer-vector-width=512")
#define XPU_FP4_FLOAT_LANES 16
#include "avx512_gemm.h"
#include "avx512_output.h"

namespace xpu_fp4::cpu {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

const ProductKernels& product(const Activations& a) {
  return a.to.format == Format::none ? kAvx512Vnni.product(a) : product_kernels<Vnni<true>, finish_row>;
}
}  // namespace

const KernelTable kAvx512Vbmi = table_above<kAvx512Vnni>("avx512_vbmi", supported, product);

}  // namespace xpu_fp4::cpu
#endif
