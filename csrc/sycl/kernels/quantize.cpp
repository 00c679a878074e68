// SPDX-License-Identifier: Apache-2.0
// x -> MXFP4 codes and scales. A lane loads 16 bytes: 8 elements of 2 bytes or 4 of 4; the 4 or 8 lanes of a block find its
// largest magnitude by butterfly exchange. Memory traffic: the input once, 17/32 byte per element out.
#include "convert.hpp"

using namespace xpu_fp4;

constexpr int kVector = 16 / size_of(kDType);  // elements of a lane
constexpr int kLanesPerBlock = kBlock / kVector;

struct LaneInput {
  float x[kVector];
  uint32_t amax_bits;  // of the whole block
};

inline LaneInput load_lane(const uint8_t* x, int64_t vector) {
  alignas(16) const Bytes16 bytes = load16(x + vector * 16);
  LaneInput in;
  in.amax_bits = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    in.x[i] = load_converted<kDType>(&bytes, i);
    in.amax_bits = sycl::max(in.amax_bits, magnitude_bits(in.x[i]));
  }
#pragma unroll
  for (int distance = 1; distance < kLanesPerBlock; distance *= 2) {
    in.amax_bits = sycl::max(in.amax_bits, sycl::permute_group_by_xor(this_sub_group(), in.amax_bits, distance));
  }
  return in;
}

// Packs a lane's codes; a NaN scale has all codes 0.
template <class Encode>
inline void store_codes(const LaneInput& in, uint8_t scale, uint8_t* q, const Encode& encode) {
  const float reciprocal = e8m0::reciprocal(scale);
  const bool valid = scale != e8m0::kNan;
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    const uint8_t packed = e2m1::pack(encode(in.x[i], reciprocal), encode(in.x[i + 1], reciprocal));
    q[i / 2] = valid ? packed : uint8_t{0};
  }
}

// A lane past the end repeats the last vector, so that whole sub-groups take part in the exchange, and stores nothing.
XPU_FP4_KERNEL(1) quantize(QuantizeArguments args) {
  const auto& [x, q, scales, vectors, mode] = args;
  const int64_t id = syclext::this_work_item::get_nd_item<1>().get_global_linear_id();
  const LaneInput in = load_lane(x, sycl::min(id, vectors - 1));
  if (id >= vectors) return;
  const uint8_t scale = e8m0::from_amax(in.amax_bits, static_cast<ScaleMode>(mode));
  store_codes(in, scale, q + id * (kVector / 2), [](float x, float r) { return quantize_element(x, r); });
  if (id % kLanesPerBlock == 0) scales[id / kLanesPerBlock] = scale;
}

XPU_FP4_KERNEL(1) group_quantize(GroupQuantizeArguments args) {
  const auto& [x, q, scales, vectors, row_blocks, scale_row_stride, scale_block_stride, scale_floor] = args;
  const int64_t id = syclext::this_work_item::get_nd_item<1>().get_global_linear_id();
  const LaneInput in = load_lane(x, sycl::min(id, vectors - 1));
  if (id >= vectors) return;
  const uint8_t scale = group_quant::scale_byte(in.amax_bits, scale_floor);
  store_codes(in, scale, q + id * (kVector / 2), [](float x, float r) { return group_quant::quantize_element(x, r); });
  const int64_t block = id / kLanesPerBlock, row = block / row_blocks;
  if (id % kLanesPerBlock == 0) {
    scales[row * scale_row_stride + (block - row * row_blocks) * scale_block_stride] = e8m0::value(scale);
  }
}
