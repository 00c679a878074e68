// SPDX-License-Identifier: Apache-2.0
#include "generic_quantize.h"
#include "generic_w4a16.h"
#include "generic_w4a4.h"

namespace xpu_fp4::cpu {

const KernelTable kPortable = {
    "portable", [] { return true; }, quantize, group_quant, dequantize,
    [](int64_t) -> const W4A4Kernels& { return w4a4_kernels<Portable, quantize, finish_row_scalars>; }, gemm_w4a16};

}  // namespace xpu_fp4::cpu
