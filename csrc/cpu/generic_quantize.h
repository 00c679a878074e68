// SPDX-License-Identifier: Apache-2.0
// Quantize and dequantize in plain C++: loops over fixed sizes that the compiler vectorises for the instruction set that it may
// use. Each isa_*.cpp includes this file after its target pragma; all of it has internal linkage, so no two instruction sets mix.
#pragma once
#include "simd_includes.h"

namespace xpu_fp4::cpu {
namespace {

// Calls function with the DType as a compile-time constant.
template <class Function>
void with_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::f32: return function(std::integral_constant<DType, DType::f32>{});
    case DType::f16: return function(std::integral_constant<DType, DType::f16>{});
    case DType::bf16: return function(std::integral_constant<DType, DType::bf16>{});
  }
}

struct BlockInput {
  float x[kBlock];
  uint32_t amax_bits;
};

template <DType T>
BlockInput load_block(const void* data, int64_t block) {
  BlockInput in;
  in.amax_bits = 0;
  for (int i = 0; i < kBlock; ++i) in.x[i] = load<T>(data, block * kBlock + i);
  for (int i = 0; i < kBlock; ++i) in.amax_bits = std::max(in.amax_bits, magnitude_bits(in.x[i]));
  return in;
}

// Encodes and packs a block with encode(x, 1 / scale) -> code; a NaN scale has all codes 0.
template <class Encode>
void store_codes(const BlockInput& in, uint8_t scale, uint8_t* q, const Encode& encode) {
  if (scale == e8m0::kNan) {
    std::memset(q, 0, kBlockBytes);
    return;
  }
  const float reciprocal = e8m0::reciprocal(scale);
  uint8_t codes[kBlock];
  for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<uint8_t>(encode(in.x[i], reciprocal));
  for (int i = 0; i < kBlockBytes; ++i) q[i] = e2m1::pack(codes[2 * i], codes[2 * i + 1]);
}

void quantize(const QuantizeArgs& args, Range blocks) {
  with_dtype(args.x_dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      args.scale[block] = e8m0::from_amax(in.amax_bits, args.mode);
      store_codes(in, args.scale[block], args.q + block * kBlockBytes, quantize_element);
    }
  });
}

void group_quant(const GroupQuantArgs& args, Range blocks) {
  const int64_t row_blocks = args.k / kBlock;
  with_dtype(args.x_dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      const uint8_t scale = group_quant::scale_byte(in.amax_bits, args.scale_floor);
      const int64_t row = block / row_blocks, column = block % row_blocks;
      args.scale[row * args.scale_row_stride + column * args.scale_block_stride] = e8m0::value(scale);
      store_codes(in, scale, args.q + block * kBlockBytes, group_quant::quantize_element);
    }
  });
}

void dequantize(const DequantizeArgs& args, Range blocks) {
  with_dtype(args.out_dtype, [&](auto dtype) {
    for (int64_t byte = blocks.begin * kBlockBytes; byte < blocks.end * kBlockBytes; ++byte) {
      const uint8_t packed = args.q[byte], scale = args.scale[byte / kBlockBytes];
      store<dtype>(args.out, 2 * byte, dequantize_element(e2m1::low(packed), scale));
      store<dtype>(args.out, 2 * byte + 1, dequantize_element(e2m1::high(packed), scale));
    }
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
