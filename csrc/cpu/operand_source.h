// SPDX-License-Identifier: Apache-2.0
// Where a quad (K = 128) of a row of A comes from: codes as they lie in memory, or floats that are quantized on the way. What a
// kernel makes of the codes is its own; of where they come from it knows nothing.
#pragma once
#include "simd_includes.h"

namespace xpu_fp4::cpu {
namespace {

// Calls function(codes, scale) with a quad's codes and its four scales: of the quad that begins at this block of A and has so
// many. Blocks beyond K have codes 0.
template <void (*quantize)(const Quantize&, Range), class Function>
void with_codes(const Activations& source, int64_t block, int blocks, const Function& function) {
  const auto bytes = [&](int64_t count) { return code_bytes(source.to.format, count * kBlock); };
  const auto* codes = static_cast<const uint8_t*>(source.data) + bytes(block);
  const uint8_t* scales = source.scale + block;
  if (source.are_codes && blocks == kQuad) return function(codes, scales);
  alignas(64) uint8_t copy[kQuadElements] = {}, scale[kQuad] = {e8m0::kBias, e8m0::kBias, e8m0::kBias, e8m0::kBias};
  if (source.are_codes) {
    std::memcpy(copy, codes, static_cast<size_t>(bytes(blocks)));
    std::memcpy(scale, scales, static_cast<size_t>(blocks));
  } else {
    const void* x = static_cast<const char*>(source.data) + block * kBlock * size_of(source.dtype);
    quantize({x, source.dtype, source.to, 1, blocks * kBlock, copy, scale}, {0, blocks});
  }
  function(copy, scale);
}

}  // namespace
}  // namespace xpu_fp4::cpu
