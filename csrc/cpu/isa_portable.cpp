// SPDX-License-Identifier: Apache-2.0
#include "generic_kernels.h"

namespace xpu_fp4::cpu {

const KernelTable kPortable = {"portable", [] { return true; }, quantize, group_quant, dequantize, gemm, gemm_w4a16};

}  // namespace xpu_fp4::cpu
