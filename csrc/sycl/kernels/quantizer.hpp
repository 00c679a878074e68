// SPDX-License-Identifier: Apache-2.0
// Device code: elements come from somewhere and become codes under a scale. Where they come from is a constructor of Values;
// what they become is an encoder: the scale byte of a largest magnitude, and the code of an element under it.
#pragma once
#include "convert.hpp"
#include "format/fp_quant.h"
#include "format/hadamard.h"

namespace xpu_fp4 {

constexpr int kVector = 16 / size_of(kDType);  // elements of a load

struct Floats4 {
  float x[4];
};

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

  /// Elements at hand.
  inline explicit Values(const float* from) {
#pragma unroll(kUnroll)
    for (int i = 0; i < count; ++i) {
      x[i] = from[i];
      amax_bits = sycl::max(amax_bits, magnitude_bits(x[i]));
    }
  }

  static constexpr int kPart = count < kBlock ? count : kBlock;  // of it, or a block, is loaded at a time

  /// (x - offset) x H. Blocks of H that are larger than `count` go on in the next lanes. `real` parts exist, which whole
  /// blocks of H fill: what stands for the others means nothing.
  inline Values(const uint8_t* from, const TransformArguments& transform, int64_t real = count / kPart) {
#pragma unroll(kUnroll)
    for (int part = 0; part < count / kPart; ++part) {
      const int64_t first = sycl::min(int64_t{part}, real - 1) * kPart;
      load_part(x + part * kPart, from + first * size_of(kDType), transform.offset, first);
    }
#pragma unroll(kUnroll)
    for (int distance = 1; distance < hadamard::kLargestSize; distance *= 2) {
      if (distance >= transform.hadamard) break;
      if (distance < count) {
        add_and_subtract(distance);
      } else {
        add_and_subtract_lanes(distance / count);
      }
    }
    const float factor = transform.hadamard == 0 ? 1.0f : hadamard::factor(transform.hadamard);
#pragma unroll(kUnroll)
    for (int i = 0; i < count; ++i) {
      x[i] *= factor;
      amax_bits = sycl::max(amax_bits, magnitude_bits(x[i]));
    }
  }

 private:
  static inline void load_part(float* to, const uint8_t* from, const float* offset, int64_t first) {
    const Values<kPart> in(from);
#pragma unroll(kUnroll)
    for (int i = 0; i < kPart; ++i) to[i] = in.x[i];
    if (offset == nullptr) return;
#pragma unroll(kUnroll)
    for (int v = 0; v < kPart / 4; ++v) {
      const auto four = __builtin_bit_cast(Floats4, load16(offset + first + 4 * v));
#pragma unroll(kUnroll)
      for (int i = 0; i < 4; ++i) to[4 * v + i] -= four.x[i];
    }
  }

  /// (u, v) -> (u + v, u - v), of elements so far apart.
  inline void add_and_subtract(int distance) {
#pragma unroll(kUnroll)
    for (int i = 0; i < count; ++i) {
      if ((i & distance) != 0) continue;
      const float u = x[i], v = x[i + distance];
      x[i] = u + v;
      x[i + distance] = u - v;
    }
  }

  /// Does a butterfly between lanes: u + 1 v, or u + -1 v, which is rounded once.
  inline void add_and_subtract_lanes(int distance) {
    const float sign = (this_sub_group().get_local_linear_id() & distance) == 0 ? 1.0f : -1.0f;
#pragma unroll(kUnroll)
    for (int i = 0; i < count; ++i) {
      x[i] = sycl::fma(x[i], sign, sycl::permute_group_by_xor(this_sub_group(), x[i], distance));
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

/// Adds up lanes' sums, in the order of fp_quant::tree_sum.
inline float sum_of_lanes(float sum, int lanes) {
#pragma unroll
  for (int distance = 1; distance < kSubGroup; distance *= 2) {
    if (distance >= lanes) break;
    sum += sycl::permute_group_by_xor(this_sub_group(), sum, distance);
  }
  return sum;
}

/// Says how a quad is quantized.
struct QuadQuantizer {
  int mode, group;  // of MXFP4; of MXINT8
};

#ifdef XPU_FP4_SCALE_MODE
constexpr auto kScaleMode = static_cast<ScaleMode>(XPU_FP4_SCALE_MODE);
constexpr float kGlobalScale = fp_quant::global_scale(kScaleMode);
#else
constexpr float kGlobalScale = 1.0f;
#endif

/// The scale byte of an MXFP4 block, of which each of its lanes has `count` elements. The largest magnitude is the block's.
/// `mode`: one of the rules of format/e8m0.h, where the program is not for one of FP-Quant's.
template <int count>
inline uint8_t mxfp4_scale(const Values<count>& in, uint32_t amax_bits, int mode) {
#ifdef XPU_FP4_SCALE_MODE
  if constexpr (kScaleMode == ScaleMode::abs_max) return fp_quant::abs_max_scale(amax_bits);
  constexpr int lanes = kBlock / count;
  const float sum = sum_of_lanes(fp_quant::tree_sum<count>(in.x), lanes);
  return fp_quant::quest_scale(amax_bits, sum, sum_of_lanes(fp_quant::tree_sum<count, fp_quant::Square>(in.x), lanes));
#else
  return e8m0::from_amax(amax_bits, static_cast<ScaleMode>(mode));
#endif
}

/// MXFP4 (format/block.h), of kGlobalScale times the elements.
struct Mxfp4Encoder {
  static constexpr int kBits = 4;
  float reciprocal;

  inline explicit Mxfp4Encoder(uint8_t scale) : reciprocal(e8m0::reciprocal(scale) * kGlobalScale) {}
  inline uint32_t operator()(float x) const { return quantize_element(x, reciprocal); }
};

/// The same, a code in each byte.
struct Mxfp4ByteEncoder : Mxfp4Encoder {
  static constexpr int kBits = 8;
  using Mxfp4Encoder::Mxfp4Encoder;
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
