// SPDX-License-Identifier: Apache-2.0
// x -> codes and scales. The lanes of a block, or of a group, find its largest magnitude together. Memory traffic: the input
// once; out, 17/32 byte per element of MXFP4 and 33/32 of MXINT8.
#include "quantizer.hpp"

using namespace xpu_fp4;

// ---- MXFP4: a lane loads 16 bytes, 8 elements of 2 bytes or 4 of 4 ----

constexpr int kLanesPerBlock = kBlock / kVector;
using LaneValues = Values<kVector>;

// Packs a lane's codes; a NaN scale has all codes 0.
template <class Encode>
inline void store_codes(const LaneValues& in, uint8_t scale, uint8_t* q, const Encode& encode) {
  const float reciprocal = e8m0::reciprocal(scale);
  const bool valid = scale != e8m0::kNan;
#pragma unroll
  for (int i = 0; i < kVector; i += 2) {
    const uint8_t packed = e2m1::pack(encode(in.x[i], reciprocal), encode(in.x[i + 1], reciprocal));
    q[i / 2] = valid ? packed : uint8_t{0};
  }
}

// A lane past the end repeats the last vector, so that whole sub-groups take part in the exchange, and stores nothing.
XPU_FP4_KERNEL(1) quantize(const void* x, uint8_t* q, uint8_t* scales, int64_t vectors, int mode) {
  const int64_t id = syclext::this_work_item::get_nd_item<1>().get_global_linear_id();
  const LaneValues in(static_cast<const uint8_t*>(x) + sycl::min(id, vectors - 1) * 16);
  const uint8_t scale = mxfp4_scale(in, largest_of_lanes(in.amax_bits, kLanesPerBlock), mode);
  if (id >= vectors) return;
  store_codes(in, scale, q + id * (kVector / 2), [](float x, float r) { return quantize_element(x, r * kGlobalScale); });
  if (id % kLanesPerBlock == 0) scales[id / kLanesPerBlock] = scale;
}

XPU_FP4_KERNEL(1)
group_quantize(const void* x, uint8_t* q, float* scales, int64_t vectors, int64_t row_blocks, int64_t scale_row_stride,
               int64_t scale_block_stride, uint8_t scale_floor) {
  const int64_t id = syclext::this_work_item::get_nd_item<1>().get_global_linear_id();
  const LaneValues in(static_cast<const uint8_t*>(x) + sycl::min(id, vectors - 1) * 16);
  const uint32_t amax_bits = largest_of_lanes(in.amax_bits, kLanesPerBlock);
  if (id >= vectors) return;
  const uint8_t scale = group_quant::scale_byte(amax_bits, scale_floor);
  store_codes(in, scale, q + id * (kVector / 2), [](float x, float r) { return group_quant::quantize_element(x, r); });
  const int64_t block = id / kLanesPerBlock, row = block / row_blocks;
  if (id % kLanesPerBlock == 0) {
    scales[row * scale_row_stride + (block - row * row_blocks) * scale_block_stride] = e8m0::value(scale);
  }
}

// ---- MXINT8: a sub-group does 128 elements of a row, a group or four of them ----

constexpr int kLaneElements = kQuadElements / kSubGroup;

XPU_FP4_KERNEL(2) quantize_mxint8(const void* x, uint8_t* q, uint8_t* scales, int64_t k, int group) {
  const auto item = syclext::this_work_item::get_nd_item<2>();
  const int64_t row = item.get_global_id(0), first = static_cast<int64_t>(item.get_global_id(1)) * kLaneElements;
  if (first / kQuadElements >= ceil_div(k, kQuadElements)) return;  // whole sub-groups
  // A lane beyond K takes part in the exchange with a magnitude of 0, and stores nothing.
  const bool real = first < k;
  const Values<kLaneElements> in(static_cast<const uint8_t*>(x) +
                                 (row * k + (real ? first : k - kLaneElements)) * size_of(kDType));
  const uint8_t scale = mxint8::scale_byte(largest_of_lanes(real ? in.amax_bits : 0, group / kLaneElements));
  if (!real) return;
  uint32_t codes[kLaneElements / 4];
  encode(in, Mxint8Encoder(scale), codes);
#pragma unroll
  for (int i = 0; i < kLaneElements / 4; ++i) {
    ((uint32_t*)(q + row * k + first))[i] = scale == e8m0::kNan ? 0 : codes[i];
  }
  if (first % kBlock == 0) scales[(row * k + first) / kBlock] = scale;
}
