// SPDX-License-Identifier: Apache-2.0
// Quantize and dequantize in plain C++.
#pragma once
#include "generic_group_quant.h"

namespace xpu_fp4::cpu {
namespace {

void quantize(const Quantize& args, Range blocks) {
  with_dtype(args.dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      args.scale[block] = e8m0::from_amax(in.amax_bits, args.to.mode);
      store_codes(in, args.scale[block], args.codes + block * kBlockBytes, quantize_element);
    }
  });
}

void dequantize(const Dequantize& args, Range blocks) {
  with_dtype(args.dtype, [&](auto dtype) {
    for (int64_t byte = blocks.begin * kBlockBytes; byte < blocks.end * kBlockBytes; ++byte) {
      const uint8_t packed = args.codes[byte], scale = args.scale[byte / kBlockBytes];
      store<dtype>(args.out, 2 * byte, dequantize_element(e2m1::low(packed), scale));
      store<dtype>(args.out, 2 * byte + 1, dequantize_element(e2m1::high(packed), scale));
    }
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
