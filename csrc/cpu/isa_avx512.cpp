// SPDX-License-Identifier: Apache-2.0
// AVX-512: sixteen lanes of float32, about three times as fast as the portable build of the same loops (benchmarks/linear.py).
#include "generic_includes.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#include "generic_kernels.h"

namespace xpu_fp4::cpu {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
}  // namespace

const KernelTable kAvx512 = {"avx512", supported, quantize, group_quant, dequantize, gemm, gemm_w4a16};

}  // namespace xpu_fp4::cpu
#endif
