// SPDX-License-Identifier: Apache-2.0
// The compatibility quantizer in plain C++, and what it shares with the plain quantizer: loops over fixed sizes that the
// compiler vectorises for the instruction set that it may use. Each isa_*.cpp includes this file after its target pragma; all
// of it has internal linkage, so no two instruction sets mix.
#pragma once
#include "with_dtype.h"

namespace xpu_fp4::cpu {
namespace {

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

inline void group_quantize(const GroupQuantize& args, Range blocks) {
  const int64_t row_blocks = args.k / kBlock;
  with_dtype(args.dtype, [&](auto dtype) {
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const BlockInput in = load_block<dtype>(args.x, block);
      const uint8_t scale = group_quant::scale_byte(in.amax_bits, args.scale_floor);
      const int64_t row = block / row_blocks, column = block % row_blocks;
      args.scale[row * args.scale_row_stride + column * args.scale_block_stride] = e8m0::value(scale);
      store_codes(in, scale, args.codes + block * kBlockBytes, group_quant::quantize_element);
    }
  });
}

}  // namespace
}  // namespace xpu_fp4::cpu
