// SPDX-License-Identifier: Apache-2.0
// Device code: elements come from somewhere and become codes under a scale. Where they come from is a constructor of Values;
// what they become is an encoder: the scale byte of a largest magnitude, and the code of an element under it.
#pragma once
#include "convert.hpp"

namespace xpu_fp4 {

constexpr int kVector = 16 / size_of(kDType);  // elements of a load

/// `count` neighbouring elements as float32, and the bits of the largest magnitude among them.
template <int count>
struct Values {
  float x[count];
  uint32_t amax_bits = 0;

  inline explicit Values(const uint8_t* from) {
#pragma unroll
    for (int v = 0; v < count / kVector; ++v) {
      alignas(16) const Bytes16 bytes = load16(from + 16 * v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[v * kVector + i] = load_converted<kDType>(&bytes, i);
        amax_bits = sycl::max(amax_bits, magnitude_bits(x[v * kVector + i]));
      }
    }
  }
};

/// The largest of `lanes` neighbouring lanes, a power of two, by butterfly exchange.
inline uint32_t largest_of_lanes(uint32_t amax_bits, int lanes) {
#pragma unroll
  for (int distance = 1; distance < kSubGroup; distance *= 2) {
    if (distance >= lanes) break;
    amax_bits = sycl::max(amax_bits, sycl::permute_group_by_xor(this_sub_group(), amax_bits, distance));
  }
  return amax_bits;
}

/// MXFP4 (format/block.h).
struct Mxfp4Encoder {
  static constexpr int kBits = 4;
  float reciprocal;

  inline explicit Mxfp4Encoder(uint8_t scale) : reciprocal(e8m0::reciprocal(scale)) {}
  inline uint32_t operator()(float x) const { return quantize_element(x, reciprocal); }
};

/// MXINT8 (format/mxint8.h).
struct Mxint8Encoder {
  static constexpr int kBits = 8;
  mxint8::Reciprocal reciprocal;

  inline explicit Mxint8Encoder(uint8_t scale) : reciprocal(mxint8::reciprocal(scale)) {}
  inline uint32_t operator()(float x) const { return static_cast<uint8_t>(mxint8::quantize_element(x, reciprocal)); }
};

/// The elements' codes, the first in the lowest bits. Under a NaN scale they mean nothing.
template <class Encoder, int count>
inline void encode(const Values<count>& in, const Encoder& encoder, uint32_t (&codes)[count * Encoder::kBits / 32]) {
  constexpr int each = 32 / Encoder::kBits;
#pragma unroll
  for (int i = 0; i < count / each; ++i) codes[i] = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) codes[i / each] |= encoder(in.x[i]) << Encoder::kBits * (i % each);
}

}  // namespace xpu_fp4
