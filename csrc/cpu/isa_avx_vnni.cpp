// SPDX-License-Identifier: Apache-2.0
// AVX-VNNI, which is vpdpbusd on vectors of 256 bits, but no AVX-512: Alder Lake and later.
#include "simd_includes.h"

#if defined(__x86_64__)
#include <cpuid.h>

#pragma GCC target("avx2,fma,f16c,avxvnni")
#define XPU_FP4_FLOAT_LANES 8
#include "avx2_gemm.h"

namespace xpu_fp4::cpu {
namespace {

// CPUID leaf 7: EAX is the last subleaf, and bit 4 of subleaf 1's EAX is AVX-VNNI. The registers are AVX2's.
bool supported() {
  if (!kAvx2.supported()) return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || eax < 1) return false;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1u) != 0;
}

struct AvxVnni {
  static __m256i vpdpbusd(__m256i sum, __m256i w, __m256i a) { return _mm256_dpbusd_avx_epi32(sum, w, a); }
};

const ProductKernels& product(const Activations& a) {
  return a.to.format == Format::none ? kAvx2.product(a) : product_kernels<Avx2<Int32Sums<AvxVnni>>, finish_row_scalars>;
}
}  // namespace

const KernelTable kAvxVnni = table_above<kAvx2>("avx_vnni", supported, product);

}  // namespace xpu_fp4::cpu
#endif
