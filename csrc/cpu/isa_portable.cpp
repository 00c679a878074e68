// SPDX-License-Identifier: Apache-2.0
#include "combine.h"
#include "generic_gemm.h"
#include "generic_w4a16.h"

namespace xpu_fp4::cpu {

namespace {
const ProductKernels& product(const Activations& a) {
  return a.to.format == Format::none ? product_kernels<PortableFloat, finish_row_scalars>
                                     : product_kernels<Portable, finish_row_scalars>;
}
}  // namespace

const KernelTable kPortable = {"portable",     [] { return true; }, transform_and_quantize<quantize_scalars>,
                               group_quantize, dequantize_scalars,  combine,
                               product};

}  // namespace xpu_fp4::cpu
