// SPDX-License-Identifier: Apache-2.0
// Quantize and dequantize in plain C++.
#pragma once
#include "generic_fp_quant.h"
#include "mxint8_groups.h"

namespace xpu_fp4::cpu {
namespace {

template <DType T, int kBlocks>
void quantize_group_scalars(const Quantize& args, int64_t first) {
  BlockInput in[kBlocks];
  uint32_t amax_bits = 0;
  for (int b = 0; b < kBlocks; ++b) {
    in[b] = load_block<T>(args.x, first + b);
    amax_bits = std::max(amax_bits, in[b].amax_bits);
  }
  const uint8_t scale = mxint8::scale_byte(amax_bits);
  const mxint8::Reciprocal reciprocal = mxint8::reciprocal(scale);
  for (int b = 0; b < kBlocks; ++b) {
    args.scale[first + b] = scale;
    for (int i = 0; i < kBlock; ++i) {
      const int8_t code = scale == e8m0::kNan ? int8_t{0} : mxint8::quantize_element(in[b].x[i], reciprocal);
      args.codes[(first + b) * kBlock + i] = static_cast<uint8_t>(code);
    }
  }
}

void quantize_scalars(const Quantize& args, Range blocks) {
  if (args.to.format == Format::mxfp4 && fp_quant::is_rule(args.to.mode)) return quantize_fp_quant(args, blocks);
  with_dtype(args.dtype, [&](auto dtype) {
    if (args.to.format == Format::mxint8) {
      for_groups(args, blocks, [&](int64_t first, auto count) { quantize_group_scalars<dtype, count>(args, first); });
      return;
    }
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      args.scale[block] = e8m0::from_amax(in.amax_bits, args.to.mode);
      store_codes(in, args.scale[block], args.codes + block * kBlockBytes, quantize_element);
    }
  });
}

inline void dequantize_scalars(const Dequantize& args, Range blocks) {
  with_dtype(args.dtype, [&](auto dtype) {
    if (args.format == Format::mxint8) {
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        const uint8_t* codes = args.codes + block * kBlock;
        float values[kBlock];
        for (int i = 0; i < kBlock; ++i) {
          values[i] = mxint8::dequantize_element(static_cast<int8_t>(codes[i]), args.scale[block]);
        }
        for (int i = 0; i < kBlock; ++i) store<dtype>(args.out, block * kBlock + i, values[i]);
      }
      return;
    }
    for (int64_t byte = blocks.begin * kBlockBytes; byte < blocks.end * kBlockBytes; ++byte) {
      const uint8_t packed = args.codes[byte], scale = args.scale[byte / kBlockBytes];
      store<dtype>(args.out, 2 * byte, dequantize_element(e2m1::low(packed), scale));
      store<dtype>(args.out, 2 * byte + 1, dequantize_element(e2m1::high(packed), scale));
    }
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
