// SPDX-License-Identifier: Apache-2.0
// x -> (x - offset) x H, and from there codes and scales, or elements of x's dtype. A lane does a block of 32: the butterflies
// within it stay in its registers, the one or two that pair blocks are exchanges with its neighbours. Memory traffic: the input
// once; out, what quantize.cpp writes, or as much again.
#include "quantizer.hpp"

using namespace xpu_fp4;

typedef uint32_t Dwords4 __attribute__((ext_vector_type(4)));

/// Whole vectors of 16 bytes.
template <int count>
inline void store_vectors(const uint32_t (&dwords)[count], uint8_t* to) {
#pragma unroll
  for (int i = 0; i < count; i += 4) *(Dwords4*)(to + 4 * i) = {dwords[i], dwords[i + 1], dwords[i + 2], dwords[i + 3]};
}

/// Codes, 0 under a NaN scale.
template <class Encoder>
inline void store_codes(const Values<kBlock>& in, uint8_t scale, uint8_t* to) {
  uint32_t codes[Encoder::kBits];
  encode(in, Encoder(scale), codes);
#pragma unroll
  for (int i = 0; i < Encoder::kBits; ++i) codes[i] = scale == e8m0::kNan ? 0 : codes[i];
  store_vectors(codes, to);
}

inline void store_floats(const Values<kBlock>& in, uint8_t* to) {
  uint32_t dwords[kBlock * size_of(kDType) / 4];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) store_converted<kDType>(dwords, i, in.x[i]);
  store_vectors(dwords, to);
}

template <Format to>
inline void transform_to(const TransformQuantizeArguments& args) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t row = item.get_global_id(0), lane_block = item.get_global_id(1), blocks = args.k / kBlock;
  // A lane beyond K repeats the last block, for the exchanges, and stores nothing.
  const bool real = lane_block < blocks;
  const int64_t block = sycl::min(lane_block, blocks - 1), place = row * blocks + block;
  const float* offset = args.transform.offset == nullptr ? nullptr : args.transform.offset + block * kBlock;
  const Values<kBlock> in(static_cast<const uint8_t*>(args.x) + place * kBlock * size_of(kDType),
                          {offset, args.transform.hadamard});
  if constexpr (to == Format::none) {
    if (real) store_floats(in, args.out + place * kBlock * size_of(kDType));
  } else {
    constexpr bool mxfp4 = to == Format::mxfp4;
    const uint8_t scale = mxfp4 ? mxfp4_scale(in, in.amax_bits, args.mode)
                                : mxint8::scale_byte(largest_of_lanes(real ? in.amax_bits : 0, args.group / kBlock));
    if (!real) return;
    store_codes<std::conditional_t<mxfp4, Mxfp4Encoder, Mxint8Encoder>>(in, scale, args.out + place * code_bytes(to, kBlock));
    args.scale[place] = scale;
  }
}

#define XPU_FP4_TRANSFORM_KERNEL(name, format)                                                                      \
  XPU_FP4_KERNEL(2)                                                                                                 \
  name(const void* x, uint8_t* out, uint8_t* scale, int64_t k, int mode, int group, XPU_FP4_TRANSFORM_PARAMETERS) { \
    transform_to<format>({x, out, scale, k, mode, group, XPU_FP4_TRANSFORM_OF_PARAMETERS});                         \
  }
XPU_FP4_TRANSFORM_KERNEL(transform, Format::none)
XPU_FP4_TRANSFORM_KERNEL(transform_quantize, Format::mxfp4)
XPU_FP4_TRANSFORM_KERNEL(transform_quantize_mxint8, Format::mxint8)
