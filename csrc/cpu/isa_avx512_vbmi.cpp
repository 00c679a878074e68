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

// All other entries are that table's: compiled a second time they would be the same code.
const KernelTable kAvx512Vbmi = {"avx512_vbmi", supported, [](const Quantize& args, Range blocks) {
  kAvx512Vnni.quantize(args, blocks);
}, [](const GroupQuantize& args, Range blocks) {
  kAvx512Vnni.group_quantize(args, blocks);
}, [](const Dequantize& args, Range blocks) { kAvx512Vnni.dequantize(args, blocks); }, [](const Combine& args, Range tokens) {
  kAvx512Vnni.combine(args, tokens);
}, product};

}  // namespace xpu_fp4::cpu
#endif
