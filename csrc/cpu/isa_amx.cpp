// SPDX-License-Identifier: Apache-2.0
// AMX int8 and bfloat16 tiles beside AVX-512: Sapphire Rapids and later.
#include "simd_includes.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,amx-tile,amx-int8,amx-bf16,fma,f16c,prfchw,prefer-vector-width=512")
#define XPU_FP4_FLOAT_LANES 16
#include "amx_gemm.h"
#include "amx_w4a16.h"
#include "avx512_output.h"

namespace xpu_fp4::cpu {
namespace {

// CPUID leaf 7: EDX bits 22, 24 and 25 are AMX-BF16, AMX-TILE and AMX-INT8, which all processors with tiles have. Linux grants
// the tile registers (state 18) to a process that asks.
bool supported() {
  static const bool granted = [] {
    if (!kAvx512Vbmi.supported()) return false;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx >> 22 & 13u) != 13u) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
}

// A tile takes as long for one row as for sixteen.
constexpr int64_t kLeastRows = 8;

const ProductKernels& product(const Activations& a) {
  if (a.to.format == Format::none && a.dtype == DType::bf16) return product_kernels<AmxBf16, finish_row>;
  if (a.to.format == Format::none || a.m < kLeastRows) return kAvx512Vbmi.product(a);
  return product_kernels<Amx, finish_row>;
}

}  // namespace

const KernelTable kAmx = table_above<kAvx512Vbmi>("amx", supported, product);

}  // namespace xpu_fp4::cpu
#endif
