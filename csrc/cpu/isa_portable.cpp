// SPDX-License-Identifier: Apache-2.0
#include "generic_quantize.h"
#include "generic_w4a16.h"
#include "generic_w4a4.h"

namespace xpu_fp4::cpu {

namespace {
const ProductKernels& product(Format activations, int64_t) {
  return activations == Format::none ? product_kernels<PortableFloat, finish_row_scalars>
                                     : product_kernels<Portable, finish_row_scalars>;
}
}  // namespace

const KernelTable kPortable = {"portable", [] { return true; }, quantize, group_quantize, dequantize, product};

}  // namespace xpu_fp4::cpu
