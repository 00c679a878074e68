// SPDX-License-Identifier: Apache-2.0
#include "generic_quantize.h"
#include "generic_w4a16.h"
#include "generic_w4a4.h"

namespace xpu_fp4::cpu {

const KernelTable kPortable = {
    "portable", [] { return true; }, quantize, group_quant, dequantize, [](int64_t) -> const ProductKernels& {
  return product_kernels<Portable, finish_row_scalars>;
}, product_kernels<PortableFloat, finish_row_scalars>};

}  // namespace xpu_fp4::cpu
